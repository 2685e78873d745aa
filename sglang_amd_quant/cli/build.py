"""`amd-mx build`: compile the HIP kernels, and say what they cost."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from sglang_amd_quant.cli.arguments import whole
from sglang_amd_quant.kernels.hip.manifest import ARCHS, CODE_OBJECTS
from sglang_amd_quant.runtime.code_objects import CODE_OBJECT_DIR
from sglang_amd_quant.toolchain.build import HIP_DIR, Built, available_archs, build
from sglang_amd_quant.toolchain.compilers import BuildError
from sglang_amd_quant.toolchain.report import KernelReport, table

DESCRIPTION = (
    "Compile every kernel of kernels/hip/ into code objects, and report the registers, LDS and instructions of each."
)
EXAMPLE = "amd-mx build --arch gfx950,sm_90 --report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "--arch", help=f"targets, comma-separated, of {','.join(ARCHS)}; default: all this machine can compile"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print the resource table; exit 1 on spills, LDS over the cap or a broken claim",
    )
    parser.add_argument(
        "--triton", action="store_true", help="compile the Triton kernels too (nothing is written; needs triton)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead")
    parser.add_argument(
        "--out", type=Path, default=CODE_OBJECT_DIR, help="folder to write to; default: where the runtime looks"
    )
    parser.add_argument(
        "--compiler", choices=("zig", "rocm"), help="HIP compiler to use; default: ziglang, else ROCm's"
    )
    parser.add_argument("--jobs", type=whole, default=os.cpu_count(), help="compilers at a time; default: one a CPU")
    parser.add_argument("--force", action="store_true", help="compile also what is up to date")


def run(args: argparse.Namespace) -> int:
    """Build. Returns 0, or 1 if a report has problems, or 2 if a source does not compile."""
    archs = list(dict.fromkeys(args.arch.split(","))) if args.arch else available_archs(ARCHS, args.compiler)
    units = sum(a in c.archs for a in archs for c in CODE_OBJECTS)
    start = time.perf_counter()
    with tqdm(total=units, unit="code object", disable=args.json, leave=False) as bar:
        try:
            built = build(
                archs,
                code_objects=CODE_OBJECTS,
                hip_dir=HIP_DIR,
                out=args.out,
                which=args.compiler,
                jobs=args.jobs,
                force=args.force,
                progress=bar.update,
            )
        except BuildError as error:
            print(error.log, end="", file=sys.stderr)
            raise
    reports = [r for b in built for r in b.reports]
    if args.triton:
        from sglang_amd_quant.toolchain.triton_aot import compile_all

        reports += [c.report for c in compile_all(archs)]
    seconds = time.perf_counter() - start
    problems = sum(bool(r.problems) for r in reports)
    if args.json:
        print(json.dumps(_json(built, reports, seconds), indent=1))
    else:
        if args.report or problems:
            print(table(reports if args.report else [r for r in reports if r.problems]))
        _summary(built, reports, seconds, args.out)
    return 1 if problems else 0


def _json(built: list[Built], reports: list[KernelReport], seconds: float) -> dict[str, object]:
    objects = [
        {
            "name": b.code_object.name,
            "arch": b.arch.name,
            "path": str(b.path),
            "bytes": b.path.stat().st_size,
            "compiler": b.compiler,
            "cached": b.cached,
        }
        for b in built
    ]
    return {"code_objects": objects, "kernels": [r.to_json() for r in reports], "seconds": round(seconds, 3)}


def _summary(built: list[Built], reports: list[KernelReport], seconds: float, out: Path) -> None:
    size = sum(b.path.stat().st_size for b in built)
    fresh = sum(not b.cached for b in built)
    compilers = ", ".join(sorted({b.compiler for b in built}))
    archs = ", ".join(dict.fromkeys(b.arch.name for b in built))
    print(f"{len(built)} code objects, {len(reports)} kernels, {size / 1024:.0f} KiB for {archs} in {out}")
    print(f"{fresh} compiled, {len(built) - fresh} up to date, {seconds:.1f} s ({compilers})")
