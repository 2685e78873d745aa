"""How `kernels/hip/decode_gemm.hip` is launched on AMD: the split of a problem over blocks and waves.

What a launch needs, `selection/amd_decode.py` says, as a kernel is chosen only where one fits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip.manifest import AMD_DECODE_M, AMD_MOE_DECODE_M
from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.runtime.decode_gemm import ACTIVATIONS, INTERLEAVED, NOTHING, Epilogue, check_operands, out_code
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import WORD_BYTES
from sglang_amd_quant.selection.amd_decode import (
    FORMATS,
    MAX_THREADS,
    SPLITS,
    TILE_K,
    TILE_ROWS,
    WORKSPACE_COUNTERS,
    factors_of_tile,
    group_of,
    lds_bytes,
    takes_codes,
    workspace_bytes,
)

DEPTH = 4
"""Tiles that a wave has under way (Stream::DEPTH)."""
RESIDENT_WAVES = 16
"""Waves of a CU that find their registers in any of these kernels."""


def _bytes(scheme: str) -> float:
    """Of one weight, without scales."""
    return 1 if FORMATS[scheme][0] == "e4m3" else 0.5


def scale_bytes(scheme: str, k: int) -> float:
    """Of the scales of a row of weights."""
    return k / group_of(scheme) * (WORD_BYTES if FORMATS[scheme][0] == "int4" else 1)


def layout_name(arch: str, scheme: str) -> str:
    """The `TensorLayout` that the kernels read on that target; on gfx942 e4m3 values are FNUZ (`MxTensor.to_fnuz`)."""
    weight = FORMATS[scheme][0]
    if weight == "int4":
        return f"{'rdna' if arch.startswith('gfx11') else 'cdna'}_int4+tile_group"
    if arch == "gfx950":
        return "mxfp8_lane+tile_scale" if weight == "e4m3" else "preshuffle+tile_scale"
    return f"cdna3_{weight}+tile_scale" if arch == "gfx942" else "preshuffle+tile_scale"


@dataclass(frozen=True)
class AmdDecodePlan:
    """A launch but for its pointers; names as in `struct DecodeArgs` (include/decode.h).

    Attributes:
        rows: of activations that the entry point is instantiated for.
        split: blocks that share K.
        waves_k, waves_n: waves of a block along K, and along N.
        groups: blocks (times split) that take the row groups (waves_n tiles of 16 rows) round robin.
        resident: blocks that a CU holds at a time.
        threads: threads a block.
        lds: bytes of LDS a block.
    """

    rows: int
    split: int
    waves_k: int
    waves_n: int
    groups: int
    resident: int
    threads: int
    lds: int

    def workspace_bytes(self, row_blocks: int, n: int) -> int:
        """Bytes of workspace that a launch needs: 0 without a split of K."""
        return workspace_bytes(self.rows, row_blocks, n, self.split, self.waves_n)


@dataclass(frozen=True)
class _Cost:
    """What a launch is modelled with, in cycles. Instructions are counted by the emulator (differences between runs
    that differ by tiles, row groups or K alone), the rest is from data sheets; nothing is measured.

    Attributes:
        codes: instructions a wave spends on one tile whose activations are codes, e2m1 and e4m3 weights.
        wide: on one whose activations have 16 bits, e2m1, e4m3 and int4 weights.
        groups: further ones for each group of int4.
        sums: further ones for each sum of a lane, where the scales of four blocks are applied to sums.
        piece: on quantizing eight activations to e4m3, to e2m1, or to halves with a factor; on copying them.
        group: on a row group, besides `output` for each of its sums that a thread finishes.
        issue: cycles that an instruction occupies its SIMD.
        bandwidth: bytes a cycle that memory delivers to each CU when all of them ask.
        latency: cycles from a load to its data when memory is busy.
        meet: cycles that blocks which share K take to find out who is last.
        clock: cycles a microsecond.
    """

    codes: tuple[int, int]
    wide: tuple[int, int, int]
    groups: int
    sums: int
    piece: tuple[int, int, int, int]
    issue: int
    bandwidth: float
    latency: int
    meet: int
    clock: int
    group: int = 115
    output: int = 130

    def of_tile(self, scheme: str, rows: int, lane_sums: int, codes: bool) -> float:
        """Instructions on one tile."""
        weight = FORMATS[scheme][0]
        base = (self.codes if codes else self.wide)[("e2m1", "e4m3", "int4").index(weight)]
        groups = TILE_K // group_of(scheme)
        if weight == "int4":
            base += self.groups * groups
        return base * (1 if rows <= 16 else 1.5) + self.sums * groups / 4 * lane_sums

    def of_piece(self, scheme: str, factors: int) -> int:
        """Instructions on eight activations."""
        kind = {"e4m3": 0, "fp8_static": 0, "e2m1": 1, "bf16": 2, "fp16": 2}[FORMATS[scheme][1]]
        return self.piece[3 if kind == 2 and not factors else kind]


_RDNA3 = {"codes": (0, 0), "wide": (305, 462, 244), "groups": 2, "sums": 12, "piece": (304, 239, 111, 53), "issue": 1}
_COSTS = {
    "gfx950": _Cost((20, 22), (45, 53, 61), 9, 0, (64, 64, 96, 28), 4, 13.0, 2000, 4000, 2400),
    "gfx942": _Cost((0, 47), (105, 124, 70), 8, 4, (145, 218, 104, 36), 4, 8.3, 2000, 4000, 2100),
    "gfx1100": _Cost(**_RDNA3, bandwidth=4.2, latency=1500, meet=3000, clock=2500),  # type: ignore[arg-type]
    "gfx1151": _Cost(**_RDNA3, bandwidth=2.2, latency=1500, meet=3000, clock=2900),  # type: ignore[arg-type]
}


def modelled_us(arch: str, scheme: str, p: AmdDecodePlan, m: int, n: int, k: int, cu_count: int) -> float:
    """Modelled, not measured: microseconds from the first block's start to the last one's end.

    The busiest CU's time: the longer of reading its weights and of its instructions, behind one memory latency; then
    partial sums. Launching is not included.
    """
    facts, cost = arch_facts(arch), _COSTS[arch]
    waves, tiles = p.waves_k * p.waves_n, -(-k // TILE_K)
    row_groups, row_blocks = -(-n // (TILE_ROWS * p.waves_n)), -(-m // p.rows)
    blocks = row_blocks * p.groups * p.split
    busiest = -(-blocks // cu_count)
    rounds = -(-row_groups // p.groups)
    of_block = -(-tiles // p.split)
    mine = -(-of_block // p.waves_k)
    lane_sums = -(-min(p.rows, 16) // (facts.wave // 16)) * -(-p.rows // 16)
    tile = cost.of_tile(scheme, p.rows, lane_sums, takes_codes(arch, scheme))
    concurrency = max(1.0, busiest * waves / facts.simds)  # waves of a SIMD
    here = min(m, p.rows)
    staging = (
        -(-here * k // (p.split * 8 * p.threads))
        * cost.of_piece(scheme, factors_of_tile(arch, scheme))
        * cost.issue
        * concurrency
    )
    work = rounds * mine * tile * cost.issue * concurrency
    outputs = -(-here * p.waves_n * TILE_ROWS // p.threads)
    summing = rounds * (cost.group + outputs * (cost.output + 8 * p.waves_k)) * cost.issue * concurrency
    if p.split > 1:
        summing += rounds * (cost.meet + outputs * 30 * p.split)
    row_bytes = k * _bytes(scheme) + scale_bytes(scheme, k)
    moved = busiest * rounds * p.waves_n * TILE_ROWS * row_bytes / p.split
    flight = min(busiest, p.resident) * waves * min(DEPTH, mine * rounds) * TILE_ROWS * TILE_K * _bytes(scheme)
    memory = moved / cost.bandwidth * max(1.0, cost.bandwidth * cost.latency / flight)
    if rounds == 1:  # activations are quantized while the first weights are on their way
        return (cost.latency + max(memory, staging + work) + summing) / cost.clock
    return (cost.latency + staging + max(memory, work) + summing) / cost.clock


def bytes_in_flight(scheme: str, p: AmdDecodePlan, row_blocks: int, cu_count: int) -> int:
    """Bytes of weights that a CU has on their way with as many blocks as it gets at least (but for idle CUs: one)."""
    blocks = min(p.resident, max(1, row_blocks * p.groups * p.split // cu_count))
    return int(blocks * p.waves_k * p.waves_n * DEPTH * TILE_ROWS * TILE_K * _bytes(scheme))


ENOUGH_IN_FLIGHT = 24 << 10
"""Bytes a CU that keep memory busy: bandwidth times latency, 8 TB/s and 0.8 us over the 256 CUs of an MI355X."""


@cache
def plans(
    arch: str, scheme: str, m: int, n: int, k: int, cu_count: int, block_m: int = 0, blocks: int = 0
) -> tuple[AmdDecodePlan, ...]:
    """Every legal split of [m, k] x [n, k] over blocks and waves, best first: enough in flight, then `modelled_us`.

    Args:
        arch: `gfx950`, `gfx942`, `gfx1100` or `gfx1151`.
        scheme: one of `FORMATS`.
        cu_count: compute units.
        block_m, blocks: grouped: rows of a routed block, and how many blocks there are; 0: dense.

    Raises:
        ShapeError: no such problem, or none that LDS holds.
    """
    what = f"decode GEMM M={m} N={n} K={k}"
    group = group_of(scheme)
    if m < 1 or n < 1 or k < group or k % group:
        raise ShapeError(what, f"needs M, N >= 1 and K a multiple of {group}", "use the GEMM")
    if block_m and block_m not in AMD_MOE_DECODE_M:
        raise ShapeError(f"blocks of {block_m} routed rows", "no such kernel", f"use one of {AMD_MOE_DECODE_M}")
    rows = block_m or next((r for r in AMD_DECODE_M if m <= r), AMD_DECODE_M[-1])
    row_blocks = blocks or -(-m // rows)
    found = list(_enumerate(arch_facts(arch), scheme, rows, row_blocks, n, k, cu_count))
    if not found:
        raise ShapeError(what, "activations do not fit in LDS", "use the GEMM")
    # Grouped: a share of the CUs for each block, as if it were alone.
    here, share = (block_m, max(1, cu_count // blocks)) if blocks else (m, cu_count)
    weights = n * k * _bytes(scheme) * row_blocks / cu_count
    wanted = min(ENOUGH_IN_FLIGHT, weights)

    def rank(p: AmdDecodePlan) -> tuple[bool, float]:
        short = bytes_in_flight(scheme, p, row_blocks, cu_count) < wanted
        return short, modelled_us(arch, scheme, p, here, n, k, share)

    return tuple(sorted(found, key=rank))


@cache
def plan_within(
    room: int, arch: str, scheme: str, m: int, n: int, k: int, cu_count: int, block_m: int, blocks: int
) -> AmdDecodePlan:
    """The first of `plans` whose workspace has at most `room` bytes. Raises ShapeError as it does, or if none has."""
    needs = []
    for p in plans(arch, scheme, m, n, k, cu_count, block_m, blocks):
        needs.append(p.workspace_bytes(blocks or -(-m // p.rows), n))
        if needs[-1] <= room:
            return p
    raise ShapeError(
        f"decode GEMM M={m} N={n} K={k} on {arch}",
        f"blocks that share K need at least {min(needs)} bytes of workspace, not {room}",
        "pass a larger one, or use the GEMM",
    )


def _enumerate(facts: Arch, scheme: str, rows: int, row_blocks: int, n: int, k: int, cu_count: int) -> Any:
    tiles, row_tiles, most = -(-k // TILE_K), -(-n // TILE_ROWS), MAX_THREADS // facts.wave
    for waves_n, waves_k, split in itertools.product((1, 2, 4, 8), range(1, most + 1), SPLITS):
        waves = waves_k * waves_n
        if waves > most or split > tiles or (waves_k > 1 and waves_k > -(-tiles // split)):
            continue
        row_groups = -(-row_tiles // waves_n)
        if split > 1 and row_blocks * row_groups > WORKSPACE_COUNTERS:
            continue
        lds = lds_bytes(facts.name, scheme, rows, tiles, split, waves_k, waves_n)
        resident = min(facts.lds_bytes // lds, max(1, RESIDENT_WAVES // waves))
        if not resident:
            continue
        for held in {1, resident}:
            groups = min(row_groups, max(1, cu_count * held // (split * row_blocks)))
            yield AmdDecodePlan(rows, split, waves_k, waves_n, groups, resident, waves * facts.wave, lds)


def decode_gemm_amd(
    x: Any,
    data: Any,
    scales: Any,
    y: Any,
    *,
    arch: str,
    scheme: str,
    n: int,
    cu_count: int,
    carry: int = 0,
    x_scale: Any = None,
    epilogue: Epilogue = NOTHING,
    row_ids: Any = None,
    block_experts: Any = None,
    block_m: int = 0,
    top_k: int = 1,
    workspace: Any = None,
    plan: AmdDecodePlan | None = None,
) -> LaunchDescription:
    """Describe y = x w^T, dense or grouped by expert.

    Args:
        x: [M / top_k, K] bf16, for schemes of fp16 activations fp16; rows 16-byte aligned, last dimension contiguous.
        data, scales: weights [E, N, K] or [N, K] in the layout `layout_name(arch, scheme)`; int4 with words for scales
            (`MxTensor.with_words`).
        y: [M, N], or [M, N / 2] after an activation; bf16, fp16 or fp32, last dimension contiguous.
        arch: target.
        scheme: one of `FORMATS`.
        n: rows of the weights (of one expert).
        cu_count: compute units.
        carry: rounds the activations' scales (`formats.mx.Element.carry`).
        x_scale: fp32 scalar on the device, the scale of static fp8 activations.
        epilogue: what is fused behind.
        row_ids, block_experts, block_m: routing (`ops/routing.py`); None and 0: dense.
        top_k: rows of y that share a row of x.
        workspace: zeroed when it was made, at least `plan.workspace_bytes`, for one launch at a time; None: no plan
            that splits K over blocks is taken.
        plan: instead of the best by the model.

    Raises:
        ShapeError: shapes, strides or dtypes that do not fit each other or the kernel, or too small a workspace.
    """
    check_operands(x, y, n, top_k, epilogue, scheme)
    m, k = y.shape[0], x.shape[1]
    grouped = row_ids is not None
    blocks = len(block_experts) if grouped else 0
    if plan is None:
        room = 0 if workspace is None else workspace.nbytes
        plan = plan_within(room, arch, scheme, m, n, k, cu_count, block_m, blocks)
    row_blocks = blocks or -(-m // plan.rows)
    needed = plan.workspace_bytes(row_blocks, n)
    if needed and (workspace is None or workspace.nbytes < needed):
        shapes = f"x {tuple(x.shape)}, y {tuple(y.shape)}, N {n}"
        raise ShapeError(
            shapes, f"{plan.split} blocks share K and need {needed} bytes of workspace", "pass a workspace"
        )
    return LaunchDescription(
        kernel=f"{'moe_decode' if grouped else 'decode'}_{scheme}_m{plan.rows}",
        grid=row_blocks * plan.groups * plan.split,
        block=plan.threads,
        lds=plan.lds,
        args=(
            x, data, scales, None, epilogue.bias, x_scale, epilogue.residual, y, row_ids, block_experts,
            epilogue.row_weights, workspace if needed else None, x.stride(0), y.stride(0), m, n, k, top_k, plan.split,
            plan.waves_k, plan.waves_n, plan.groups, 0, 0, carry, out_code(y),
            ACTIVATIONS[epilogue.activation] | (INTERLEAVED if epilogue.interleaved else 0),
            epilogue.alpha, epilogue.limit or 0.0,
        ),
    )  # fmt: skip
