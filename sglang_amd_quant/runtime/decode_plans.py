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
from sglang_amd_quant.runtime.decode_wanted import (
    RESIDENT,
    Shape,
    in_clusters,
    is_large,
    wanted_of,
)
from sglang_amd_quant.selection.hopper_decode import (
    COMMON,
    DECODE_WEIGHTS,
    EARLY_PREPARED,
    TILE_K,
    TILE_ROWS,
    DecodeWeights,
    early_sums_fit,
    early_tiles,
    lds_bytes,
    prepared_lds,
    ring_chunk,
)

MOST_X_WAVES = 8
_EARLY_WAVES = {8: 32, 16: 28, 32: 24, 64: 24}
"""Waves that find registers on a multiprocessor, of kernels that have waves for x."""


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


def entry_point(scheme: str, plan: DecodePlan) -> str:
    """The entry point that a plan launches."""
    streams = "paired_" if plan.paired else "own_" if plan.own_rows else "prepared_"
    alone = "alone_" * (plan.rows in DECODE_WEIGHTS[scheme].alone and _beside_each_other(plan.lds) < 2)
    kind = "early_" if plan.early else streams if plan.share > 0 else alone
    return f"decode_{kind}{scheme}_m{plan.rows}"


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
    early, paired = any(p.early for p in found), any(p.paired for p in found)
    wanted = wanted_of(w.kind, min(m, rows), tiles, row_tiles, cu_count, early=early, paired=paired)
    if wanted.apart:
        found = list(dict.fromkeys(found + [_apart(p) for p in found if _one_each(p, m, cu_count)]))

    def distance(p: DecodePlan) -> tuple[bool, bool, bool, float]:
        beside = wanted.apart and _beside_each_other(p.lds) > 1
        return (
            p.early != wanted.early,
            p.paired != wanted.paired,
            beside,
            _distance(p, w, wanted.shape, tiles, row_tiles, cu_count),
        )

    return tuple(sorted(found, key=distance))


def _one_each(plan: DecodePlan, m: int, cu_count: int) -> bool:
    """Whether there is a multiprocessor for every block."""
    return -(-m // plan.rows) * plan.blocks <= in_clusters(cu_count, plan.cluster)


def _apart(plan: DecodePlan) -> DecodePlan:
    """With so much shared memory that no multiprocessor has two blocks. Else, while some still have one of the launch
    in front, others may have two of this one's."""
    all_of_it = arch_facts("sm_90").lds_bytes + 1024
    return replace(plan, lds=max(plan.lds, all_of_it // 2 - 1024 + 128))


def _beside_each_other(lds: int) -> int:
    """Blocks that find so many bytes of shared memory on one multiprocessor."""
    return (arch_facts("sm_90").lds_bytes + 1024) // (lds + 1024)


def _resident(w: DecodeWeights, lds: int, rows: int, waves: int, x_waves: int = 0) -> int:
    """Blocks of so many waves that find a place on one multiprocessor."""
    registers_for = _EARLY_WAVES[rows] if x_waves else w.resident_waves(rows)
    return min(_beside_each_other(lds), registers_for // (waves + x_waves))


def _places(w: DecodeWeights, plan: DecodePlan, cu_count: int) -> int:
    """Blocks of a plan that run at the same time."""
    resident = _resident(w, plan.lds, plan.rows, plan.waves, plan.x_waves)
    return in_clusters(cu_count, plan.cluster) * resident


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
            resident = _resident(w, lds, rows, waves)
            if resident and rows <= MANY_M[-1]:
                of_group = split * row_blocks
                groups = min(row_groups, max(1, in_clusters(cu_count, split) * resident // of_group))
                plan = DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds)
                found.append(plan)
                if rows >= max(8, w.wide_from):
                    # a launch in front prepares x: multiprocessors are left to it, unless that takes more rounds
                    as_many_rounds = -(-row_groups // -(-row_groups // groups))
                    fewer = min(groups, cu_count * 10 // 11 * resident // of_group)
                    found.append(replace(plan, groups=max(as_many_rounds, fewer), share=RESIDENT))
            held = early_tiles(rows, depth, chunk) >= most_tiles and early_sums_fit(rows, split, waves_k, depth, chunk)
            if w.x_bytes == 1 and held and not is_large(row_tiles, cu_count):
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
        for chunk, blocks in itertools.product((1, 2, 4, 6, 8, 12), (1, 2)):  # blocks to a multiprocessor
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
