"""How fast kernels are chosen: python -m bench.selection [--json]

Times what a serving process and a person wait for: importing selection, loading packs of 100,000 entries, `choose()`
warm (the problem was seen before) and cold (every GEMM of every model card, with the large packs loaded), and the
`coverage` command on the card with the most cells. Wall time on one core, no GPU; the least of several runs, because on
a shared machine others only ever add to it. Aims are those of the project.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from sglang_amd_quant import shapes
from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.selection import GemmProblem, Selector, choose
from sglang_amd_quant.selection.buckets import TUNING_MS
from sglang_amd_quant.selection.coverage import problem_of
from sglang_amd_quant.selection.pack_csv import COLUMNS, VERSION_LINE, load_file
from sglang_amd_quant.selection.packs import Packs, shipped_dir

ROWS = 100_000
REPEATS = 7
PARALLEL = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 8))

AIMS = {
    "import_s": 0.3,
    "load_100k_rows_s": 1.0,
    "warm_same_object_us": 3.0,
    "warm_equal_object_us": 3.0,
    "cold_median_us": 200.0,
    "cold_p99_us": 200.0,
    "coverage_command_s": 2.0,
}
"""Figure -> the most it may be."""


def problems(arch: str, m: int) -> Iterator[GemmProblem]:
    """Every quantized GEMM of every model card at several TP and EP, in two schemes, each once."""
    seen: set[GemmProblem] = set()
    for card in shapes.cards():
        facts = shapes.load(card)
        for scheme in ("w4a8", "mxfp8"):
            for tp, ep in PARALLEL:
                try:
                    gemms = shapes.plan(facts, tp, ep, scheme)
                except AmdMxError:
                    continue  # this card cannot be divided so
                for gemm in gemms:
                    if gemm.scheme != "bf16":
                        problem = problem_of(gemm, arch, m, tp, ep)
                        if problem not in seen:
                            seen.add(problem)
                            yield problem


def rows() -> Iterator[list[str]]:
    """Entries as a tuner would write them: every GEMM of every card, at every M worth tuning, in two layouts, ..."""
    kernels = {"linear": "triton_gemm_mx", ("moe", "w4a8"): "triton_moe_a8w4", ("moe", "mxfp8"): "triton_moe_mxfp8"}
    found = list(problems("gfx950", 1))
    for cu_num in (256, 128, 64, 32):
        for layout in ("strided", "cdna4_scale"):
            for p in found:
                for i, m in enumerate(TUNING_MS):
                    moe = p.moe
                    row = dict.fromkeys(COLUMNS, "") | {
                        "arch": p.arch, "cu_num": cu_num, "op": p.op, "scheme": p.scheme, "N": p.n, "K": p.k, "M": m,
                        "E": p.e_local if moe else "", "top_k": p.top_k if moe else "", "tp": p.tp, "ep": p.ep,
                        "layout": layout, "kernel": kernels[("moe", p.scheme) if moe else "linear"], "block_m": 64,
                        "block_n": 128, "block_k": 256, "num_warps": 4, "num_stages": 2, "us": f"{10 + i * 1.37:.2f}",
                        "err": 0.001, "device": "none: generated", "versions": "none", "date": "2026-01-01",
                        "source": "measured",
                    }  # fmt: skip
                    yield [str(value) for value in row.values()]


def write_rows(path: Path) -> None:
    """A pack of exactly `ROWS` entries."""
    with path.open("w", newline="") as file:
        file.write(VERSION_LINE + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(islice(rows(), ROWS))


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least wall time of one run."""
    return min(timeit.repeat(run, number=1, repeat=repeats))


def import_seconds() -> float:
    """Least time of `import sglang_amd_quant.selection` in a fresh interpreter, the interpreter's start excluded."""
    code = "import time; t = time.perf_counter(); import sglang_amd_quant.selection; print(time.perf_counter() - t)"
    runs = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(REPEATS)
    )
    return min(float(run.stdout) for run in runs)


def warm_us(run: Callable[[], object], number: int = 200_000) -> float:
    """Mean time of a call, the least of several series."""
    return min(timeit.repeat(run, number=number, repeat=REPEATS)) / number * 1e6


def cold_us(packs: Packs) -> list[float]:
    """Time of each decision worked out afresh, the least of a few for each problem, sorted."""
    selector = Selector(packs)
    asked = [problem for m in (1, 24, 100, 4096) for problem in problems("gfx950", m)]
    return sorted(seconds(lambda p=problem: selector.decide(p), 5) * 1e6 for problem in asked)  # type: ignore[misc]


def coverage_seconds() -> tuple[float, str]:
    """The whole command, interpreter included, on the card that has the most GEMMs; and that card."""
    gemms = {card: len(shapes.plan(shapes.load(card), 1, 1, "w4a8")) for card in shapes.cards()}
    card = max(gemms, key=lambda name: gemms[name])
    argv = [sys.executable, "-m", "sglang_amd_quant.cli.main", "coverage", card, "--scheme", "w4a8"]
    env = {**os.environ, "SGLANG_AMD_MX_PACKS": ""}
    return seconds(lambda: subprocess.run([*argv, "--html"], capture_output=True, check=True, env=env), 5), card


def measure() -> dict[str, Any]:
    """All figures, with what they were measured on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.csv"
        write_rows(path)
        load_s = seconds(lambda: Packs(load_file(path)), 5)
        load_cpu_s = min(timeit.repeat(lambda: Packs(load_file(path)), timer=time.process_time, number=1, repeat=5))
        large = Packs(load_file(path))
    problem = next(problems("gfx950", 64))
    equal = replace(problem)
    choose(problem)
    cold, shipped = cold_us(large), cold_us(Packs(r for f in shipped_dir().rglob("*.csv") for r in load_file(f)))
    coverage_s, card = coverage_seconds()
    return {
        "import_s": import_seconds(),
        "load_100k_rows_s": load_s,
        "load_100k_rows_cpu_s": load_cpu_s,
        "rows": len(large),
        "warm_same_object_us": warm_us(lambda: choose(problem)),
        "warm_equal_object_us": warm_us(lambda: choose(equal)),
        "make_problem_us": warm_us(lambda: replace(problem), 20_000),
        "cold_problems": len(cold),
        "cold_median_us": statistics.median(cold),
        "cold_p99_us": cold[int(0.99 * len(cold))],
        "cold_max_us": cold[-1],
        "cold_median_us_shipped_packs": statistics.median(shipped),
        "coverage_command_s": coverage_s,
        "coverage_card": card,
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    figures = measure()
    missed = [name for name, aim in AIMS.items() if figures[name] > aim]
    if args.json:
        print(json.dumps({**figures, "aims": AIMS, "missed": missed}, indent=1))
    else:
        for name, value in figures.items():
            aim = f"   aim <= {AIMS[name]:g}" if name in AIMS else ""
            print(f"{name:30} {f'{value:.4g}' if isinstance(value, float) else value}{aim}")
        print(f"missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
