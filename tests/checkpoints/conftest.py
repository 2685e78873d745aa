"""Tiny checkpoints, written by transformers itself; and what torchvision's CUDA build lacks beside a CPU torch."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_amd_quant.checkpoints import reader_for
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.checkpoints.naming import Part, Role
from sglang_amd_quant.checkpoints.native import NativeReader
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, split_words
from sglang_amd_quant.recipe import Recipe

HELPERS = str(Path(__file__).parent)
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)

if not hasattr(torch.ops.torchvision, "nms"):  # transformers imports torchvision, which declares fakes for these
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _op in ("nms", "qnms"):
        _schemas.define(f"{_op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SIZES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "gemma3_text": BASE | {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 2},
    "qwen3_moe": BASE | MOE,
    "mixtral": BASE | {"num_local_experts": 4},
    "gpt_oss": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "llama4_text": BASE | MOE | {"intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
}


def tiny_model(model_type: str) -> Any:
    """A random bf16 model of an architecture, some 100 kB."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES[model_type]))
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():  # some initializers leave zeros, which would hide mix-ups
            parameter.normal_(std=0.05)
    return model.to(torch.bfloat16).eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_type -> folder that `save_pretrained` wrote."""
    folders: dict[str, Path] = {}

    def save(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp(model_type) / "bf16"
            tiny_model(model_type).save_pretrained(folders[model_type])
        return folders[model_type]

    return save


def canonical(folder: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint's tensors in canonical form."""
    opened = Folder.open(folder)
    reader = opened.reader()
    assert reader is not None
    return dict(reader.canonical(opened.stream()))


def dequantized(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical tensors -> module name -> fp32 weight, of the quantized modules."""
    native = NativeReader(Recipe())

    def modules() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            part = native.part(name)
            if part is None or part.role is not Role.DATA or tensor.element_size() != 1:
                continue
            scales = tensors[Part(part.module, Role.SCALE).name]
            if scales.dtype == torch.int32:
                yield part.module, dequantize_int4(tensor, *split_words(scales))
                continue
            element = "e2m1" if tensor.dtype == torch.uint8 else "e4m3"
            yield part.module, dequantize_mx(tensor, scales, element)

    return dict(modules())


@pytest.fixture(scope="session")
def quark() -> Any:
    """amd-quark. Its import looks through every model of transformers for experts, which takes 10 s: show it one."""
    found = Path.rglob
    with pytest.MonkeyPatch.context() as patch:

        def few(self: Path, pattern: str) -> Iterator[Path]:
            models = ["qwen3_moe/modeling_qwen3_moe.py"]
            return (self / m for m in models) if pattern == "modeling_*.py" else found(self, pattern)

        patch.setattr(Path, "rglob", few)
        import quark.torch
    return quark


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helpers of this file, for test modules (which cannot import a conftest)."""
    import types

    return types.SimpleNamespace(
        canonical=canonical, dequantized=dequantized, reader_for=reader_for, tiny_model=tiny_model
    )
