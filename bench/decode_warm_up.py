"""Compiles what `bench.decode` will launch, before it, in as many processes as there are cores.

Libraries keep what they compile on disk, but compile it on one core when it is first called: gemlite all of its some
twenty configurations for every shape and M. Nothing is timed here: processes share the GPU.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from bench.decode_ours import load, ways
from bench.decode_peers import FOR, PEERS, one_line
from bench.decode_problem import NAMES, Problem
from bench.timing import autotune_never
from sglang_amd_quant.runtime.device import gpu

OURS = "ours"


@dataclass(frozen=True)
class Task:
    """One kernel, or all among which one is chosen: `peer` is a peer's name or `OURS`."""

    m: int
    scheme: str
    k: int
    n: int
    peer: str
    symmetric: bool = False

    def __str__(self) -> str:
        return f"{self.scheme} {self.k} to {self.n} M={self.m} {self.peer}"


def tasks(
    schemes: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    ms: Sequence[int],
    peers: Sequence[str],
    symmetric: bool = False,
) -> list[Task]:
    """What a run needs. M varies slowest: 2, 4 and 8 rows compile to the same, and once if not at the same time."""
    every = itertools.product(sorted(ms), schemes, shapes, (*peers, OURS))
    return [
        Task(m, scheme, *shape, peer, symmetric)
        for m, scheme, shape, peer in every
        if peer == OURS or peer in FOR[NAMES[scheme][0].weight]
    ]


def warm_up(every: Sequence[Task]) -> Iterator[str]:
    """Runs each task once. Yields a line for each that could not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited
    context, cores = multiprocessing.get_context("spawn"), len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(cores, len(every)), mp_context=context) as pool:
        begun = {pool.submit(_run, task): task for task in every}
        for done in as_completed(begun):
            ended = done.exception()  # of the process; the others then end as well
            if why := one_line(ended) if ended else done.result():
                yield f"{begun[done]}: {why}"


def _run(task: Task) -> str:
    """Why it could not; empty if it could."""
    autotune_never()
    try:
        p = Problem(task.scheme, task.k, task.n, seed=0, sets=1, symmetric=task.symmetric)
        x, _ = p.activations(task.m, 0)
        if task.peer == OURS:
            load(gpu(0), task.scheme)
            ways(gpu(0), p, task.m)[0].run(0, x, x.new_empty(task.m, task.n))
        else:
            PEERS[task.peer](p.weights[0], p.dtype)(x)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as reason:
        return one_line(reason)
    return ""
