"""Grouped MX GEMM for Hopper: weights in the order of wgmma's fragments, dequantized in registers, E = 1 for dense.

y^T = w x^T: the weights are wgmma's left operand, which may lie in registers, so 4-bit codes go from shared memory to
the tensor core without a way back through it, and a block of few tokens wastes no rows of 64. Three kinds of operands:

- `e2m1` x `bf16`: exact. A code times 2^-126 is a bf16 by its bits alone; one multiplication by a power of two, the
  block's scale over the row's largest, makes it the value.
- `e2m1` x `e4m3`: a code times 2^d is an e4m3 for twelve values of d, looked up four at a time. So a row of weights is
  e4m3 under one power of two, exact where its scales span 12 octaves. Activations are e4m3 under one scale a row.
- `e4m3` x `e4m3`: weights re-encoded under one power of two a row (`hopper_pack.py`), no work in the loop.

`hopper_pack.py` has the order of the bytes; `moe.py` what is done around these GEMMs. Gluon, because layouts of
registers must be told: Triton's own choice takes the codes through shared memory again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_K = gl.constexpr(128)


@gluon.constexpr_function
def fragments(groups, warps, wide):
    """Registers that hold a [groups, 512] tile of packed weights, `groups` of 16 rows each.

    Offset in a group: lane, then 16 bytes of its own; `wide` (uint16): two such halves after one another.
    """
    own = [[0, 1], [0, 2], [0, 4]] + ([[0, 256]] if wide else [[0, 8]])
    first = 8 if wide else 16
    lanes = [[0, first << i] for i in range(5)]
    rows = [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    of_warps = warps.bit_length() - 1
    return gl.DistributedLinearLayout(own + rows[of_warps:], lanes, rows[:of_warps], [], [groups, 512])


@gluon.jit
def codes_to_e4m3(packed, low_first, low_second, high_first, high_second):
    """[R, C] bytes, four of which hold eight codes, and the e4m3 of magnitudes 0..3 and 4..7 of either half's block.

    Returns two [R, C] e4m3: the first and the second four codes of each word.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 pick, sign;
        and.b32 pick, $2, 0x77777777;
        and.b32 sign, $2, 0x80808080;
        prmt.b32 $0, $3, $7, pick;
        or.b32 $0, $0, sign;
        shr.u32 pick, pick, 16;
        shl.b32 sign, $2, 4;
        and.b32 sign, sign, 0x80808080;
        prmt.b32 $1, $11, $15, pick;
        or.b32 $1, $1, sign;
        }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [packed, low_first, low_second, high_first, high_second],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def codes_to_bf16(packed, first, second, third, fourth):
    """[R, C] uint16, two of which hold eight codes, and 2^126 times the scale of each code's block, twice a word.

    Returns four [R, C] bf16.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 code, sign;
        and.b32 code, $4, 0x81C081C0;
        mul.rn.bf16x2 $0, code, $5;
        shl.b32 code, $4, 3;
        and.b32 code, code, 0x01C001C0;
        shl.b32 sign, $4, 2;
        and.b32 sign, sign, 0x80008000;
        or.b32 code, code, sign;
        mul.rn.bf16x2 $1, code, $7;
        shl.b32 code, $4, 6;
        and.b32 code, code, 0x81C081C0;
        mul.rn.bf16x2 $2, code, $9;
        shr.u32 code, $4, 4;
        and.b32 code, code, 0x01C001C0;
        shl.b32 sign, $4, 1;
        and.b32 sign, sign, 0x80008000;
        or.b32 code, code, sign;
        mul.rn.bf16x2 $3, code, $11;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [packed, first, second, third, fourth],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def e4m3_table(word, block: gl.constexpr, layout: gl.constexpr):
    """The e4m3 bytes of magnitudes 0..3 and 4..7 under the scale in byte `block` of each row's word."""
    octave = (word >> (8 * block)) & 0xFF
    first = gl.expand_dims(octave * 0x08080800 + 0x14100800, 1)
    second = gl.expand_dims(octave * 0x08080808 + 0x24201C18, 1)
    return first, second


@gluon.jit
def bf16_scale(word, block: gl.constexpr):
    """The scale in byte `block` of each row's word as two equal bf16."""
    return gl.expand_dims(((word >> (8 * block)) & 0xFF) * 0x00800080, 1)


@gluon.jit
def weights_of(w_tile, scale_tile, W_FORMAT: gl.constexpr, X_FORMAT: gl.constexpr, BLOCK_N: gl.constexpr,
               operand: gl.constexpr, registers: gl.constexpr):  # fmt: skip
    """The left operand [BLOCK_N, 128] from a stage of shared memory."""
    GROUPS: gl.constexpr = BLOCK_N // 16
    if X_FORMAT == "bf16":
        words = w_tile.load(registers).reshape((GROUPS, 2, 8, 4, 2, 2, 2)).permute((0, 5, 2, 1, 4, 3, 6))
        words = gl.convert_layout(words.reshape((BLOCK_N, 32)), operand, assert_trivial=True)
        scales = scale_tile.load(gl.SliceLayout(1, operand))
        a, b, c, d = codes_to_bf16(words, bf16_scale(scales, 0), bf16_scale(scales, 1), bf16_scale(scales, 2),
                                   bf16_scale(scales, 3))  # fmt: skip
    elif W_FORMAT == "e2m1":
        scales = scale_tile.load(gl.SliceLayout(1, operand)).to(gl.uint32)
        words = w_tile.slice(0, GROUPS, 0).load(registers).reshape((GROUPS, 8, 4, 2, 2, 4)).permute((0, 4, 1, 3, 2, 5))
        words = gl.convert_layout(words.reshape((BLOCK_N, 32)), operand, assert_trivial=True)
        low, low2 = e4m3_table(scales, 0, operand)
        high, high2 = e4m3_table(scales, 1, operand)
        a, b = codes_to_e4m3(words, low, low2, high, high2)
        words = (
            w_tile.slice(1 * GROUPS, GROUPS, 0)
            .load(registers)
            .reshape((GROUPS, 8, 4, 2, 2, 4))
            .permute((0, 4, 1, 3, 2, 5))
        )
        words = gl.convert_layout(words.reshape((BLOCK_N, 32)), operand, assert_trivial=True)
        low, low2 = e4m3_table(scales, 2, operand)
        high, high2 = e4m3_table(scales, 3, operand)
        c, d = codes_to_e4m3(words, low, low2, high, high2)
    else:
        a = plain(w_tile.slice(0, GROUPS, 0), BLOCK_N, operand, registers)
        b = plain(w_tile.slice(1 * GROUPS, GROUPS, 0), BLOCK_N, operand, registers)
        c = plain(w_tile.slice(2 * GROUPS, GROUPS, 0), BLOCK_N, operand, registers)
        d = plain(w_tile.slice(3 * GROUPS, GROUPS, 0), BLOCK_N, operand, registers)
    return a, b, c, d


@gluon.jit
def plain(w_tile, BLOCK_N: gl.constexpr, operand: gl.constexpr, registers: gl.constexpr):
    """e4m3 weights [BLOCK_N, 32] as they are."""
    words = w_tile.load(registers).reshape((BLOCK_N // 16, 8, 4, 2, 2, 4)).permute((0, 4, 1, 3, 2, 5))
    return gl.convert_layout(words.reshape((BLOCK_N, 32)), operand, assert_trivial=True).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def hopper_moe_kernel(
    x, x_factors, w, w_scales, w_factors, bias, y, row_ids, block_experts, row_weights,
    M, N, K, k_tiles, groups_n, tiles_m, alpha, limit, beta,
    X_FORMAT: gl.constexpr, W_FORMAT: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr,
    INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N weight rows and BLOCK_M tokens; see `moe.py` for the arguments.

    M: routed rows; N: weight rows; K: elements of a row of x; k_tiles: K / 128 rounded up; groups_n: N / 16 rounded up;
        tiles_m: blocks along M. ACTIVATION: "none", "silu" or "swigluoai", of pairs of rows that `hopper_pack` has put
        8 apart. CLAMP: whether `limit` holds.
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = BLOCK_N // 16
    WIDE: gl.constexpr = X_FORMAT == "bf16"
    PARTS: gl.constexpr = 1 if WIDE else (2 if W_FORMAT == "e2m1" else 4)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_M, 16 if WIDE else 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2 if WIDE else 4)
    registers: gl.constexpr = fragments(GROUPS, NUM_WARPS, WIDE)

    tiles_n = (groups_n + GROUPS - 1) // GROUPS
    pid = gl.program_id(0)
    band = GROUP_M * tiles_n
    top = pid // band * GROUP_M
    height = gl.minimum(tiles_m - top, GROUP_M)
    tile_m = top + pid % band % height
    tile_n = pid % band // height
    expert = gl.load(block_experts + tile_m)
    if expert < 0:
        return

    # Where things come from. Rows of x are 16 bytes a thread, one row to as few threads as it takes.
    x_vector: gl.constexpr = 8 if WIDE else 16
    x_threads: gl.constexpr = 128 // x_vector
    copy_x: gl.constexpr = gl.BlockedLayout([1, x_vector], [32 // x_threads, x_threads], [NUM_WARPS, 1], [1, 0])
    m_places = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, copy_x))
    m_rows = gl.load(row_ids + m_places)
    x_inside = gl.expand_dims(m_rows < M, 1)
    x_columns = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, copy_x)), 0)
    x_pointers = x + gl.expand_dims((m_rows // TOP_K).to(gl.int64) * K, 1) + x_columns

    w_vector: gl.constexpr = 8 if WIDE else 16
    copy_w: gl.constexpr = gl.BlockedLayout([1, w_vector], [1, 32], [NUM_WARPS, 1], [1, 0])
    w_rows = gl.expand_dims(gl.arange(0, PARTS * GROUPS, gl.SliceLayout(1, copy_w)), 1)
    w_groups = tile_n * GROUPS + w_rows % GROUPS
    w_inside = w_groups < groups_n
    w_columns = gl.expand_dims(gl.arange(0, 512, gl.SliceLayout(0, copy_w)), 0)
    W_STEP: gl.constexpr = 512 * PARTS
    w_pointers = w + expert.to(gl.int64) * groups_n * k_tiles * W_STEP + w_groups * (k_tiles * W_STEP)
    w_pointers += w_rows // GROUPS * 512 + w_columns
    copy_s: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    n_rows = gl.arange(0, BLOCK_N, copy_s)
    s_groups = tile_n * GROUPS + n_rows // 16
    s_inside = s_groups < groups_n
    s_pointers = w_scales + expert.to(gl.int64) * groups_n * k_tiles * 16 + s_groups * (k_tiles * 16) + n_rows % 16

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(128, 16 if WIDE else 8, 2)
    x_stages = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, BLOCK_M, BLOCK_K], x_shared)
    w_stages = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, PARTS * GROUPS, 512], flat)
    s_stages = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    # STAGES - 2 tiles are on their way while one is used and the one before may still be read by the other half.
    for first in gl.static_range(STAGES - 2):
        if first < k_tiles:
            async_copy.async_copy_global_to_shared(w_stages.index(first), w_pointers + first * W_STEP, mask=w_inside)
            if W_FORMAT == "e2m1":
                async_copy.async_copy_global_to_shared(s_stages.index(first), s_pointers + first * 16, mask=s_inside)
            inside = x_inside & (first * BLOCK_K + x_columns < K)
            async_copy.async_copy_global_to_shared(x_stages.index(first), x_pointers + first * BLOCK_K, mask=inside)
        async_copy.commit_group()

    total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    for tile in range(k_tiles):
        async_copy.wait_group(STAGES - 3)
        coming = tile + STAGES - 2
        if coming < k_tiles:
            free = coming % STAGES
            async_copy.async_copy_global_to_shared(w_stages.index(free), w_pointers + coming * W_STEP, mask=w_inside)
            if W_FORMAT == "e2m1":
                async_copy.async_copy_global_to_shared(s_stages.index(free), s_pointers + coming * 16, mask=s_inside)
            inside = x_inside & (coming * BLOCK_K + x_columns < K)
            async_copy.async_copy_global_to_shared(x_stages.index(free), x_pointers + coming * BLOCK_K, mask=inside)
        async_copy.commit_group()
        stage = tile % STAGES
        fence_async_shared()
        a, b, c, d = weights_of(w_stages.index(stage), s_stages.index(stage), W_FORMAT, X_FORMAT, BLOCK_N, operand,
                                registers)  # fmt: skip
        right = x_stages.index(stage).permute((1, 0))
        acc = warpgroup_mma(a, right.slice(0, 32, 0), total, is_async=True)
        acc = warpgroup_mma(b, right.slice(32, 32, 0), acc, is_async=True)
        acc = warpgroup_mma(c, right.slice(64, 32, 0), acc, is_async=True)
        acc = warpgroup_mma(d, right.slice(96, 32, 0), acc, is_async=True)
        total = warpgroup_mma_wait(0, deps=(acc,))

    n_index = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
    m_place = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    m_row = gl.load(row_ids + m_place)
    n_inside = n_index < groups_n * 16
    factor = gl.load(w_factors + expert.to(gl.int64) * groups_n * 16 + n_index, mask=n_inside, other=0.0)
    total = total * gl.expand_dims(factor, 1)
    if x_factors is not None:
        x_factor = gl.load(x_factors + m_row // TOP_K, mask=m_row < M, other=0.0)
        total = total * gl.expand_dims(x_factor, 0)
    if bias is not None:
        column = n_index
        if ACTIVATION != "none":
            out = n_index // 16 * 8 + n_index % 8
            second = n_index % 16 // 8
            column = out * 2 + second if INTERLEAVED else out + second * (N // 2)
            n_inside = out < N // 2
        else:
            n_inside = n_index < N
        total += gl.expand_dims(
            gl.load(bias + expert.to(gl.int64) * N + column, mask=n_inside, other=0.0).to(gl.float32), 1
        )
    if row_weights is not None:
        total = total * gl.expand_dims(gl.load(row_weights + m_row, mask=m_row < M, other=0.0), 0)
    if ACTIVATION != "none":
        pairs = total.reshape((GROUPS, 2, 8, BLOCK_M)).permute((0, 2, 3, 1)).reshape((BLOCK_N // 2, BLOCK_M, 2))
        gate, up = gl.split(pairs)
        if CLAMP:
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit)
        if ACTIVATION == "swigluoai":
            result = gate / (1.0 + gl.exp(-alpha * gate)) * (up + beta)
        else:
            result = gate / (1.0 + gl.exp(-gate)) * up
        WIDTH: gl.constexpr = BLOCK_N // 2
        n_out = N // 2
    else:
        result = total
        WIDTH: gl.constexpr = BLOCK_N
        n_out = N

    out_threads: gl.constexpr = min(32, WIDTH // 8)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 // out_threads, out_threads], [NUM_WARPS, 1], [1, 0])
    result = gl.convert_layout(result.to(y.dtype.element_ty).permute((1, 0)), store)
    rows = gl.load(row_ids + tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, store)))
    columns = tile_n * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, store))
    places = gl.expand_dims(rows.to(gl.int64) * n_out, 1) + gl.expand_dims(columns, 0)
    gl.store(y + places, result, mask=gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < n_out, 0))
