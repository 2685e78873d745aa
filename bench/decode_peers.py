"""What a user would run a small-M quantized GEMM on instead, behind one interface, and how it is timed."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.decode_ours import IN_A_GRAPH
from bench.decode_problem import Problem
from bench.timing import graph_us
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


def _triton(tile: Callable[[torch.Tensor, MxTensor, torch.dtype], Any], weight: MxTensor, dtype: torch.dtype) -> Run:
    """Our Triton GEMM of MX weights as they are stored, dequantized to bf16 tile by tile."""
    return lambda x: _mx_gemm(x, weight, dtype, tile(x, weight, dtype))


def _mx_gemm(x: torch.Tensor, weight: MxTensor, dtype: torch.dtype, tile: Any) -> torch.Tensor:
    from sglang_amd_quant.kernels.triton.mx_gemm import mx_gemm

    y = torch.empty(x.shape[0], weight.n, dtype=dtype, device="cuda")
    return mx_gemm(x, None, weight.data, weight.scales, y, tile, "sm_90")


def _stock(*_: object) -> Any:
    """The untuned baseline of aiter #3783."""
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig

    return MxGemmConfig(64, 128, 128, num_warps=8, num_stages=2)


def _tiles(m: int) -> Iterator[Any]:
    """24 that are as high as M, up to 64 rows."""
    import triton
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig

    rows = min(64, max(16, triton.next_power_of_2(m)))
    for columns, block_k, warps, stages in itertools.product((32, 64, 128), (128, 256), (4, 8), (2, 4)):
        yield MxGemmConfig(rows, columns, block_k, num_warps=warps, num_stages=stages)


_TUNED: dict[tuple[object, ...], Any] = {}
"""(M, N, K, elements of weights) -> the tile that was fastest."""


def _tuned(x: torch.Tensor, weight: MxTensor, dtype: torch.dtype) -> Any:
    """The fastest of `_tiles`, timed as Triton's autotuners do when it is first asked for."""
    import triton

    problem = (x.shape[0], weight.n, weight.k, weight.scheme.weight)
    if problem not in _TUNED:
        took: dict[Any, list[float]] = {}
        for tile in _tiles(x.shape[0]):
            with contextlib.suppress(triton.OutOfResources):  # some have no place in shared memory
                launch = partial(_mx_gemm, x, weight, dtype, tile)
                took[tile] = triton.testing.do_bench(launch, quantiles=(0.5, 0.2, 0.8))
        _TUNED[problem] = min(took, key=took.__getitem__)
    return _TUNED[problem]


def _triton_kernels(weight: MxTensor, dtype: torch.dtype) -> Run:
    """OpenAI's matmul_ogs, by the tile that it chooses, as a batch of one; it shares no K where weights have scales."""
    from triton_kernels.matmul_ogs import matmul_ogs

    from bench.peers_moe import for_triton_kernels

    w, config = for_triton_kernels(weight.data[None], weight.scales[None])
    return lambda x: matmul_ogs(x, w, None, precision_config=config)


PEERS: dict[str, Callable[[MxTensor, torch.dtype], Run]] = {
    "cublas_bf16": cublas,
    "humming_bf16": partial(_humming, None),
    "humming_fp8": partial(_humming, {"dtype": "float8e4m3"}),
    "gemlite_a16w4": partial(_gemlite, "A16W4_MXFP"),
    "gemlite_a8w4": partial(_gemlite, "A8W4_MXFP_dynamic"),
    "gemlite_a8w8": partial(_gemlite, "A8W8_MXFP_dynamic"),
    "gemlite_int4": partial(_gemlite, "A16W4_HQQ_INT"),
    "stock_triton": partial(_triton, _stock),
    "tuned_triton": partial(_triton, _tuned),
    "triton_kernels": _triton_kernels,
}
"""name -> makes weights and the dtype of activations into a callable of x[M, K]. `bf16`: not quantized; they are fp16
where a scheme's are."""

_ALL = ("cublas_bf16", "humming_bf16")
_MX = (*_ALL, "humming_fp8", "stock_triton", "tuned_triton")

FOR = {
    "e2m1": (*_MX, "gemlite_a16w4", "gemlite_a8w4", "triton_kernels"),
    "e4m3": (*_MX, "gemlite_a8w8"),
    "int4": (*_ALL, "gemlite_int4"),
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
