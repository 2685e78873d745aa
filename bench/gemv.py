"""The MXFP4 GEMV on this machine's GPU: correctness against fp64, then time in CUDA graphs over weights larger than L2.

    python -m bench.gemv [--json] [--explore] [--shapes 6144x1536,8192x28672] [--m 1,2,4]

Measured: everything but `floor`, which is bytes of weights and scales over the read bandwidth that is measured first.
Method: each graph launches the kernel once for every set of weights, sets together exceed twice the L2; the graph is
replayed, the time between events divided by the launches, the median taken. An empty kernel's share is printed apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

import bench.source_tree  # noqa: F401
from bench.arguments import matrices
from bench.timing import graph_us, read_bandwidth
from sglang_amd_quant import formats
from sglang_amd_quant.cli.arguments import wholes
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.runtime.device import Gpu, gpu
from sglang_amd_quant.runtime.gemv_mxfp4 import GemvPlan, gemv_mxfp4, plans
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.toolchain.build import available_archs, build

SHAPES = "6144x2304,2048x6144,6144x1536,1536x6144,2880x5760,8192x28672"  # K x N


def weights(n: int, k: int, seed: int, scales: tuple[int, int] = (112, 125)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes [n, k/2] and scales [n, k/32] on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    w = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda", generator=generator)
    s = torch.randint(*scales, (n, k // 32), dtype=torch.uint8, device="cuda", generator=generator)
    return w, s


def dequantize(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Weights as fp64 [n, k]; a scale of 255 is NaN."""
    return formats.dequantize_mx(w, s, "e2m1", torch.float64)


def start(device: Gpu, description: LaunchDescription) -> None:
    """Launch on torch's stream."""
    device.launch(description, torch.cuda.current_stream().cuda_stream)


def check(device: Gpu) -> int:
    """Compare every code path with fp64 on fresh random inputs. Returns the number of cases; raises on the first
    error."""
    cases = 0
    for seed, (m, n, k) in enumerate(
        (m, n, k)
        for m in (1, 2, 3, 4)
        for n, k in ((1536, 6144), (1, 32), (37, 2080), (130, 28672), (513, 96), (2048, 8192))
    ):
        w, s = weights(n, k, seed)
        full = torch.randn(m, k + 8 * (seed % 3), device="cuda").bfloat16()
        x = full[:, :k]
        bias = torch.randn(n, device="cuda").bfloat16() if seed % 2 else None
        wide = dequantize(w, s)
        exact = x.double() @ wide.T + (0 if bias is None else bias.double())
        magnitude = x.double().abs() @ wide.abs().T + (0 if bias is None else bias.double().abs())
        chosen = {p.waves_k: p for p in plans(m, n, k, device.arch_name, device.cu_count)}
        for p in chosen.values():
            for dtype in (torch.float32, torch.bfloat16):
                y = torch.full((m, n), torch.nan, dtype=dtype, device="cuda")
                start(device, _describe(device, x, w, s, y, bias, p))
                # The matrix unit truncates sums to fp32, so each of the K products may cost an ulp of the running sum;
                # the activations' common exponent and the final bf16 add one rounding each.
                bound = (k * 2.0**-23 + 2.0**-30) * magnitude + (
                    2.0**-8 * exact.abs() if dtype == torch.bfloat16 else 0
                )
                error = (y.double() - exact).abs()
                assert y.isfinite().all(), (m, n, k, p, dtype)
                assert (error <= bound + 1e-30).all(), (m, n, k, p, dtype, (error / bound).max().item())
                whole = exact if n > 1 else magnitude  # a result by itself may cancel
                relative = (error.norm() / whole.norm()).item()
                assert relative < (3e-3 if dtype == torch.bfloat16 else 2e-6), (m, n, k, p, dtype, relative)
                cases += 1
    return cases + check_special(device)


def check_special(device: Gpu) -> int:
    """Scales at both ends of their range, NaN scales, infinities and wide ranges in one block of activations."""
    n, k = 64, 512
    w, s = weights(n, k, 99, (0, 230))
    x = torch.randn(1, k, device="cuda").bfloat16()
    x[0, 32:64] *= torch.exp2(torch.arange(32, device="cuda") - 16.0).bfloat16()
    s[::2] = torch.randint(0, 40, (n // 2, k // 32), dtype=torch.uint8, device="cuda")
    s[3, 5] = 255
    y = torch.empty(1, n, dtype=torch.float32, device="cuda")
    start(device, _describe(device, x, w, s, y, None, None))
    exact = x.double() @ dequantize(w, s).T
    with_nan = (s == 255).any(1)
    assert torch.equal(y[0].isnan(), with_nan), "a NaN scale must make its rows, and no others, NaN"
    fits = ~with_nan & (exact[0].abs() < 3.4e38)
    relative = (y[0].double() - exact[0]).abs()[fits] / (x.double().abs() @ dequantize(w, s).abs().T)[0][fits]
    assert (relative < 1e-5).all(), relative.max().item()
    x[0, 7] = torch.inf
    w[0, 3], w[1, 3] = 0x22, 0xAA  # +1, -1 at k = 6, 7
    s[:2] = 127
    start(device, _describe(device, x, w, s, y, None, None))
    assert y[0, :2].tolist() == [torch.inf, -torch.inf]
    return 2


def _describe(device: Gpu, x, w, s, y, bias, chosen: GemvPlan | None) -> LaunchDescription:
    return gemv_mxfp4(x, w, s, y, arch=device.arch_name, cu_count=device.cu_count, bias=bias, chosen=chosen)


def measure(device: Gpu, m: int, n: int, k: int, bandwidth: float, explore: bool) -> list[dict]:
    """Time the chosen plan (and with `explore` the other good ones) and cuBLAS in bf16."""
    sets = max(4, -(-(2 << 26) // (n * k * 17 // 32)))
    data = [weights(n, k, seed) for seed in range(sets)]
    x = torch.randn(m, k, device="cuda").bfloat16()
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    size = n * k * 17 // 32
    rows = []
    candidates = plans(m, n, k, device.arch_name, device.cu_count)
    for p in candidates[: 24 if explore else 1]:
        us = graph_us([partial(start, device, _describe(device, x, w, s, y, None, p)) for w, s in data])
        rows.append(_row("gemv_mxfp4", m, n, k, us, size, bandwidth) | {"plan": vars(p)})
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, sets // 4))]
    us = graph_us([partial(torch.nn.functional.linear, x, w) for w in dense])
    rows.append(_row("cuBLAS bf16", m, n, k, us, 2 * n * k, bandwidth) | {"plan": None})
    return rows


def _row(kernel: str, m: int, n: int, k: int, us: float, size: int, bandwidth: float) -> dict:
    floor = size / bandwidth * 1e6
    return {
        "kernel": kernel,
        "M": m,
        "K": k,
        "N": n,
        "us": us,
        "GB/s": size / us / 1e3,
        "floor_us": floor,
        "of_floor": floor / us,
    }


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=matrices, default=SHAPES, help=f"KxN, comma-separated; default {SHAPES}")
    parser.add_argument("--m", type=wholes, default="1,2,4", help="activation rows, comma-separated")
    parser.add_argument("--explore", action="store_true", help="time up to 24 plans a shape, best first")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with fp64")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()

    device = gpu(0)
    prepare(device)
    cases = 0 if args.no_check else check(device)
    bandwidth = read_bandwidth()
    tiny = torch.zeros(1, device="cuda")
    empty = graph_us([lambda: tiny.add_(0)] * 100)
    rows = []
    for k, n in args.shapes:
        for m in args.m:
            rows += measure(device, m, n, k, bandwidth, args.explore)
            torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cases": cases,
        "read_bandwidth_GB_s": bandwidth / 1e9,
        "smallest_node_us": empty,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{result['device']}, torch {result['torch']}; {cases} cases agree with fp64")
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s, smallest graph node {empty:.2f} us (both measured)")
    print(
        "kernel          M      K      N       us     GB/s  floor us  % of floor  plan (waves_k x waves_n, grid, slab)"
    )
    for r in rows:
        p = r["plan"]
        how = f"{p['waves_k']} x {p['waves_n']}, {p['grid']}, {p['slab']}" if p else ""
        print(
            f"{r['kernel']:12} {r['M']:4} {r['K']:6} {r['N']:6} {r['us']:8.2f} {r['GB/s']:8.0f} {r['floor_us']:9.2f}"
            f" {100 * r['of_floor']:11.0f}  {how}"
        )
    return 0


def prepare(device: Gpu) -> None:
    """Bring the code object for this device up to date, where there is a compiler, and load it ahead of any capture."""
    from sglang_amd_quant.kernels.hip.manifest import find  # once source_tree has run

    name = "gemv_mxfp4_bf16_m1"
    if available_archs([device.arch_name]):
        build([device.arch_name], code_objects=(find(name)[0],))
    device.load(*(e.name for e in find(name)[0].entry_points))


if __name__ == "__main__":
    try:
        sys.exit(exit_code("bench.gemv", main))
    except AssertionError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        sys.exit(1)
