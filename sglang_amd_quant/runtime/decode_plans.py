"""How a problem is split over clusters, blocks and waves by `kernels/hip/decode_gemm.hip` on sm_90.

AMD targets have plans of their own, in `decode_gemm_amd.py`. The sizes of tiles and of shared memory repeat those of
`kernels/hip/include/decode_sm90.h`; `tests/device` holds the two together by running plans of many shapes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip.manifest import (
    DECODE_M,
    INT4_DECODE_M,
    INT4_GROUPS,
    INT4_MOE_DECODE_M,
    INT4_SCHEMES,
    MOE_DECODE_M,
)
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.schemes import MX_BLOCK

TILE_ROWS, TILE_K = 16, 64


@dataclass(frozen=True)
class _Weights:
    """What a plan must know of a scheme's weights.

    Attributes:
        e4m3: whether a weight is a byte, not half of one.
        group: elements along K that share a scale.
        tile_k: elements of a row in a tile.
        tile_bytes: of a tile, with its scales.
        waves: that a block for few rows may have: `KERNEL(...)` in decode_gemm.hip.
        dense, grouped: rows of activations that entry points are instantiated for.
    """

    e4m3: bool
    group: int
    tile_k: int
    tile_bytes: int
    waves: int
    dense: tuple[int, ...] = DECODE_M
    grouped: tuple[int, ...] = MOE_DECODE_M


_E4M3 = _Weights(True, MX_BLOCK, TILE_K, 1024 + 32, 8)
_E2M1 = _Weights(False, MX_BLOCK, TILE_K, 512 + 32, 12)
_INT4 = {
    32: _Weights(False, 32, TILE_K, 512 + 128, 8, INT4_DECODE_M, INT4_MOE_DECODE_M),
    64: _Weights(False, 64, TILE_K, 512 + 64, 8, INT4_DECODE_M, INT4_MOE_DECODE_M),
    128: _Weights(False, 128, 2 * TILE_K, 1024 + 64, 8, INT4_DECODE_M, INT4_MOE_DECODE_M),
}
_OF_SCHEME = dict.fromkeys(("mxfp8", "mxfp8_static", "w8a16"), _E4M3)
_OF_SCHEME |= {f"{scheme}_g{group}": _INT4[group] for scheme in INT4_SCHEMES for group in INT4_GROUPS}


def _weights(scheme: str) -> _Weights:
    return _OF_SCHEME.get(scheme, _E2M1)


WIDE_FROM = 16
"""Rows from which on four waves multiply together, by wgmma (decode_sm90_many.h)."""
RESIDENT_WAVES = {2: 24, 4: 24, 8: 24, 16: 28, 32: 20, 64: 16}
"""Waves that find registers on a multiprocessor, by rows."""


@dataclass(frozen=True)
class DecodePlan:
    """A launch but for its pointers; names as in `struct DecodeArgs` (include/decode.h).

    Attributes:
        rows: of activations that the entry point is instantiated for.
        split: blocks, a cluster, that share K.
        waves_k, waves_n: waves of a block along K, and along N.
        groups: clusters that take the row groups (waves_n tiles of 16 rows) round robin; of a prepared x, one each.
        depth, chunk: `depth` bulk copies of `chunk` tiles are under way for every wave.
        lds: bytes of shared memory a block.
        share: 0 where every block quantizes its part of x; else a launch in front does ("prepared", see
            decode_sm90_prepared.h), and the blocks of `share` row groups, a cluster, fetch it together.
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

    @property
    def waves(self) -> int:
        """Waves of a block that multiply."""
        return self.waves_k * self.waves_n

    def prepared_values(self, m: int, k: int) -> int:
        """bf16 values of x that the launch in front leaves."""
        return -(-m // self.rows) * self.rows * -(-k // TILE_K) * TILE_K if self.share else 0


def room(rows: int) -> int:
    """Columns of the matrix unit that activations are given (Activations::ROOM)."""
    return max(4, rows) if rows < 8 else rows


def lds_bytes(
    w: _Weights, rows: int, tiles: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int
) -> int:
    """Shared memory of a block: barriers, rings, activations with their factors, row factors and partial sums."""
    waves, most, columns = waves_k * waves_n, -(-tiles // split), room(rows)
    barriers = -(-(8 + waves * depth * 8) // 128) * 128
    ring = waves * depth * chunk * w.tile_bytes
    if rows < WIDE_FROM:
        activations = 16 + columns * ((most * w.tile_k + 32) * 2 + most * w.tile_k // MX_BLOCK * 4)
    else:
        activations, columns = 1024 + most * 128 * rows, columns + 4
    sums = 2 * 4 * waves_n * TILE_ROWS // split + 4 * waves * TILE_ROWS * columns
    return barriers + ring + activations + sums


Shape = tuple[int, ...]
"""split, waves_k, waves_n, depth, chunk, and share where x is prepared."""


_WIDE: dict[tuple[bool, int], tuple[Shape, Shape, Shape, Shape]] = {
    # e4m3, rows: many row groups a block; long K with few row tiles, or more; short K
    (False, 16): ((4, 1, 16, 2, 8), (8, 2, 8, 2, 3), (8, 1, 12, 2, 6), (4, 1, 16, 2, 4)),
    (False, 32): ((1, 1, 16, 4, 4, 1), (8, 1, 8, 2, 6), (8, 1, 12, 2, 6), (1, 2, 4, 4, 4, 1)),
    (False, 64): ((1, 1, 16, 3, 4, 1), (8, 1, 8, 3, 4, 1), (8, 1, 12, 3, 4, 1), (1, 2, 4, 5, 2, 1)),
    (True, 16): ((8, 1, 16, 2, 4), (8, 2, 8, 2, 2), (8, 1, 12, 2, 3), (4, 1, 8, 2, 4)),
    (True, 32): ((8, 1, 12, 2, 4), (4, 2, 4, 3, 4, 1), (8, 1, 12, 2, 3), (4, 1, 16, 2, 2)),
    (True, 64): ((1, 2, 8, 3, 2, 1), (4, 2, 4, 4, 2, 1), (8, 1, 12, 4, 2, 1), (4, 1, 16, 2, 2)),
}


def _wanted(e4m3: bool, rows: int, m: int, tiles: int, row_tiles: int, cu_count: int) -> Shape:
    """What measured best, or within a few percent, on an H100 80GB HBM3, of up to 60 plans each for 70 dense problems
    (`python -m bench.decode --schemes w4a8,mxfp8 --explore 60`).

    K is shared by more blocks the longer it is and the more activations each would have to quantize, and waves share
    what is left of it, so that 6 to 16 tiles remain to a wave; where every block has many row groups to take, by fewer.
    A launch in front costs 3 us, so x is prepared only where it is large.
    """
    large, long = row_tiles >= 8 * cu_count, tiles >= 64
    if rows >= WIDE_FROM:
        return _WIDE[e4m3, rows][0 if large else 3 if not long else 1 if row_tiles <= cu_count else 2]
    if large:
        return (2, 4, 2, 4, 4) if e4m3 else (2, 4, 2, 2, 8) if m <= 4 else (4, 2, 4, 2, 8)
    if long:
        if not e4m3:
            return 8, 2, 6, 2, 3
        return (8, 2, 2, 2, 2) if m <= 2 else (8, 1, 8, 2, 3)
    if m == 1:
        return (2, 2, 2, 2, 4) if e4m3 else (1, 4, 2, 2, 4)
    return (2, 2, 4, 2, 2) if e4m3 else (2, 2, 4, 4, 2)


def _distance(plan: DecodePlan, wanted: Shape, row_tiles: int, cu_count: int) -> float:
    """How far a plan is from what is wanted, in powers of two; idle multiprocessors and uneven shares count double."""
    split, waves_k, waves_n, depth, chunk, share = (*wanted, 0)[:6]
    blocks = plan.groups * plan.split
    idle = max(0.0, math.log2(min(cu_count, row_tiles * split * waves_k) / blocks) - 0.7)
    row_groups = -(-row_tiles // plan.waves_n)
    if plan.share:  # one row group a block: as many rounds as it takes
        places = _in_clusters(cu_count, plan.split * plan.share) * _resident(plan.lds, plan.rows, plan.waves)
        uneven = math.log2(-(-blocks // places) * min(1, places / blocks))
    else:
        uneven = math.log2(-(-row_groups // plan.groups) * plan.groups / row_groups)
    ways = abs(math.log2(plan.split * plan.waves_k / (split * waves_k))) + 0.5 * abs(math.log2(plan.split / split))
    ring = abs(math.log2(plan.depth * plan.chunk / (depth * chunk))) + 0.25 * abs(math.log2(plan.depth / depth))
    waves = abs(math.log2(plan.waves / (waves_k * waves_n))) + 0.5 * abs(math.log2(plan.waves_n / waves_n))
    other = abs(math.log2(plan.share / share)) if plan.share and share else 2 * (plan.share != share)
    return 2 * (idle + uneven) + ways + 0.5 * (waves + ring + other)


@cache
def plans(scheme: str, m: int, n: int, k: int, cu_count: int, pairs: bool = False) -> tuple[DecodePlan, ...]:
    """Every legal dense plan of [m, k] x [n, k], those most like what measured best first.

    Args:
        scheme: one of the manifest's `DECODE_SCHEMES`, or `INT4_SCHEMES` by group (`int4_w4a16_g128`): for M <= 8.
        pairs: an activation follows: gate and up tiles must have one owner.

    Raises:
        ShapeError: no such problem, or none that shared memory holds.
    """
    w = _weights(scheme)
    _check(w, m, n, k)
    if m > w.dense[-1] < WIDE_FROM:
        raise ShapeError(f"decode GEMM of {scheme} M={m} N={n} K={k}", f"made for M <= {w.dense[-1]}", "use the GEMM")
    least = next((r for r in w.dense if m <= r), w.dense[-1])
    for rows in (least, 32) if least > 32 else (least,):  # by 32 where the activations of more do not fit
        found = _enumerate(w, rows, n, k, cu_count, pairs, -(-m // rows))
        if rows >= WIDE_FROM:
            found += _enumerate_prepared(w, rows, n, k, pairs)
        if found:
            return _sorted(found, w, rows, min(m, rows), n, k, cu_count)
    raise ShapeError(f"decode GEMM M={m} N={n} K={k}", "activations do not fit in shared memory", "use the GEMM")


@cache
def grouped_plan(scheme: str, block_m: int, blocks: int, n: int, k: int, cu_count: int) -> DecodePlan:
    """The plan for `blocks` routed blocks of `block_m` rows, most of which have work. Raises ShapeError as `plans`."""
    w = _weights(scheme)
    _check(w, block_m, n, k)
    if block_m not in w.grouped:
        raise ShapeError(f"blocks of {block_m} routed rows", "no such kernel", f"use one of {w.grouped}")
    tiles, row_tiles = -(-k // w.tile_k), -(-n // TILE_ROWS)
    # Measured best, or within a few percent, on an H100 80GB HBM3 for gpt-oss-120b at TP1 and TP8 and Qwen3-30B-A3B:
    # waves along N alone, but where so few blocks have work that waves must share K to keep memory busy.
    if blocks < 16 and k > 15 * TILE_K:
        waves_k, waves_n = 4, 2
    else:
        waves_k, waves_n = 1, 16 if block_m == 16 else 8 if k > 23 * TILE_K else 4
    waves_n = min(waves_n, 1 << (row_tiles - 1).bit_length())
    for chunk in range(min(6, -(-tiles // (2 * waves_k))), 0, -1):
        lds = lds_bytes(w, block_m, tiles, 1, waves_k, waves_n, 2, chunk)
        if lds <= arch_facts("sm_90").lds_bytes:
            groups = min(-(-row_tiles // waves_n), -(-20 * cu_count // max(1, blocks)))
            return DecodePlan(block_m, 1, waves_k, waves_n, groups, 2, chunk, lds)
    raise ShapeError(f"MoE decode N={n} K={k}", "activations do not fit in shared memory", "use the GEMM")


def _sorted(
    found: list[DecodePlan], w: _Weights, rows: int, m: int, n: int, k: int, cu_count: int
) -> tuple[DecodePlan, ...]:
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    wanted = _wanted(w.e4m3, rows, m, tiles, row_tiles, cu_count)
    return tuple(sorted(found, key=lambda p: _distance(p, wanted, row_tiles, cu_count)))


def _in_clusters(cu_count: int, split: int) -> int:
    """Multiprocessors that clusters of `split` blocks find places on: a cluster stays within one of the GPU's groups,
    of which not all are whole. Of an H100's 132, 120 (cuOccupancyMaxActiveClusters)."""
    return cu_count if split <= 2 else cu_count * 10 // 11


def _resident(lds: int, rows: int, waves: int) -> int:
    """Blocks of so many waves that find a place on one multiprocessor."""
    return min((arch_facts("sm_90").lds_bytes + 1024) // (lds + 1024), RESIDENT_WAVES[rows] // waves)


def _enumerate(
    w: _Weights,
    rows: int,
    n: int,
    k: int,
    cu_count: int,
    pairs: bool,
    row_blocks: int,
) -> list[DecodePlan]:
    tiles, row_tiles = -(-k // w.tile_k), -(-n // TILE_ROWS)
    most = 16 if rows >= WIDE_FROM else w.waves
    found = []
    for waves, waves_k, split in itertools.product((4, 8, 12, 16), (1, 2, 4), (1, 2, 4, 8)):
        waves_n, mine = waves // waves_k, tiles / split / waves_k
        if waves > most or waves % waves_k or (waves_n > row_tiles and waves > 4) or (mine < 1 and waves_k > 1):
            continue
        owned, uneven = divmod(waves_n * TILE_ROWS, split)
        if (rows >= WIDE_FROM and waves_n % 4) or uneven or (pairs and owned % TILE_ROWS) or split > tiles:
            continue
        row_groups = -(-row_tiles // waves_n)
        # Rings that hold all, or half, or a quarter of a wave's share of a row tile
        for depth, ring in itertools.product((2, 4), (1, 2, 4)):
            chunk = min(12, max(1, math.ceil(mine / depth / ring)))
            lds = lds_bytes(w, rows, tiles, split, waves_k, waves_n, depth, chunk)
            resident = _resident(lds, rows, waves)
            if resident:
                groups = min(row_groups, max(1, _in_clusters(cu_count, split) * resident // (split * row_blocks)))
                found.append(DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds))
    return list(dict.fromkeys(found))


def prepared_lds(w: _Weights, rows: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int) -> int:
    """Shared memory of a block that multiplies a prepared x: barriers, rings, which partial sums of waves use again,
    row factors, and the partial sums of the blocks that share K."""
    of_rows = waves_n * TILE_ROWS * (rows + 4) * 4
    barriers = -(-(8 + (2 + waves_k * waves_n) * depth * 8) // 128) * 128
    rings = 1024 + depth * waves_k * chunk * (128 * rows + waves_n * w.tile_bytes)
    return barriers + max(rings, waves_k * of_rows) + 8 * waves_n * TILE_ROWS // split + (of_rows if split > 1 else 0)


def _enumerate_prepared(w: _Weights, rows: int, n: int, k: int, pairs: bool) -> list[DecodePlan]:
    room = arch_facts("sm_90").lds_bytes
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    found = []
    for waves_k, waves_n, split, share in itertools.product((1, 2, 4), (4, 8, 12, 16), (1, 2, 4, 8), (1, 2, 4)):
        owned, row_groups = waves_n * TILE_ROWS // split, -(-row_tiles // waves_n)
        if waves_k * waves_n > 16 or split * share > 8 or split > tiles or share > row_groups:
            continue
        if (waves_n > row_tiles and waves_n > 4) or (pairs and owned % TILE_ROWS):
            continue
        groups = -(-row_groups // share) * share
        for chunk, blocks in itertools.product((1, 2, 4, 8), (1, 2)):  # blocks to a multiprocessor
            stages = -(-tiles // (split * chunk * waves_k))
            for depth in range(min(8, stages), min(2, stages) - 1, -1):
                lds = prepared_lds(w, rows, split, waves_k, waves_n, depth, chunk)
                if blocks * (lds + 1024) <= room + 1024:
                    found.append(DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds, share))
                    break
    return list(dict.fromkeys(found))


def _check(w: _Weights, m: int, n: int, k: int) -> None:
    if m < 1 or n < 1 or k < w.group or k % w.group:
        raise ShapeError(
            f"decode GEMM M={m} N={n} K={k}", f"needs M, N >= 1 and K a multiple of {w.group}", "use the GEMM"
        )
