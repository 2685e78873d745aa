"""Our kernels in `bench.decode`: each way in which a problem can be launched, checked and timed."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from sglang_amd_quant.kernels.hip.manifest import find
from sglang_amd_quant.kernels.triton.hopper import HopperConfig, linear_hopper
from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights

from bench.decode_problem import Problem, Reference, x_format
from bench.timing import graph_us
from sglang_amd_quant.ops.hip import carry
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.ops.triton_hopper import tile_of
from sglang_amd_quant.runtime.decode_gemm import decode_gemm
from sglang_amd_quant.runtime.decode_plans import DecodePlan, plans, prepared_bytes
from sglang_amd_quant.runtime.device import Gpu
from sglang_amd_quant.selection import GemmProblem, Selector

DECODE = ("hip_decode", "hip_decode_e4m3")
"""The decode kernels of MX weights, as selection names them."""

IN_A_GRAPH = 30
"""Launches that a graph holds at least: events resolve half a microsecond, and some launches take five."""


@dataclass(frozen=True)
class Way:
    """One way to compute a problem.

    Attributes:
        what: its plan, for the report.
        run: (i, x, y, overlap=True) -> fills y, with set i of the weights.
    """

    what: dict[str, Any]
    run: Callable[..., None]


def load(device: Gpu, name: str) -> None:
    """Load a scheme's kernels: a graph capture must not be the first to need them."""
    device.load(*(e.name for e in find(f"decode_{name}_m8", "sm_90")[0].entry_points))


def launch(
    device: Gpu, p: Problem, i: int, x: torch.Tensor, y: torch.Tensor, plan: DecodePlan, overlap: bool = True
) -> None:
    """One product with set i of the weights."""
    room = prepared_bytes(p.name, plan, *x.shape)
    prepared = x.new_empty(room, dtype=torch.uint8) if room else None
    for description in decode_gemm(
        x, *p.packed[i], y, scheme=p.name, n=p.n, cu_count=device.cu_count, carry=carry(ActQuant(p.scheme)), plan=plan,
        prepared=prepared,
    ):  # fmt: skip
        device.launch(replace(description, overlap=overlap), torch.cuda.current_stream().cuda_stream)


def launch_tiles(
    p: Problem, config: HopperConfig, i: int, x: torch.Tensor, y: torch.Tensor, overlap: bool = True
) -> None:
    """The same by the kernel that more rows have."""
    w = HopperWeights(*p.packed[i], p.scheme.weight, x_format(p.scheme), p.n, p.k, None, 1)
    element = None if p.scheme.act == "bf16" else p.scheme.act
    linear_hopper(x, w, config, element=element, y=y, overlapping=overlap)


def ways(device: Gpu, p: Problem, m: int) -> list[Way]:
    """Plans of the decode kernels, the model's best first; before them the other kernel, where selection prefers it."""
    made = [
        Way(asdict(plan), partial(launch, device, p, plan=plan)) for plan in plans(p.name, m, p.n, p.k, device.cu_count)
    ]
    if p.scheme.weight != "int4":
        packed_for = x_format(p.scheme)
        tiles, layout = f"triton_hopper_{packed_for}", f"hopper_{packed_for}"
        problem = GemmProblem("linear", p.scheme.name, "sm_90", m, p.n, p.k, device.cu_count, layout=layout)
        chosen = Selector(available=frozenset({tiles, *DECODE})).decide(problem)
        if chosen.kernel == tiles:
            config = tile_of(chosen.config)
            made.insert(0, Way({"kernel": tiles, **vars(config)}, partial(launch_tiles, p, config)))
    return made


def measure(device: Gpu, p: Problem, m: int, bandwidth: float, explore: int) -> dict[str, Any]:
    """The best plan by the model, or with `explore` the best measured of that many; all of them checked."""
    reference = Reference(p, m, seed=m)
    x, y = reference.x, torch.empty(m, p.n, dtype=p.dtype, device="cuda")
    tried = []
    for way in ways(device, p, m)[: max(1, explore)]:
        error = reference.check(partial(way.run, 0), way.what)
        us = graph_us([partial(way.run, i, x, y) for i in range(p.sets)], at_least=IN_A_GRAPH)
        tried.append((us, error, way))
    us, error, way = min(tried, key=lambda t: t[0])
    alone = graph_us([partial(way.run, i, x, y, overlap=False) for i in range(p.sets)], at_least=IN_A_GRAPH)
    floor = p.bytes / bandwidth * 1e6
    row = {"scheme": p.name, "K": p.k, "N": p.n, "M": m, "us": us, "alone": alone, "floor_us": floor}
    row |= {"GB/s": p.bytes / us / 1e3, "of_floor": floor / us, "error": error, "plan": way.what, "peers": {}}
    if explore:
        row["tried"] = [[t[0], t[2].what] for t in tried]
    return row
