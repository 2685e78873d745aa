"""Runs measurements in processes of their own: they get ready side by side, and are timed one after another.

Getting ready (imports, packing, compiling, a first call) takes far longer than timing, and most of it is the CPU's
work. And whatever ends a process, such as a peer's illegal access, ends nothing but what that process was about.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import multiprocessing as mp
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process measures: a kernel on a shape at some M.

    Attributes:
        shape: of `moe_problem.SHAPES`, or `moe_dense.NAME`.
        kernel: `ours`, or a peer's key.
        ms: numbers of tokens.
        schemes: for `ours`.
        tuned: search configs first.
        checked: compare with fp64 first.
    """

    shape: str
    kernel: str
    ms: tuple[int, ...]
    schemes: tuple[str, ...] = ()
    tuned: bool = False
    checked: bool = True

    @property
    def name(self) -> str:
        """For people, and for the log's file name."""
        return f"{self.shape}.{self.kernel}"


Measure = Callable[[Job], Iterator[Row]]
"""Gives `{"at": M}` when it turns to an M, `READY` before it times anything, and rows."""

READY: Row = {"ready": True}
DONE: Row = {"done": True}


@dataclass
class _Process:
    job: Job
    process: BaseProcess
    pipe: Connection
    log: Path
    at: int | None = None

    def receive(self, seconds: float) -> Row:
        """The next message that is not about progress. Raises EOFError with the reason where none comes."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise EOFError(f"no answer within {seconds:.0f} s")
                message: Row = self.pipe.recv()
            except (EOFError, ConnectionError) as error:
                self.end()
                raise EOFError(
                    str(error) or f"the process ended with {self.process.exitcode}: {self._last()}"
                ) from None
            if "at" not in message:
                return message
            self.at = message["at"]

    def end(self) -> None:
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _last(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        return (errors or lines or ["no word"])[-1][:300]


def run_jobs(
    jobs: Sequence[Job], measure: Measure, logs: Path, side_by_side: int = 12, set_up_s: float = 300,
    timing_s: float = 300,
) -> Iterator[Row]:  # fmt: skip
    """Rows of all jobs, and `{"shape", "kernel", "M", "why"}` for what could not be measured.

    An M at which a process ends while it gets ready is left out, and the rest begun again.

    Args:
        side_by_side: processes at a time; the device's memory must hold what so many have made ready.
        set_up_s, timing_s: how long one may say nothing, before it is ready and then.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(jobs), side_by_side):
        yield from _run(jobs[first : first + side_by_side], measure, logs, set_up_s, timing_s)


def _run(jobs: Sequence[Job], measure: Measure, logs: Path, set_up_s: float, timing_s: float) -> Iterator[Row]:
    ready = []
    for one in [_start(job, measure, logs) for job in jobs]:
        begun: _Process | None = one
        while begun is not None:
            try:
                message = begun.receive(set_up_s)
                if message == READY:
                    ready.append(begun)
                    break
                yield message
            except EOFError as error:
                yield _missing(begun, str(error))
                left = tuple(m for m in begun.job.ms if m != begun.at)
                again = begun.at is not None and left
                begun = _start(replace(begun.job, ms=left), measure, logs) if again else None
    for begun in ready:
        begun.pipe.send("go")
        try:
            while (row := begun.receive(timing_s)) != DONE:
                yield row
            begun.end()
        except EOFError as error:
            yield _missing(begun, str(error))


def _missing(begun: _Process, why: str) -> Row:
    return {"shape": begun.job.shape, "kernel": begun.job.kernel, "M": begun.at, "why": why}


def _start(job: Job, measure: Measure, logs: Path) -> _Process:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    log = logs / f"{job.name}.log"
    process = context.Process(target=_work, args=(job, measure, there, log), daemon=True)
    process.start()
    there.close()
    return _Process(job, process, here, log)


def _work(job: Job, measure: Measure, pipe: Connection, log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for row in measure(job):
        pipe.send(row)
        if row == READY:
            pipe.recv()
    pipe.send(DONE)
    sys.stdout.flush()
    os._exit(0)  # a peer's threads or device state may not let it end otherwise
