"""`amd-mx coverage`: what every GEMM of a model would run on at every M, and what is untuned."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sglang_amd_quant import shapes
from sglang_amd_quant.cli.arguments import known_arch, recipe_file, wholes
from sglang_amd_quant.errors import RecipeError, ShapeError, UnsupportedError
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection.choose import Selector
from sglang_amd_quant.selection.coverage import DEFAULT_MS, Report, coverage, recorded
from sglang_amd_quant.selection.heatmap import LETTERS, html
from sglang_amd_quant.selection.problem import FLOATS
from sglang_amd_quant.selection.specs import shipped
from sglang_amd_quant.selection.trace import read_choices, write_untuned
from sglang_amd_quant.shapes.recipes import AMD_MX, recipe_for

DESCRIPTION = """List the source of the kernel choice for every GEMM of a model x M, with totals and the untuned shapes.

MODEL is a checkpoint folder, a config.json, or a shipped model card. By default the plan looks at every kernel that
selection knows, published mechanisms included, and says how many cells this build has no kernel binary for; with
--kernels shipped it looks only at kernels that this build has. --from-trace reports what a server recorded instead
(SGLANG_AMD_MX_TRACE=choices.jsonl, or a log with its `amd_mx untuned` lines)."""
EXAMPLE = """amd-mx coverage gpt-oss-120b --arch gfx950 --tp 8 --ep 2 --scheme w4a8 --missing untuned.jsonl
amd-mx coverage gpt-oss-120b --arch gfx950 --scheme w4a16 --out-dtype fp16 --kernels shipped"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder, config.json or card's name")
    parser.add_argument("--from-trace", type=Path, metavar="FILE", help="report what was recorded, instead of a model")
    parser.add_argument("--arch", type=known_arch, default="gfx950", help="default gfx950")
    parser.add_argument("--cu-count", type=int, default=0, help="compute units (default: the arch's usual device)")
    parser.add_argument("--tp", type=int, default=1, help="SGLang's --tp (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="SGLang's --ep (default 1)")
    parser.add_argument("--scheme", choices=[AMD_MX, *SCHEMES], default=AMD_MX, help=f"default {AMD_MX}")
    parser.add_argument("--recipe", metavar="FILE", help="recipe (JSON) that gives layers their schemes")
    parser.add_argument("--group", type=int, default=0, help="elements per int4 scale (default: as served)")
    parser.add_argument(
        "--out-dtype", choices=FLOATS, default="bf16", help="the model's, SGLang's --dtype (default bf16)"
    )
    parser.add_argument("--m", type=wholes, default=DEFAULT_MS, metavar="M,M,…", help="default 1,2,4,…,8192")
    parser.add_argument("--kernels", choices=("all", "shipped"), default="all", help="what to plan with (default all)")
    parser.add_argument(
        "--fail-under",
        type=_percent,
        metavar="PCT",
        help="exit 1 if less than PCT %% of cells have a tuned entry (of kernels in this build: --kernels shipped)",
    )
    parser.add_argument("--missing", type=Path, metavar="FILE", help="write the shapes to tune, for the tuner to read")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report there, not to stdout")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="report as JSON")
    form.add_argument("--csv", action="store_true", help="report as CSV, one row a cell")
    form.add_argument("--html", action="store_true", help="report as one HTML file with a heat map")


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0 to 100")
    return value


def run(args: argparse.Namespace) -> int:
    report = _report(args)
    if args.missing:
        count = _written(lambda: write_untuned(args.missing, report.misses()), args.missing)
        print(f"{count} shapes to tune written to {args.missing}", file=sys.stderr)
    text = _render(report, args)
    if args.output:
        encoded = text.encode("utf-8", "backslashreplace")  # a model's folder may have a name that is no UTF-8
        _written(lambda: args.output.write_bytes(encoded), args.output)
    else:
        print(text, end="")
    if args.fail_under is not None and report.tuned_percent < args.fail_under:
        print(f"{report.tuned_percent:.2f} % tuned is under {args.fail_under:g} %", file=sys.stderr)
        return 1
    return 0


def _report(args: argparse.Namespace) -> Report:
    if args.from_trace and args.model:
        raise ShapeError(f"{args.model} and --from-trace", "are two different reports", "give one of them")
    if args.from_trace:
        return recorded(read_choices(args.from_trace), str(args.from_trace))
    if not args.model:
        raise ShapeError("MODEL", "not given", "name one (`amd-mx shapes --list` lists cards), or give --from-trace")
    facts = shapes.load(args.model)
    recipe = recipe_file(args.recipe, facts) if args.recipe else recipe_for(facts, args.scheme, args.arch)
    if args.group and "int4" not in recipe.weights:
        raise RecipeError(f"--group {args.group}", f"{recipe.source} makes no int4", "drop one of the two")
    recipe = replace(recipe, group=args.group or recipe.group)
    selector = Selector(available=shipped() if args.kernels == "shipped" else None)
    return coverage(facts, args.arch, args.tp, args.ep, recipe, args.m, selector, args.cu_count, args.out_dtype)


def _written(write, path: Path) -> int:  # type: ignore[no-untyped-def]
    try:
        return int(write())
    except OSError as error:
        raise UnsupportedError(str(path), f"cannot be written ({error.strerror})", "name another file") from None


def _render(report: Report, args: argparse.Namespace) -> str:
    if args.json:
        return json.dumps(report.to_json(), indent=1) + "\n"
    if args.csv:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(report.to_csv_rows())
        return buffer.getvalue()
    return html(report) if args.html else "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.title}{' (recorded)' if report.recorded else ''}"
    yield ""
    labels = [f"{row.count:4} x {row.label}" for row in report.rows]
    width = max((len(label) for label in labels), default=4)
    widths = [max(2, len(str(m))) for m in report.ms]
    yield f"{'M':>{width}}  " + " ".join(f"{m:>{w}}" for m, w in zip(report.ms, widths, strict=True))
    for label, row in zip(labels, report.rows, strict=True):
        cells = []
        for m, w in zip(report.ms, widths, strict=True):
            choice = row.choices.get(m)
            mark = "" if choice is None else LETTERS[choice.source] + ("" if choice.in_build else "*")
            cells.append(f"{mark:>{w}}")
        yield f"{label:<{width}}  {' '.join(cells)}  {row.layout.layout}  {', '.join(row.layers)}"
    yield ""
    total = len(report.choices)
    for source, count in report.totals().items():
        if count:
            yield f"  {LETTERS[source]}  {source:10} {count:5}  {100 * count / total:5.1f} %"
    yield f"  {report.tuned_percent:.1f} % of {total} cells tuned for their GEMM (exact, padded M or nearest E)"
    if report.without_binary:
        yield (
            f"  *  {report.without_binary} cells plan a published mechanism of which this build has no kernel binary: "
            "the reference would run there"
        )
    if report.bf16:
        yield f"  not quantized, run by the engine: {', '.join(report.bf16)}"
