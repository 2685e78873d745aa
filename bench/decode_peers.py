"""What a user would run a small-M quantized GEMM on instead, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Run = Callable[[torch.Tensor], torch.Tensor]


def cublas(data: torch.Tensor, scales: torch.Tensor, element: str, dense: torch.Tensor) -> Run:
    """The weights in bf16, by torch."""
    return lambda x: torch.nn.functional.linear(x, dense)


def _humming(
    input_config: dict[str, str] | None, data: torch.Tensor, scales: torch.Tensor, element: str, _: object
) -> Run:
    from humming.layer import HummingLayer

    fmt = {"quant_method": "mxfp4"} if element == "e2m1" else {
        "dtype": "float8e4m3", "scale_dtype": "float8e8m0", "group_size": 32,
    }  # fmt: skip
    layer = HummingLayer(
        shape_n=scales.shape[0], shape_k=scales.shape[1] * 32, weight_config=fmt, input_config=input_config,
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    if element == "e4m3":  # its own schema packs codes into words, and means scales by their dtype
        data, scales = data.view(torch.int32), scales.view(torch.float8_e8m0fnu)
    layer.load_from_tensors({"weight": data, "weight_scale": scales})
    layer.transform()
    return layer


def _gemlite(name: str, data: torch.Tensor, scales: torch.Tensor, element: str, dense: torch.Tensor) -> Run:
    from gemlite import helper

    linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=torch.bfloat16, device="meta")
    linear.weight = torch.nn.Parameter(dense, requires_grad=False)
    return getattr(helper, name)(device="cuda:0", dtype=torch.bfloat16).from_linear(linear, del_orig=False)


def _stock_triton(x_format: str, data: torch.Tensor, scales: torch.Tensor, element: str, _: object) -> Run:
    """`tl.dot` on dequantized tiles of 64 x 128 x 128 with 8 warps: the untuned baseline of aiter #3783."""
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig, mx_gemm

    from sglang_amd_quant import formats

    config = MxGemmConfig(64, 128, 128, num_warps=8, num_stages=2)
    weight = data.view(torch.float8_e4m3fn) if element == "e4m3" else data

    def run(x: torch.Tensor) -> torch.Tensor:
        codes, x_scales = (x, None) if x_format == "bf16" else formats.quantize_mx(x, x_format)
        y = torch.empty(x.shape[0], scales.shape[0], dtype=torch.bfloat16, device="cuda")
        return mx_gemm(codes, x_scales, weight, scales, y, config, "sm_90")

    return run


PEERS: dict[str, Callable[..., Run]] = {
    "cublas_bf16": cublas,
    "humming_bf16": partial(_humming, None),
    "humming_fp8": partial(_humming, {"dtype": "float8e4m3"}),
    "gemlite_a16w4": partial(_gemlite, "A16W4_MXFP"),
    "gemlite_a8w4": partial(_gemlite, "A8W4_MXFP_dynamic"),
    "gemlite_a8w8": partial(_gemlite, "A8W8_MXFP_dynamic"),
    "stock_triton": partial(_stock_triton, "bf16"),
}
"""name -> makes (data, scales, element, dense bf16) into a callable of x[M, K]."""

FOR = {
    "e2m1": ("cublas_bf16", "humming_bf16", "humming_fp8", "gemlite_a16w4", "gemlite_a8w4", "stock_triton"),
    "e4m3": ("cublas_bf16", "humming_bf16", "humming_fp8", "gemlite_a8w8"),
}
"""Peers that have a kernel for a weight format."""
