"""What a user would run a small-M quantized GEMM on instead, behind one interface, and how it is timed."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.decode_ours import IN_A_GRAPH
from bench.decode_problem import Problem
from bench.timing import graph_us
from sglang_amd_quant import formats
from sglang_amd_quant.formats import nibbles
from sglang_amd_quant.formats.int4 import ZERO
from sglang_amd_quant.tensor import MxTensor

Run = Callable[[torch.Tensor], torch.Tensor]


def cublas(weight: MxTensor, dtype: torch.dtype) -> Run:
    """The weights in the dtype of activations, by torch."""
    dense = weight.dequantize(dtype)
    return lambda x: torch.nn.functional.linear(x, dense)


def _for_humming(weight: MxTensor, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Weight config and tensors. Its own schema, of e4m3 and int4, packs codes into words, rows of zero points too, and
    knows scales by their dtype."""
    data, scales = weight.data, weight.scales
    if weight.scheme.weight == "e2m1":
        return {"quant_method": "mxfp4"}, {"weight": data, "weight_scale": scales}
    words, group = data.view(torch.int32), {"group_size": weight.scheme.block}
    if weight.scheme.weight == "e4m3":
        config = {"dtype": "float8e4m3", "scale_dtype": "float8e8m0"} | group
        return config, {"weight": words, "weight_scale": scales.view(torch.float8_e8m0fnu)}
    config = {"dtype": "uint4", "has_zero_point": weight.zeros is not None} | group
    tensors = {"weight": words, "weight_scale": scales.to(dtype)}
    if weight.zeros is not None:
        tensors["zero_point"] = nibbles.pack(weight.zeros.T).view(torch.int32).T.contiguous()
    return config, tensors


def _humming(input_config: dict[str, str] | None, weight: MxTensor, dtype: torch.dtype) -> Run:
    from humming.layer import HummingLayer

    config, tensors = _for_humming(weight, dtype)
    layer = HummingLayer(
        shape_n=weight.n, shape_k=weight.k, weight_config=config, input_config=input_config, torch_dtype=dtype
    ).cuda()
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer


def _gemlite(name: str, weight: MxTensor, dtype: torch.dtype) -> Run:
    """Of int4, a code times its scale plus a scaled zero point, rounded to `dtype`; it has none without zero points."""
    from gemlite import helper

    codes = weight.data if weight.scheme.weight == "e4m3" else nibbles.unpack(weight.data)
    if weight.scheme.weight == "int4":
        zeros = torch.full_like(weight.scales, ZERO) if weight.zeros is None else weight.zeros
        shared = {"scales": weight.scales, "zeros": zeros}
    else:
        shared = {"scales": weight.scales.view(torch.float8_e8m0fnu)}
    return getattr(helper, name)(device="cuda:0", dtype=dtype).from_weights(codes, **shared)


def _stock_triton(x_format: str, weight: MxTensor, dtype: torch.dtype) -> Run:
    """`tl.dot` on dequantized tiles of 64 x 128 x 128 with 8 warps: the untuned baseline of aiter #3783."""
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig, mx_gemm

    config = MxGemmConfig(64, 128, 128, num_warps=8, num_stages=2)

    def run(x: torch.Tensor) -> torch.Tensor:
        codes, x_scales = (x, None) if x_format == "bf16" else formats.quantize_mx(x, x_format)
        y = torch.empty(x.shape[0], weight.n, dtype=dtype, device="cuda")
        return mx_gemm(codes, x_scales, weight.data, weight.scales, y, config, "sm_90")

    return run


PEERS: dict[str, Callable[[MxTensor, torch.dtype], Run]] = {
    "cublas_bf16": cublas,
    "humming_bf16": partial(_humming, None),
    "humming_fp8": partial(_humming, {"dtype": "float8e4m3"}),
    "gemlite_a16w4": partial(_gemlite, "A16W4_MXFP"),
    "gemlite_a8w4": partial(_gemlite, "A8W4_MXFP_dynamic"),
    "gemlite_a8w8": partial(_gemlite, "A8W8_MXFP_dynamic"),
    "gemlite_int4": partial(_gemlite, "A16W4_HQQ_INT"),
    "stock_triton": partial(_stock_triton, "bf16"),
}
"""name -> makes weights and the dtype of activations into a callable of x[M, K]. `bf16`: not quantized; they are fp16
where a scheme's are."""

FOR = {
    "e2m1": ("cublas_bf16", "humming_bf16", "humming_fp8", "gemlite_a16w4", "gemlite_a8w4", "stock_triton"),
    "e4m3": ("cublas_bf16", "humming_bf16", "humming_fp8", "gemlite_a8w8"),
    "int4": ("cublas_bf16", "humming_bf16", "gemlite_int4"),
}
"""Peers that have a kernel for a weight format."""


def measure_peers(p: Problem, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Adds every peer's time, or why it has none, to the rows of this problem."""
    for name in names:
        if name not in FOR[p.scheme.weight]:
            continue
        made: list[Run] = []
        for row in rows:
            try:
                made = made or [PEERS[name](w, p.dtype) for w in p.weights[: 8 if name == "cublas_bf16" else p.sets]]
                row["peers"][name] = _timed(p, made, row["M"])
            except Exception as reason:
                row["peers"][name] = {"why": one_line(reason)}
        del made
        torch.cuda.empty_cache()


def _timed(p: Problem, made: list[Run], m: int) -> dict[str, Any]:
    x, exact = p.activations(m, 7)
    want = exact @ p.values(0).double().T
    error = float((made[0](x).double() - want).norm() / want.norm())
    # fp8 activations under one scale a token, or unrounded ones, differ from MX by up to 2^-4 of each value
    if not error < 0.1:
        return {"why": f"relative error {error:.2f}"}
    return {"us": graph_us([partial(run, x) for run in made], at_least=IN_A_GRAPH), "error": error}


def one_line(reason: Exception) -> str:
    """An exception for a report."""
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:120]}"
