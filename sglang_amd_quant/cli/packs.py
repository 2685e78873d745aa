"""`amd-mx packs`: check, compare and join packs of tuned entries."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.selection.pack_csv import PackRow, load_file, write_file
from sglang_amd_quant.selection.pack_tools import describe, diff, lint, merge
from sglang_amd_quant.selection.packs import pack_files, shipped_dir

DESCRIPTION = """Check, compare and join packs: the CSV files of tuned entries (docs/packs.md has the schema).

  lint   two owners of a shape, illegal entries, shapes no model has, kernels that are gone: exit 1 if there is any
  diff   what differs between two packs, entry by entry: exit 1 if anything does
  merge  several packs into one file, one owner a shape: exit 1, nothing written, if that is undecided"""
EXAMPLE = "amd-mx packs lint my-packs/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="packs_command", metavar="lint|diff|merge", required=True)

    def command(
        name: str, line: str, run: Callable[[argparse.Namespace], int], example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=line, description=line, epilog=f"example: amd-mx packs {name} {example}")
        sub.set_defaults(packs_run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = command("lint", "check files and folders, taken as one set", _lint, "my-packs/")
    sub.add_argument("places", nargs="*", metavar="DIR", help="default: the packs that this package ships")

    sub = command("diff", "what differs from A to B", _diff, "old.csv new.csv")
    sub.add_argument("a", metavar="A", help="file or folder")
    sub.add_argument("b", metavar="B", help="file or folder")

    line = "join packs into OUT; measured entries replace published ones"
    sub = command("merge", line, _merge, "all.csv mine.csv published/ --prefer faster")
    sub.add_argument("out", metavar="OUT", type=Path, help="file to write")
    sub.add_argument("places", nargs="+", metavar="PACK", help="files or folders")
    sub.add_argument(
        "--prefer",
        choices=("first", "last", "faster"),
        default="",
        help="which of several measured (or several published) entries of a shape to keep; default: none, and fail",
    )


def run(args: argparse.Namespace) -> int:
    return int(args.packs_run(args))


def _files(places: list[str]) -> list[Path]:
    """The packs that are named: at least one."""
    files = pack_files(places)
    if not files:
        raise UnsupportedError(" ".join(places), "holds no *.csv", "name packs, or a folder of them")
    return files


def _rows(place: str) -> list[PackRow]:
    return [row for path in _files([place]) for row in load_file(path)]


def _lint(args: argparse.Namespace) -> int:
    places = args.places or [str(shipped_dir())]
    _files(places)
    findings, count = lint(places)
    if args.json:
        print(json.dumps({"entries": count, "findings": [f._asdict() for f in findings]}, indent=1))
    else:
        print(*findings, sep="\n", end="\n" if findings else "")
        print(f"{count} entries in {' '.join(places)}: {len(findings) or 'no'} findings")
    return 1 if findings else 0


def _diff(args: argparse.Namespace) -> int:
    changes = diff(_rows(args.a), _rows(args.b))
    if args.json:
        texts = [
            {"kind": c.kind, "entry": describe(row), "text": str(c)} for c in changes if (row := c.after or c.before)
        ]
        print(json.dumps(texts, indent=1))
    else:
        print(*changes, sep="\n", end="\n" if changes else "")
        print(f"{len(changes) or 'no'} differences")
    return 1 if changes else 0


def _merge(args: argparse.Namespace) -> int:
    merged, conflicts = merge([_rows(place) for place in args.places], args.prefer)
    undecided = [(describe(rows[0]), [(row.place, row.us) for row in rows]) for rows in conflicts]
    if not undecided:
        try:
            write_file(args.out, merged)
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UnsupportedError(str(args.out), why, "name another file") from None
    if args.json:
        texts = [{"entry": entry, "owners": [{"place": p, "us": us} for p, us in rows]} for entry, rows in undecided]
        print(json.dumps({"out": str(args.out), "entries": len(merged), "undecided": texts}, indent=1))
    elif undecided:
        for entry, rows in undecided:
            owners = ", ".join(f"{place} ({us or '?'} us)" for place, us in rows)
            print(f"undecided: {entry}: {owners}")
        print(f"{len(undecided)} shapes have several owners; say --prefer first, last or faster (one device)")
    else:
        print(f"{len(merged)} entries written to {args.out}")
    return 1 if undecided else 0
