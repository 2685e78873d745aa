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
from sglang_amd_quant.kernels.hip.manifest import DECODE_M, MOE_DECODE_M
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.schemes import MX_BLOCK

E4M3_SCHEMES = ("mxfp8", "mxfp8_static", "w8a16")
TILE_ROWS, TILE_K = 16, 64
WIDE_FROM = 16
"""Rows from which on four waves multiply together, by wgmma (decode_sm90_many.h)."""
RESIDENT_WAVES = {16: 28, 32: 20, 64: 16}
"""Waves that find registers on a multiprocessor, by rows; of fewer rows 20 with e4m3 weights, else 16."""


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


def lds_bytes(e4m3: bool, rows: int, tiles: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int) -> int:
    """Shared memory of a block: barriers, rings, activations with their factors, row factors and partial sums."""
    waves, most, columns = waves_k * waves_n, -(-tiles // split), rows
    barriers = -(-(8 + waves * depth * 8) // 128) * 128
    ring = waves * depth * chunk * ((1024 if e4m3 else 512) + 32)
    if rows < WIDE_FROM:
        activations = 16 + most * 2 * (rows * (2 * MX_BLOCK + 4) + 16)
    else:
        activations, columns = 1024 + most * 128 * rows, columns + 4
    sums = 2 * 4 * waves_n * TILE_ROWS // split + 4 * waves * TILE_ROWS * columns
    return barriers + ring + activations + sums


def max_waves(rows: int) -> int:
    """Waves that a block may have: `KERNEL(...)` in decode_gemm.hip."""
    return 16 if rows >= WIDE_FROM else 8


Shape = tuple[int, ...]
"""split, waves_k, waves_n, depth, chunk, and share where x is prepared."""


_WANTED: dict[tuple[bool, int], tuple[Shape, Shape, Shape, Shape]] = {
    # e4m3, rows: many row groups a block; long K with few row tiles, or more; short K
    (False, 1): ((2, 2, 2, 2, 8), (8, 2, 2, 2, 3), (8, 1, 8, 2, 6), (2, 2, 4, 2, 4)),
    (False, 2): ((2, 1, 8, 2, 8), (8, 2, 4, 2, 3), (8, 1, 8, 2, 6), (2, 2, 4, 2, 4)),
    (False, 4): ((2, 1, 8, 2, 8), (8, 2, 4, 2, 3), (8, 1, 8, 2, 6), (2, 2, 4, 2, 4)),
    (False, 8): ((8, 1, 8, 2, 8), (8, 2, 4, 2, 3), (8, 1, 8, 2, 6), (4, 1, 8, 2, 4)),
    (False, 16): ((4, 1, 16, 2, 8), (4, 4, 4, 1, 8, 1), (8, 1, 12, 2, 6), (1, 4, 4, 1, 8, 1)),
    (False, 32): ((1, 1, 16, 4, 4, 1), (8, 2, 4, 1, 8, 1), (8, 1, 12, 2, 6), (1, 4, 4, 1, 8, 1)),
    (False, 64): ((1, 1, 16, 3, 4, 1), (4, 2, 4, 2, 4, 1), (8, 1, 12, 3, 4, 1), (1, 2, 4, 2, 4, 1)),
    (True, 1): ((2, 2, 4, 2, 8), (8, 1, 4, 2, 6), (8, 1, 4, 2, 6), (2, 2, 2, 2, 4)),
    (True, 2): ((8, 1, 8, 2, 8), (8, 1, 8, 2, 6), (8, 1, 8, 2, 3), (4, 1, 4, 2, 4)),
    (True, 4): ((8, 1, 8, 2, 8), (8, 2, 4, 2, 2), (8, 1, 8, 2, 3), (2, 2, 4, 2, 2)),
    (True, 8): ((8, 1, 8, 2, 8), (8, 2, 4, 2, 2), (8, 1, 8, 2, 3), (4, 1, 8, 2, 2)),
    (True, 16): ((4, 1, 16, 2, 4), (8, 2, 8, 2, 2), (8, 1, 12, 2, 3), (4, 1, 16, 2, 2)),
    (True, 32): ((8, 1, 12, 2, 4), (4, 2, 4, 3, 4, 1), (8, 1, 12, 2, 3), (1, 4, 4, 3, 2, 1)),
    (True, 64): ((1, 1, 16, 4, 2, 1), (4, 2, 4, 4, 2, 1), (8, 1, 12, 4, 2, 1), (1, 4, 4, 4, 1, 1)),
}
"""What measured best, or within a few percent, on an H200, of up to 100 plans each for 70 dense problems
(`python -m bench.decode --schemes w4a8,mxfp8 --explore 100`).

K is shared by more blocks the longer it is and the more activations each would have to quantize, and few enough tiles
remain to a wave that its ring holds them all; where every block has many row groups to take, K is shared by fewer.
A launch in front costs a few microseconds, so x is prepared only where it is large, or blocks have little else to do.
"""


def _wanted(e4m3: bool, rows: int, m: int, tiles: int, row_tiles: int, cu_count: int) -> Shape:
    large, long = row_tiles >= 8 * cu_count, tiles >= 64
    which = 0 if large else 3 if not long else 1 if row_tiles <= cu_count else 2
    return _WANTED[e4m3, 1 if m == 1 else rows][which]


def _distance(plan: DecodePlan, e4m3: bool, wanted: Shape, row_tiles: int, cu_count: int) -> float:
    """How far a plan is from what is wanted, in powers of two; idle multiprocessors and uneven shares count double."""
    split, waves_k, waves_n, depth, chunk, share = (*wanted, 0)[:6]
    blocks = plan.groups * plan.split
    idle = max(0.0, math.log2(min(cu_count, row_tiles * split * waves_k) / blocks) - 0.7)
    row_groups = -(-row_tiles // plan.waves_n)
    if plan.share:  # one row group a block: as many rounds as it takes
        places = _in_clusters(cu_count, plan.split * plan.share) * _resident(e4m3, plan.lds, plan.rows, plan.waves)
        uneven = math.log2(-(-blocks // places) * min(1, places / blocks))
    else:
        uneven = math.log2(-(-row_groups // plan.groups) * plan.groups / row_groups)
    ways = abs(math.log2(plan.split * plan.waves_k / (split * waves_k))) + 0.5 * abs(math.log2(plan.split / split))
    ring = abs(math.log2(plan.depth * plan.chunk / (depth * chunk))) + 0.5 * abs(math.log2(plan.depth / depth))
    waves = abs(math.log2(plan.waves / (waves_k * waves_n))) + 0.5 * abs(math.log2(plan.waves_n / waves_n))
    other = abs(math.log2(plan.share / share)) if plan.share and share else 2 * (plan.share != share)
    return 2 * (idle + uneven) + ways + 0.5 * (waves + ring + other)


@cache
def plans(scheme: str, m: int, n: int, k: int, cu_count: int, pairs: bool = False) -> tuple[DecodePlan, ...]:
    """Every legal dense plan of [m, k] x [n, k], those most like what measured best first.

    Args:
        scheme: one of the manifest's `DECODE_SCHEMES`.
        pairs: an activation follows: gate and up tiles must have one owner.

    Raises:
        ShapeError: no such problem, or none that shared memory holds.
    """
    _check(m, n, k)
    e4m3 = scheme in E4M3_SCHEMES
    least = next((r for r in DECODE_M if m <= r), DECODE_M[-1])
    for rows in (least, 32) if least > 32 else (least,):  # by 32 where the activations of more do not fit
        found = _enumerate(e4m3, rows, n, k, cu_count, pairs, -(-m // rows))
        if rows >= WIDE_FROM:
            found += _enumerate_prepared(e4m3, rows, n, k, pairs)
        if found:
            return _sorted(found, e4m3, rows, min(m, rows), n, k, cu_count)
    raise ShapeError(f"decode GEMM M={m} N={n} K={k}", "activations do not fit in shared memory", "use the GEMM")


@cache
def grouped_plan(scheme: str, block_m: int, blocks: int, n: int, k: int, cu_count: int) -> DecodePlan:
    """The plan for `blocks` routed blocks of `block_m` rows, most of which have work. Raises ShapeError as `plans`."""
    _check(block_m, n, k)
    if block_m not in MOE_DECODE_M:
        raise ShapeError(f"blocks of {block_m} routed rows", "no such kernel", f"use one of {MOE_DECODE_M}")
    e4m3, tiles, row_tiles = scheme in E4M3_SCHEMES, -(-k // TILE_K), -(-n // TILE_ROWS)
    # Measured best, or within a few percent, on an H100 80GB HBM3 for gpt-oss-120b at TP1 and TP8 and Qwen3-30B-A3B:
    # waves along N alone, but where so few blocks have work that waves must share K to keep memory busy.
    if blocks < 16 and tiles >= 16:
        waves_k, waves_n = 4, 2
    else:
        waves_k, waves_n = 1, 16 if block_m == 16 else 8 if tiles >= 24 else 4
    waves_n = min(waves_n, 1 << (row_tiles - 1).bit_length())
    for chunk in range(min(6, -(-tiles // (2 * waves_k))), 0, -1):
        lds = lds_bytes(e4m3, block_m, tiles, 1, waves_k, waves_n, 2, chunk)
        if lds <= arch_facts("sm_90").lds_bytes:
            groups = min(-(-row_tiles // waves_n), -(-20 * cu_count // max(1, blocks)))
            return DecodePlan(block_m, 1, waves_k, waves_n, groups, 2, chunk, lds)
    raise ShapeError(f"MoE decode N={n} K={k}", "activations do not fit in shared memory", "use the GEMM")


def _sorted(
    found: list[DecodePlan], e4m3: bool, rows: int, m: int, n: int, k: int, cu_count: int
) -> tuple[DecodePlan, ...]:
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    wanted = _wanted(e4m3, rows, m, tiles, row_tiles, cu_count)
    return tuple(sorted(found, key=lambda p: _distance(p, e4m3, wanted, row_tiles, cu_count)))


def _in_clusters(cu_count: int, split: int) -> int:
    """Multiprocessors that clusters of `split` blocks find places on: a cluster stays within one of the GPU's groups,
    of which not all are whole. Of an H100's 132, 120 (cuOccupancyMaxActiveClusters)."""
    return cu_count if split <= 2 else cu_count * 10 // 11


def _resident(e4m3: bool, lds: int, rows: int, waves: int) -> int:
    """Blocks of so many waves that find a place on one multiprocessor."""
    by_registers = RESIDENT_WAVES.get(rows, 20 if e4m3 else 16)
    return min((arch_facts("sm_90").lds_bytes + 1024) // (lds + 1024), by_registers // waves)


def _enumerate(
    e4m3: bool,
    rows: int,
    n: int,
    k: int,
    cu_count: int,
    pairs: bool,
    row_blocks: int,
) -> list[DecodePlan]:
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    most = max_waves(rows)
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
            lds = lds_bytes(e4m3, rows, tiles, split, waves_k, waves_n, depth, chunk)
            resident = _resident(e4m3, lds, rows, waves)
            if resident:
                groups = min(row_groups, max(1, _in_clusters(cu_count, split) * resident // (split * row_blocks)))
                found.append(DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds))
    return list(dict.fromkeys(found))


def prepared_lds(e4m3: bool, rows: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int) -> int:
    """Shared memory of a block that multiplies a prepared x: barriers, rings, which partial sums of waves use again,
    row factors, and the partial sums of the blocks that share K."""
    of_rows = waves_n * TILE_ROWS * (rows + 4) * 4
    barriers = -(-(8 + (2 + waves_k * waves_n) * depth * 8) // 128) * 128
    rings = 1024 + depth * waves_k * chunk * (128 * rows + waves_n * ((1024 if e4m3 else 512) + 32))
    return barriers + max(rings, waves_k * of_rows) + 8 * waves_n * TILE_ROWS // split + (of_rows if split > 1 else 0)


def _enumerate_prepared(e4m3: bool, rows: int, n: int, k: int, pairs: bool) -> list[DecodePlan]:
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
                lds = prepared_lds(e4m3, rows, split, waves_k, waves_n, depth, chunk)
                if blocks * (lds + 1024) <= room + 1024:
                    found.append(DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds, share))
                    break
    return list(dict.fromkeys(found))


def _check(m: int, n: int, k: int) -> None:
    if m < 1 or n < 1 or k < MX_BLOCK or k % MX_BLOCK:
        raise ShapeError(f"decode GEMM M={m} N={n} K={k}", "needs M, N >= 1 and K a multiple of 32", "use the GEMM")
