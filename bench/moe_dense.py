"""The dense MXFP4 layer 8192 -> 28672 for many tokens: the prefill kernel with E = 1 beside its peers."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from collections.abc import Callable, Iterator
from functools import partial

import torch
from sglang_amd_quant.kernels.triton.hopper import linear_hopper
from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights, pack_hopper

from bench.decode_peers import PEERS
from bench.moe_jobs import READY, Job, Row
from bench.moe_ours import SCHEMES
from bench.moe_problem import relative
from bench.timing import graph_us
from sglang_amd_quant.formats import dequantize_mx
from sglang_amd_quant.ops.triton_hopper import tile_of
from sglang_amd_quant.schemes import SCHEMES as MX_SCHEMES
from sglang_amd_quant.selection import GemmProblem, Selector
from sglang_amd_quant.tensor import MxTensor

NAME, K, N = "dense-8192-28672", 8192, 28672
PEER_KEYS = ("humming_fp8", "humming_bf16", "cublas_bf16")


def measure(job: Job) -> Iterator[Row]:
    """Rows of a job: our schemes, or one peer. The error is against fp64 of x as it is."""
    g = torch.Generator("cuda").manual_seed(1)
    data = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda", generator=g)
    scales = torch.randint(114, 121, (N, K // 32), dtype=torch.uint8, device="cuda", generator=g)
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if job.kernel == "ours":
        for scheme in (s for s in job.schemes if SCHEMES[s][0] == "e2m1"):
            _, element, x_format = SCHEMES[scheme]
            w = pack_hopper(data[None], scales[None], x_format)
            runs[f"ours {scheme}"] = partial(_ours, w=w, scheme=scheme, element=element)
    else:
        runs[job.kernel] = PEERS[job.kernel](MxTensor.canonical(data, scales, MX_SCHEMES["w4a8"]), torch.bfloat16)
    xs = {m: torch.randn(m, K, device="cuda", generator=g).bfloat16() for m in job.ms}
    errors = {}
    for m, x in xs.items():
        yield {"at": m}
        want = torch.cat([x[:64].double() @ w.T for w in _parts(data, scales)], 1)
        for name, run in runs.items():
            errors[name, m] = relative(run(x)[:64], want)
    torch.cuda.empty_cache()
    yield READY
    for (name, m), error in errors.items():
        yield {"at": m}
        us = graph_us([partial(runs[name], xs[m])] * 4)  # 125 MB of weights: no L2 keeps them
        yield {
            "shape": NAME, "kernel": name, "M": m, "active": 1, "us": us, "weight_bytes": N * K * 17 // 32,
            "flops": 2 * m * N * K, "error": error,
        }  # fmt: skip


def _ours(x: torch.Tensor, w: HopperWeights, scheme: str, element: str | None) -> torch.Tensor:
    """The prefill kernel with the tile that selection gives a layer of this shape."""
    problem = GemmProblem("linear", scheme, "sm_90", len(x), N, K, layout=f"hopper_{w.x_format}")
    choice = Selector(available=frozenset({f"triton_hopper_{w.x_format}"})).decide(problem)
    return linear_hopper(x, w, tile_of(choice.config), element=element)


def _parts(data: torch.Tensor, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weights in fp64, 2048 rows at a time."""
    for rows in zip(data.split(2048), scales.split(2048), strict=True):
        yield dequantize_mx(*rows, "e2m1", torch.float64)
