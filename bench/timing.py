"""Time of launches in CUDA graphs, and the bandwidth that floors are taken with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch


def graph_us(launches: Sequence[Callable[[], object]], replays: int = 20, at_least: int = 1) -> float:
    """Median microseconds a launch, of replays of a graph that holds all launches, over and over up to `at_least`.

    Launches should use weights of their own that together exceed the L2, or the cache is what is measured.
    """
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    rounds = max(1, at_least // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    times = []
    for i in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(launches)))
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second that torch reads when it sums up 8 GiB."""
    data = torch.ones(1 << 31, dtype=torch.float32, device="cuda")
    return data.nbytes / graph_us([lambda: torch.sum(data)] * 2, replays=10) * 1e6


def autotune_briefly() -> None:
    """Have Triton's autotuners, such as gemlite's, time a configuration by 100 launches or so where they make 800.

    They still try all their configurations, each with the L2 cold before every launch, and take the least median.
    """
    import triton.testing

    # looked up by each when it first tunes; both are milliseconds, and clearing the L2 counts as well
    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=3, rep=12)


def autotune_never() -> None:
    """Have them compile all their configurations, run each once, and find them the same."""
    import triton.testing

    def run_once(launch: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        launch()
        return [0.0 for _ in quantiles]

    triton.testing.do_bench = run_once
