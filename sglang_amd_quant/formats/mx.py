"""MX blocks: 32 elements along K share an e8m0 scale (OCP MX v1.0). The reference every kernel is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import e2m1, e4m3, e8m0
from sglang_amd_quant.formats.pieces import pieces
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode

_MANTISSA = (1 << 23) - 1


@dataclass(frozen=True)
class Element:
    """What a block is made of.

    Attributes:
        name: as schemes call it.
        max: the largest value.
        mantissa_bits: without the implicit one.
        dtype: of stored data.
        pack: elements per stored item along K.
        encode: fp32 [..., K], any strides (may be overwritten) -> data [..., K / pack].
        decode: data [..., K / pack] -> fp32 [..., K], exact.
    """

    name: str
    max: float
    mantissa_bits: int
    dtype: torch.dtype
    pack: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    @property
    def emax(self) -> int:
        """floor(log2(max)): 2 for e2m1, 8 for e4m3."""
        return math.frexp(self.max)[1] - 1

    def carry(self, mode: ScaleMode) -> int:
        """What to add to the fp32 bits of a block's amax for its exponent field to step up just where `mode` wants it.

        FLOOR never steps. CEIL steps from any nonzero mantissa on. RCEIL steps beyond the mantissa of `max`, which is
        ceil(log2(amax / max)) without the rounding of a division or a logarithm. EVEN steps where amax rounds up to the
        next power of two at the element's own mantissa width.
        """
        max_mantissa = round((math.frexp(self.max)[0] * 2 - 1) * (1 << 23))
        return {
            ScaleMode.FLOOR: 0,
            ScaleMode.CEIL: _MANTISSA,
            ScaleMode.RCEIL: _MANTISSA - max_mantissa,
            ScaleMode.EVEN: 1 << (22 - self.mantissa_bits),
        }[mode]


ELEMENTS = {
    e.name: e
    for e in (
        Element("e2m1", e2m1.MAX, e2m1.MANTISSA_BITS, torch.uint8, 2, e2m1.encode, e2m1.decode),
        Element("e4m3", e4m3.MAX, e4m3.MANTISSA_BITS, torch.float8_e4m3fn, 1, e4m3.encode, e4m3.decode),
    )
}


def quantize_mx(x: Tensor, element: str, mode: ScaleMode | str | None = None) -> tuple[Tensor, Tensor]:
    """Quantize along the last dimension in blocks of 32, elements to nearest, ties to even, saturating.

    A block with a NaN gets the scale 255; its e4m3 elements are NaN, its e2m1 elements +-6. Inf counts as 2^128: it
    saturates, and is Inf again once multiplied by the scale in fp32. A block of zeros, or of numbers too small for any
    scale, gets the scale 0 (2^-127). docs/formats.md compares this with other libraries.

    Args:
        x: [..., K], any float dtype (fp64 is rounded to fp32 first), any strides.
        element: `e2m1` or `e4m3`.
        mode: how scales are rounded. None: `schemes.DEFAULT_SCALE_MODE[element]`.

    Returns:
        data: e2m1: uint8 [..., K/2], low nibble = even index. e4m3: float8_e4m3fn [..., K].
        scales: uint8 e8m0 [..., K/32].

    Raises:
        ShapeError: K is not a multiple of 32.
        SchemeError: unknown element or mode, or x is no float tensor.
    """
    el = _element(element)
    carry = el.carry(_mode(mode, el))
    if x.dim() == 0 or x.shape[-1] % MX_BLOCK:
        raise ShapeError(
            f"tensor {list(x.shape)}", f"K is not a multiple of {MX_BLOCK}", "pad K with zeros or leave it unquantized"
        )
    if not x.is_floating_point():
        raise SchemeError(f"tensor of {x.dtype}", "only floats can be quantized", "dequantize or cast it first")
    lead, n = x.shape[:-1], x.shape[-1] // MX_BLOCK
    data = torch.empty(*lead, n, MX_BLOCK // el.pack, dtype=el.dtype, device=x.device)
    scales = torch.empty(*lead, n, 1, dtype=torch.uint8, device=x.device)
    for source, d, s in pieces(x.detach().unflatten(-1, (n, MX_BLOCK)), data, scales):
        blocks = source.to(torch.float32)
        amax = blocks.abs().amax(-1, keepdim=True)
        b = (amax.view(torch.int32) + carry >> 23).sub_(el.emax).clamp_(min=0).masked_fill_(amax.isnan(), e8m0.NAN)
        d.copy_(el.encode(blocks * e8m0.reciprocal(b)))
        s.copy_(b)
    return data.flatten(-2), scales.flatten(-2)


def dequantize_mx(data: Tensor, scales: Tensor, element: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of MX blocks, element times scale: exact in fp32 and fp64 but for overflow, else rounded once.

    Args:
        data: as `quantize_mx` returns it, any strides.
        scales: uint8 e8m0 [..., K/32].
        element: `e2m1` or `e4m3`.
        dtype: float dtype of the result.

    Returns:
        [..., K]; NaN throughout blocks whose scale is 255.

    Raises:
        ShapeError: data and scales are not of one tensor.
        SchemeError: unknown element, or dtypes other than the element's and uint8.
    """
    el = _element(element)
    if data.dtype != el.dtype or scales.dtype != torch.uint8:
        raise SchemeError(
            f"{element} data of {data.dtype} with scales of {scales.dtype}",
            f"they must be {el.dtype} and torch.uint8",
            "view the bytes as those",
        )
    n = scales.shape[-1] if scales.dim() else 0
    if data.shape[:-1] != scales.shape[:-1] or not data.dim() or data.shape[-1] * el.pack != n * MX_BLOCK:
        raise ShapeError(
            f"{element} data {list(data.shape)} with scales {list(scales.shape)}",
            f"there must be one scale per {MX_BLOCK} elements",
            "take both from the same tensor",
        )
    out = torch.empty(*scales.shape, MX_BLOCK, dtype=dtype, device=data.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for d, s, target in pieces(data.unflatten(-1, (n, MX_BLOCK // el.pack)), scales.unsqueeze(-1), out):
        target.copy_(el.decode(d) * e8m0.decode(s, wide))
    return out.flatten(-2)


def fake_quantize_mx(x: Tensor, element: str, mode: ScaleMode | str | None = None) -> Tensor:
    """What is left of `x` [..., K] after a round trip through MX: same shape and dtype. Raises as `quantize_mx`."""
    return dequantize_mx(*quantize_mx(x, element, mode), element, x.dtype)


def _element(name: str) -> Element:
    if name not in ELEMENTS:
        raise SchemeError(f"element {name!r}", "not an MX element", f"use one of {', '.join(ELEMENTS)}")
    return ELEMENTS[name]


def _mode(mode: ScaleMode | str | None, element: Element) -> ScaleMode:
    try:
        return DEFAULT_SCALE_MODE[element.name] if mode is None else ScaleMode(mode)
    except ValueError:
        raise SchemeError(f"scale mode {mode!r}", "unknown", f"use one of {', '.join(ScaleMode)}") from None
