"""Rows of x for a block of `hopper_moe.py`: which they are, their factors, and, where few, their quantization."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .hopper_operands import larger


@gluon.jit
def rows_at(places, row_ids, M, BLOCK_M: gl.constexpr, ALONE: gl.constexpr):
    """Routed rows at places, M where none is: as `row_ids` says; without it one a block, or all in order (dense)."""
    rows = places
    if row_ids is not None:
        rows = gl.load(row_ids + places)
    elif ALONE:
        rows = gl.where(places % BLOCK_M == 0, places // BLOCK_M, M)
    return rows


@gluon.jit
def factors_at(rows, factors, M, DIVIDE: gl.constexpr):
    """Factor of each row, whose index is divided by DIVIDE; 0 where there is no row."""
    return gl.load(factors + rows // DIVIDE, mask=rows < M, other=0.0)


@gluon.constexpr_function
def chunk_of(block_k, rows, warps):
    """Elements of each of `rows` rows that `quantize_rows` takes at once, 8 a lane."""
    return max(block_k, 256 * warps // rows)


@gluon.constexpr_function
def steps_of(k, block_k, rows, warps):
    """Tiles of `block_k` that a row of x takes as a whole."""
    chunk = chunk_of(block_k, rows, warps)
    return (k + chunk - 1) // chunk * chunk // block_k


@gluon.jit
def repeated(codes, ROWS: gl.constexpr):
    """[A, 1, B] -> [A, ROWS, B]."""
    LAYOUT: gl.constexpr = codes.type.layout
    codes, _ = gl.broadcast(codes, gl.zeros((codes.shape[0], ROWS, codes.shape[2]), codes.dtype, LAYOUT))
    return codes


@gluon.jit
def in_x_order(codes, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """[ROWS, COLUMNS] with the elements of every 64 columns in `x_order`."""
    codes = codes.reshape((ROWS, COLUMNS // 64, 4, 4, 4)).permute((0, 1, 3, 2, 4))
    return codes.reshape((ROWS, COLUMNS))


@gluon.jit
def quantize_rows(x_steps, x, row_ids, tile_m, M, TOP_K: gl.constexpr, ALONE: gl.constexpr, ORDERED: gl.constexpr,
                  K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, shared: gl.constexpr):  # fmt: skip
    """A block's rows of x, bf16, as e4m3 under one power of two each, to shared memory as a whole: what `quant_mx`
    gives for `row`, to the bit, but for the codes of a row with NaN. Returns these powers, of such a row NaN, [BLOCK_M]
    or, if ALONE, [1].

    ALONE: each row of the block becomes its one row; sums of all but the first go nowhere. ORDERED: in `x_order` of
    `hopper_pack.py`.
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 1 if ALONE else BLOCK_M
    CHUNK: gl.constexpr = chunk_of(BLOCK_K, ROWS, NUM_WARPS)
    CHUNKS: gl.constexpr = (K + CHUNK - 1) // CHUNK
    TILES: gl.constexpr = CHUNK // BLOCK_K
    lanes: gl.constexpr = min(32, CHUNK // 8)
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // lanes, lanes], [1, NUM_WARPS] if ALONE else [NUM_WARPS, 1], [1, 0]
    )
    chunks = x_steps._reinterpret(x_steps.dtype, [CHUNKS, TILES * BLOCK_M, BLOCK_K], shared)
    rows = rows_at(tile_m * BLOCK_M + gl.arange(0, ROWS, gl.SliceLayout(1, layout)), row_ids, M, BLOCK_M, ALONE)
    inside = gl.expand_dims(rows < M, 1)
    columns = gl.expand_dims(gl.arange(0, CHUNK, gl.SliceLayout(0, layout)), 0)
    pointers = x + gl.expand_dims((rows // TOP_K).to(gl.int64) * K, 1) + columns
    bits = gl.zeros((ROWS, CHUNK), gl.uint16, layout)
    for chunk in gl.static_range(CHUNKS):
        mask = inside & (columns < K - chunk * CHUNK) if (chunk + 1) * CHUNK > K else inside
        bits = larger(bits, gl.load(pointers + chunk * CHUNK, mask=mask, other=0.0).to(gl.uint16, bitcast=True))
    largest = gl.max(bits.to(gl.int32), 1) << 16
    byte = gl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 0)
    inverse = gl.expand_dims(((254 - byte) << 23).to(gl.float32, bitcast=True), 1)
    for chunk in gl.static_range(CHUNKS):  # read once more, as registers would not hold it all
        mask = inside & (columns < K - chunk * CHUNK) if (chunk + 1) * CHUNK > K else inside
        values = gl.load(pointers + chunk * CHUNK, mask=mask, other=0.0).to(gl.float32)
        codes = (values * inverse).to(gl.float8e4nv)
        if ORDERED:
            codes = in_x_order(codes, ROWS, CHUNK)
        codes = codes.reshape((ROWS, TILES, BLOCK_K)).permute((1, 0, 2))
        if ALONE:
            codes = repeated(codes, BLOCK_M)
        chunks.index(chunk).store(codes.reshape((TILES * BLOCK_M, BLOCK_K)))
    fence_async_shared()
    return gl.where(largest > 0x7F800000, 0x7FC00000, gl.maximum(byte << 23, 1 << 22)).to(gl.float32, bitcast=True)
