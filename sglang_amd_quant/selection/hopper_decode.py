"""What sm_90's decode kernels read and keep in shared memory: specs take it from here, and `runtime/decode_plans.py`.

The sizes of tiles and of shared memory repeat those of `kernels/hip/include/decode_sm90.h`; `tests/device` holds the
two together by running plans of many shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang_amd_quant.kernels.hip.manifest import (
    ALONE_M,
    DECODE_M,
    E2M1_SCHEMES,
    E4M3_SCHEMES,
    FEW_M,
    INT4_GROUPS,
    INT4_SCHEMES,
    PAIRED_M,
    QUANTIZED_M,
)
from sglang_amd_quant.layouts.names import round_up
from sglang_amd_quant.schemes import MX_BLOCK

TILE_ROWS, TILE_K = 16, 64
LINE = 128
"""Bytes of a line of shared memory."""


@dataclass(frozen=True)
class DecodeWeights:
    """What a plan must know of a scheme's weights.

    Attributes:
        kind: what plans were measured with.
        group: elements along K that share a scale.
        tile_k: elements of a row in a tile.
        tile_bytes: of a tile, with its scales.
        rows: of activations that entry points are instantiated for.
        wide_from: rows from which on four waves multiply together, by wgmma.
        x_bytes: of an activation there.
        waves: that find registers on a multiprocessor, by rows; elsewhere 16.
        paired: rows of activations that blocks which are pairs multiply.
        alone: rows of which blocks with a multiprocessor for themselves have an entry point that takes more registers.
    """

    kind: str
    group: int
    tile_k: int
    tile_bytes: int
    rows: tuple[int, ...] = DECODE_M
    wide_from: int = 16
    x_bytes: int = 2
    waves: Mapping[int, int] = field(default_factory=lambda: {16: 28, 32: 20})
    paired: tuple[int, ...] = ()
    alone: tuple[int, ...] = ()

    def resident_waves(self, rows: int) -> int:
        return self.waves.get(rows, 16)


_BF16 = {
    "w4a16": DecodeWeights("e2m1", MX_BLOCK, TILE_K, 512 + 32),
    "w8a16": DecodeWeights("e4m3", MX_BLOCK, TILE_K, 1024 + 32, waves={2: 20, 4: 20, 8: 20, 16: 28, 32: 20}),
}
_ROW_E2M1, _ROW_E4M3 = (
    DecodeWeights(
        kind,
        MX_BLOCK,
        TILE_K,
        nbytes,
        QUANTIZED_M,
        wide_from=1,
        x_bytes=1,
        waves={8: 32, 16: 20, 32: 20},
        paired=paired,
        alone=alone,
    )
    for kind, nbytes, paired, alone in (("row_e2m1", 512 + 16, PAIRED_M, ALONE_M), ("row_e4m3", 1024, (), ()))
)
_INT4 = {
    group: DecodeWeights("int4", group, tile_k, nbytes, waves={16: 20} if group > 32 else {})
    for group, tile_k, nbytes in (
        (32, TILE_K, 512 + 128), (64, TILE_K, 512 + 64), (128, 2 * TILE_K, 1024 + 64),
    )
}  # fmt: skip
DECODE_WEIGHTS = _BF16 | dict.fromkeys(E4M3_SCHEMES, _ROW_E4M3) | dict.fromkeys(E2M1_SCHEMES, _ROW_E2M1)
DECODE_WEIGHTS |= {f"{scheme}_g{group}": _INT4[group] for scheme in INT4_SCHEMES for group in INT4_GROUPS}


OWN_BARRIERS = 5
"""Of a block, besides those of rings: `decode.h`."""

COMMON = 4
"""Row tiles that the two blocks of a pair have in common: `decode_sm90_pair.h`."""

EARLY_PREPARED, MOST_ADDED = 32, 12
"""Rows of x from which on plans with waves for x have it prepared, and sums travel as halves (`HalfSums`); tiles of a
wave, at most, then: what the matrix unit adds up (`Totals::add_all`)."""


def early_tiles(rows: int, depth: int, chunk: int) -> int:
    """Tiles of a wave, at most, that a plan with waves for x takes."""
    return min(depth * chunk, MOST_ADDED) if rows >= EARLY_PREPARED else depth * chunk


def early_sums_fit(rows: int, split: int, waves_k: int, depth: int, chunk: int) -> bool:
    """Whether what four waves of such a plan send of their sums, as halves, finds room where their weights were:
    `HalfSums::by_fours`."""
    by_fours = rows >= EARLY_PREPARED and split > 1 and waves_k == 1
    return not by_fours or rows * 2 <= depth * chunk * TILE_K


def _ring(w: DecodeWeights, rows: int, depth: int, chunk: int) -> int:
    """Bytes of a wave's ring: `Stream::bytes`."""
    used = depth * chunk * w.tile_bytes
    return round_up(used, LINE) if w.kind == "row_e2m1" and rows < 64 else used


def _barriers(of_rings: int) -> int:
    return round_up((OWN_BARRIERS + of_rings) * 8, LINE)


def lds_bytes(
    w: DecodeWeights,
    rows: int,
    tiles: int,
    split: int,
    waves_k: int,
    waves_n: int,
    depth: int,
    chunk: int,
    *,
    early: bool = False,
) -> int:
    """Shared memory of a block: barriers, rings, activations with their factors, row factors and partial sums. `early`:
    rings have room for e2m1 as e4m3, and scales lie where sums will be."""
    waves, most = waves_k * waves_n, -(-tiles // split)
    of_rows = 4 * waves_n * TILE_ROWS  # bytes of a column of sums
    barriers = _barriers(waves * depth)
    held = waves * depth * chunk
    ring = held * TILE_ROWS * TILE_K if early else waves * _ring(w, rows, depth, chunk)
    if w.x_bytes == 1:
        activations = 1024 + most * rows * TILE_K + 8 * rows
    elif rows < w.wide_from:
        activations = 16 + most * w.tile_k // MX_BLOCK * (rows * (2 * MX_BLOCK + 4) + 16)
    else:
        activations = 1024 + most * w.tile_k * 2 * rows
    factors, used = 2 * of_rows // split, ring + activations
    scales = held * (w.tile_bytes - TILE_ROWS * TILE_K // 2) if early and w.kind == "row_e2m1" else 0
    if early and rows >= EARLY_PREPARED:
        halves = of_rows * rows // 2 if split > 1 else 0
        return barriers + max(used, waves_k * of_rows * rows + halves) + 4 * rows + factors + max(halves, scales)
    return barriers + used + factors + max(waves_k * of_rows * rows, scales)


def prepared_lds(
    w: DecodeWeights, rows: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int, *, paired: bool = False
) -> int:
    """Shared memory of a block that multiplies a prepared x: barriers, rings, factors of rows, and where K is shared
    partial sums: of waves, which use the rings again, and of blocks; or those of rows that a pair has in common."""
    of_rows = 4 * waves_n * TILE_ROWS
    barriers = _barriers((2 + waves_k * waves_n) * depth)
    of_x = depth * waves_k * chunk * w.tile_k * w.x_bytes * rows
    rings = 1024 + of_x + waves_k * waves_n * _ring(w, rows, depth, chunk)
    used = rings + (round_up(4 * rows, LINE) if w.x_bytes == 1 else 0)
    if split * waves_k == 1:
        return barriers + used + 2 * of_rows + (4 * (COMMON // 2 * TILE_ROWS) * rows if paired else 0)
    return barriers + max(used, waves_k * of_rows * rows) + 2 * of_rows // split + (of_rows * rows if split > 1 else 0)


def least_lds(scheme: str, m: int, k: int) -> int:
    """Shared memory of a plan that is always tried, for any N, where every wave has work. Up to 8 rows: eight blocks
    share K, four waves along K (of quantized activations along N) their part of it, with rings of a quarter of what a
    wave reads. Beyond: x streams through by two."""
    w = DECODE_WEIGHTS[scheme]
    rows = next((r for r in w.rows if m <= r), w.rows[-1])
    if rows > FEW_M[-1]:
        return prepared_lds(w, rows, split=1, waves_k=1, waves_n=4, depth=2, chunk=1)
    tiles, waves_k = -(-k // w.tile_k), 1 if rows >= w.wide_from else 4
    chunk = ring_chunk(tiles / 8 / waves_k, depth=4, part=4)
    return lds_bytes(w, rows, tiles, 8, waves_k, 4 // waves_k, 4, chunk)


def ring_chunk(mine: float, depth: int, part: int) -> int:
    """Tiles of a bulk copy where `depth` of them are 1/part of a wave's."""
    return min(12, max(1, math.ceil(mine / depth / part)))
