"""Fused MoE on this machine's GPU beside its peers: correctness against fp64, then time in CUDA graphs.

    python -m bench.moe [--shapes gpt-oss-120b-tp1,...] [--schemes w4a8,w4a16] [--m 1,16,256] [--tune] [--out FOLDER]

Measured: microseconds, and the read bandwidth that `floor` is taken with: bytes of the active experts' weights and
scales over it. `us` is everything from topk_ids to the combined sum; `gemms` leaves routing out, as the peers' time
does where their routing is another call (`triton_kernels`, `humming`). `x best` is the fastest peer's time over ours.

Method: `moe_measure.py`. Every kernel and shape has a process of its own; a peer that crashes is a line of the report.
Before ours is timed, every stage is compared with fp64 of the same quantized operands on fresh random inputs, into
buffers of NaN; a peer's result with fp64 of the unrounded MoE.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
import json
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton

from bench import moe_dense
from bench.arguments import command, earlier, names
from bench.moe_jobs import Job, Row, run_jobs
from bench.moe_measure import measure
from bench.moe_ours import SCHEMES
from bench.moe_pack import pack_entries
from bench.moe_problem import SHAPES
from bench.peers_moe import PEERS
from bench.timing import read_bandwidth
from sglang_amd_quant.cli.arguments import wholes
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.runtime.device import gpu

PEER_PACKAGES = ("humming-kernels", "sglang", "sglang-kernel")
ORDER = [*SHAPES, moe_dense.NAME]
"""What may be measured, as a report has it."""

HEADS = ("device", "torch", "triton", "date", "read_bandwidth_GB_s", "errors", "left_out")
ROW = ("shape", "kernel", "M", "active", "us", "floor_us", "of_floor", "TB/s", "TFLOP/s")
"""What a report has, and every row of it."""


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is run, in order."""
    ms, schemes = args.m, tuple(args.schemes)
    dense, made = moe_dense.NAME, []
    for shape in args.shapes:
        if shape == dense:
            if 1024 in ms:
                made += [Job(dense, "ours", (1024,), schemes)] if schemes else []
                made += [Job(dense, peer, (1024,)) for peer in moe_dense.PEER_KEYS if args.peers]
            continue
        if any(SCHEMES[s][0] == SHAPES[shape].element for s in schemes):
            made.append(Job(shape, "ours", ms, schemes, args.tune, not args.no_check))
        made += [Job(shape, peer, ms) for peer in args.peers]
    return made


def report(rows: list[Row], bandwidth: float) -> list[Row]:
    """Rows with bandwidth, rate, floor, and for ours the ratio to the fastest peer."""
    made = []
    for row in rows:
        floor = row["weight_bytes"] / bandwidth * 1e6
        rates = {
            "TB/s": row["weight_bytes"] / row["us"] / 1e6,
            "TFLOP/s": row["flops"] / row["us"] / 1e6,
            "floor_us": floor,
            "of_floor": floor / row["us"],
        }
        made.append(row | rates)
    for row in made:
        peers = [
            r for r in made if (r["shape"], r["M"]) == (row["shape"], row["M"]) and not r["kernel"].startswith("ours")
        ]
        if row["kernel"].startswith("ours") and peers:
            best = min(peers, key=lambda r: r["us"])
            row |= {"best_peer": best["kernel"], "x_best_peer": best["us"] / row["us"]}
    return made


_TIMES = "    M active        us     gemms floor us % floor   TB/s TFLOP/s  x best error   configs"
HEAD = f"{'shape':17} {'kernel':22} {_TIMES}"


def line(r: Row) -> str:
    """One row for people."""
    if "why" in r:
        return f"{r['shape']:17} {r['kernel']:22} {r['M'] or '':5} left out: {r['why']}"
    gemms = f"{r['gemms']:9.1f}" if "gemms" in r else " " * 9
    times = f"{r['x_best_peer']:7.2f}" if "x_best_peer" in r else " " * 7
    error = f"{r['error']:.1e}" if r.get("error") is not None else " " * 7
    return (
        f"{r['shape']:17} {r['kernel']:22} {r['M']:5} {r['active']:6.1f} {r['us']:9.1f} {gemms} {r['floor_us']:8.1f} "
        f"{100 * r['of_floor']:5.0f} {r['TB/s']:6.2f} {r['TFLOP/s']:7.0f} {times} {error} {r.get('configs', '')}"
    )


def plot(result: dict[str, Any], file: Path) -> None:
    """Microseconds over M, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = [s for s in dict.fromkeys(r["shape"] for r in result["rows"]) if s in SHAPES]
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.2), squeeze=False)
    for axis, name in zip(axes[0], shapes, strict=True):
        rows = [r for r in result["rows"] if r["shape"] == name]
        for kernel in dict.fromkeys(r["kernel"] for r in rows):
            mine = [r for r in rows if r["kernel"] == kernel]
            axis.plot([r["M"] for r in mine], [r["us"] for r in mine], marker="o", label=kernel)
        floor = {r["M"]: r["floor_us"] for r in rows}
        axis.plot(list(floor), list(floor.values()), "k--", label="weights of active experts, read once")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us", title=name)
        axis.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, measured {result['date']}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def parser() -> argparse.ArgumentParser:
    """The command's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shapes", type=names(ORDER), default=",".join(ORDER), help="of " + ", ".join(ORDER))
    made.add_argument(
        "--schemes", type=names(SCHEMES), default="w4a8,w4a16,mxfp8", help="of " + ", ".join(SCHEMES) + ", or none"
    )
    made.add_argument("--m", type=wholes, default="1,4,16,64,256,1024,8192", help="tokens, comma-separated")
    made.add_argument(
        "--peers", type=names(PEERS), default=",".join(PEERS), help="of " + ", ".join(PEERS) + ", or none"
    )
    made.add_argument("--tune", action="store_true", help="search configs, by the time of the whole MoE")
    made.add_argument("--no-check", action="store_true", help="skip the comparison with fp64")
    made.add_argument("--date", default="", help="for the report")
    made.add_argument("--json", action="store_true", help="print JSON in place of the table")
    made.add_argument("--out", type=Path, help="folder for moe.json, moe.png, pack entries and logs")
    made.add_argument(
        "--show", type=earlier(HEADS, ROW), metavar="JSON",
        help="measure nothing (no GPU needed): the table, and with --out the plot and pack entries, of an earlier run",
    )  # fmt: skip
    return made


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured; written after each row, so that a run that is cut short leaves what it has."""
    gpu(0)  # says so where there is none
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "command": command("bench.moe", args, parser()),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "peers": {p: _version(p) for p in PEER_PACKAGES},
        "date": args.date, "read_bandwidth_GB_s": bandwidth / 1e9,
        "errors": {}, "left_out": [], "wrong": [], "rows": [],
    }  # fmt: skip
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in run_jobs(jobs(args), measure, (args.out or Path(scratch)) / "logs"):
            if "errors" in row:
                result["errors"][f"{row['shape']} {row['scheme']} M={row['M']}"] = row["errors"]
            elif "wrong" in row:
                result["wrong"].append(row)
                print("WRONG", row, file=sys.stderr, flush=True)
            elif "why" in row:
                row["kernel"] = PEERS[row["kernel"]].name if row["kernel"] in PEERS else row["kernel"]
                result["left_out"].append(row)
                print(line(row), file=sys.stderr, flush=True)
            else:
                rows.append(row)
                result["rows"] = report(rows, bandwidth)
                print(f"{row['shape']} {row['kernel']} M={row['M']}: {row['us']:.1f} us", file=sys.stderr, flush=True)
                _write(result, args.out)
    result["rows"].sort(
        key=lambda r: (ORDER.index(r["shape"]), not r["kernel"].startswith("ours"), r["kernel"], r["M"])
    )
    _write(result, args.out)
    return result


def table(result: dict[str, Any]) -> str:
    """A report as text: what measured it, what was wrong, the largest errors, the rows, and what was left out."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, "
        f"{result['read_bandwidth_GB_s']:.0f} GB/s read"
    ]
    lines += [f"WRONG {row}" for row in result.get("wrong", ())]
    for (name, scheme), e in _worst(result["errors"]).items():
        lines.append(f"{name} {scheme}: " + ", ".join(f"{stage} {value:.2e}" for stage, value in e.items()))
    return "\n".join([*lines, HEAD, *map(line, [*result["rows"], *result["left_out"]])])


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    args = parser().parse_args()
    result: dict[str, Any] = args.show or run(args)
    print(json.dumps(result, indent=1) if args.json else table(result))
    if args.out and any(r["shape"] in SHAPES for r in result["rows"]):
        args.out.mkdir(parents=True, exist_ok=True)
        plot(result, args.out / "moe.png")
        for name, text in pack_entries(result, SHAPES).items():
            (args.out / name).write_text(text)
    return int(bool(result.get("wrong")))


def _write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "moe.json").write_text(json.dumps(result, indent=1))


def _worst(errors: dict[str, dict[str, float]]) -> dict[tuple[str, str], dict[str, float]]:
    """The largest error of each stage over all M, by shape and scheme."""
    made: dict[tuple[str, str], dict[str, float]] = {}
    for key, stages in errors.items():
        name, scheme, _ = key.split(" ")
        found = made.setdefault((name, scheme), dict.fromkeys(stages, 0.0))
        for stage, value in stages.items():
            found[stage] = max(found[stage], value)
    return made


if __name__ == "__main__":
    sys.exit(exit_code("bench.moe", main))
