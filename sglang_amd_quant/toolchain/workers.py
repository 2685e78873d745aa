"""One process an architecture, for compilers that cannot be asked for two in one process, or that abort instead of
raising.

Triton 3.6.0 is both: the first conversion to fp8 that a process compiles for AMD fixes, in a static table of its C++
lowering, how every later one is done, whatever the target. gfx942 code compiled after gfx950 code then has instructions
that gfx942 lacks; gfx950 code compiled after gfx942 code silently does without its own. And LLVM ends the process at
what it cannot lower.
"""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import ParamSpec, TypeVar

import sglang_amd_quant

P = ParamSpec("P")
T = TypeVar("T")


class ProcessAborted(Exception):
    """The process ended before it answered; the message is what it said last."""


@cache
def _context() -> BaseContext:
    """Processes forked from one that has imported torch and Triton, which takes seconds, and compiled nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.compiler"])
    return context


class Worker:
    """A process of its own, started when first asked, started again after an abort."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._log = Path()

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Begin a call in the process; module-level functions and picklable arguments only."""
        if self._pool is None:
            handle, name = tempfile.mkstemp(prefix="amd-mx-worker-", suffix=".log")
            os.close(handle)
            self._log = Path(name)
            start = (list(sglang_amd_quant.__path__), name)
            self._pool = ProcessPoolExecutor(1, _context(), initializer=_start, initargs=start)
        return self._pool.submit(function, *args, **kwargs)

    def result(self, future: Future[T]) -> T:
        """What a call returned or raised.

        Raises:
            ProcessAborted: the process died of it.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            said = self._log.read_text(errors="replace")
            self.close()
            raise ProcessAborted(_last_words(said)) from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            self._log.unlink(missing_ok=True)


def _start(package_path: list[str], log: str) -> None:
    """First thing in the process: an uninstalled checkout's subpackages (bench/source_tree.py), a file for what C++
    writes to standard error, and nothing for the garbage collector to do about what is imported."""
    gc.freeze()
    sglang_amd_quant.__path__[:] = package_path
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)


def _last_words(said: str) -> str:
    found = re.findall(r"^.*(?:LLVM ERROR|Assertion|error:).*$", said, re.M)
    return found[0].strip() if found else "the compiler's process ended without a word"
