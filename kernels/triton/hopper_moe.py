"""Grouped GEMM for Hopper: weights in the order of wgmma's fragments, dequantized in registers, E = 1 for dense.

y^T = w x^T: the weights are wgmma's left operand, which may lie in registers, so 4-bit codes go from shared memory to
the tensor core without a way back through it, and a block of few tokens wastes no rows of 64. Four kinds of operands:

- `e2m1` x `bf16`: exact. A code times 2^-126 is a bf16 by its bits alone; one multiplication by a power of two, the
  block's scale over the row's largest, makes it the value.
- `e2m1` x `e4m3`: a code times 2^d is an e4m3 for twelve values of d, looked up four at a time. So a row of weights is
  e4m3 under one power of two, exact where its scales span 12 octaves. Activations are e4m3 under one scale a row.
- `e4m3` x `e4m3`: weights re-encoded under one power of two a row (`hopper_pack.py`), no work in the loop.
- `int4` x `bf16` or `fp16`: a code less its zero point, exact, times its group's scale: rounded once, to x's dtype, as
  the checkpoint's own dequantization is. fp32 scales become that dtype first.

`hopper_pack.py` has the order of the bytes, of int4 the layouts `mma_int4` and `tile_group`;
`hopper_operands.py` how they become operands, `hopper.py` what launches this. Gluon, because layouts of
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .hopper_operands import (
    codes_to_bf16,
    codes_to_e4m3,
    fragments,
    int4_steps,
    int4_words_of,
    scale_fragments,
    scales_of,
    words_of,
)


@gluon.jit
def multiply(acc, w_tile, s_tile, right, W_FORMAT: gl.constexpr, GROUP: gl.constexpr, WIDE: gl.constexpr,
             PARTS: gl.constexpr, BLOCK_N: gl.constexpr, operand: gl.constexpr, w_registers: gl.constexpr,
             s_registers: gl.constexpr):  # fmt: skip
    """Start acc += weights times right for a stage of shared memory, PARTS times 64 of K."""
    GROUPS: gl.constexpr = BLOCK_N // 16
    for part in gl.static_range(PARTS):
        if W_FORMAT == "int4":
            blocks = int4_words_of(w_tile.slice(part * GROUPS, GROUPS, 0), BLOCK_N, w_registers)
            for block in gl.static_range(2):
                of_group = s_tile.slice((64 * part + 32 * block) // GROUP * GROUPS, GROUPS, 0)
                a, b = int4_steps(blocks[block], of_group, right.dtype == gl.float16, BLOCK_N, operand, s_registers)
                acc = warpgroup_mma(a, right.slice(64 * part + 32 * block, 16, 0), acc, is_async=True)
                acc = warpgroup_mma(b, right.slice(64 * part + 32 * block + 16, 16, 0), acc, is_async=True)
        elif W_FORMAT == "e4m3":
            first = words_of(w_tile.slice(2 * part * GROUPS, GROUPS, 0), BLOCK_N, 4, operand, w_registers)
            second = words_of(w_tile.slice((2 * part + 1) * GROUPS, GROUPS, 0), BLOCK_N, 4, operand, w_registers)
            a = first.to(gl.float8e4nv, bitcast=True)
            b = second.to(gl.float8e4nv, bitcast=True)
            acc = warpgroup_mma(a, right.slice(64 * part, 32, 0), acc, is_async=True)
            acc = warpgroup_mma(b, right.slice(64 * part + 32, 32, 0), acc, is_async=True)
        else:
            first, second = scales_of(s_tile.slice(part * GROUPS, GROUPS, 0), BLOCK_N, operand, s_registers)
            w_part = w_tile.slice(part * GROUPS, GROUPS, 0)
            if WIDE:
                words = words_of(w_part, BLOCK_N, 2, operand, w_registers)
                a, b, c, d = codes_to_bf16(words, first * 0x00800080, second * 0x00800080)
                acc = warpgroup_mma(a, right.slice(64 * part, 16, 0), acc, is_async=True)
                acc = warpgroup_mma(b, right.slice(64 * part + 16, 16, 0), acc, is_async=True)
                acc = warpgroup_mma(c, right.slice(64 * part + 32, 16, 0), acc, is_async=True)
                acc = warpgroup_mma(d, right.slice(64 * part + 48, 16, 0), acc, is_async=True)
            else:
                words = words_of(w_part, BLOCK_N, 4, operand, w_registers)
                a, b = codes_to_e4m3(
                    words, first * 0x08080800 + 0x14100800, first * 0x08080808 + 0x24201C18,
                    second * 0x08080800 + 0x14100800, second * 0x08080808 + 0x24201C18,
                )  # fmt: skip
                acc = warpgroup_mma(a, right.slice(64 * part, 32, 0), acc, is_async=True)
                acc = warpgroup_mma(b, right.slice(64 * part + 32, 32, 0), acc, is_async=True)
    return acc


@gluon.jit
def start_weights(step, steps, w_stages, s_stages, w_pointers, s_pointers, w_groups, s_groups, w_parts, s_parts,
                  k_tiles, s_tiles, groups_n, W_STEP: gl.constexpr, PARTS: gl.constexpr, GROUPS: gl.constexpr,
                  S_K: gl.constexpr, S_WIDTH: gl.constexpr, STAGES: gl.constexpr, RUN: gl.constexpr):  # fmt: skip
    """Ask for the weights that step `step` multiplies, `steps` to a tile of weight rows; beyond them come zeros.

    S_K: elements along K that S_WIDTH words of scales are for; 0 where there are none.
    """
    tile = step
    stage = step % STAGES
    w_from = w_pointers
    s_from = s_pointers
    if RUN > 1:
        tile = step % steps
        groups = step // steps * GROUPS
        w_from += groups * (k_tiles * W_STEP)
        s_from += groups * (s_tiles * S_WIDTH)
        k_tiles = gl.where(step < RUN * steps, k_tiles, 0)
        s_tiles = gl.where(step < RUN * steps, s_tiles, 0)
        w_groups += groups
        s_groups += groups
    w_mask = (w_groups < groups_n) & (tile * PARTS + w_parts < k_tiles)
    w_from += tile * (PARTS * W_STEP)
    async_copy.async_copy_global_to_shared(w_stages.index(stage), w_from, mask=w_mask)
    if S_K:
        s_tile = tile * (PARTS * 64 // S_K) if S_K <= PARTS * 64 else tile // (S_K // (PARTS * 64))
        s_mask = (s_groups < groups_n) & (s_tile + s_parts < s_tiles)
        async_copy.async_copy_global_to_shared(s_stages.index(stage), s_from + s_tile * S_WIDTH, mask=s_mask)


@gluon.jit
def start_rows(step, steps, x_stages, x_pointers, x_inside, x_columns, K, PARTS: gl.constexpr, STAGES: gl.constexpr,
               RUN: gl.constexpr):  # fmt: skip
    """Ask for the rows of x that step `step` multiplies; what was asked for since the last call is now a group."""
    tile = step
    if RUN > 1:
        tile = step % steps
    x_mask = x_inside & (tile * (PARTS * 64) + x_columns < K)
    x_from = x_pointers + tile * (PARTS * 64)
    async_copy.async_copy_global_to_shared(x_stages.index(step % STAGES), x_from, mask=x_mask)
    async_copy.commit_group()


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


@gluon.jit(do_not_specialize=["M", "k_tiles", "s_tiles", "groups_n", "tiles_m", "E"])
def hopper_moe_kernel(
    x, x_factors, w, w_scales, w_factors, bias, y, row_ids, block_experts, row_weights,
    M, N, K, k_tiles, s_tiles, groups_n, tiles_m, E, alpha, limit, beta,
    X_FORMAT: gl.constexpr, W_FORMAT: gl.constexpr, GROUP: gl.constexpr, TOP_K: gl.constexpr, ACTIVATION: gl.constexpr,
    INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, RUN: gl.constexpr,
    OVERLAP: gl.constexpr = False, AHEAD: gl.constexpr = False, LATE: gl.constexpr = False,
):  # fmt: skip
    """RUN tiles of BLOCK_N weight rows, one after another, and BLOCK_M tokens; see `hopper.py` for the arguments.

    Dense: row_ids and block_experts are None, E is 1. Without row_ids alone, each block has one routed row.

    M: routed rows; N: weight rows; K: elements of a row of x; k_tiles: K / 64 rounded up; s_tiles: likewise, of int4
        groups of scales; groups_n: N / 16 rounded up; tiles_m: blocks along M. GROUP: elements that share a scale of
        int4. ACTIVATION: "none", "silu" or "swigluoai", of pairs of rows that `hopper_pack` has put 8 apart. CLAMP:
        whether `limit` holds. BLOCK_K: 64 or 128. Copies run ahead of the multiplication across the tiles of a run, so
        that its next tile is on its way while one is finished.

    OVERLAP, AHEAD, LATE: see `Overlap` in `hopper.py`.
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = BLOCK_N // 16
    WIDE: gl.constexpr = X_FORMAT != "e4m3"
    INT4: gl.constexpr = W_FORMAT == "int4"
    S_K: gl.constexpr = GROUP if INT4 else 64 if W_FORMAT == "e2m1" else 0
    S_WIDTH: gl.constexpr = 16 if INT4 else 8
    PARTS: gl.constexpr = BLOCK_K // 64
    S_PARTS: gl.constexpr = max(1, BLOCK_K // S_K) if S_K else 1
    ROWS: gl.constexpr = PARTS * GROUPS * (1 if S_K else 2)
    WIDTH: gl.constexpr = 256 if WIDE else 512
    PAIRED: gl.constexpr = ACTIVATION != "none"
    OUT_N: gl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
    W_STEP: gl.constexpr = WIDTH if S_K else 2 * WIDTH
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_M, 16 if WIDE else 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2 if WIDE else 4)
    w_registers: gl.constexpr = fragments(GROUPS, NUM_WARPS, WIDE)
    s_registers: gl.constexpr = scale_fragments(GROUPS, NUM_WARPS, S_WIDTH)

    tiles_n = (groups_n + GROUPS * RUN - 1) // (GROUPS * RUN)
    pid = gl.program_id(0)
    band = GROUP_M * tiles_n
    top = pid // band * GROUP_M
    height = gl.minimum(tiles_m - top, GROUP_M)
    tile_m = top + pid % band % height
    tile_n = pid % band // height * RUN
    ALONE: gl.constexpr = row_ids is None and block_experts is not None
    if OVERLAP and not AHEAD:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
    # Where things come from: 16 bytes a thread, whole rows of x or groups of w to as few threads as it takes.
    vector: gl.constexpr = 8 if WIDE else 16
    x_threads: gl.constexpr = BLOCK_K // vector
    copy_x: gl.constexpr = gl.BlockedLayout([1, vector], [32 // x_threads, x_threads], [NUM_WARPS, 1], [1, 0])
    m_rows = rows_at(tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, copy_x)), row_ids, M, BLOCK_M, ALONE)
    expert = tile_m * 0
    if block_experts is not None:
        expert = gl.load(block_experts + tile_m)
        if (expert < 0) | (expert >= E):
            return
    expert = expert.to(gl.int64)

    x_inside = gl.expand_dims(m_rows < M, 1)
    x_columns = gl.expand_dims(gl.arange(0, BLOCK_K, gl.SliceLayout(0, copy_x)), 0)
    x_pointers = x + gl.expand_dims((m_rows // TOP_K).to(gl.int64) * K, 1) + x_columns

    copy_w: gl.constexpr = gl.BlockedLayout([1, vector], [1, 32], [NUM_WARPS, 1], [1, 0])
    w_rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, copy_w)), 1)
    w_groups = tile_n * GROUPS + w_rows % GROUPS
    w_parts = w_rows // (ROWS // PARTS)
    w_columns = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, copy_w)), 0)
    w_pointers = w + expert * groups_n * k_tiles * W_STEP + w_groups * (k_tiles * W_STEP)
    w_pointers += w_rows // GROUPS * WIDTH + w_columns
    copy_s: gl.constexpr = gl.BlockedLayout([1, 1], [32 // S_WIDTH, S_WIDTH], [NUM_WARPS, 1], [1, 0])
    s_rows = gl.expand_dims(gl.arange(0, S_PARTS * GROUPS, gl.SliceLayout(1, copy_s)), 1)
    s_groups = tile_n * GROUPS + s_rows % GROUPS
    s_parts = s_rows // GROUPS
    s_pointers = s_groups
    if S_K:
        s_pointers = w_scales + expert * groups_n * s_tiles * S_WIDTH + (s_groups * s_tiles + s_parts) * S_WIDTH
        s_pointers += gl.expand_dims(gl.arange(0, S_WIDTH, gl.SliceLayout(0, copy_s)), 0)

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x_shared: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_K * (2 if WIDE else 1)), 16 if WIDE else 8, 2)
    x_stages = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, BLOCK_M, BLOCK_K], x_shared)
    w_stages = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, ROWS, WIDTH], flat)
    s_stages = gl.allocate_shared_memory(gl.int32, [STAGES, S_PARTS * GROUPS if S_K else 1, S_WIDTH], flat)

    # By twos, so that weights of the next tile go to other registers than those that a running wgmma reads. An odd last
    # tile along K is followed by one of zeros.
    pairs_k = (k_tiles + 2 * PARTS - 1) // (2 * PARTS)
    # STAGES - 2 tiles are on their way while one is multiplied and the one before may still be.
    for first in gl.static_range(STAGES - 2):
        start_weights(first, 2 * pairs_k, w_stages, s_stages, w_pointers, s_pointers, w_groups, s_groups, w_parts,
                      s_parts, k_tiles, s_tiles, groups_n, W_STEP, PARTS, GROUPS, S_K, S_WIDTH, STAGES,
                      RUN)  # fmt: skip
        if not AHEAD:
            start_rows(first, 2 * pairs_k, x_stages, x_pointers, x_inside, x_columns, K, PARTS, STAGES, RUN)
    if AHEAD:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
        for first in gl.static_range(STAGES - 2):
            start_rows(first, 2 * pairs_k, x_stages, x_pointers, x_inside, x_columns, K, PARTS, STAGES, RUN)
    m_place = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    out_threads: gl.constexpr = min(32, OUT_N // 8)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 // out_threads, out_threads], [NUM_WARPS, 1], [1, 0])
    EARLY: gl.constexpr = BLOCK_M <= 32
    if EARLY and x_factors is not None:
        x_factor = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), x_factors, M, TOP_K)
    if EARLY and row_weights is not None:
        row_weight = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), row_weights, M, 1)
    for run in range(RUN):
        # What the sum is multiplied with and added to, while tiles come; of many tokens only afterwards.
        n_index = (tile_n + run) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
        if w_factors is not None:
            factor = gl.load(w_factors + expert * groups_n * 16 + n_index, mask=n_index < groups_n * 16, other=0.0)
        if bias is not None:
            column = n_index
            if PAIRED:
                out = n_index // 16 * 8 + n_index % 8
                half = n_index % 16 // 8
                column = out * 2 + half if INTERLEAVED else out + half * (N // 2)
            addend = gl.load(bias + expert * N + column, mask=n_index < N, other=0.0).to(gl.float32)
        total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
        for pair in range(pairs_k):
            for second in gl.static_range(2):
                step = 2 * (run * pairs_k + pair) + second
                stage = step % STAGES
                async_copy.wait_group(STAGES - 3)
                fence_async_shared()
                start_weights(step + STAGES - 2, 2 * pairs_k, w_stages, s_stages, w_pointers, s_pointers, w_groups,
                              s_groups, w_parts, s_parts, k_tiles, s_tiles, groups_n, W_STEP, PARTS, GROUPS, S_K,
                              S_WIDTH, STAGES, RUN)  # fmt: skip
                start_rows(step + STAGES - 2, 2 * pairs_k, x_stages, x_pointers, x_inside, x_columns, K, PARTS, STAGES,
                           RUN)  # fmt: skip
                right = x_stages.index(stage).permute((1, 0))
                running = multiply(total, w_stages.index(stage), s_stages.index(stage), right, W_FORMAT, GROUP, WIDE,
                                   PARTS, BLOCK_N, operand, w_registers, s_registers)  # fmt: skip
                total = warpgroup_mma_wait(PARTS * (4 if WIDE else 2), deps=(running,))
        total = warpgroup_mma_wait(0, deps=(total,))
        if LATE and run == RUN - 1:
            gdc_launch_dependents()

        if w_factors is not None:
            total = total * gl.expand_dims(factor, 1)
        if x_factors is not None:
            if not EARLY:
                x_factor = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), x_factors, M, TOP_K)
            total = total * gl.expand_dims(x_factor, 0)
        if bias is not None:
            total += gl.expand_dims(addend, 1)
        if row_weights is not None:
            if not EARLY:
                row_weight = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), row_weights, M, 1)
            total = total * gl.expand_dims(row_weight, 0)
        if PAIRED:
            pairs = total.reshape((GROUPS, 2, 8, BLOCK_M)).permute((0, 2, 3, 1)).reshape((OUT_N, BLOCK_M, 2))
            gate, up = gl.split(pairs)
            if CLAMP:
                gate = gl.where(gate > limit, limit, gate)  # unlike a minimum, this keeps NaN
                up = gl.where(up > limit, limit, gl.where(up < -limit, -limit, up))
            if ACTIVATION == "swigluoai":
                result = gate / (1.0 + gl.exp(-alpha * gate)) * (up + beta)
            else:
                result = gate / (1.0 + gl.exp(-gate)) * up
        else:
            result = total
        n_out = N // 2 if PAIRED else N
        result = gl.convert_layout(result.to(y.dtype.element_ty).permute((1, 0)), store)
        rows = rows_at(tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, store)), row_ids, M, BLOCK_M, ALONE)
        columns = (tile_n + run) * OUT_N + gl.arange(0, OUT_N, gl.SliceLayout(0, store))
        places = gl.expand_dims(rows.to(gl.int64) * n_out, 1) + gl.expand_dims(columns, 0)
        gl.store(y + places, result, mask=gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < n_out, 0))
