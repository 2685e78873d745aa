"""Which plans of sm_90's decode kernels measured best, by kind of weights, rows of x and shape: of what is legal,
`decode_plans.py` takes what is nearest to that.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from sglang_amd_quant.selection.hopper_decode import COMMON, EARLY_PREPARED, TILE_K

RESIDENT = -1
"""`DecodePlan.share` of an x that is prepared, and then held as a whole by the blocks that multiply it."""

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
    ("row_e2m1", 4): ((2, 4, 4, 2, 8, -1), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (2, 1, 12, 2, 8)),
    ("row_e2m1", 8): ((2, 4, 4, 2, 8, -1), (8, 1, 16, 1, 12), (8, 1, 16, 1, 12), (8, 1, 8, 1, 4)),
    ("row_e2m1", 16): ((2, 1, 16, 2, 8, -1), (4, 2, 4, 2, 6, -1), (8, 1, 12, 2, 6, -1), (1, 4, 4, 2, 4, -1)),
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
    ("row_e4m3", 2): (8, 2, 4, 1, 4),
    ("row_e4m3", 4): (8, 2, 4, 1, 4),
    ("row_e4m3", 16): (8, 1, 16, 2, 4),
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
    ("row_e2m1", 2): (8, 1, 12, 2, 12),
    ("row_e2m1", 4): (8, 1, 12, 2, 12),
    ("row_e2m1", 8): (8, 1, 12, 2, 12, -1),
    ("row_e2m1", 16): (8, 1, 12, 2, 12, -1),
    ("row_e4m3", 16): (8, 2, 8, 2, 4, -1),
}
"""Likewise of longer K and three row tiles or more to two multiprocessors; of 32 and 64 rows, here and above, some 85
plans each for 17 shapes (docs/measured/decode_plans_32_64.json)."""

_WANTED_EARLY: dict[tuple[str, int], tuple[Shape | None, ...]] = {
    # kind, most rows of x: K from 6144 on with few row tiles, or more; K from 4096, from 2048 on; shorter
    ("row_e2m1", 2): ((8, 1, 8, 4, 3), (8, 1, 4, 1, 12), (8, 1, 4, 2, 4), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 4): ((8, 1, 8, 4, 3), (8, 1, 4, 2, 6), (8, 1, 12, 2, 4), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 8): ((8, 1, 16, 2, 6), (8, 1, 8, 4, 3), (4, 1, 12, 2, 8), (2, 1, 12, 4, 4), (2, 1, 8, 4, 3)),
    ("row_e2m1", 16): ((8, 1, 16, 2, 6), (8, 1, 16, 2, 6), (2, 2, 4, 4, 4, -1), (2, 1, 12, 4, 4), (2, 1, 12, 4, 3)),
    ("row_e2m1", 32): ((8, 1, 4, 1, 12), (8, 1, 12, 1, 12), None, (4, 1, 4, 1, 8), (2, 1, 4, 1, 12)),
    ("row_e2m1", 64): ((8, 1, 4, 4, 3), (8, 1, 12, 1, 12), None, (4, 1, 4, 4, 2), (2, 1, 4, 2, 6)),
    ("row_e4m3", 2): ((8, 2, 4, 2, 3), (8, 1, 8, 4, 3), (8, 1, 8, 1, 8), (4, 1, 8, 2, 4), (2, 1, 16, 1, 12)),
    ("row_e4m3", 4): ((8, 1, 4, 2, 6), (8, 1, 8, 4, 3), (8, 1, 12, 1, 8), (2, 2, 4, 4, 2), (2, 1, 16, 1, 12)),
    ("row_e4m3", 8): ((8, 1, 12, 1, 12), (8, 1, 16, 4, 3), (4, 1, 12, 2, 8), (2, 2, 4, 4, 2), (2, 1, 16, 2, 6)),
    ("row_e4m3", 16): ((8, 1, 16, 1, 12), (8, 1, 16, 4, 3), (4, 1, 12, 2, 8), (2, 2, 8, 4, 2), (2, 1, 16, 1, 12)),
    ("row_e4m3", 32): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, (4, 1, 4, 4, 2), (2, 1, 4, 4, 3)),
    ("row_e4m3", 64): ((8, 1, 4, 4, 3), (8, 1, 12, 4, 3), None, (4, 1, 4, 4, 2), (2, 1, 4, 4, 3)),
}
"""The same of plans with waves of their own for x, which are preferred where there are any, but for None. Of up to 150
plans each; of 32 and 64 rows, of all for 15 shapes on an H200 (docs/measured/decode_first_h200.json)."""


_WANTED_EVEN: dict[tuple[str, int], tuple[float, int, int, int, int]] = {
    ("row_e2m1", 2): (0.8, 16, 2, 6, 0),
    ("row_e2m1", 4): (0.8, 16, 4, 2, -1),
    ("row_e2m1", 8): (0.8, 16, 4, 2, -1),
    ("row_e2m1", 16): (0.7, 8, 2, 12, -1),
    ("row_e2m1", 32): (0.7, 8, 3, 8, 1),
    ("row_e2m1", 64): (0.7, 8, 2, 8, 1),
    ("row_e4m3", 2): (0.9, 16, 4, 2, 0),
    ("row_e4m3", 8): (0.9, 16, 4, 2, -1),
    ("row_e4m3", 32): (0.9, 8, 2, 8, 1),
    ("row_e4m3", 64): (0.7, 8, 3, 4, 1),
}
_WANTED_EVEN_LARGE: dict[tuple[str, int], tuple[float, int, int, int, int]] = {
    ("row_e2m1", 2): (0.9, 16, 2, 6, 0),
    ("row_e2m1", 4): (0.9, 16, 4, 4, -1),
    ("row_e2m1", 8): (0.9, 16, 4, 4, -1),
    ("row_e2m1", 16): (0.9, 16, 3, 8, 1),
    ("row_e2m1", 32): (0.9, 16, 3, 8, 1),
    ("row_e2m1", 64): (0.9, 16, 2, 8, 1),
    ("row_e4m3", 16): (0.9, 16, 2, 6, 1),
    ("row_e4m3", 32): (0.9, 16, 2, 8, 1),
    ("row_e4m3", 64): (0.9, 16, 3, 4, 1),
}
"""From which share of busy multiprocessors on a block takes one row group (`_even`), and its waves, depth, chunk and
share then; where many row groups a block would do as well (`is_large`), and elsewhere. Of some 200 plans each for ten
shapes of published models, K and N from 4096 to 28672, on an H200 (docs/measured/decode_even_h200.json)."""

_HELD_RATHER = {8: 128 << 10, 16: 128 << 10, 32: 64 << 10, 64: 0}
"""By rows: bytes of x up to which such a block holds its part. What is longer streams, from 32 rows on, or is shared by
more blocks."""


def in_clusters(cu_count: int, split: int) -> int:
    """Multiprocessors that clusters of `split` blocks find places on: a cluster stays within one of the GPU's groups,
    of which not all are whole. Of an H100's 132, 120 (cuOccupancyMaxActiveClusters)."""
    return cu_count if split <= 2 else max(1, cu_count * 10 // 11)


def _even(row_tiles: int, cu_count: int) -> tuple[float, int, int]:
    """How evenly row tiles fall to multiprocessors where each has part of one row group at most: the share of them that
    would be busy if work were even, and the `split` and `waves_n` of that, few blocks a cluster rather than many."""
    best = 0.0, 1, 4
    for split, waves_n in itertools.product((1, 2, 4), (4, 8, 12, 16)):
        if split * -(-row_tiles // waves_n) <= in_clusters(cu_count, split):
            best = max(best, (row_tiles * split / (waves_n * cu_count), split, waves_n), key=lambda e: round(e[0], 6))
    return best


def is_large(row_tiles: int, cu_count: int) -> bool:
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
    weights arrive there while this one multiplies: e4m3 of K from 1536 to 2048, of more than 16 rows from 1024 to 1536,
    as measured on an H200 (docs/decode_log.md). Of one or two rows beyond 1536 less is gained so than lost where no
    launch overlaps."""
    least, most = (16, 24) if m > 16 else (24, 24 if m <= 2 else 32)
    if kind != "row_e4m3" or m > 32 or not least <= tiles <= most:
        return None
    held = -(-tiles // 2)  # by a wave; twelve waves hold sixteen beside as many rows of x, sixteen hold twelve
    choices, depth = ((8, 12, 16), 1) if held == 12 and m <= 16 else ((12,), 4)
    for waves_n in choices:
        if cu_count // 3 < 2 * -(-row_tiles // waves_n) <= cu_count // 2:
            return (2, 1, waves_n, depth, -(-held // depth))
    return None


_WANTED_EARLY_3072: dict[str, Shape] = {"row_e2m1": (4, 1, 12, 1, 12), "row_e4m3": (4, 1, 12, 4, 3)}
_WANTED_EARLY_FEW: Shape = (4, 1, 8, 2, 4)
"""Likewise of 32 and 64 rows with K from 3072 to 4095, and of 64 with K from 2048 to 3071 and three row tiles or fewer
to two multiprocessors."""


def _wanted_early(kind: str, m: int, most: int, tiles: int, row_tiles: int, cu_count: int) -> Shape | None:
    """What is wanted of plans with waves for x; None where others are preferred."""
    if beside := _beside(kind, m, tiles, row_tiles, cu_count):
        return beside
    if most >= EARLY_PREPARED and 48 <= tiles < 64:
        return _WANTED_EARLY_3072[kind]
    if most == 64 and 32 <= tiles < 48 and 2 * row_tiles <= 3 * cu_count:
        return _WANTED_EARLY_FEW
    by_k = (0 if row_tiles <= cu_count else 1) if tiles >= 96 else 2 if tiles >= 64 else 3 if tiles >= 32 else 4
    return _WANTED_EARLY[kind, most][by_k]


class Wanted(NamedTuple):
    """What is wanted.

    Attributes:
        shape: of the plan.
        early: with waves for x.
        paired: blocks that are pairs.
        apart: no multiprocessor may have two of its blocks.
    """

    shape: Shape
    early: bool = False
    paired: bool = False
    apart: bool = False


def wanted_of(kind: str, m: int, tiles: int, row_tiles: int, cu_count: int, *, early: bool, paired: bool) -> Wanted:
    """What is wanted; with waves for x, and blocks that are pairs, only if there are such plans: `early`, `paired`."""
    most = next(most for most in (1, 2, 4, 8, 16, 32, 64) if m <= most and (kind, most) in _WANTED)
    which = 3 if tiles < 64 else 1 if row_tiles <= cu_count else 2
    if early and (in_time := _wanted_early(kind, m, most, tiles, row_tiles, cu_count)):
        return Wanted(in_time, early=True)
    if paired and is_large(row_tiles, cu_count) and _even_in_pairs(row_tiles, cu_count):
        return Wanted(_WANTED_PAIR, paired=True)
    if even := _wanted_even(kind, most, tiles, row_tiles, cu_count):
        return Wanted(even, apart=True)
    if is_large(row_tiles, cu_count):
        # Measured at K = 8192: a shorter one is shared by fewer, so that waves go on as long.
        split, waves_k, *rest = _WANTED[kind, most][0]
        fewer = max(min(split, 2), split * min(tiles, 128) // 128)
        if kind == "row_e2m1":  # measured at K = 4096 too
            waves_k = max(1, min(waves_k, split * waves_k * min(tiles, 128) // (128 * fewer)))
        return Wanted((fewer, waves_k, *rest))
    wanted = _WANTED[kind, most][which]
    if which == 2 and (tiles < 96 or 2 * row_tiles >= 3 * cu_count):
        wanted = (_WANTED_4096 if tiles < 96 else _WANTED_MORE).get((kind, most), wanted)
    return Wanted(wanted)


def _wanted_even(kind: str, most: int, tiles: int, row_tiles: int, cu_count: int) -> Shape | None:
    """What is wanted where work falls evenly to blocks of one row group; None where it does not, or where many row
    groups a block are as good."""
    busy, split, waves_n = _even(row_tiles, cu_count)
    by_size = _WANTED_EVEN_LARGE if is_large(row_tiles, cu_count) else _WANTED_EVEN
    least, waves, *ring = by_size.get((kind, most), (math.inf, 0))
    rows = max(8, most)
    held = rows * tiles * TILE_K // split <= _HELD_RATHER[rows]
    if busy < least or not (held or rows >= EARLY_PREPARED):
        return None
    if held and rows >= EARLY_PREPARED:
        ring = [*ring[:2], RESIDENT]
    return (split, max(1, waves // waves_n), waves_n, *ring)
