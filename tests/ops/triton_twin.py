"""The twin of the Triton GEMM as ops call it: on weights in any layout that the kernel reads."""

from __future__ import annotations

from typing import Any

import torch
from sglang_amd_quant.kernels.triton.mx_gemm import STRIDED, element_of, mx_gemm_torch

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
    values, scales = layout
    k = x.shape[-1] * (2 if element_of(x) == "e2m1" else 1)
    if values != "strided":
        w = value_layout(values).unpack(w, n, k // 2 if element_of(w) == "e2m1" else k)
    if scales != "strided":
        w_scales = scale_layout(scales).unpack(w_scales, n, k // 32)
    return mx_gemm_torch(x, x_scales, w, w_scales, **options)
