"""How `kernels/hip/decode_gemm.hip` is launched on sm_90: the split of a problem over clusters, blocks and waves.

AMD targets have plans of their own, in `decode_gemm_amd.py`. The sizes of tiles and of shared memory repeat those of
`kernels/hip/include/decode_sm90.h`; `tests/device` holds the two together by running plans of many shapes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip.manifest import DECODE_M, MOE_DECODE_M
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import MX_BLOCK

OUTS = {"bf16": 0, "fp16": 1, "fp32": 2}
ACTIVATIONS = {None: 0, "silu": 1, "swigluoai": 2}
INTERLEAVED = 4
"""Numbers of `enum Out` and `enum Activation` in include/decode.h."""

E4M3_SCHEMES = ("mxfp8", "mxfp8_static", "w8a16")
TILE_ROWS, TILE_K = 16, 64
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
        groups: clusters that take the row groups (waves_n tiles of 16 rows) round robin.
        depth, chunk: `depth` bulk copies of `chunk` tiles are under way for every wave.
        lds: bytes of shared memory a block.
    """

    rows: int
    split: int
    waves_k: int
    waves_n: int
    groups: int
    depth: int
    chunk: int
    lds: int

    @property
    def waves(self) -> int:
        """Waves of a block."""
        return self.waves_k * self.waves_n


def room(e4m3: bool, rows: int) -> int:
    """Columns of the matrix unit that activations are given (Activations::ROOM)."""
    return max(4, rows) if rows < 8 else rows


def lds_bytes(e4m3: bool, rows: int, tiles: int, split: int, waves_k: int, waves_n: int, depth: int, chunk: int) -> int:
    """Shared memory of a block: barriers, rings, activations with their factors, row factors and partial sums."""
    waves, most, columns = waves_k * waves_n, -(-tiles // split), room(e4m3, rows)
    barriers = -(-(8 + waves * depth * 8) // 128) * 128
    ring = waves * depth * chunk * ((1024 if e4m3 else 512) + 32)
    if rows < WIDE_FROM:
        activations = 16 + columns * ((most * TILE_K + 32) * 2 + most * 2 * 4)
    else:
        activations, columns = most * 2 * (64 * (rows + 1) + 16 * e4m3), columns + 4
    sums = 2 * 4 * waves_n * TILE_ROWS // split + 4 * waves * TILE_ROWS * columns
    return barriers + ring + activations + sums


def max_waves(e4m3: bool, rows: int) -> int:
    """Waves that a block may have: `KERNEL(...)` in decode_gemm.hip."""
    return 16 if rows >= WIDE_FROM else 8 if e4m3 else 12


Shape = tuple[int, int, int, int, int]
"""split, waves_k, waves_n, depth, chunk."""


def _wanted(e4m3: bool, rows: int, m: int, tiles: int, row_tiles: int, cu_count: int) -> Shape:
    """What measured best, or within a few percent, on an H100 80GB HBM3: of up to 60 plans each for 70 dense problems
    (`python -m bench.decode --schemes w4a8,mxfp8 --explore 60`).

    K is shared by more blocks the longer it is and the more activations each would have to quantize, and waves share
    what is left of it, so that 6 to 16 tiles remain to a wave; where every block has many row groups to take, by fewer.
    """
    if row_tiles >= 8 * cu_count:
        if rows < WIDE_FROM:
            return (2, 4, 2, 4, 4) if e4m3 else (2, 4, 2, 2, 8) if m <= 4 else (4, 2, 4, 2, 8)
        wide = {16: (8, 1, 16, 2, 4), 32: (8, 1, 12, 2, 4), 64: (8, 1, 8, 2, 2)}
        return wide[rows] if e4m3 else {16: (4, 1, 12, 2, 8), 32: (4, 1, 12, 2, 4), 64: (8, 1, 12, 2, 2)}[rows]
    if tiles >= 64:
        if rows >= WIDE_FROM:
            return (8, 2, 8, 2, 3) if rows == 16 else (8, 1, 12, 2, 6 if rows == 32 and not e4m3 else 3)
        if not e4m3:
            return 8, 2, 6, 2, 3
        return (8, 2, 2, 2, 2) if m <= 2 else (8, 1, 8, 2, 3)
    if rows >= WIDE_FROM:
        return (4, 1, 8, 2, 4) if rows == (16 if e4m3 else 32) else (4, 1, 16, 2, 4 if rows == 16 else 2)
    if m == 1:
        return (2, 2, 2, 2, 4) if e4m3 else (1, 4, 2, 2, 4)
    return (2, 2, 4, 2, 2) if e4m3 else (2, 2, 4, 4, 2)


def _distance(plan: DecodePlan, wanted: Shape, row_tiles: int, cu_count: int) -> float:
    """How far a plan is from what is wanted, in powers of two; idle multiprocessors and uneven shares count double."""
    split, waves_k, waves_n, depth, chunk = wanted
    blocks = plan.groups * plan.split
    idle = max(0.0, math.log2(min(cu_count, row_tiles * split * waves_k) / blocks) - 0.7)
    row_groups = -(-row_tiles // plan.waves_n)
    uneven = math.log2(-(-row_groups // plan.groups) * plan.groups / row_groups)
    ways = abs(math.log2(plan.split * plan.waves_k / (split * waves_k))) + 0.5 * abs(math.log2(plan.split / split))
    ring = abs(math.log2(plan.depth * plan.chunk / (depth * chunk))) + 0.25 * abs(math.log2(plan.depth / depth))
    waves = abs(math.log2(plan.waves / (waves_k * waves_n))) + 0.5 * abs(math.log2(plan.waves_n / waves_n))
    return 2 * (idle + uneven) + ways + 0.5 * waves + 0.5 * ring


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
    return tuple(sorted(found, key=lambda p: _distance(p, wanted, row_tiles, cu_count)))


def _in_clusters(cu_count: int, split: int) -> int:
    """Multiprocessors that clusters of `split` blocks find places on: a cluster stays within one of the GPU's groups,
    of which not all are whole. Of an H100's 132, 120 (cuOccupancyMaxActiveClusters)."""
    return cu_count if split <= 2 else cu_count * 10 // 11


def _enumerate(
    e4m3: bool,
    rows: int,
    n: int,
    k: int,
    cu_count: int,
    pairs: bool,
    row_blocks: int,
) -> list[DecodePlan]:
    facts = arch_facts("sm_90")
    tiles, row_tiles = -(-k // TILE_K), -(-n // TILE_ROWS)
    most = max_waves(e4m3, rows)
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
            resident = min((facts.lds_bytes + 1024) // (lds + 1024), RESIDENT_WAVES[rows] // waves)
            if resident:
                groups = min(row_groups, max(1, _in_clusters(cu_count, split) * resident // (split * row_blocks)))
                found.append(DecodePlan(rows, split, waves_k, waves_n, groups, depth, chunk, lds))
    return list(dict.fromkeys(found))


def _check(m: int, n: int, k: int) -> None:
    if m < 1 or n < 1 or k < MX_BLOCK or k % MX_BLOCK:
        raise ShapeError(f"decode GEMM M={m} N={n} K={k}", "needs M, N >= 1 and K a multiple of 32", "use the GEMM")


@dataclass(frozen=True)
class Epilogue:
    """What happens to sums before they are stored.

    Attributes:
        bias: [N] or [E, N] bf16, in the order before packing, or None.
        residual: bf16 of y's shape and strides, added last, or None.
        activation: `silu`, `swigluoai` or None; halves N.
        interleaved: gate and up rows alternated before packing; else all gates came first.
        alpha, limit: of the activation; limit None = no clamp.
        row_weights: fp32, one for each row of y, multiplied before the residual, or None.
    """

    bias: Any = None
    residual: Any = None
    activation: str | None = None
    interleaved: bool = False
    alpha: float = 1.702
    limit: float | None = None
    row_weights: Any = None


NOTHING = Epilogue()


def decode_gemm(
    x: Any,
    data: Any,
    scales: Any,
    factors: Any,
    y: Any,
    *,
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
    plan: DecodePlan | None = None,
) -> LaunchDescription:
    """Describe y = x w^T, dense or grouped by expert, on sm_90.

    Args:
        x: [M / top_k, K] bf16, rows 16-byte aligned, last dimension contiguous.
        data, scales, factors: weights in `mma_tile` + `mma_scale` (e4m3; factors None) or packed as `hopper_bf16`.
        y: [M, N], or [M, N / 2] after an activation; bf16, fp16 or fp32, last dimension contiguous.
        scheme: one of the manifest's `DECODE_SCHEMES`.
        n: rows of the weights (of one expert).
        cu_count: multiprocessors.
        carry: rounds the activations' scales (`formats.mx.Element.carry`).
        x_scale: fp32 scalar on the device, the scale of static fp8 activations.
        epilogue: what is fused behind.
        row_ids, block_experts, block_m: routing (`ops/routing.py`); None and 0: dense.
        top_k: rows of y that share a row of x.
        plan: instead of the first of `plans`.

    Raises:
        ShapeError: shapes, strides or dtypes that do not fit each other or the kernel.
    """
    check_operands(x, y, n, top_k, epilogue)
    m, k = y.shape[0], x.shape[1]
    grouped = row_ids is not None
    pairs = epilogue.activation is not None
    if plan is None and grouped:
        plan = grouped_plan(scheme, block_m, len(block_experts), n, k, cu_count)
    elif plan is None:
        plan = plans(scheme, m, n, k, cu_count, pairs)[0]
    row_blocks = len(block_experts) if grouped else -(-m // plan.rows)
    return LaunchDescription(
        kernel=f"{'moe_decode' if grouped else 'decode'}_{scheme}_m{plan.rows}",
        grid=row_blocks * plan.groups * plan.split,
        block=plan.waves * 32,
        lds=plan.lds,
        args=(
            x, data, scales, factors, epilogue.bias, x_scale, epilogue.residual, y, row_ids, block_experts,
            epilogue.row_weights, None, x.stride(0), y.stride(0), m, n, k, top_k, plan.split, plan.waves_k,
            plan.waves_n, plan.groups, plan.depth, plan.chunk, carry, out_code(y),
            ACTIVATIONS[epilogue.activation] | (INTERLEAVED if epilogue.interleaved else 0),
            epilogue.alpha, epilogue.limit or 0.0,
        ),
        cluster=plan.split,
        overlap=True,
    )  # fmt: skip


def check_operands(x: Any, y: Any, n: int, top_k: int, epilogue: Epilogue) -> None:
    """What every target asks of x and y.

    Raises:
        ShapeError: shapes or strides that do not fit each other or the kernel.
    """
    columns = n // 2 if epilogue.activation else n
    if y.shape[1] != columns or x.shape[0] * top_k != y.shape[0] or (epilogue.activation and n % TILE_ROWS):
        want = f"want [M / top_k, K] and [M, {columns}], N in 16s with an activation"
        raise ShapeError(_shapes(x, y, n), want, "check the layer")
    if x.stride(1) != 1 or x.stride(0) % 8 or y.stride(1) != 1:
        strides = f"{_shapes(x, y, n)}, strides {x.stride()}, {y.stride()}"
        raise ShapeError(strides, "rows must be 16-byte aligned", "make x contiguous")


def _shapes(x: Any, y: Any, n: int) -> str:
    return f"x {tuple(x.shape)}, y {tuple(y.shape)}, N {n}"


def out_code(y: Any) -> int:
    """The kernel's number of y's dtype.

    Raises:
        ShapeError: a dtype that it does not store.
    """
    name = str(y.dtype).removeprefix("torch.")
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    if name not in known:
        raise ShapeError(f"y of {name}", "the kernel stores bf16, fp16 or fp32", "pass one of those")
    return OUTS[known[name]]
