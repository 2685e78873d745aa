"""Twins of the Triton GEMMs as ops call them: on weights in any layout that the kernels read."""

from __future__ import annotations

from typing import Any

import torch
from sglang_amd_quant.kernels.triton.group_gemm import group_gemm_torch
from sglang_amd_quant.kernels.triton.hopper_pack import row_order
from sglang_amd_quant.kernels.triton.mx_gemm import element_of, mx_gemm_torch
from sglang_amd_quant.kernels.triton.tiles import STRIDED

from sglang_amd_quant.layouts.registry import scale_layout, value_layout


def mx_gemm_twin(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    n: int,
    layout: tuple[str, str] = STRIDED,
    **options: Any,
) -> torch.Tensor:
    """`mx_gemm_torch` after `w` and `w_scales` are brought back to [N, K] from `layout`."""
    k = x.shape[-1] * (2 if element_of(x) == "e2m1" else 1)
    return mx_gemm_torch(x, x_scales, *strided(w, w_scales, n, k, layout), **options)


def group_gemm_twin(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    n: int,
    group: int,
    layout: tuple[str, str] = STRIDED,
    pairs: str | None = None,
    **options: Any,
) -> torch.Tensor:
    """`group_gemm_torch` after `w` and `w_scales` are brought back to [N, K] from `layout`."""
    return group_gemm_torch(x, *strided(w, w_scales, n, x.shape[-1], layout, pairs, group), **options)


def strided(
    w: torch.Tensor,
    w_scales: torch.Tensor,
    n: int,
    k: int,
    layout: tuple[str, str],
    pairs: str | None = None,
    block: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scales [..., N, K] from `layout`, whose rows alternate 8 gates and 8 ups if `pairs` says so."""
    values, scales = layout
    if values != "strided":
        packed = w.dtype == torch.int32 or element_of(w) == "e2m1"
        w = value_layout(values).unpack(w, n, k // 2 if packed else k)
    if scales != "strided":
        w_scales = scale_layout(scales).unpack(w_scales, n, k // block)
    if pairs is None:
        return w, w_scales
    back = row_order(n, pairs).argsort()
    return w.view(torch.uint8).index_select(-2, back).view(w.dtype), w_scales.index_select(-2, back)
