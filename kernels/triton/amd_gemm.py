"""Dense and grouped GEMM of int4 and MX weights on AMD: y = x w^T for prefill, weights in registers all the way.

- int4: what `group_gemm.py` computes, as exactly: q - z is exact in x's dtype, products of a group are summed in fp32,
  and its scale is applied to that sum in fp32.
- e2m1, e4m3 (MX blocks of 32) by bf16: on CDNA codes become bf16 with their scale, a power of two, and sums run over
  all of K; on RDNA, which multiplies no bf16, sums of a block are scaled. Exact either way, within bf16's range.
- e2m1 by fp16, which has not the range of scales: sums of a block are scaled.

Gluon, because layouts of registers must be told: Triton's own choice dequantizes first and takes values through LDS, 32
of K at a time between two barriers.

- Weights: a lane has row l % 16 of a tile and 16 bytes of it, as decode kernels do, loaded a step ahead. Its words
  become the matrix unit's operand, which every warp of a block makes of its own rows only.
- x goes through LDS a step at a time, between two barriers, out of registers that the next step is loaded into.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd.cdna3 import buffer_load, mfma
from triton.experimental.gluon.language.amd.rdna3 import wmma

from .e2m1_values import e2m1_halves, e2m1_values, e8m0_values
from .e4m3_values import e4m3_values
from .int4_values import int4_values
from .mx_gemm import e8m0_to_fp32
from .quant_mx import activate
from .tiles import column_offsets, row_offsets, tile_of_program

LAYOUTS = {
    ("gfx950", "int4"): "cdna_int4", ("gfx942", "int4"): "cdna_int4", ("gfx11", "int4"): "rdna_int4",
    ("gfx950", "e2m1"): "preshuffle", ("gfx942", "e2m1"): "cdna3_e2m1", ("gfx11", "e2m1"): "preshuffle",
    ("gfx942", "e4m3"): "cdna3_e4m3", ("gfx11", "e4m3"): "preshuffle",
}  # fmt: skip
"""Layout of values that is read on an arch, besides `strided`."""


@gluon.constexpr_function
def _bases(count, at, step=1):
    """Bases of `count` elements, `step` apart, along dimension `at` of two."""
    return [[step << i, 0] if at == 0 else [0, step << i] for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def sums_layout(arch, warps_m, warps_n):
    """Of y, by 16 x 16 matrix instructions: a lane has one column of each, as it has one row of weights."""
    if arch == "gfx11":
        return gl.amd.AMDWMMALayout(1, False, [warps_m, warps_n])
    k, version = (32, 4) if arch == "gfx950" else (16, 3)
    return gl.amd.AMDMFMALayout(version, [16, 16, k], False, [warps_m, warps_n])


@gluon.constexpr_function
def words_layout(arch, rows, words, warps_m, warps_n):
    """Of words of eight codes [rows, words] as loaded: 16 rows a wave, on CDNA with a quarter of the words to each 16
    lanes, on RDNA with all to either half of the wave."""
    quarters = 1 if arch == "gfx11" else 4
    own = words // quarters
    lanes = _bases(16, 0) + (_bases(4, 1, own) if quarters == 4 else [[0, 0]])
    warps = _bases(warps_n, 0, 16) + [[0, 0]] * (warps_m.bit_length() - 1)
    registers = _bases(own, 1) + _bases(rows // 16 // warps_n, 0, 16 * warps_n)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, words])


@gluon.constexpr_function
def staged_layout(wave, warps, step):
    """Of x on its way to LDS: 16 bytes a lane."""
    return gl.BlockedLayout([1, 8], [wave * 8 // step, step // 8], [warps, 1], [1, 0])


@gluon.jit
def parts_of(words, CDNA: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr):
    """Words [ROWS, 4 PARTS] as loaded -> a tuple of [ROWS, 4], of 32 along K each, in order; PARTS is 1, 2 or 4."""
    if CDNA:  # a lane's words are of one part each
        words = words.reshape((ROWS, 4, PARTS)).permute((0, 2, 1)).reshape((ROWS, 4 * PARTS))
    parts = (words,)
    if PARTS > 1:
        parts = gl.split(words.reshape((ROWS, 2, 2 * PARTS)).permute((0, 2, 1)))
    if PARTS == 4:
        low = gl.split(parts[0].reshape((ROWS, 2, 4)).permute((0, 2, 1)))
        high = gl.split(parts[1].reshape((ROWS, 2, 4)).permute((0, 2, 1)))
        parts = (low[0], low[1], high[0], high[1])
    return parts


@gluon.jit
def x_of(x, at, x_k, k, K, LONG: gl.constexpr, EVEN_K: gl.constexpr):
    """x of a step at k, zero behind K."""
    inside = None if EVEN_K else gl.expand_dims(k + x_k < K, 0)
    other = None if EVEN_K else 0.0
    return gl.load(x + k + at, mask=inside, other=other) if LONG else buffer_load(x + k, at, inside)


@gluon.jit
def words_of(w, at, word, k, K, VALUES: gl.constexpr, EVEN_K: gl.constexpr):
    """Weights of a step, zero behind K, where tiles of a whole step are padded."""
    inside = None if EVEN_K or VALUES == "cdna_int4" or VALUES == "cdna3_e2m1" else gl.expand_dims(k + word * 8 < K, 0)
    return buffer_load(w + (k // 8 if VALUES == "strided" else k * 2), at, inside)


@gluon.jit
def scales_of(w_scales, at, k, K, GROUP: gl.constexpr, PARTS: gl.constexpr, SCALES: gl.constexpr, EVEN_K: gl.constexpr):
    """Words of scale and zero point of a step's groups, or bytes of its MX blocks' scales; zero behind K."""
    scales = ()
    for g in gl.static_range(PARTS):
        inside = None if EVEN_K else at * 0 + k + g * GROUP < K
        scales += (buffer_load(w_scales + column_offsets(k // GROUP + g, SCALES), at, inside),)
    return scales


@gluon.jit
def step_of(x, w, w_scales, x_at, w_at, s_at, x_k, word, k, K, LONG: gl.constexpr, GROUP: gl.constexpr,
            PARTS: gl.constexpr, VALUES: gl.constexpr, SCALES: gl.constexpr, WHOLE: gl.constexpr):  # fmt: skip
    """x, weights and scales of a step at k; WHOLE: nothing of it is behind K."""
    x_tile = x_of(x, x_at, x_k, k, K, LONG, WHOLE)
    return (
        x_tile,
        words_of(w, w_at, word, k, K, VALUES, WHOLE),
        scales_of(w_scales, s_at, k, K, GROUP, PARTS, SCALES, WHOLE),
    )


@gluon.jit
def in_turn(sums):
    """Unchanged; but LLVM finishes them before it reads more of LDS. Else it begins with all groups of a step at once,
    each with sums of its own, and spills."""
    return gl.inline_asm_elementwise("", "=v,0", [sums], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def eight_columns_on(sums):
    """Of each 16 columns, the sums of the other eight: lanes of a row of sixteen have one each."""
    return gl.inline_asm_elementwise(
        "s_nop 1\nv_mov_b32_dpp $0, $1 row_ror:8 row_mask:0xf bank_mask:0xf", "=&v,v", [sums], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def amd_gemm_kernel(
    x, x_scale, w, w_scales, bias, y, row_ids, block_experts, row_weights,
    M, N, K, tiles_m,
    ARCH: gl.constexpr, GROUP: gl.constexpr, TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WARPS: gl.constexpr,
    GROUP_M: gl.constexpr, XCDS: gl.constexpr, EVEN_K: gl.constexpr,
    VALUES: gl.constexpr, SCALES: gl.constexpr, PAD: gl.constexpr, SCALE_PAD: gl.constexpr,
    FORMAT: gl.constexpr = "int4", LONG: gl.constexpr = False, PAIRS: gl.constexpr = None,
    ACTIVATION: gl.constexpr = None, LIMIT: gl.constexpr = None, ALPHA: gl.constexpr = 1.0, BETA: gl.constexpr = 0.0,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of y; see `group_gemm` for the arguments.

    M, tiles_m, GROUP, TOP_K, EVEN_K: as of `group_gemm_kernel`. ARCH: gfx950, gfx942, gfx11. FORMAT: `int4`, `e2m1` or
        `e4m3`, whose words of eight codes are int64, of the others int32. A step is BLOCK_K or a group of K, whichever
        is more, 128 at most; whole tiles of a layout. WARPS: of the block. VALUES, SCALES: the weights' layouts, whose
        rows are padded to PAD words of int4 or bytes of MX, and to SCALE_PAD scales. LONG: x may be beyond the 2 GiB
        that buffer loads reach. PAIRS: `halves` or `interleaved`, where 8 gates and 8 ups alternate in the weights, for
        how they do in y and the bias; N is then whole 16s. ACTIVATION: of PAIRS, `silu` or `swigluoai`, which
        makes N / 2 columns of them; LIMIT, ALPHA, BETA: as `Front` has them.
    """
    CDNA: gl.constexpr = ARCH != "gfx11"
    HALF: gl.constexpr = x.dtype.element_ty == gl.float16
    PACKED: gl.constexpr = VALUES != "strided"
    MX: gl.constexpr = FORMAT != "int4"
    CHUNK: gl.constexpr = 2 if FORMAT == "e4m3" else 4  # words of eight codes that are 16 bytes
    SCALED: gl.constexpr = MX and CDNA and not HALF  # values are, which powers of two leave exact; else sums
    STEP: gl.constexpr = BLOCK_K if BLOCK_K > GROUP else GROUP
    PARTS: gl.constexpr = STEP // GROUP
    gl.static_assert(STEP >= 32 * CHUNK or not VALUES.startswith("cdna"), "steps are tiles of the layout")
    WARPS_N: gl.constexpr = min(BLOCK_N // 16, WARPS)
    WARPS_M: gl.constexpr = WARPS // WARPS_N
    sums: gl.constexpr = sums_layout(ARCH, WARPS_M, WARPS_N)
    loaded: gl.constexpr = words_layout(ARCH, BLOCK_N, STEP // 8, WARPS_M, WARPS_N)
    staged: gl.constexpr = staged_layout(64 if CDNA else 32, WARPS, STEP)
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 8 if CDNA else 16)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 8 if CDNA else 16)
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, STEP // 8, [1, 0])

    tile_m, tile_n = tile_of_program(gl.program_id(0), tiles_m, gl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    W_PAD: gl.constexpr = PAD * CHUNK // 16 if MX and PACKED else PAD  # in words
    w_cols = gl.cdiv(K // 32 * 4, W_PAD) * W_PAD
    s_cols = gl.cdiv(K // GROUP, SCALE_PAD) * SCALE_PAD
    y_places = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, sums))
    x_rows = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, staged))
    columns = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, sums))
    places = columns  # of y and of the bias
    if PAIRS == "halves":
        places = columns // 16 * 8 + columns % 8 + columns % 16 // 8 * (N // 2)
    elif PAIRS == "interleaved":
        places = columns // 16 * 16 + columns % 8 * 2 + columns % 16 // 8
    ACTIVATED: gl.constexpr = ACTIVATION is not None
    gl.static_assert(PAIRS is not None or not ACTIVATED, "a gate and its up are eight columns apart")
    kept, y_columns, n_out = columns < N, places, N
    if ACTIVATED:
        kept, y_columns, n_out = kept & (columns % 16 < 8), columns // 16 * 8 + columns % 8, N // 2
    first = tile_m * BLOCK_M // TOP_K  # row of x from which offsets count
    if row_ids is not None:
        x_rows, first = gl.load(row_ids + x_rows), 0
        expert = gl.load(block_experts + tile_m).to(gl.int64)
        if expert < 0:
            y_rows = gl.load(row_ids + y_places)
            inside = gl.expand_dims(y_rows < M, 1) & gl.expand_dims(kept, 0)
            nothing = gl.full((BLOCK_M, BLOCK_N), 0, y.dtype.element_ty, sums)
            at = gl.expand_dims(y_rows.to(gl.int64) * n_out, 1) + gl.expand_dims(y_columns, 0)
            gl.store(y + at, nothing, mask=inside)
            return
        before = expert * (gl.cdiv(N, 16) * 16 if PACKED else N)  # rows
        w += before * w_cols
        w_scales += before * s_cols
        if bias is not None:
            bias += expert * N
    x += first.to(gl.int64) * K
    w += (tile_n * BLOCK_N).to(gl.int64) * w_cols
    w_scales += (tile_n * BLOCK_N).to(gl.int64) * s_cols

    # Rows beyond the last are the last's once more, and are not stored: so no load is masked where EVEN_K.
    x_rows = gl.minimum(x_rows, M - 1) // TOP_K - first
    x_k = gl.arange(0, STEP, gl.SliceLayout(0, staged))
    if LONG:
        x_rows = x_rows.to(gl.int64)
    x_at = gl.expand_dims(x_rows * K, 1) + gl.expand_dims(x_k, 0)
    n = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, loaded)), N - 1 - tile_n * BLOCK_N)
    c = gl.arange(0, STEP // 8, gl.SliceLayout(0, loaded))
    # Of strided weights single words, so that every lane has the parts of K that it has of packed ones.
    word = c % (STEP // 32) * 4 + c // (STEP // 32) if CDNA else c
    if PACKED:
        stored = word // CHUNK * (16 * CHUNK) + word % CHUNK
        if VALUES.startswith("cdna"):  # by lanes: 16 bytes are of as many parts of K as have words there
            OWN: gl.constexpr = STEP // 32 // CHUNK
            stored = c // CHUNK % OWN * (64 * CHUNK) + c // CHUNK // OWN * (16 * CHUNK) + c % CHUNK
        w_at = gl.expand_dims(n // 16 * 16 * w_cols + n % 16 * CHUNK, 1) + gl.expand_dims(stored, 0)
    else:
        w_at = gl.expand_dims(n * w_cols, 1) + gl.expand_dims(word, 0)
    s_at = row_offsets(n, s_cols, SCALES)

    AHEAD: gl.constexpr = BLOCK_M <= 64  # of LDS too; of more rows x would take too many registers
    buffer = gl.allocate_shared_memory(x.dtype.element_ty, [BLOCK_M, STEP], shared)
    total = gl.full((BLOCK_M, BLOCK_N), 0, gl.float32, sums)
    last = (K - 1) // STEP * STEP
    x_tile, w_tile, scales = step_of(
        x, w, w_scales, x_at, w_at, s_at, x_k, word, 0, K, LONG, GROUP, PARTS, VALUES, SCALES, EVEN_K
    )
    for k in range(0, K, STEP):
        buffer.store(x_tile)
        words = parts_of(w_tile, CDNA, STEP // 32, BLOCK_N)
        now = scales
        ahead = gl.minimum(k + STEP, last)  # the last step once more, behind it
        if EVEN_K or ahead + STEP <= K:
            x_tile, w_tile, scales = step_of(
                x, w, w_scales, x_at, w_at, s_at, x_k, word, ahead, K, LONG, GROUP, PARTS, VALUES, SCALES, True
            )
        else:
            x_tile, w_tile, scales = step_of(
                x, w, w_scales, x_at, w_at, s_at, x_k, word, ahead, K, LONG, GROUP, PARTS, VALUES, SCALES, False
            )
        x_part = buffer.slice(0, 32, 1).load(left)
        x_next = x_part
        for g in gl.static_range(PARTS):
            of_words = gl.convert_layout(now[g], gl.SliceLayout(1, words[0].type.layout), assert_trivial=True)
            of_words = gl.expand_dims(of_words, 1)
            products = total if SCALED else gl.full((BLOCK_M, BLOCK_N), 0, gl.float32, sums)
            for d in gl.static_range(g * (GROUP // 32), (g + 1) * (GROUP // 32)):
                if AHEAD and d + 1 < STEP // 32:
                    x_next = buffer.slice((d + 1) * 32, 32, 1).load(left)
                elif not AHEAD and d > 0:
                    x_part = buffer.slice(d * 32, 32, 1).load(left)
                if FORMAT == "e2m1" and HALF:
                    values = e2m1_halves(words[d], ARCH, BLOCK_N)
                elif FORMAT == "e2m1":
                    values = e2m1_values(words[d], e8m0_values(of_words, ARCH), ARCH, BLOCK_N)
                elif FORMAT == "e4m3":
                    values = e4m3_values(words[d], e8m0_values(of_words, ARCH), ARCH, not PACKED, BLOCK_N)
                else:
                    values = int4_values(words[d], of_words, ARCH, HALF, PACKED, BLOCK_N)
                operand = gl.convert_layout(values.permute((1, 0)), right, assert_trivial=True)
                products = mfma(x_part, operand, products) if CDNA else wmma(x_part, operand, products)
                if AHEAD:
                    x_part = x_next
            if SCALED:
                total = products
            else:
                scale = gl.convert_layout(now[g], gl.SliceLayout(0, sums), assert_trivial=True)
                scale = e8m0_to_fp32(scale) if MX else (scale & -16).to(gl.float32, bitcast=True)
                total = gl.fma(products, gl.broadcast(gl.expand_dims(scale, 0), products)[0], total)
            if not SCALED and BLOCK_M * BLOCK_N > 4096 and g + 1 < PARTS:
                total = in_turn(total)

    y_rows = y_places
    if row_ids is not None:  # not before: they would take registers all the way
        y_rows = gl.load(row_ids + y_places)
    if x_scale is not None:
        total *= gl.load(x_scale)
    if bias is not None:
        total += gl.expand_dims(gl.load(bias + places, mask=columns < N, other=0.0).to(gl.float32), 0)
    if ACTIVATED:
        CLAMP: gl.constexpr = LIMIT is not None
        total = activate(total, eight_columns_on(total), ACTIVATION, CLAMP, ALPHA, LIMIT if CLAMP else 0.0, BETA)
    if row_weights is not None:
        total *= gl.expand_dims(gl.load(row_weights + y_rows, mask=y_rows < M, other=0.0), 1)
    inside = gl.expand_dims(y_rows < M, 1) & gl.expand_dims(kept, 0)
    at = gl.expand_dims(y_rows.to(gl.int64) * n_out, 1) + gl.expand_dims(y_columns, 0)
    gl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
