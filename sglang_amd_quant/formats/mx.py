"""MX blocks: 32 elements along K under one e8m0 scale (OCP MX v1.0). The reference every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import e2m1, e4m3, e8m0
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode

ELEMENTS = {"e2m1": e2m1, "e4m3": e4m3}


def _element(name: str):  # type: ignore[no-untyped-def]
    if name not in ELEMENTS:
        raise SchemeError(f"element {name!r}", "not an MX element here", f"use one of {', '.join(ELEMENTS)}")
    return ELEMENTS[name]


def quantize_mx(x: Tensor, element: str, mode: ScaleMode | None = None) -> tuple[Tensor, Tensor]:
    """Quantize along the last dimension in blocks of 32.

    Args:
        x: [..., K], any float dtype, any strides.
        element: `e2m1` or `e4m3`.
        mode: how scales are rounded; None = the element's default (`schemes.DEFAULT_SCALE_MODE`).

    Returns:
        data: e2m1: uint8 [..., K/2], low nibble = even index; e4m3: float8_e4m3fn [..., K].
        scales: uint8 e8m0 [..., K/32]; 255 (NaN) where the block holds a NaN.

    Raises:
        ShapeError: K is not a multiple of 32.
        SchemeError: unknown element or mode.
    """
    el = _element(element)
    mode = DEFAULT_SCALE_MODE[element] if mode is None else ScaleMode(mode)
    if x.dim() == 0 or x.shape[-1] % MX_BLOCK:
        raise ShapeError(
            f"tensor {list(x.shape)}", f"K is not a multiple of {MX_BLOCK}", "pad K or keep the layer in bf16"
        )
    *lead, k = x.shape
    blocks = x.to(torch.float32).reshape(*lead, k // MX_BLOCK, MX_BLOCK)
    amax = blocks.abs().amax(dim=-1)
    scales = e8m0.block_exponents(amax, mode, el.EMAX, el.MANTISSA_BITS, el.MAX_MANTISSA)
    y = blocks * e8m0.decode(254 - scales.clamp(max=254)).unsqueeze(-1)
    y = y.masked_fill((scales == e8m0.NAN).unsqueeze(-1), torch.nan if element == "e4m3" else 0.0)
    return el.encode(y.reshape(*lead, k)), scales.to(torch.uint8)


def dequantize_mx(data: Tensor, scales: Tensor, element: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize_mx`: data and scales as it returns them -> [..., K] in `dtype`."""
    el = _element(element)
    values = el.decode(data)
    *lead, k = values.shape
    if list(scales.shape) != [*lead, k // MX_BLOCK]:
        raise ShapeError(
            f"data {list(data.shape)} with scales {list(scales.shape)}",
            f"scales must be {[*lead, k // MX_BLOCK]}",
            "check that both come from the same tensor",
        )
    blocks = values.reshape(*lead, k // MX_BLOCK, MX_BLOCK) * e8m0.decode(scales).unsqueeze(-1)
    return blocks.reshape(*lead, k).to(dtype)


def fake_quantize_mx(x: Tensor, element: str, mode: ScaleMode | None = None) -> Tensor:
    """What `x` becomes after a round trip through MX: same shape and dtype."""
    return dequantize_mx(*quantize_mx(x, element, mode), element, x.dtype)
