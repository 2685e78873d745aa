"""Activations quantized ahead of a kernel that does not do it itself."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from sglang_amd_quant import formats
from sglang_amd_quant.ops.devices import has_triton
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.detect import current_arch
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode
from sglang_amd_quant.selection.arch import ARCHES, canonical

UNIT_SCALE = 127
"""e8m0 of 1."""


class Quantized(NamedTuple):
    """What a GEMM's kernel reads of its input.

    Attributes:
        data: e2m1 uint8 [M, K/2], e4m3 [M, K], or x itself; contiguous.
        scales: uint8 e8m0 [M, K/32]; None where x is not quantized.
        factor: fp32 scalar that the product is still to be multiplied by (static fp8); None = 1.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None
    factor: torch.Tensor | None = None


def quantize(x: torch.Tensor, element: str, mode: ScaleMode) -> tuple[torch.Tensor, torch.Tensor]:
    """x[M, K] to codes and e8m0 scales, the bits of `formats.quantize_mx`: by one kernel where there is one."""
    if has_triton(x) and x.dtype in (torch.bfloat16, torch.float16):
        from sglang_amd_quant.kernels.triton.quant_mx import quant_mx

        data, scales = quant_mx(x.contiguous(), element, mode=mode.value, native=_native_fp8(x.get_device()))
        assert scales is not None
        return data, scales
    return formats.quantize_mx(x, element, mode)


@cache
def _native_fp8(device: int) -> bool:
    """Whether the device converts fp32 to OCP e4m3."""
    facts = ARCHES.get(canonical(current_arch()))
    return facts is not None and facts.fp8 == "ocp"


def quantize_activation(x: torch.Tensor, act: ActQuant) -> Quantized:
    """x[M, K] as its scheme wants it. No host read: may be captured in a graph.

    Static fp8 codes come with unit scales and their factor apart, so that kernels for MX operands take them.

    Raises:
        ShapeError: K is not a multiple of 32 where blocks are quantized.
    """
    if act.scale is not None:
        codes = formats.quantize_fp8_static(x, act.scale)
        unit = torch.full((*x.shape[:-1], x.shape[-1] // MX_BLOCK), UNIT_SCALE, dtype=torch.uint8, device=x.device)
        return Quantized(codes, unit, act.scale.float())
    element = act.scheme.act
    if element == "bf16":
        return Quantized(x.contiguous())
    return Quantized(*quantize(x, element, act.mode or DEFAULT_SCALE_MODE[element]))


def bf16_values(x: torch.Tensor, act: ActQuant) -> torch.Tensor:
    """x[M, K] in bf16, where its scheme quantizes it the values of the MX codes, which bf16 has exactly but at the ends
    of its range. No host read: may be captured in a graph."""
    element = act.scheme.act
    if element == "bf16":
        return x.contiguous()
    mode = act.mode or DEFAULT_SCALE_MODE[element]
    if has_triton(x) and x.dtype in (torch.bfloat16, torch.float16):
        from sglang_amd_quant.kernels.triton.quant_mx import quant_mx

        return quant_mx(x.contiguous(), element, "bf16", mode.value, native=_native_fp8(x.get_device()))[0]
    return formats.dequantize_mx(*formats.quantize_mx(x, element, mode), element, torch.bfloat16)
