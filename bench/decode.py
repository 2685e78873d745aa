"""Small-M dense GEMMs on this machine's GPU beside their peers: correctness against fp64, then time in CUDA graphs.

    python -m bench.decode [--schemes mxfp8,w4a8] [--shapes 6144x2304,...] [--m 1,16] [--peers cublas_bf16,humming_bf16]
                           [--explore 40] [--out FOLDER]
    python -m bench.decode --schemes 'int4_*' --peers cublas_bf16,humming_bf16,gemlite_int4

Schemes are named as decode kernels name them: int4 with its group, and with `_fp16` where activations are fp16.

Measured: microseconds, and the read bandwidth that `floor` (bytes of weights and scales) is taken with. Quantizing
activations is part of every time. `us` is a chain of launches that may begin before the one in front has ended
(programmatic dependent launch), as a server's graph runs them; `alone` is without.

Method: a graph launches the kernel once for each of several sets of weights that together exceed the L2 twice; it is
replayed, the time between events divided by the launches, the median taken. Before that, each result is compared
with fp64 of the same quantized operands, on fresh random inputs, into a buffer of NaN. Peers see the same weights, and
gemlite tunes itself for each shape and M among all that it does by default. The same command with `--warm-up` compiles
for all of them beforehand, in parallel.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
import json
import math
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from bench.arguments import command, earlier, matrices, names
from bench.decode_ours import load, measure
from bench.decode_peers import PEERS, measure_peers
from bench.decode_problem import NAMES, Problem
from bench.decode_warm_up import tasks, warm_up
from bench.timing import autotune_briefly, read_bandwidth
from sglang_amd_quant.cli.arguments import wholes
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.runtime.device import gpu

SEED_SHAPES = "6144x2304,2048x6144,6144x1536,1536x6144"
"""K x N of aiter #3783: qkv, o_proj, gate_up and mlp_down of MiniMax-M3 at TP4."""

ROW = ("scheme", "K", "N", "M", "us", "alone", "floor_us", "of_floor", "peers")
"""What every row of a report has."""


def table(result: dict[str, Any]) -> str:
    """Rows as text, then what peers had no time for."""
    bandwidth = f"{result['read_bandwidth_GB_s']:.0f} GB/s, measured"
    lines = [f"{result['device']}, torch {result['torch']}; read bandwidth {bandwidth}"]
    width = max((len(r["scheme"]) for r in result["rows"]), default=6)
    lines.append(f"{'scheme':{width}}      K      N   M      us   alone   floor  % of floor   best peer              x")
    missing: dict[str, list[str]] = {}
    for r in result["rows"]:
        timed = {name: peer["us"] for name, peer in r["peers"].items() if "us" in peer}
        best = min(timed, key=timed.__getitem__) if timed else ""
        peer = f"{best:14} {timed[best]:7.2f} {timed[best] / r['us']:6.2f}" if best else ""
        lines.append(
            f"{r['scheme']:{width}} {r['K']:6} {r['N']:6} {r['M']:3} {r['us']:7.2f} {r['alone']:7.2f}"
            f" {r['floor_us']:7.2f} {100 * r['of_floor']:11.0f}   {peer}"
        )
        for name, peer in r["peers"].items():
            if "why" in peer:
                what = f"no time of {name} for {r['scheme']} {r['K']} to {r['N']}: {peer['why']}"
                missing.setdefault(what, []).append(str(r["M"]))
    return "\n".join([*lines, *(f"{what} (M={','.join(ms)})" for what, ms in missing.items())])


SCHEME, SHAPE = itemgetter("scheme"), itemgetter("K", "N")


def plot(result: dict[str, Any], file: Path) -> None:
    """A column a scheme, a line a shape over M: % of the floor; below, times the best peer that was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def faster(row: dict[str, Any]) -> float:
        return min((peer["us"] for peer in row["peers"].values() if "us" in peer), default=math.nan) / row["us"]

    schemes, shapes = (list(dict.fromkeys(key(r) for r in result["rows"])) for key in (SCHEME, SHAPE))
    figure, axes = pyplot.subplots(
        2, len(schemes), figsize=(5 * len(schemes), 7), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (share, peers), scheme in zip(axes.T, schemes, strict=True):
        for i, (k, n) in enumerate(shapes):
            rows = [r for r in result["rows"] if (SCHEME(r), *SHAPE(r)) == (scheme, k, n)]
            if not rows:
                continue
            m = [r["M"] for r in rows]
            share.plot(m, [100 * r["of_floor"] for r in rows], "o-", color=f"C{i}", label=f"{k} to {n}")
            peers.plot(m, [faster(r) for r in rows], "o-", color=f"C{i}")
        share.set(title=scheme, ylim=(0, 105))
        peers.set(xlabel="M", xscale="log", xticks=m, xticklabels=m)
        peers.minorticks_off()
        peers.axhline(1, color="black", linewidth=0.8)
        share.grid(alpha=0.3)
        peers.grid(alpha=0.3)
    axes[1][0].set_ylim(bottom=0)  # of all schemes, which have been drawn by now
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize="small")
    axes[0][0].set_ylabel("% of the memory floor")
    axes[1][0].set_ylabel("times the best peer")
    figure.suptitle(result["device"])
    figure.savefig(file, dpi=100)


def parser() -> argparse.ArgumentParser:
    """The command's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--schemes", type=names(NAMES), default="mxfp8,w4a8,w4a16", help=f"comma-separated, of {', '.join(NAMES)}"
    )
    made.add_argument("--shapes", type=matrices, default=SEED_SHAPES + ",8192x28672", help="KxN, comma-separated")
    made.add_argument(
        "--m", type=wholes, default="1,2,4,8,16,32,64", help="rows of activations, comma-separated"
    )  # fmt: skip
    made.add_argument(
        "--peers", type=names(PEERS),
        help=f"comma-separated, of {', '.join(PEERS)}; empty: none; default: cublas_bf16, or with --show all",
    )  # fmt: skip
    made.add_argument(
        "--symmetric",
        action="store_true",
        help="int4 without zero points, which is nothing to our kernels, but to peers",
    )
    made.add_argument(
        "--explore", type=int, default=0, metavar="N", help="time N plans a problem instead of the model's best"
    )
    made.add_argument(
        "--warm-up", action="store_true", help="measure nothing: compile for the same command without this option"
    )
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    made.add_argument("--out", type=Path, help="write decode.json and decode.png into this folder")
    made.add_argument(
        "--show",
        type=earlier(("device", "torch", "read_bandwidth_GB_s"), ROW),
        metavar="JSON",
        help="measure nothing (no GPU needed): the table and plot of an earlier run, with --peers against these only",
    )
    return made


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, in the order of the arguments; written after each problem."""
    autotune_briefly()
    device = gpu(0)
    for scheme in args.schemes:
        load(device, scheme)
    bandwidth = read_bandwidth()
    result: dict[str, Any] = {
        "command": command("bench.decode", args, parser()),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    result |= {"read_bandwidth_GB_s": bandwidth / 1e9, "symmetric": args.symmetric, "rows": []}
    for scheme in args.schemes:
        for k, n in args.shapes:
            problem = Problem(scheme, k, n, seed=k + n, symmetric=args.symmetric)
            rows = [measure(device, problem, m, bandwidth, args.explore) for m in args.m]
            measure_peers(problem, args.peers, rows)
            result["rows"] += rows
            print(f"{scheme} {k} to {n} done", file=sys.stderr, flush=True)
            del problem
            torch.cuda.empty_cache()
            if args.out:
                (args.out / "decode.json").write_text(json.dumps(result, indent=1))
    return result


def beside(peers: list[str] | None, result: dict[str, Any]) -> dict[str, Any]:
    """An earlier run's report, with some of its peers."""
    for row in result["rows"]:
        row["peers"] = {name: peer for name, peer in row["peers"].items() if peers is None or name in peers}
    return result


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    args = parser().parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.show:
        result = beside(args.peers, args.show)
    else:
        args.peers = ["cublas_bf16"] if args.peers is None else args.peers
        if args.warm_up:
            for failed in warm_up(tasks(args.schemes, args.shapes, args.m, args.peers, args.symmetric)):
                print(failed, flush=True)
            return 0
        result = run(args)
    if args.out:
        plot(result, args.out / "decode.png")
    print(json.dumps(result, indent=1) if args.json else table(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(exit_code("bench.decode", main))
    except AssertionError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        sys.exit(1)
