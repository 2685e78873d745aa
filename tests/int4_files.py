"""int4 layers as GPTQ, AWQ and compressed-tensors store them, packed by functions of SGLang and compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "moe.gate.", "router")
"""Parts of names of matrices that no quantizer of these formats touches."""


@dataclass(frozen=True)
class Int4:
    """One layer: codes [N, K] and zero points [N, K/group], 0..15, and fp16 scales [N, K/group]."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, group: int, symmetric: bool) -> Int4:
        """Quantize [N, K] to nearest, by this file's own formula."""
        groups = weight.float().unflatten(-1, (-1, group))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (groups.abs().amax(-1) / 7.5 if symmetric else (high - low) / 15).half()
        zeros = torch.full_like(scales, 8) if symmetric else (-low / scales).round().clamp(0, 15)
        codes = (groups / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
        return cls(codes.flatten(-2).to(torch.uint8), zeros.to(torch.uint8), scales)

    @property
    def values(self) -> torch.Tensor:
        """What the layer stands for, fp32: the product of a small integer and an fp16 number is exact."""
        group = self.codes.shape[-1] // self.scales.shape[-1]
        z, s = (t.float().repeat_interleave(group, -1) for t in (self.zeros, self.scales))
        return (self.codes.float() - z) * s


def gptq(layer: Int4, version: int = 1) -> dict[str, torch.Tensor]:
    """qweight along K, qzeros along N, both in sequence; version 1 stores zero points minus one."""
    from sglang.srt.layers.quantization.utils import pack_cols, pack_rows

    codes, zeros = layer.codes.T, layer.zeros.T
    stored = zeros if version == 2 else (zeros.int() - 1) & 15
    group = codes.shape[0] // zeros.shape[0]
    return {
        "qweight": pack_rows(codes, 4, *codes.shape),
        "qzeros": pack_cols(stored, 4, *stored.shape),
        "scales": layer.scales.T,
        "g_idx": torch.arange(codes.shape[0], dtype=torch.int32) // group,
    }


def awq(layer: Int4) -> dict[str, torch.Tensor]:
    """qweight and qzeros along N, in AutoAWQ's order."""
    from sglang.srt.layers.quantization.utils import pack_cols

    def packed(matrix: torch.Tensor) -> torch.Tensor:
        ordered = matrix.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)
        return pack_cols(ordered, 4, *ordered.shape)

    return {"qweight": packed(layer.codes.T), "qzeros": packed(layer.zeros.T), "scales": layer.scales.T}


def pack_quantized(layer: Int4, symmetric: bool) -> dict[str, torch.Tensor]:
    """weight_packed along K, weight_zero_point along N, both signed plus 8."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, zeros = ((t.int() - 8).to(torch.int8) for t in (layer.codes, layer.zeros))
    stored = {"weight_packed": pack_to_int32(codes, 4), "weight_scale": layer.scales}
    stored["weight_shape"] = torch.tensor(codes.shape)
    return stored if symmetric else stored | {"weight_zero_point": pack_to_int32(zeros, 4, packed_dim=0)}


def config(method: str, group: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    """The quantization_config that the format's tools write."""
    base: dict[str, Any] = {"quant_method": method.removesuffix("_v2")}
    if method.startswith("gptq"):
        own = {"bits": 4, "group_size": group, "sym": symmetric, "desc_act": False, "checkpoint_format": method}
    elif method == "awq":
        own = {"bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    else:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        own = {"config_groups": groups, "ignore": ["lm_head"], "format": "pack-quantized"}
    return base | own | more


def stored(method: str, layer: Int4, symmetric: bool) -> dict[str, torch.Tensor]:
    """A layer's tensors, by the ends of their names."""
    writers: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "gptq": lambda: gptq(layer, 1),
        "gptq_v2": lambda: gptq(layer, 2),
        "awq": lambda: awq(layer),
        "compressed-tensors": lambda: pack_quantized(layer, symmetric),
    }
    return {name: tensor.contiguous() for name, tensor in writers[method]().items()}


def quantizable(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Modules that quantizers of these formats quantize."""
    matrices = [n for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]
    return [n.removesuffix(".weight") for n in matrices if not any(kept in n for kept in KEPT)]


def rewrite(
    source: Path,
    target: Path,
    method: str,
    group: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    **more: Any,
) -> dict[str, Int4]:
    """Write a bf16 checkpoint in an int4 format, all else in `dtype`. Returns its layers by module."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    layers = {}
    for module in quantizable(tensors):
        layers[module] = Int4.of(tensors.pop(f"{module}.weight"), group, symmetric)
    plain = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    made = {f"{m}.{end}": t for m, layer in layers.items() for end, t in stored(method, layer, symmetric).items()}
    save_file(plain | made, target / "model.safetensors", {"format": "pt"})
    written = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    written["quantization_config"] = config(method, group, symmetric, **more)
    (target / "config.json").write_text(json.dumps(written))
    return layers
