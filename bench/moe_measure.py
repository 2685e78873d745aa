"""What one process of `bench.moe` measures: `measure(job)`, for `moe_jobs.run_jobs`.

A graph launches the MoE once for each of several routings and sets of weights that together exceed the L2 twice; it is
replayed, the time between events divided by the launches, the median taken. Ours and the peers see the same weights,
activations and routings.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from triton.errors import TritonError

from bench import moe_dense
from bench.moe_jobs import READY, Job, Row
from bench.moe_ours import SCHEMES, Configs, Ours, check, selected
from bench.moe_problem import SHAPES, Shape, random_routing, random_weights, relative, whole
from bench.moe_tune import candidates, tune
from bench.peers_moe import PEERS
from bench.timing import graph_us

CHECKED_M = (1, 5, 61, 300)

LAYERS = 12
"""Launches in a graph, at least: a model's layers are more, and a graph takes some microseconds to begin."""

PEER_FAILURES = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    TritonError,
)
"""What a peer's failure may be: a line of the report, no end of the run."""

Problem = tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]
"""x, and ids and weights of several routings."""


def measure(job: Job) -> Iterator[Row]:
    """Rows of a job, see `moe_jobs.Measure`."""
    if job.shape == moe_dense.NAME:
        return moe_dense.measure(job)
    return _ours(job) if job.kernel == "ours" else _peer(job)


def _ours(job: Job) -> Iterator[Row]:
    shape, name = SHAPES[job.shape], job.shape
    schemes = [s for s in job.schemes if SCHEMES[s][0] == shape.element]
    for seed, (scheme, m) in enumerate((s, m) for s in schemes if job.checked for m in CHECKED_M):
        try:
            yield {"shape": name, "scheme": scheme, "M": m, "errors": check(shape, scheme, m, seed)}
        except AssertionError as wrong:
            yield {"shape": name, "scheme": scheme, "M": m, "wrong": str(wrong)}
    weights = random_weights(shape, seed=1)
    problems = {m: _problem(shape, m) for m in job.ms}
    ours = {scheme: Ours(shape, weights, scheme) for scheme in schemes}

    for scheme in schemes:
        for m in job.ms:
            yield {"at": m}
            x, routings = problems[m]
            ours[scheme].whole(x, *routings[0], selected(shape, scheme, m)[0])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield READY
    for scheme in schemes:
        mine = ours[scheme]
        for m in job.ms:
            yield {"at": m}
            x, routings = problems[m]
            (configs, source), timed = selected(shape, scheme, m), 0

            def us(pair: Configs, replays: int = 20, mine: Ours = mine, p: Problem = problems[m]) -> float:
                return graph_us([partial(mine.whole, p[0], i, w, pair) for i, w in p[1]], replays, LAYERS)

            if job.tuned:
                space = candidates(m, shape.top_k, shape.experts, mine.w13.x_format, mine.w13.w_format)
                configs, timed = tune(partial(us, replays=5), space, configs)
                source = "searched in this run"
            placed = [mine.place(i, configs[0].block_m) for i, _ in routings]
            both = zip(routings, placed, strict=True)
            gemms = graph_us([partial(mine.gemms, x, i, w, configs, r) for (i, w), r in both], at_least=LAYERS)
            yield _row(
                job, m, f"ours {scheme}", us(configs), routings, gemms=gemms, configs=source, configs_timed=timed,
                scheme=scheme, x_format=mine.w13.x_format, config13=vars(configs[0]), config2=vars(configs[1]),
            )  # fmt: skip


def _peer(job: Job) -> Iterator[Row]:
    shape = SHAPES[job.shape]
    made = PEERS[job.kernel]
    weights = random_weights(shape, seed=1)
    runs, errors = {}, {}
    try:
        peer = made(shape, weights)
    except PEER_FAILURES as failure:
        yield _why(job, made.name, None, failure)
        yield READY
        return
    for m in job.ms:
        yield {"at": m}
        x, routings = _problem(shape, m)
        try:
            bound = [peer.bind(x, i, w) for i, w in routings]
            y = bound[0]()
            torch.cuda.synchronize()
            errors[m] = relative(y, whole(x, *routings[0], weights, shape)) if m <= 256 else None
            runs[m] = (bound, routings)
        except PEER_FAILURES as failure:
            torch.cuda.synchronize()  # raises where the device is lost to this process
            yield _why(job, made.name, m, failure)
    torch.cuda.empty_cache()
    yield READY
    for m, (bound, routings) in runs.items():
        yield {"at": m}
        try:
            yield _row(job, m, made.name, graph_us(bound, at_least=LAYERS), routings, error=errors[m])
        except PEER_FAILURES as failure:
            torch.cuda.synchronize()
            yield _why(job, made.name, m, failure)


def _why(job: Job, name: str, m: int | None, failure: Exception) -> Row:
    return {"shape": job.shape, "kernel": name, "M": m, "why": f"{type(failure).__name__}: {str(failure)[:300]}"}


def _problem(shape: Shape, m: int) -> Problem:
    """x and routings of M tokens, so many that the weights they touch exceed the L2 twice, the same in each process."""
    torch.manual_seed(m)
    active = random_routing(m, shape, 0)[0].unique().numel()
    sets = max(3, min(24, -(-(2 << 26) // (active * shape.weight_bytes))))
    x = torch.randn(m, shape.hidden, device="cuda").bfloat16()
    return x, [random_routing(m, shape, seed) for seed in range(sets)]


def _row(job: Job, m: int, kernel: str, us: float, routings: list[tuple[torch.Tensor, torch.Tensor]],
         **more: object) -> Row:  # fmt: skip
    shape = SHAPES[job.shape]
    active = statistics.mean(i.unique().numel() for i, _ in routings)
    return {
        "shape": job.shape, "kernel": kernel, "M": m, "active": active, "us": us,
        "weight_bytes": active * shape.weight_bytes, "flops": m * shape.top_k * shape.flops, **more,
    }  # fmt: skip
