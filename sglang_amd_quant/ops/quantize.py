"""Activations quantized ahead of a kernel that does not do it itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_amd_quant import formats
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode

Quantizer = Callable[[torch.Tensor, str, ScaleMode], tuple[torch.Tensor, torch.Tensor]]
"""x[M, K], element (`e2m1`, `e4m3`), scale mode -> codes and e8m0 scales: the bits of `formats.quantize_mx`."""

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


def quantizer_for(x: torch.Tensor) -> Quantizer:
    """What quantizes x on its device: the seam for a device kernel. torch's runs everywhere and in a graph."""
    return formats.quantize_mx


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
    return Quantized(*quantizer_for(x)(x, element, act.mode or DEFAULT_SCALE_MODE[element]))
