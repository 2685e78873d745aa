"""Small-M dense GEMMs on this machine's GPU beside their peers: correctness against fp64, then time in CUDA graphs.

    python -m bench.decode [--schemes mxfp8,w4a8] [--shapes 6144x2304,...] [--m 1,16] [--peers cublas_bf16,humming_bf16]
                           [--explore 40] [--out FOLDER]

Measured: microseconds, and the read bandwidth that `floor` (bytes of weights and scales) is taken with. Quantizing
activations is part of every time. `us` is a chain of launches that may begin before the one in front has ended
(programmatic dependent launch), as a server's graph runs them; `alone` is without.

Method: a graph launches the kernel once for each of several sets of weights that together exceed the L2 twice; it is
replayed, the time between events divided by the launches, the median taken. Before that, each result is compared
with fp64 of the same quantized operands, on fresh random inputs, into a buffer of NaN. Peers see the same weights.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sglang_amd_quant.kernels.hip.manifest import find
from sglang_amd_quant.kernels.triton.hopper_pack import pack_hopper

from bench.decode_peers import FOR, PEERS
from bench.timing import graph_us, read_bandwidth
from sglang_amd_quant import formats
from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.formats.mx import ELEMENTS
from sglang_amd_quant.layouts.mma_tile import MmaScale, MmaTile
from sglang_amd_quant.runtime.decode_gemm import decode_gemm
from sglang_amd_quant.runtime.decode_plans import DecodePlan, plans, prepared_bytes
from sglang_amd_quant.runtime.device import Gpu, gpu
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, SCHEMES

SEED_SHAPES = "6144x2304,2048x6144,6144x1536,1536x6144"
"""K x N of aiter #3783: qkv, o_proj, gate_up and mlp_down of MiniMax-M3 at TP4."""

IN_A_GRAPH = 30
"""Launches that a graph holds at least: events resolve half a microsecond, and some launches take five."""


class Problem:
    """Weights for one (scheme, N, K), in several sets: as many as exceed the L2, or `sets`.

    Attributes:
        codes, scales: [sets, N, ...] as formats have them.
        packed: (data, scales, factors) of each set.
    """

    def __init__(self, scheme: str, k: int, n: int, seed: int, sets: int = 0) -> None:
        self.scheme, self.k, self.n = SCHEMES[scheme], k, n
        element, generator = self.scheme.weight, torch.Generator("cuda").manual_seed(seed)
        columns = k * self.scheme.weight_bits // 8
        self.sets = sets or max(2, min(40, -(-(1 << 28) // (n * columns))))
        codes = torch.randint(0, 256, (self.sets, n, columns), dtype=torch.uint8, device="cuda", generator=generator)
        self.codes = torch.where(codes & 0x7F == 0x7F, 0x31, codes).to(torch.uint8) if element == "e4m3" else codes
        self.scales = torch.randint(
            110, 126, (self.sets, n, k // 32), dtype=torch.uint8, device="cuda", generator=generator
        )
        self.packed = [self._pack(c, s) for c, s in zip(self.codes, self.scales, strict=True)]
        self.bytes = n * columns + n * k // 32

    def _pack(
        self, codes: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self.scheme.weight == "e4m3" and self.scheme.act == "bf16":
            return MmaTile().pack(codes), MmaScale().pack(scales), None
        codes = codes.view(torch.float8_e4m3fn) if self.scheme.weight == "e4m3" else codes
        made = pack_hopper(codes[None], scales[None], "bf16" if self.scheme.act == "bf16" else "e4m3")
        return made.data, made.scales, made.factors

    def values(self, i: int) -> torch.Tensor:
        """Weights of a set, fp32 [N, K]."""
        codes = self.codes[i].view(torch.float8_e4m3fn) if self.scheme.weight == "e4m3" else self.codes[i]
        return formats.dequantize_mx(codes, self.scales[i], self.scheme.weight)

    def activations(self, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x bf16 [M, K], and what the scheme makes of it, fp64."""
        x = torch.randn(m, self.k, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()
        exact = x.float() if self.scheme.act == "bf16" else formats.fake_quantize_mx(x.float(), self.scheme.act)
        return x, exact.double()


def carry(act: str) -> int:
    """What rounds the scales of activations of this format."""
    return 0 if act == "bf16" else ELEMENTS[act].carry(DEFAULT_SCALE_MODE[act])


def launch(
    device: Gpu, p: Problem, i: int, x: torch.Tensor, y: torch.Tensor, plan: DecodePlan, overlap: bool = True
) -> None:
    """One product with set i of the weights."""
    room = prepared_bytes(p.scheme.name, plan, *x.shape)
    prepared = x.new_empty(room, dtype=torch.uint8) if room else None
    for description in decode_gemm(
        x, *p.packed[i], y, scheme=p.scheme.name, n=p.n, cu_count=device.cu_count, carry=carry(p.scheme.act), plan=plan,
        prepared=prepared,
    ):  # fmt: skip
        device.launch(replace(description, overlap=overlap), torch.cuda.current_stream().cuda_stream)


RELATIVE_ERROR = 1e-3
"""Of a whole result, by norm, that a kernel may have against fp64 of the same quantized operands."""


def bound(p: Problem, exact: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How far each element of a kernel's result may be from fp64 of `exact` [M, K] and the values [N, K] of set 0.

    With bf16 activations products are exact, and the matrix unit truncates its sums to fp32, so each of K additions
    costs at most an ulp of the running sum, which |x| |w|^T bounds.

    Quantized ones are e4m3, whose products the matrix unit adds in groups of 32 and the sum before, all cut off 13 bits
    below the largest (DeepSeek-V3 Technical Report, 3.3.2): 33 x 2^-13 of the running sum a group, 24 groups (12 tiles
    of 64) before sums are added as floats. Elements under a row's one scale are off by half of e4m3's least, 2^-10: of
    x, whose largest is at least 2^7 (e2m1: 2) of that, and of w. x in e4m3 is rounded once, under that scale, where
    `exact` was under its block's: if that is another, half of its least, which is half as much or less, comes on top.
    """
    absolute = exact.abs() @ values.abs().T
    if p.scheme.act == "bf16":
        return p.k * 2.0**-23 * absolute + 1e-30
    least_x = exact.abs().amax(1, keepdim=True) * (1.5 * 2.0**-17 if p.scheme.act == "e4m3" else 2.0**-11)
    least_w = torch.exp2(p.scales[0].amax(1).double() - 137)
    operands = least_x * values.abs().sum(1) + exact.abs().sum(1, keepdim=True) * least_w
    return 24 * 33 * 2.0**-13 * absolute + operands + 1e-40


class Reference:
    """fp64 of the quantized operands, and how far from it a result may be: `bound`, and `RELATIVE_ERROR` as a whole."""

    def __init__(self, p: Problem, m: int, seed: int) -> None:
        self.x, exact = p.activations(m, seed)
        values = p.values(0).double()
        self.want = exact @ values.T
        self.bound = bound(p, exact, values)

    def check(self, device: Gpu, p: Problem, plan: DecodePlan) -> float:
        """Relative error of one launch. Raises AssertionError beyond the bounds."""
        y = torch.full_like(self.want, torch.nan, dtype=torch.float32)
        launch(device, p, 0, self.x, y, plan)
        error = (y.double() - self.want).abs()
        what = f"{p.scheme.name} M={y.shape[0]} N={p.n} K={p.k} {plan}"
        assert y.isfinite().all(), f"{what}: not every output is finite"
        assert (error <= self.bound).all(), f"{what}: {(error / self.bound).max():.2f} x bound"
        relative = float(error.norm() / self.want.norm())
        assert relative <= RELATIVE_ERROR, f"{what}: relative error {relative:.1e}"
        return relative


def measure(device: Gpu, p: Problem, m: int, bandwidth: float, explore: int) -> dict[str, Any]:
    """The best plan by the model, or with `explore` the best measured of that many; all of them checked."""
    reference = Reference(p, m, seed=m)
    x, y = reference.x, torch.empty(m, p.n, dtype=torch.bfloat16, device="cuda")
    tried = []
    for plan in plans(p.scheme.name, m, p.n, p.k, device.cu_count)[: max(1, explore)]:
        error = reference.check(device, p, plan)
        us = graph_us([partial(launch, device, p, i, x, y, plan) for i in range(p.sets)], at_least=IN_A_GRAPH)
        tried.append((us, error, plan))
    us, error, plan = min(tried, key=lambda t: t[0])
    alone = graph_us([partial(launch, device, p, i, x, y, plan, False) for i in range(p.sets)], at_least=IN_A_GRAPH)
    floor = p.bytes / bandwidth * 1e6
    row = {"scheme": p.scheme.name, "K": p.k, "N": p.n, "M": m, "us": us, "alone": alone, "floor_us": floor}
    row |= {"GB/s": p.bytes / us / 1e3, "of_floor": floor / us, "error": error, "plan": asdict(plan), "peers": {}}
    if explore:
        row["tried"] = [[t[0], asdict(t[2])] for t in tried]
    return row


def measure_peers(p: Problem, names: list[str], rows: list[dict[str, Any]]) -> None:
    """Adds every peer's time, or why it has none, to the rows of this problem."""
    for name in names:
        if name not in FOR[p.scheme.weight]:
            continue
        try:
            count = min(p.sets, 8 if name == "cublas_bf16" else p.sets)
            made = [PEERS[name](p.codes[i], p.scales[i], p.scheme.weight, p.values(i).bfloat16()) for i in range(count)]
            for row in rows:
                x, exact = p.activations(row["M"], 7)
                want = exact @ p.values(0).double().T
                error = float((made[0](x).double() - want).norm() / want.norm())
                us = graph_us([partial(run, x) for run in made], at_least=IN_A_GRAPH)
                # fp8 activations under one scale a token, or unrounded ones, differ from MX by up to 2^-4 of each value
                row["peers"][name] = (
                    {"us": us, "error": error} if error < 0.1 else {"why": f"relative error {error:.2f}"}
                )
        except Exception as reason:
            for row in rows:
                row["peers"].setdefault(name, {"why": f"{type(reason).__name__}: {str(reason)[:120]}"})
        torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """Rows as text."""
    bandwidth = f"{result['read_bandwidth_GB_s']:.0f} GB/s, measured"
    lines = [f"{result['device']}, torch {result['torch']}; read bandwidth {bandwidth}"]
    lines.append("scheme      K      N   M      us   alone   floor  % of floor   best peer              x")
    for r in result["rows"]:
        timed = {name: peer["us"] for name, peer in r["peers"].items() if "us" in peer}
        best = min(timed, key=timed.__getitem__) if timed else ""
        peer = f"{best:14} {timed[best]:7.2f} {timed[best] / r['us']:6.2f}" if best else ""
        lines.append(
            f"{r['scheme']:6} {r['K']:6} {r['N']:6} {r['M']:3} {r['us']:7.2f} {r['alone']:7.2f} {r['floor_us']:7.2f}"
            f" {100 * r['of_floor']:11.0f}   {peer}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], file: Path) -> None:
    """A column a scheme, a line a shape over M: % of the floor; below, times the best peer that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def faster(row: dict[str, Any]) -> float:
        return min((peer["us"] for peer in row["peers"].values() if "us" in peer), default=math.nan) / row["us"]

    schemes = list(dict.fromkeys(r["scheme"] for r in result["rows"]))
    figure, axes = pyplot.subplots(
        2, len(schemes), figsize=(5 * len(schemes), 7), sharex=True, sharey="row", squeeze=False
    )
    for (share, peers), scheme in zip(axes.T, schemes, strict=True):
        for k, n in dict.fromkeys((r["K"], r["N"]) for r in result["rows"] if r["scheme"] == scheme):
            rows = [r for r in result["rows"] if (r["scheme"], r["K"], r["N"]) == (scheme, k, n)]
            m = [r["M"] for r in rows]
            share.plot(m, [100 * r["of_floor"] for r in rows], "o-", label=f"{k} to {n}")
            peers.plot(m, [faster(r) for r in rows], "o-")
        share.set(title=scheme, ylim=(0, 105))
        peers.set(xlabel="M", ylim=(0, None))
        peers.set_xscale("log", base=2)
        peers.axhline(1, color="black", linewidth=0.8)
        share.grid(alpha=0.3)
        peers.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    axes[0][0].set_ylabel("% of the memory floor")
    axes[1][0].set_ylabel("times the best peer")
    figure.suptitle(result["device"])
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="mxfp8,w4a8,w4a16", help="comma-separated")
    parser.add_argument("--shapes", default=SEED_SHAPES + ",8192x28672", help="KxN, comma-separated")
    parser.add_argument("--m", default="1,2,4,8,16,32,64", help="rows of activations, comma-separated")
    parser.add_argument("--peers", default="cublas_bf16", help=f"comma-separated, of {', '.join(PEERS)}; empty: none")
    parser.add_argument(
        "--explore", type=int, default=0, metavar="N", help="time N plans a problem instead of the model's best"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="write decode.json and decode.png into this folder")
    parser.add_argument(
        "--show",
        type=Path,
        metavar="JSON",
        help="measure nothing (no GPU needed): the table and plot of an earlier run",
    )
    args = parser.parse_args()

    if args.show:
        earlier = json.loads(args.show.read_text())
        if args.out:
            plot(earlier, args.out / "decode.png")
        print(table(earlier))
        return 0
    device = gpu(0)
    for scheme in args.schemes.split(","):
        device.load(*(e.name for e in find(f"decode_{scheme}_m8", "sm_90")[0].entry_points))
    bandwidth = read_bandwidth()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    result |= {"read_bandwidth_GB_s": bandwidth / 1e9, "rows": []}
    for scheme in args.schemes.split(","):
        for k, n in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
            problem = Problem(scheme, k, n, seed=k + n)
            rows = [measure(device, problem, m, bandwidth, args.explore) for m in map(int, args.m.split(","))]
            measure_peers(problem, [name for name in args.peers.split(",") if name], rows)
            result["rows"] += rows
            print(f"{scheme} {k} to {n} done", file=sys.stderr, flush=True)
            del problem
            torch.cuda.empty_cache()
            if args.out:
                (args.out / "decode.json").write_text(json.dumps(result, indent=1))
    if args.out:
        plot(result, args.out / "decode.png")
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, AmdMxError) as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        sys.exit(1)
