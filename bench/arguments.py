"""Kinds of arguments that benches share, besides those of `cli/arguments.py`; what is wrong is said before anything is
measured."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from sglang_amd_quant.cli.arguments import whole


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads comma-separated names, or shell patterns of them, in the order in which they are given; none of `none`."""

    def read(text: str) -> list[str]:
        found = [(word, fnmatch.filter(known, word)) for word in text.split(",") if word and text != "none"]
        if unknown := [word for word, matching in found if not matching]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return list(dict.fromkeys(name for _, matching in found for name in matching))

    return read


def matrices(text: str) -> list[tuple[int, int]]:
    """Reads comma-separated KxN, as (K, N)."""
    try:
        return [(whole(k), whole(n)) for k, n in (matrix.split("x") for matrix in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write KxN of each matrix, as 6144x2304,8192x28672") from None


def file(text: str) -> Path:
    """Reads the path of a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def earlier(heads: Collection[str], row_heads: Collection[str]) -> Callable[[str], dict[str, Any]]:
    """Reads what an earlier run wrote: a JSON object of `heads` and `rows`, each of which has `row_heads`."""

    def read(text: str) -> dict[str, Any]:
        try:
            result = json.loads(file(text).read_text())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: no JSON; name the report that --out wrote") from None
        rows = result.get("rows") if isinstance(result, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            missing = ["rows"]
        else:
            missing = [head for head in heads if head not in result]
            missing += [head for head in row_heads if any(head not in row for row in rows)]
        if missing:
            why = f"has no {missing[0]}, so it is no report of this bench"
            raise argparse.ArgumentTypeError(f"{text}: {why}; name one that --out wrote")
        return result

    return read


def command(module: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """For a report: what measures this again. Of options those that are not the defaults, but for where results go."""
    usual = parser.parse_args([])
    given = {k: v for k, v in vars(args).items() if v != getattr(usual, k) and k not in ("out", "date", "json")}
    words = [f"python -m {module}"]
    for name, value in given.items():
        text = ",".join(map(_word, value)) or "none" if isinstance(value, list | tuple) else str(value)
        words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join(words)


def _word(item: object) -> str:
    """A part of a list of options: a matrix is (K, N)."""
    return "x".join(map(str, item)) if isinstance(item, tuple) else str(item)
