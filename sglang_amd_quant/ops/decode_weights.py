"""Weights as the decode kernels of a target (`kernels/hip/decode_gemm.hip`) want them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_amd_quant.runtime.decode_gemm_amd import layout_name
from sglang_amd_quant.tensor import MxTensor


def decode_weights(weights: MxTensor, arch: str) -> MxTensor:
    """Weights in the layout of an AMD target's decode kernels, with values that its matrix unit can take.

    gfx942 reads e4m3 as FNUZ, so codes and scales are converted (`MxTensor.to_fnuz`). gfx11 multiplies e4m3 as halves
    and knows no NaN code: the whole MX block of a NaN becomes NaN, by its scale.

    Args:
        weights: strided [N, K] or [E, N, K]; int4 with words.
        arch: `gfx950`, `gfx942`, `gfx1100` or `gfx1151`, or `gfx11` for what these have in common.

    Raises:
        ShapeError, SchemeError: the layout cannot hold them.
    """
    scheme = {"e4m3": "mxfp8", "e2m1": "w4a16", "int4": f"int4_w4a16_g{weights.scheme.block}"}[weights.scheme.weight]
    if weights.scheme.weight == "e4m3" and arch == "gfx942" and weights.data.dtype == torch.float8_e4m3fn:
        weights = weights.to_fnuz()
    elif weights.scheme.weight == "e4m3" and arch.startswith("gfx11"):
        weights = nan_by_scale(weights)
    return weights.to_layout(layout_name(arch, scheme))


def nan_by_scale(weights: MxTensor) -> MxTensor:
    """Strided e4m3 weights in which the whole MX block of a NaN code is NaN, for kernels that look at scales only."""
    nan = weights.data.view(torch.uint8) & 0x7F == 0x7F
    blocks = nan.unflatten(-1, (-1, weights.scheme.block)).any(-1)
    return replace(weights, scales=weights.scales.masked_fill(blocks, 255))
