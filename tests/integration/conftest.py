"""One SGLang context per test process; layers of any TP or EP rank are then built by overriding the parallel state."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # triton_twin

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="session")
def sglang_context(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SGLang with its plugins loaded and server arguments set, as in a scheduler process."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=str(folder), quantization="amd_mx", skip_tokenizer_init=True)
    args.resolve_once()
    runtime_context._CONTEXT.set_server_args(args)
    return runtime_context


@pytest.fixture
def load_model(sglang_context: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`load_model(folder, quantization)` loads a checkpoint as a scheduler process of one rank would."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_loader import get_model
    from sglang.srt.server_args import ServerArgs

    before = sglang_context.get_server_args()
    parallel = sglang_context.get_parallel()
    ranks = ("tp", "pp", "moe_ep", "moe_tp", "moe_dp", "attn_tp", "attn_dp", "attn_cp")
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    parallel.override_permanently(**{f"{name}_rank": 0 for name in ranks})
    parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")

    def load(folder: Any, quantization: str | None = None) -> torch.nn.Module:
        args = ServerArgs(model_path=str(folder), quantization=quantization, skip_tokenizer_init=True)
        args.resolve_once()
        sglang_context._CONTEXT.set_server_args(args)
        config = ModelConfig.from_server_args(args)
        return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))

    yield load
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    parallel.clear_stamp()
    sglang_context._CONTEXT.set_server_args(before)


@pytest.fixture
def rank(sglang_context: Any) -> Callable[..., Any]:
    """`with rank(tp=(1, 2), ep=(0, 2)):` builds layers as that rank would; (rank, size) pairs. tp is what ep leaves."""

    @contextmanager
    def as_rank(tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1)) -> Iterator[None]:
        values = {"tp": tp, "attn_tp": tp, "moe_ep": ep}
        total = tp[1] * ep[1]
        overrides: dict[str, int] = {}
        for name, (index, size) in values.items():
            overrides |= {f"{name}_rank": index, f"{name}_size": size}
        overrides |= {"tp_size": total, "attn_tp_size": total, "tp_rank": tp[0] + ep[0] * tp[1]}
        overrides |= {"attn_tp_rank": overrides["tp_rank"], "moe_tp_rank": tp[0], "moe_tp_size": tp[1]}
        overrides |= {"pp_rank": 0, "pp_size": 1, "moe_dp_size": 1, "moe_dp_rank": 0}
        with sglang_context.get_parallel().override(**overrides):
            yield

    return as_rank


@pytest.fixture
def make_config(sglang_context: Any) -> Callable[..., Any]:
    """A config of ours for a recipe, scheme name or quantization_config."""

    def make(
        recipe: Any = None, quantization_config: dict[str, Any] | None = None, model_type: str = "qwen3_moe"
    ) -> Any:
        from sglang_amd_quant.integration.config import AmdMxConfig
        from sglang_amd_quant.recipe import Recipe

        hf_config = type("HfConfig", (), {"model_type": model_type})()
        if quantization_config is not None:
            return AmdMxConfig.from_config({**quantization_config, "hf_config": hf_config})
        made = Recipe.uniform(recipe) if isinstance(recipe, str) else recipe
        return AmdMxConfig(made, None, hf_config, check_patterns=not isinstance(recipe, str))

    return make


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Layers are built as for an MI355X; Triton kernels run as their torch twins, and HIP kernels are only loaded.

    Attributes:
        calls: archs that a twin was called for.
        loaded: entry points that were asked for ahead.
    """
    pytest.importorskip("triton")
    from sglang_amd_quant.kernels.triton import group_gemm, mx_gemm
    from triton_twin import group_gemm_twin, mx_gemm_twin

    from sglang_amd_quant.integration import linear as linear_method
    from sglang_amd_quant.integration import moe as moe_method
    from sglang_amd_quant.ops import hip, layout, linear, moe, operand

    class Gpu:
        arch_name = "gfx950"

        def __init__(self) -> None:
            self.calls: list[str] = []
            self.loaded: set[str] = set()

        def load(self, *names: str) -> None:
            self.loaded.update(names)

    gpu = Gpu()

    def twin(x, x_scales, w, w_scales, y, config, arch, **options):  # type: ignore[no-untyped-def]
        gpu.calls.append(arch)
        return y.copy_(mx_gemm_twin(x, x_scales, w, w_scales, y.shape[1], **options))

    def group_twin(x, w, scales, y, config, arch, **options):  # type: ignore[no-untyped-def]
        gpu.calls.append(arch)
        return y.copy_(group_gemm_twin(x, w, scales, y.shape[1], **options))

    for module in (linear_method, moe_method, layout, operand):
        monkeypatch.setattr(module, "current_arch", lambda: "gfx950")
    for module in (layout, linear, moe):
        gemms = {f"triton_{w}_{op}" for w in ("mx", "int4", "e2m1_fp16") for op in ("gemm", "moe")}
        kernels = frozenset({"gemv_mxfp4", *gemms})
        monkeypatch.setattr(module, "launchable", lambda arch, kernels=kernels: kernels)
    for module in (linear_method, moe_method):
        monkeypatch.setattr(module, "cu_count", lambda: 256)
    monkeypatch.setattr(mx_gemm, "mx_gemm", twin)
    monkeypatch.setattr(group_gemm, "group_gemm", group_twin)
    monkeypatch.setattr(hip, "device_of", lambda x: gpu)
    linear.bound.cache_clear()
    moe.bound.cache_clear()
    yield gpu
    linear.bound.cache_clear()
    moe.bound.cache_clear()
