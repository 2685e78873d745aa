"""Activations quantized ahead of a kernel that does not do it itself."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_amd_quant import formats
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.devices import has_triton
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.detect import current_arch
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode
from sglang_amd_quant.selection.arch import canonical

if TYPE_CHECKING:
    from sglang_amd_quant.kernels.triton.quant_mx import Front

UNIT_SCALE = 127
"""e8m0 of 1."""


class Quantized(NamedTuple):
    """What a GEMM's kernel reads of its input.

    Attributes:
        data: e2m1 uint8 [M, K/2], e4m3 [M, K], x itself, or its values in bf16; contiguous.
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

        data, scales = quant_mx(x.contiguous(), element, mode=mode.value, arch=_arch(x.get_device()))
        assert scales is not None
        return data, scales
    return formats.quantize_mx(x, element, mode)


@cache
def _arch(device: int) -> str:
    """Which conversions the device has, for `quant_mx`."""
    return canonical(current_arch())


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


def bf16_values(x: torch.Tensor, act: ActQuant) -> Quantized:
    """x[M, K] as it is, or in bf16 what its codes stand for, which bf16 has exactly but at the ends of its range. No
    host read: may be captured in a graph."""
    if act.scale is not None:
        return Quantized(formats.quantize_fp8_static(x, act.scale).to(torch.bfloat16), factor=act.scale.float())
    if act.scheme.act == "bf16":
        return Quantized(x.contiguous())
    return Quantized(_rounded(x.contiguous(), act, x.dtype))


def activated_values(x: torch.Tensor, f: Activation, act: ActQuant, dtype: torch.dtype) -> Quantized:
    """fp32 sums x[M, columns of gate and up] through an activation, rounded to a model's dtype, as `bf16_values`."""
    if act.scale is None and act.scheme.act != "bf16" and f.fused:
        return Quantized(_rounded(x, act, dtype, f))
    return bf16_values(activated(x, f, dtype), act)


def activated(x: torch.Tensor, f: Activation, dtype: torch.dtype) -> torch.Tensor:
    """fp32 sums through an activation, in a model's dtype."""
    if has_triton(x) and f.fused and dtype == torch.bfloat16:
        from sglang_amd_quant.kernels.triton.quant_mx import quant_mx

        return quant_mx(x, None, "bf16", front=front(f), dtype=dtype)[0]
    return f(x).to(dtype)


def _rounded(x: torch.Tensor, act: ActQuant, dtype: torch.dtype, f: Activation | None = None) -> torch.Tensor:
    """What the MX codes stand for of x, or of an activation's result in a model's dtype."""
    element = act.scheme.act
    mode = act.mode or DEFAULT_SCALE_MODE[element]
    if has_triton(x) and dtype in (torch.bfloat16, torch.float16):
        from sglang_amd_quant.kernels.triton.quant_mx import NO_FRONT, quant_mx

        before, arch = NO_FRONT if f is None else front(f), _arch(x.get_device())
        return quant_mx(x, element, "bf16", mode.value, before, arch, dtype)[0]
    model = x if f is None else f(x).to(dtype)
    return formats.dequantize_mx(*formats.quantize_mx(model, element, mode), element, torch.bfloat16)


def front(f: Activation) -> Front:
    """A fused activation as kernels take it."""
    from sglang_amd_quant.kernels.triton.quant_mx import Front

    return Front(f.kind, f.interleaved, f.limit, f.alpha, f.beta)
