"""How a problem is split over clusters, blocks and waves by `kernels/hip/decode_gemm.hip` on sm_90.

AMD targets have plans of their own, in `decode_gemm_amd.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip.manifest import MANY_M
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.selection.hopper_decode import (
    COMMON,
    DECODE_WEIGHTS,
    EARLY_PREPARED,
    TILE_K,
    TILE_ROWS,
    DecodeWeights,
    early_tiles,
    lds_bytes,
    prepared_lds,
    ring_chunk,
)

MOST_X_WAVES = 8
_EARLY_WAVES = {8: 32, 16: 28, 32: 24, 64: 24}
"""Waves that find registers on a multiprocessor, of kernels that have waves for x."""
RESIDENT = -1
"""`DecodePlan.share` of an x that is prepared, and then held as a whole by the blocks that multiply it."""


@dataclass(frozen=True)
class DecodePlan:
    """A launch but for its pointers; names as in `struct DecodeArgs` (include/decode.h).

    Attributes:
        rows: of activations that the entry point is instantiated for.
        split: blocks, a cluster, that share K.
        waves_k, waves_n: waves of a block along K, and along N.
        groups: clusters that take the row groups (waves_n tiles of 16 rows) round robin; `one_group`: one each.
        depth, chunk: `depth` bulk copies of `chunk` tiles are under way for every wave.
        lds: bytes of shared memory a block.
        share: 0 where every block quantizes its part of x; else a launch in front does: RESIDENT where every block then
            fetches its part, or so many row groups whose blocks, a cluster, stream it together.
        x_waves: more waves of a block, which fetch x while the others wait for weights and bring them into the order in
            which the matrix unit takes them from shared memory (few rows of x by e4m3: as they are): one row group a
            block, and rings that hold all of K. 0 where all waves fetch x.
        paired: two blocks, a cluster, have COMMON row tiles in common, and multiply chunks of these along K by turns;
            each finishes half of them. x streams to each by itself, and no more of K is shared.
    """

    rows: int
    split: int
    waves_k: int
    waves_n: int
    groups: int
    depth: int
    chunk: int
    lds: int
    share: int = 0
    x_waves: int = 0
    paired: bool = False

    @property
    def early(self) -> bool:
        """Whether all weights of a block are in shared memory, and decoded, before they are multiplied."""
        return self.x_waves > 0

    @property
    def one_group(self) -> bool:
        """Whether a block takes one row group only."""
        return self.share > 0 or self.early

    @property
    def own_rows(self) -> bool:
        """Whether x streams and a wave has all of K of its rows, so that it finishes them by itself."""
        return self.share > 0 and self.split * self.waves_k == 1 and not self.paired

    @property
    def kind(self) -> str:
        """Of the entry point: its name goes on with the scheme."""
        streams = "paired_" if self.paired else "own_" if self.own_rows else "prepared_"
        return "early_" if self.early else streams if self.share > 0 else ""

    @property
    def together(self) -> int:
        """Row groups of a cluster: those whose blocks stream x together, or a pair's two."""
        return 2 if self.paired else max(1, self.share)

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.split * self.together

    @property
    def row_tiles(self) -> int:
        """Of a row group: what its blocks finish, which of a pair is less than they multiply."""
        return self.waves_n - COMMON // 2 * self.paired

    @property
    def waves(self) -> int:
        """Waves of a block that multiply."""
        return self.waves_k * self.waves_n

    @property
    def blocks(self) -> int:
        """Blocks for `rows` of x."""
        return self.groups * self.split


def prepared_bytes(scheme: str, plan: DecodePlan, m: int, k: int) -> int:
    """Bytes that the launch in front leaves of x [m, k]: values, and a factor a row of quantized ones. 0 without it."""
    w, rows = DECODE_WEIGHTS[scheme], -(-m // plan.rows) * plan.rows
    factors = 4 if w.x_bytes == 1 else 0
    return rows * (-(-k // TILE_K) * TILE_K * w.x_bytes + factors) if plan.share else 0


@cache  # asked at every launch
def lds_of(scheme: str, plan: DecodePlan, k: int) -> int:
    """Bytes of shared memory that a block of a plan whose x does not stream needs."""
    w = DECODE_WEIGHTS[scheme]
    return lds_bytes(
        w, plan.rows, -(-k // w.tile_k), plan.split, plan.waves_k, plan.waves_n, plan.depth, plan.chunk,
        early=plan.early,
    )  # fmt: skip


def max_waves(w: DecodeWeights, rows: int) -> int:
    """Waves that a block may have: `KERNEL(...)` in decode_gemm.hip."""
    return 16 if rows >= w.wide_from else 8


Shape = tuple[int, ...]
"""split, waves_k, waves_n, depth, chunk, and share where x is prepared: `DecodePlan`."""


_WANTED: dict[tuple[str, int], tuple[Shape, Shape, Shape, Shape]] = {
    # kind, most rows of x: many row groups a block; long K with few row tiles, or more; short K
    ("e2m1", 1): ((2, 2, 2, 2, 8), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (2, 2, 4, 1, 8)),
    ("e2m1", 2): ((2, 1, 8, 2, 8), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (2, 2, 4, 1, 8)),
    ("e2m1", 4): ((2, 1, 8, 2, 8), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (2, 2, 4, 1, 8)),
    ("e2m1", 8): ((8, 1, 8, 2, 8), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (4, 1, 8, 1, 8)),
    ("e2m1", 16): ((4, 1, 12, 2, 8, -1), (4, 4, 4, 1, 8, 1), (8, 1, 12, 2, 6), (2, 2, 8, 2, 4, -1)),
    ("e2m1", 32): ((1, 1, 12, 2, 8, 1), (8, 1, 4, 3, 4, 1), (8, 1, 12, 2, 6), (1, 4, 4, 1, 8, 1)),
    ("e2m1", 64): ((1, 1, 12, 3, 4, 1), (8, 1, 4, 2, 4, 1), (8, 1, 12, 3, 4, 1), (1, 4, 4, 2, 2, 1)),
    ("e4m3", 1): ((2, 2, 4, 2, 8), (8, 1, 4, 1, 12), (8, 1, 4, 1, 12), (2, 2, 2, 1, 8)),
    ("e4m3", 2): ((8, 1, 8, 2, 8), (8, 1, 8, 1, 12), (8, 1, 8, 1, 12), (4, 1, 4, 1, 8)),
    ("e4m3", 4): ((8, 1, 8, 2, 8), (8, 2, 4, 2, 2), (8, 1, 8, 2, 3), (4, 1, 4, 2, 2)),
    ("e4m3", 8): ((8, 1, 8, 2, 8), (8, 2, 4, 2, 2), (8, 1, 8, 4, 2), (2, 2, 4, 2, 2)),
    ("e4m3", 16): ((4, 1, 16, 2, 4), (8, 2, 8, 2, 2), (8, 1, 12, 2, 3), (4, 1, 16, 2, 2)),
    ("e4m3", 32): ((8, 1, 12, 2, 4), (4, 2, 4, 3, 4, 1), (8, 1, 12, 2, 3), (1, 4, 4, 3, 2, 1)),
    ("e4m3", 64): ((1, 1, 16, 4, 2, 1), (4, 2, 4, 4, 2, 1), (8, 1, 12, 4, 2, 1), (1, 4, 4, 4, 1, 1)),
    ("int4", 1): ((2, 2, 2, 2, 8), (8, 2, 4, 1, 6), (8, 1, 4, 1, 12), (4, 1, 8, 1, 8)),
    ("int4", 2): ((2, 2, 4, 2, 16), (8, 2, 4, 1, 6), (8, 1, 8, 1, 6), (4, 1, 8, 1, 8)),
    ("int4", 4): ((2, 2, 4, 2, 16), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (4, 1, 8, 1, 8)),
    ("int4", 8): ((8, 1, 8, 1, 16), (8, 2, 4, 1, 6), (8, 1, 8, 1, 12), (4, 1, 8, 1, 8)),
    ("int4", 16): ((4, 1, 16, 2, 8, -1), (4, 4, 4, 1, 8, 1), (8, 1, 12, 2, 6), (1, 4, 4, 1, 8, 1)),
    ("int4", 32): ((1, 1, 12, 2, 8, 1), (4, 4, 4, 1, 8, 1), (8, 1, 12, 2, 6), (1, 4, 4, 1, 8, 1)),
    ("int4", 64): ((1, 1, 12, 3, 4, 1), (8, 1, 4, 2, 4, 1), (8, 1, 12, 3, 4, 1), (1, 4, 4, 2, 2, 1)),
    ("row_e2m1", 2): ((2, 4, 4, 2, 8), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (2, 1, 12, 2, 8)),
    ("row_e2m1", 4): ((4, 1, 16, 2, 8), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (2, 1, 12, 2, 8)),
    ("row_e2m1", 8): ((2, 4, 4, 2, 8, -1), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (8, 1, 8, 1, 4)),
    ("row_e2m1", 16): ((4, 1, 16, 2, 8, -1), (4, 2, 4, 2, 6, -1), (8, 1, 12, 2, 6, -1), (1, 4, 4, 2, 4, -1)),
    ("row_e2m1", 32): ((1, 1, 8, 2, 8, 1), (4, 2, 4, 2, 6, -1), (8, 1, 12, 2, 6, -1), (1, 2, 4, 2, 8, -1)),
    ("row_e2m1", 64): ((1, 1, 12, 2, 8, 1), (4, 4, 4, 1, 8, 1), (2, 4, 4, 2, 4, 1), (1, 4, 4, 2, 4, 1)),
    ("row_e4m3", 2): ((2, 4, 4, 2, 4), (8, 1, 4, 1, 12), (8, 1, 8, 1, 12), (4, 1, 4, 1, 8)),
    ("row_e4m3", 4): ((8, 1, 12, 2, 8), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (4, 1, 8, 1, 8)),
    ("row_e4m3", 8): ((8, 1, 12, 2, 8), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (8, 1, 8, 1, 2)),
    ("row_e4m3", 16): ((8, 2, 8, 2, 4), (8, 2, 8, 2, 3), (8, 1, 12, 4, 2), (4, 1, 8, 2, 4)),
    ("row_e4m3", 32): ((4, 1, 12, 2, 4, -1), (4, 2, 4, 1, 12, -1), (8, 1, 12, 2, 6, -1), (1, 4, 4, 2, 4, 1)),
    ("row_e4m3", 64): ((1, 1, 12, 3, 4, 2), (4, 2, 4, 2, 4, 1), (4, 1, 12, 2, 4, 1), (1, 4, 4, 3, 2, 2)),
}
"""What measured best, or within a few percent, of 16 to 400 plans each for 70 dense problems (`python -m bench.decode
--schemes w4a8,mxfp8 --explore 100`), on an H100; rows with many row groups on an H200 (docs/measured/decode_h200.json);
`e2m1` and `e4m3`, which are for bf16 activations, with kernels for quantized ones that worked as theirs do; of `int4`,
of 16 plans each. Chunks are in tiles of 64 along K.

K is shared by more blocks the longer it is and the more activations each would have to quantize, and few enough tiles
remain to a wave that its ring holds all of them, or half; where every block has many row groups to take, K is shared by
fewer. A launch in front costs a few microseconds, so x is prepared only where it is large, or blocks have little else
to do.
"""

_WANTED_4096: dict[tuple[str, int], Shape] = {
    ("row_e2m1", 2): (8, 1, 4, 1, 8),
    ("row_e2m1", 4): (8, 1, 4, 1, 8),
    ("row_e2m1", 16): (4, 1, 4, 2, 8, -1),
    ("row_e2m1", 32): (4, 1, 12, 2, 8, -1),
    ("row_e2m1", 64): (1, 4, 4, 2, 4, 1),
    ("row_e4m3", 2): (8, 1, 4, 1, 8),
    ("row_e4m3", 16): (8, 1, 12, 2, 4),
    ("row_e4m3", 32): (1, 4, 4, 2, 4, 1),
    ("row_e4m3", 64): (1, 4, 4, 3, 2, 2),
    ("e2m1", 64): (4, 1, 12, 3, 4, 1),
    ("int4", 32): (8, 1, 8, 1, 8),
    ("int4", 64): (2, 2, 4, 2, 4, 1),
}
"""Likewise of K from 4096 to 6143 and more row tiles than multiprocessors: 30 plans each for 4096 -> 6144 and 4096."""

_WANTED_MORE: dict[tuple[str, int], Shape] = {
    ("e2m1", 16): (2, 4, 4, 3, 4, 1),
    ("e2m1", 32): (2, 4, 4, 2, 4, 1),
    ("e2m1", 64): (2, 4, 4, 2, 2, 1),
    ("int4", 32): (2, 4, 4, 2, 4, 1),
    ("int4", 64): (2, 4, 4, 2, 2, 1),
}
"""Likewise of longer K and three row tiles or more to two multiprocessors; of 32 and 64 rows, here and above, some 85
plans each for 17 shapes (docs/measured/decode_plans_32_64.json)."""

_WANTED_EARLY: dict[tuple[str, int], tuple[Shape | None, ...]] = {
    # kind, most rows of x: K from 6144 on with few row tiles, or more; K from 4096, from 2048 on; shorter
    ("row_e2m1", 2): ((8, 1, 8, 4, 3), (8, 1, 4, 1, 12), (8, 1, 4, 2, 4), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 4): ((8, 1, 8, 4, 3), (8, 1, 4, 2, 6), (8, 1, 12, 2, 4), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 8): ((8, 1, 16, 2, 6), (8, 1, 8, 4, 3), (4, 1, 12, 2, 8), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 16): ((8, 1, 16, 2, 6), (8, 1, 16, 2, 6), (4, 1, 12, 2, 8), (2, 1, 12, 4, 4), (2, 1, 12, 4, 3)),
    ("row_e2m1", 32): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, (1, 4, 4, 4, 2), (1, 2, 4, 4, 3)),
    ("row_e2m1", 64): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, None, (1, 2, 4, 4, 3)),
    ("row_e4m3", 2): ((8, 2, 4, 2, 3), (8, 1, 8, 4, 3), (8, 1, 8, 1, 8), (4, 1, 8, 4, 2), (2, 1, 16, 1, 12)),
    ("row_e4m3", 4): ((8, 1, 4, 2, 6), (8, 1, 8, 4, 3), (8, 1, 12, 1, 8), (2, 2, 4, 4, 2), (2, 1, 16, 1, 12)),
    ("row_e4m3", 8): ((8, 1, 12, 1, 12), (8, 1, 16, 4, 3), (4, 1, 12, 2, 8), (2, 2, 4, 4, 2), (2, 1, 16, 2, 6)),
    ("row_e4m3", 16): ((8, 1, 16, 1, 12), (8, 1, 16, 4, 3), (4, 1, 12, 2, 8), (2, 2, 8, 4, 2), (2, 1, 16, 1, 12)),
    ("row_e4m3", 32): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, (1, 4, 4, 4, 2), (1, 2, 4, 4, 3)),
    ("row_e4m3", 64): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, None, (1, 2, 4, 4, 3)),
}
"""The same of plans with waves of their own for x, which are preferred where there are any, but for None. Of up to 150
plans each."""


def _large(row_tiles: int, cu_count: int) -> bool:
    """Whether a block has many row groups to take."""
    return row_tiles >= 8 * cu_count


_WANTED_PAIR: Shape = (1, 1, 16, 2, 8, 1)
"""Of blocks that are pairs, what measured best of nine plans on an H200, for N = 28672 (docs/decode_log.md)."""


def _even_in_pairs(row_tiles: int, cu_count: int) -> bool:
    """Whether the multiprocessor with most row tiles has fewer by that than by any blocks of their own."""

    def most(of_block: int) -> int:
        return -(-row_tiles // (of_block * cu_count)) * of_block

    return most(_WANTED_PAIR[2] - COMMON // 2) < min(most(of_block) for of_block in (8, 12, 16))


def _beside(kind: str, m: int, tiles: int, row_tiles: int, cu_count: int) -> Shape | None:
    """What is wanted of plans with waves for x where a launch leaves half of the multiprocessors to the next, whose
    weights arrive there while this one multiplies: e4m3 of K from 1536 to 2048, as measured on an H200
    (docs/decode_log.md). Of one or two rows beyond 1536 less is gained so than lost where no launch overlaps."""
    if kind != "row_e4m3" or m > 16 or not 24 <= tiles <= (24 if m <= 2 else 32):
        return None
    held = -(-tiles // 2)  # by a wave; twelve waves hold sixteen beside as many rows of x, sixteen hold twelve
    choices, depth = ((8, 12, 16), 1) if held == 12 else ((12,), 4)
    for waves_n in choices:
        if cu_count // 3 < 2 * -(-row_tiles // waves_n) <= cu_count // 2:
            return (2, 1, waves_n, depth, -(-held // depth))
    return None


def _wanted(kind: str, m: int, tiles: int, row_tiles: int, cu_count: int, early: bool) -> tuple[Shape, bool]:
    """What is wanted, and whether it has waves for x, which may be only if there is such a plan: `early`."""
    most = next(most for most in (1, 2, 4, 8, 16, 32, 64) if m <= most and (kind, most) in _WANTED)
    if _large(row_tiles, cu_count):
        # Measured at K = 8192: a shorter one is shared by fewer, so that waves go on as long.
        split, waves_k, *rest = _WANTED[kind, most][0]
        fewer = max(min(split, 2), split * min(tiles, 128) // 128)
        if kind == "row_e2m1":  # measured at K = 4096 too
            waves_k = max(1, min(waves_k, split * waves_k * min(tiles, 128) // (128 * fewer)))
        return (fewer, waves_k, *rest), False
    which = 3 if tiles < 64 else 1 if row_tiles <= cu_count else 2
    by_k = which - 1 if tiles >= 96 else 2 if tiles >= 64 else 3 if tiles >= 32 else 4
    if early and (in_time := _beside(kind, m, tiles, row_tiles, cu_count) or _WANTED_EARLY[kind, most][by_k]):
        return in_time, True
    wanted = _WANTED[kind, most][which]
    if which == 2 and (tiles < 96 or 2 * row_tiles >= 3 * cu_count):
        return (_WANTED_4096 if tiles < 96 else _WANTED_MORE).get((kind, most), wanted), False
    return wanted, False


def _distance(plan: DecodePlan, w: DecodeWeights, wanted: Shape, tiles: int, row_tiles: int, cu_count: int) -> float:
    """How far a plan is from what is wanted, in powers of two; idle multiprocessors and uneven shares count double, and
    a wave that must wait for a second chunk with nothing under way as one more."""
    split, waves_k, waves_n, depth, chunk, share = (*wanted, 0)[:6]
    idle = max(0.0, math.log2(min(cu_count, row_tiles * split * waves_k) / plan.blocks) - 0.7)
    if (plan.split, plan.waves_k, plan.waves_n) == wanted[:3]:  # measured so
        idle = 0.0
    row_groups, in_chunk = -(-row_tiles // plan.row_tiles), plan.chunk * w.tile_k // TILE_K
    if plan.one_group:  # as many rounds as it takes
        places = _places(w, plan, cu_count)
        uneven = math.log2(-(-plan.blocks // places) * min(1, places / plan.blocks))
    else:
        uneven = math.log2(-(-row_groups // plan.groups) * plan.groups / row_groups)
    ways = abs(math.log2(plan.split * plan.waves_k / (split * waves_k))) + 0.5 * abs(math.log2(plan.split / split))
    ring = abs(math.log2(plan.depth * in_chunk / (depth * chunk))) + 0.5 * abs(math.log2(plan.depth / depth))
    waves = abs(math.log2(plan.waves / (waves_k * waves_n))) + 0.5 * abs(math.log2(plan.waves_n / waves_n))
    other = abs(math.log2(plan.share / share)) if min(plan.share, share) > 0 else 2 * (plan.share != share)
    waits = plan.depth == 1 and in_chunk * plan.split * plan.waves_k < tiles
    return 2 * (idle + uneven) + ways + 0.5 * (waves + ring + other) + waits


@cache
def plans(scheme: str, m: int, n: int, k: int, cu_count: int, activated: bool = False) -> tuple[DecodePlan, ...]:
    """Every legal dense plan of [m, k] x [n, k], those most like what measured best first.

    Args:
        scheme: one of the manifest's `DECODE_SCHEMES`, or `INT4_SCHEMES` by group (`int4_w4a16_g128`).
        activated: an activation follows: gate and up tiles must have one owner.

    Raises:
        ShapeError: no such problem, or none that shared memory holds.
    """
    w = DECODE_WEIGHTS[scheme]
    _check(w, m, n, k)
    rows = next((r for r in w.rows if m <= r), w.rows[-1])
    found = _enumerate(w, m, rows, n, k, cu_count, activated)
    if rows >= 16:
        found += _enumerate_prepared(w, rows, n, k, activated)
    if not found:
        raise ShapeError(f"decode GEMM M={m} N={n} K={k}", "activations do not fit in shared memory", "use the GEMM")
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    wanted, early = _wanted(w.kind, min(m, rows), tiles, row_tiles, cu_count, any(p.early for p in found))
    paired = rows in w.paired and _large(row_tiles, cu_count) and _even_in_pairs(row_tiles, cu_count)
    if paired:
        wanted = _WANTED_PAIR

    def distance(p: DecodePlan) -> tuple[bool, bool, float]:
        return p.early != early, p.paired != paired, _distance(p, w, wanted, tiles, row_tiles, cu_count)

    return tuple(sorted(found, key=distance))


def _in_clusters(cu_count: int, split: int) -> int:
    """Multiprocessors that clusters of `split` blocks find places on: a cluster stays within one of the GPU's groups,
    of which not all are whole. Of an H100's 132, 120 (cuOccupancyMaxActiveClusters)."""
    return cu_count if split <= 2 else cu_count * 10 // 11


def _resident(w: DecodeWeights, lds: int, rows: int, waves: int, x_waves: int = 0) -> int:
    """Blocks of so many waves that find a place on one multiprocessor."""
    registers_for = _EARLY_WAVES[rows] if x_waves else w.resident_waves(rows)
    return min((arch_facts("sm_90").lds_bytes + 1024) // (lds + 1024), registers_for // (waves + x_waves))


def _places(w: DecodeWeights, plan: DecodePlan, cu_count: int) -> int:
    """Blocks of a plan that run at the same time."""
    resident = _resident(w, plan.lds, plan.rows, plan.waves, plan.x_waves)
    return _in_clusters(cu_count, plan.cluster) * resident


def _enumerate(w: DecodeWeights, m: int, rows: int, n: int, k: int, cu_count: int, activated: bool) -> list[DecodePlan]:
    tiles, row_tiles, row_blocks = -(-k // w.tile_k), -(-n // TILE_ROWS), -(-m // rows)
    most = max_waves(w, rows)
    found = []
    for waves, waves_k, split in itertools.product((4, 8, 12, 16), (1, 2, 4), (1, 2, 4, 8)):
        waves_n, mine = waves // waves_k, tiles / split / waves_k
        if waves > most or waves % waves_k or (waves_n > row_tiles and waves > 4) or (mine < 1 and waves_k > 1):
            continue
        owned, uneven = divmod(waves_n * TILE_ROWS, split)
        if (rows >= w.wide_from and waves_n % 4) or uneven or (activated and owned % TILE_ROWS) or split > tiles:
            continue
        row_groups, most_tiles = -(-row_tiles // waves_n), -(-tiles // (split * waves_k))
        # Rings that hold all, or half, or a quarter of a wave's share of a row tile, in one chunk, two or four
        for depth, ring in itertools.product((1, 2, 4), (1, 2, 4)):
            chunk = ring_chunk(mine, depth, ring)
            lds = lds_bytes(w, rows, tiles, split, waves_k, waves_n, depth, chunk)
            places = _in_clusters(cu_count, split) * _resident(w, lds, rows, waves)
            if places and rows <= MANY_M[-1]:
                groups = min(row_groups, max(1, places // (split * row_blocks)))
                plan = DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds)
                found += [plan, replace(plan, share=RESIDENT)] if rows >= max(8, w.wide_from) else [plan]
            if w.x_bytes == 1 and early_tiles(rows, depth, chunk) >= most_tiles and not _large(row_tiles, cu_count):
                lds = lds_bytes(w, rows, tiles, split, waves_k, waves_n, depth, chunk, early=True)
                x_waves = -(-min(m, rows) // (rows // MOST_X_WAVES))  # a row each, or two
                plan = DecodePlan(rows, split, waves_k, waves_n, row_groups, depth, chunk, lds, x_waves=x_waves)
                both = plan, replace(plan, share=RESIDENT, x_waves=1)
                # only what starts at once is decoded while others wait
                found += [p for p in both[rows >= EARLY_PREPARED :] if row_blocks * p.blocks <= _places(w, p, cu_count)]
    return list(dict.fromkeys(found))


def _enumerate_prepared(w: DecodeWeights, rows: int, n: int, k: int, activated: bool) -> list[DecodePlan]:
    room = arch_facts("sm_90").lds_bytes
    tiles, row_tiles = -(-k // w.tile_k), -(-n // TILE_ROWS)
    found = []
    for waves_k, waves_n, split, share, paired in itertools.product(
        (1, 2, 4), (4, 8, 12, 16), (1, 2, 4, 8), (1, 2, 4), (False, True)[: 1 + (rows in w.paired)]
    ):
        plan = DecodePlan(rows, split, waves_k, waves_n, 0, 0, 0, 0, share, paired=paired)
        if paired and (waves_k * split * share > 1 or waves_n == COMMON):
            continue
        owned, row_groups = waves_n * TILE_ROWS // split, -(-row_tiles // plan.row_tiles)
        if waves_k * waves_n > 16 or split * share > 8 or split > tiles or share > row_groups:
            continue
        if (waves_n > row_tiles and waves_n > 4) or (activated and owned % TILE_ROWS):
            continue
        groups = -(-row_groups // plan.together) * plan.together
        for chunk, blocks in itertools.product((1, 2, 4, 8), (1, 2)):  # blocks to a multiprocessor
            stages = -(-tiles // (split * chunk * waves_k))
            for depth in range(min(8, stages), min(2, stages) - 1, -1):
                lds = prepared_lds(w, rows, split, waves_k, waves_n, depth, chunk, paired=paired)
                if blocks * (lds + 1024) <= room + 1024:
                    found.append(replace(plan, groups=groups, depth=depth, chunk=chunk, lds=lds))
                    break
    return list(dict.fromkeys(found))


def _check(w: DecodeWeights, m: int, n: int, k: int) -> None:
    if m < 1 or n < 1 or k < w.group or k % w.group:
        raise ShapeError(
            f"decode GEMM M={m} N={n} K={k}", f"needs M, N >= 1 and K a multiple of {w.group}", "use the GEMM"
        )
