"""Problems and choices as lines of text: the log line of a miss, the trace, and reading both back."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.selection.buckets import tuning_m
from sglang_amd_quant.selection.problem import GemmProblem, KernelChoice

ENV_TRACE = "SGLANG_AMD_MX_TRACE"
"""A file to which every distinct choice of the process is appended, one JSON object a line."""

UNTUNED = "amd_mx untuned "
"""Stands before the JSON of a problem in a log line, whatever the logger writes before it."""

logger = logging.getLogger(__name__)

_missed: set[GemmProblem] = set()
_broken: set[str] = set()


def record(problem: GemmProblem, choice: KernelChoice, tunable: bool = True) -> None:
    """Log a miss once per shape to tune, if anything is tunable; append the choice to the trace if one is asked for."""
    if tunable and not choice.tuned and problem.m:
        wanted = to_tune(problem)
        if wanted not in _missed:
            _missed.add(wanted)
            logger.info("%s", untuned_line(wanted, choice.source))
    path = os.environ.get(ENV_TRACE)
    if path and path not in _broken:
        try:
            _append(path, json.dumps({"problem": problem.to_json(), "choice": choice.to_json()}, separators=(",", ":")))
        except OSError as error:
            _broken.add(path)
            logger.warning("%s=%s cannot be written (%s): choices are no longer traced", ENV_TRACE, path, error)


def _append(path: str, line: str) -> None:
    """Add a line in one write to a file opened for appending, so that lines of several ranks do not mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode() + b"\n")
    finally:
        os.close(descriptor)


def to_tune(problem: GemmProblem) -> GemmProblem:
    """The problem at the M at which an entry would be found for it: several Ms share one."""
    return replace(problem, m=tuning_m(problem))


def untuned_line(problem: GemmProblem, source: str) -> str:
    """A miss as one line that `read_problems` reads back, wherever it stands in a log."""
    return UNTUNED + json.dumps({"problem": problem.to_json(), "source": source}, separators=(",", ":"))


def write_untuned(path: Path, misses: Iterable[tuple[GemmProblem, str]]) -> int:
    """Write the shapes to tune for these (problem, source) misses, each once. Returns how many there are."""
    lines = dict.fromkeys(untuned_line(to_tune(problem), source) for problem, source in misses)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def read_choices(path: Path) -> list[tuple[GemmProblem, KernelChoice]]:
    """The distinct problems in a trace, a file of misses, or any log that holds lines of misses, each with its choice.

    Of a miss only the choice's source is known. A problem that stands there again counts as it stood last.

    Raises:
        ShapeError: a line that begins as one of these and cannot be read, with file and line; or none at all.
    """
    found = dict(_choices(path))
    if not found:
        raise ShapeError(str(path), "holds no problem", f"give a trace ({ENV_TRACE}) or a log with {UNTUNED!r} lines")
    return list(found.items())


def read_problems(path: Path) -> list[GemmProblem]:
    """The problems of `read_choices`: what a tuner is to work on."""
    return [problem for problem, _ in read_choices(path)]


def _choices(path: Path) -> Iterator[tuple[GemmProblem, KernelChoice]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ShapeError(str(path), f"cannot be read ({error.strerror})", "name another file") from None
    for number, line in enumerate(lines, 1):
        _, untuned, text = line.partition(UNTUNED)
        if not untuned:
            text = line if line.startswith('{"problem":') else ""
        if text:
            try:
                data = json.loads(text)
                yield GemmProblem.from_json(data["problem"]), KernelChoice.from_json(data.get("choice", data))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ShapeError(f"{path}:{number}", f"no problem ({error})", "cut the broken line") from None
