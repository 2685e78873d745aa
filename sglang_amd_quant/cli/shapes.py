"""`amd-mx shapes`: every GEMM of a model for TP x EP, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from sglang_amd_quant import shapes
from sglang_amd_quant.cli.arguments import above_zero, recipe_file, wholes
from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import BF16, SCHEMES
from sglang_amd_quant.shapes.layers import Experts
from sglang_amd_quant.shapes.recipes import AMD_MX, recipe_for

DESCRIPTION = """List every GEMM that one rank runs: N, K, experts, how often, bytes, and its floor in us.

MODEL is a local checkpoint folder, a config.json, or the name of a shipped model card (--list names them).
Everything is derived from the config; floors are modelled (bytes that must move / bandwidth), never measured."""
EXAMPLE = "amd-mx shapes gpt-oss-120b --tp 8 --scheme w4a8 --m 1,64"

DEFAULT_ARCH = "gfx950"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder, config.json or card's name")
    parser.add_argument("--list", action="store_true", help="list the shipped model cards")
    parser.add_argument("--tp", type=int, default=1, help="SGLang's --tp: ranks of the model (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="SGLang's --ep: groups the experts are dealt to (default 1)")
    parser.add_argument("--rank", type=int, default=0, help="which rank (default 0; the last one's remainder is told)")
    schemes = parser.add_mutually_exclusive_group()
    schemes.add_argument(
        "--scheme",
        choices=[AMD_MX, *SCHEMES, BF16],
        default=AMD_MX,
        help="scheme of all layers that can be quantized; amd_mx: the checkpoint's own, else the arch's default",
    )
    schemes.add_argument("--recipe", metavar="FILE", help="recipe (JSON) that gives layers their schemes")
    parser.add_argument("--m", type=wholes, default=(1,), metavar="M,M,…", help="tokens to tell floors for (default 1)")
    parser.add_argument(
        "--arch",
        choices=list(shapes.BANDWIDTH_TBPS),
        default=DEFAULT_ARCH,
        help=f"sets the bandwidth and amd_mx's default scheme (default {DEFAULT_ARCH})",
    )
    parser.add_argument("--bandwidth", type=above_zero, metavar="TBPS", help="TB/s, in place of the arch's peak")
    parser.add_argument(
        "--fuse-shared",
        action=argparse.BooleanOptionalAction,
        help="run shared experts inside the grouped GEMM, E+1 and top_k+1 (default: as SGLang does)",
    )
    parser.add_argument("--mtp", action="store_true", help="add the multi-token-prediction (draft) block")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(args.json)
    if args.model is None:
        raise AmdMxError("MODEL", "not given", "name one, or see `amd-mx shapes --list`")
    facts = shapes.load(args.model)
    recipe = recipe_file(args.recipe, facts) if args.recipe else recipe_for(facts, args.scheme, args.arch)
    here, last = (
        shapes.plan(facts, args.tp, args.ep, recipe, fuse_shared=args.fuse_shared, rank=rank, mtp=args.mtp)
        for rank in (args.rank, args.tp - 1)
    )
    bandwidth = args.bandwidth or shapes.BANDWIDTH_TBPS[args.arch]
    report = _report(facts, args, recipe, bandwidth, list(zip(here, last, strict=True)))
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _report(
    facts: shapes.ModelFacts,
    args: argparse.Namespace,
    recipe: Recipe,
    bandwidth: float,
    gemms: list[tuple[shapes.Gemm, shapes.Gemm]],
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for gemm, last in gemms:
        floors = {str(m): round(shapes.floor_us(gemm, m, bandwidth), 3) for m in args.m}
        rows.append(
            {
                **asdict(gemm),
                "N_used_last_rank": last.N_used,
                "K_used_last_rank": last.K_used,
                "elements": gemm.elements,
                "data_bytes": gemm.data_bytes,
                "padded_32": gemm.padded(32),
                "padded_256": gemm.padded(256),
                "floor_us": floors,
                "limits": shapes.limits(gemm, last),
            }
        )
    return {
        "model": facts.name,
        "architecture": facts.architecture,
        "source": facts.source,
        "unconfirmed": list(facts.unconfirmed),
        "tp": args.tp,
        "ep": args.ep,
        "rank": args.rank,
        "recipe": recipe.source,
        "bandwidth_tbps": bandwidth,
        "floor": "modelled",
        "total_bytes": sum(r["bytes"] * r["count"] for r in rows),
        "total_floor_us": {str(m): round(sum(r["floor_us"][str(m)] * r["count"] for r in rows), 1) for m in args.m},
        "gemms": rows,
    }


def _print(report: dict[str, Any]) -> None:
    ms = list(report["total_floor_us"])
    print(
        f"{report['model']} ({report['architecture']}) at TP {report['tp']}, EP {report['ep']}, rank {report['rank']};"
        f" {report['recipe']}; floors modelled at {report['bandwidth_tbps']:g} TB/s"
    )
    print(f"facts: {report['source']}")
    if report["unconfirmed"]:
        print(f"unconfirmed: {', '.join(report['unconfirmed'])}")
    head = ["layer", "blocks", "op", "N", "K", "E", "top_k", "scheme", "MB", "count", "pads to 32, 256"]
    table = [[*head, *(f"us M={m}" for m in ms), "limits"]]
    for row in report["gemms"]:
        table.append(
            [
                row["layer"],
                _ranges(row["blocks"]),
                row["op"] + (" + silu" if row["activated"] else ""),
                row["N"],
                row["K"],
                row["E_local"],
                row["top_k"],
                row["scheme"] + (f", group {row['block']}" if "int4" in row["scheme"] else ""),
                f"{row['bytes'] / 1e6:.1f}",
                row["count"],
                _pads(row),
                *(f"{row['floor_us'][m]:.2f}" for m in ms),
                "; ".join(row["limits"]),
            ]
        )
    print_table(table, left={0, 1, 2, 7, len(head) + len(ms)})
    total = ", ".join(f"{us / 1e3:.2f} ms at M={m}" for m, us in report["total_floor_us"].items())
    print(f"weights of these GEMMs: {report['total_bytes'] / 1e9:.2f} GB a rank; floors add up to {total}")


def print_table(table: list[list[Any]], left: set[int]) -> None:
    """Print rows of cells in columns, right-aligned but for those in `left`; the first row is the head."""
    cells = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(aligned).rstrip())


def _pads(row: dict[str, Any]) -> str:
    """Where N or K is no multiple of 256, what it pads to; to 32 as well, where it is no multiple of that either."""
    found = []
    for name, size, to_32, to_256 in zip("NK", (row["N"], row["K"]), row["padded_32"], row["padded_256"], strict=True):
        if to_256 != size:
            found.append(f"{name}→{to_256}" if to_32 == size else f"{name}→{to_32},{to_256}")
    return " ".join(found)


def _ranges(blocks: tuple[int, ...]) -> str:
    """Block indices in short: `0-2`, `3,7,…,59` for evenly spaced ones, or the first and how many."""
    if len(blocks) < 2:
        return ",".join(map(str, blocks))
    steps = {b - a for a, b in pairwise(blocks)}
    if steps == {1}:
        return f"{blocks[0]}-{blocks[-1]}"
    if len(steps) == 1 and len(blocks) > 2:
        return f"{blocks[0]},{blocks[1]},…,{blocks[-1]}"
    return ",".join(map(str, blocks)) if len(blocks) < 4 else f"{blocks[0]},{blocks[1]},{blocks[2]},…,{blocks[-1]}"


def _list(as_json: bool) -> int:
    rows: list[dict[str, Any]] = []
    for name in shapes.cards():
        facts = shapes.load(name)
        experts = next((layer for layer in facts.layers if isinstance(layer, Experts)), None)
        rows.append(
            {
                "name": name,
                "architecture": facts.architecture,
                "experts": experts.experts if experts else 0,
                "top_k": experts.top_k if experts else 0,
                "unconfirmed": list(facts.unconfirmed),
                "source": facts.source,
            }
        )
    if as_json:
        print(json.dumps(rows))
        return 0
    head = ["card", "architecture", "experts", "top_k", "unconfirmed", "source"]
    body = [[*list(r.values())[:4], ", ".join(r["unconfirmed"]), r["source"]] for r in rows]
    print_table([head, *body], left={0, 1, 4, 5})
    return 0
