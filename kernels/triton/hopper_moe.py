"""Grouped GEMM for Hopper: weights in the order of wgmma's fragments, dequantized in registers, E = 1 for dense.

y^T = w x^T: the weights are wgmma's left operand, which may lie in registers, so 4-bit codes go from shared memory to
the tensor core without a way back through it, and a block of few tokens wastes no rows of 64. Four kinds of operands:

- `e2m1` x `bf16`: exact. A code times 2^-126 is a bf16 by its bits alone; one multiplication by a power of two, the
  block's scale over the row's largest, makes it the value.
- `e2m1` x `e4m3`: a code times 2^d is an e4m3 for twelve values of d, looked up four at a time. So a row of weights is
  e4m3 under one power of two, exact where its scales span 12 octaves. Activations are e4m3 under one scale a row, and
  so ordered that a thread looks up all that it has of a row's 64 elements in the table of one block.
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
    e4m3_of,
    fragments,
    int4_steps,
    int4_words_of,
    scale_fragments,
    scales_of,
    words_of,
)
from .hopper_rows import factors_at, quantize_rows, rows_at, steps_of

LONG = gl.constexpr(3072)
"""K from which on sums of e4m3 products, which wgmma keeps 14 bits of, are added up as fp32 every few steps."""

FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
"""Shared memory of weights and scales: as they come."""


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
        elif WIDE:
            first, second = scales_of(s_tile.slice(part * GROUPS, GROUPS, 0), BLOCK_N, operand, s_registers)
            words = words_of(w_tile.slice(part * GROUPS, GROUPS, 0), BLOCK_N, 2, operand, w_registers)
            a, b, c, d = codes_to_bf16(words, first * 0x00800080, second * 0x00800080)
            acc = warpgroup_mma(a, right.slice(64 * part, 16, 0), acc, is_async=True)
            acc = warpgroup_mma(b, right.slice(64 * part + 16, 16, 0), acc, is_async=True)
            acc = warpgroup_mma(c, right.slice(64 * part + 32, 16, 0), acc, is_async=True)
            acc = warpgroup_mma(d, right.slice(64 * part + 48, 16, 0), acc, is_async=True)
        else:
            steps = s_tile._reinterpret(gl.uint8, [PARTS * GROUPS, 16], FLAT)
            a, b = e4m3_of(w_tile.slice(part * GROUPS, GROUPS, 0), steps.slice(part * GROUPS, GROUPS, 0), BLOCK_N,
                           operand, w_registers, s_registers)  # fmt: skip
            acc = warpgroup_mma(a, right.slice(64 * part, 32, 0), acc, is_async=True)
            acc = warpgroup_mma(b, right.slice(64 * part + 32, 32, 0), acc, is_async=True)
    return acc


@gluon.constexpr_function
def unrolled(stages, block_n, block_k, warps):
    """Steps of one round of the loop: all stages, which are then no numbers to calculate, unless that is long."""
    tiles = stages * block_n * block_k // (1024 * warps)
    return stages if stages % 2 == 0 and tiles <= 16 else 2


@gluon.constexpr_function
def rounds_of(k, block_k, deep, unroll, known):
    """Rounds of `unroll` steps. `known`: such that all steps that they ask for, `deep` ahead, are whole; others follow.
    Else all steps, and beyond them to a whole round."""
    return max(0, k // block_k - deep) // unroll if known else ((k + block_k - 1) // block_k + unroll - 1) // unroll


@gluon.jit
def start_weights(stage, w_stages, s_stages, w_from, s_from, w_parts, s_parts, k_left, WHOLE: gl.constexpr,
                  S_K: gl.constexpr, S_PARTS: gl.constexpr):  # fmt: skip
    """Ask for a step's weights. k_left: elements of K from there on, WHOLE: enough; beyond them come zeros.

    S_PARTS: of scales, each for S_K elements; 0: there are none.
    """
    w_mask = None if WHOLE else w_parts * 64 < k_left
    async_copy.async_copy_global_to_shared(w_stages.index(stage), w_from, mask=w_mask)
    if S_PARTS:
        s_mask = None if WHOLE else s_parts * S_K < k_left
        async_copy.async_copy_global_to_shared(s_stages.index(stage), s_from, mask=s_mask)


@gluon.jit
def start_rows(stage, x_stages, x_from, x_inside, x_columns, k_left, WHOLE: gl.constexpr):
    """Ask for a step's part of the rows of x."""
    x_mask = x_inside if WHOLE else x_inside & (x_columns < k_left)
    async_copy.async_copy_global_to_shared(x_stages.index(stage), x_from, mask=x_mask)


@gluon.jit
def advance(total, stage, x_at, ahead, w_stages, s_stages, x_stages, w_from, s_from, x_from, w_parts, s_parts, x_inside,
            x_columns, k_left, ASK: gl.constexpr, WHOLE: gl.constexpr, QUANTIZE: gl.constexpr, W_FORMAT: gl.constexpr,
            GROUP: gl.constexpr, WIDE: gl.constexpr, S_K: gl.constexpr, S_PARTS: gl.constexpr, DEEP: gl.constexpr,
            PARTS: gl.constexpr, BLOCK_N: gl.constexpr, operand: gl.constexpr, w_registers: gl.constexpr,
            s_registers: gl.constexpr):  # fmt: skip
    """One step: stage `stage` of weights times tile `x_at` of x. ASK: ask for what comes to stage `ahead` first."""
    async_copy.wait_group(DEEP - 1)
    if not QUANTIZE:
        fence_async_shared()
    if ASK:
        if not QUANTIZE:
            start_rows(ahead, x_stages, x_from, x_inside, x_columns, k_left, WHOLE)
        start_weights(ahead, w_stages, s_stages, w_from, s_from, w_parts, s_parts, k_left, WHOLE, S_K, S_PARTS)
    async_copy.commit_group()
    right = x_stages.index(x_at).permute((1, 0))
    running = multiply(total, w_stages.index(stage), s_stages.index(stage), right, W_FORMAT, GROUP, WIDE, PARTS,
                       BLOCK_N, operand, w_registers, s_registers)  # fmt: skip
    return warpgroup_mma_wait(PARTS * (4 if WIDE else 2), deps=(running,))


@gluon.jit(do_not_specialize=["M", "groups_n", "tiles_m", "E"])
def hopper_moe_kernel(
    x, x_factors, w, w_scales, w_factors, bias, y, row_ids, block_experts, row_weights,
    M, N, groups_n, tiles_m, E, alpha, limit, beta,
    K: gl.constexpr, X_FORMAT: gl.constexpr, W_FORMAT: gl.constexpr, GROUP: gl.constexpr, TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr, INTERLEAVED: gl.constexpr, CLAMP: gl.constexpr, NARROW: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    OVERLAP: gl.constexpr = False, AHEAD: gl.constexpr = False, LATE: gl.constexpr = False,
):  # fmt: skip
    """BLOCK_N weight rows and BLOCK_M tokens; see `hopper.py` for the arguments.

    Dense: row_ids and block_experts are None, E is 1. Without row_ids alone, each block has one routed row. X_FORMAT
    e4m3 without x_factors: x is bf16, and its rows are quantized here.

    M: routed rows; N: weight rows; K: of a row of weights; groups_n: N / 16 rounded up; tiles_m: blocks along M.
        GROUP: elements that share a scale of int4. ACTIVATION: "none", "silu" or "swigluoai", of pairs of rows that
        `hopper_pack` has put 8 apart. CLAMP: whether `limit` holds. NARROW: N is less than BLOCK_N. BLOCK_K: 64 or 128.

    OVERLAP, AHEAD, LATE: see `Overlap` in `hopper.py`.
    """
    NUM_WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = BLOCK_N // 16
    WIDE: gl.constexpr = X_FORMAT != "e4m3"
    INT4: gl.constexpr = W_FORMAT == "int4"
    QUANTIZE: gl.constexpr = x_factors is None and not WIDE
    K_TILES: gl.constexpr = (K + 63) // 64
    S_K: gl.constexpr = GROUP if INT4 else 64
    S_TILES: gl.constexpr = K // GROUP if INT4 else K_TILES
    ORDERED: gl.constexpr = W_FORMAT == "e2m1" and not WIDE
    X_K: gl.constexpr = K_TILES * 64 if ORDERED else K  # of whole tiles, in `x_order` of `hopper_pack.py`
    S_WIDTH: gl.constexpr = 16 if INT4 else 4 if ORDERED else 8
    SCALED: gl.constexpr = W_FORMAT != "e4m3"
    PARTS: gl.constexpr = BLOCK_K // 64
    S_PARTS: gl.constexpr = max(1, BLOCK_K // S_K) if SCALED else 0
    ROWS: gl.constexpr = PARTS * GROUPS * (1 if SCALED else 2)
    WIDTH: gl.constexpr = 256 if WIDE else 512
    PAIRED: gl.constexpr = ACTIVATION != "none"
    OUT_N: gl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
    W_STEP: gl.constexpr = WIDTH if SCALED else 2 * WIDTH
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_M, 16 if WIDE else 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2 if WIDE else 4)
    w_registers: gl.constexpr = fragments(GROUPS, NUM_WARPS, WIDE)
    s_registers: gl.constexpr = scale_fragments(GROUPS, NUM_WARPS, S_WIDTH)

    tiles_n = (groups_n + GROUPS - 1) // GROUPS
    pid = gl.program_id(0)
    band = GROUP_M * tiles_n
    top = pid // band * GROUP_M
    height = gl.minimum(tiles_m - top, GROUP_M)
    tile_m = top + pid % band % height
    first_group = pid % band // height * GROUPS
    if not NARROW:  # the last tile begins earlier instead of reaching beyond N: some rows come twice, and the same
        first_group = gl.minimum(first_group, groups_n - GROUPS)
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
    x_from = x + gl.expand_dims((m_rows // TOP_K).to(gl.int64) * X_K, 1) + x_columns

    copy_w: gl.constexpr = gl.BlockedLayout([1, vector], [1, 32], [NUM_WARPS, 1], [1, 0])
    w_rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, copy_w)), 1)
    w_groups = w_rows % GROUPS
    w_parts = w_rows // (ROWS // PARTS)
    copy_s: gl.constexpr = gl.BlockedLayout([1, 4], [128 // S_WIDTH, S_WIDTH // 4], [NUM_WARPS, 1], [1, 0])
    s_rows = gl.expand_dims(gl.arange(0, max(S_PARTS, 1) * GROUPS, gl.SliceLayout(1, copy_s)), 1)
    s_groups = s_rows % GROUPS
    s_parts = s_rows // GROUPS
    if NARROW:  # groups beyond the last are the last again: their sums are stored nowhere
        w_groups = gl.minimum(w_groups, groups_n - 1)
        s_groups = gl.minimum(s_groups, groups_n - 1)
    group = expert * groups_n + first_group
    w_columns = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, copy_w)), 0)
    w_from = w + group * (K_TILES * W_STEP) + (w_groups * (K_TILES * W_STEP) + w_rows // GROUPS * WIDTH + w_columns)
    s_from = s_parts
    if SCALED:
        s_columns = gl.expand_dims(gl.arange(0, S_WIDTH, gl.SliceLayout(0, copy_s)), 0)
        s_from = w_scales + group * (S_TILES * S_WIDTH) + ((s_groups * S_TILES + s_parts) * S_WIDTH + s_columns)

    x_shared: gl.constexpr = gl.NVMMASharedLayout(min(128, BLOCK_K * (2 if WIDE else 1)), 16 if WIDE else 8, 2)
    x_type: gl.constexpr = gl.float8e4nv if QUANTIZE else x.dtype.element_ty
    X_STAGES: gl.constexpr = steps_of(X_K, BLOCK_K, 1 if ALONE else BLOCK_M, NUM_WARPS) if QUANTIZE else STAGES
    x_stages = gl.allocate_shared_memory(x_type, [X_STAGES, BLOCK_M, BLOCK_K], x_shared)
    w_stages = gl.allocate_shared_memory(w.dtype.element_ty, [STAGES, ROWS, WIDTH], FLAT)
    s_stages = gl.allocate_shared_memory(gl.int32, [STAGES, max(S_PARTS, 1) * GROUPS, S_WIDTH], FLAT)

    # DEEP steps are on their way while one is multiplied and the one before may still be.
    #
    # Rounds are long enough that weights of a step go to other registers than those that a running wgmma reads. Of few
    # tokens all that they ask for is whole, and what is left to do after them is known beforehand: fewer instructions.
    # Of many, whose sums fill the registers, they do everything, beyond K with zeros.
    DEEP: gl.constexpr = STAGES - 2
    STEPS: gl.constexpr = (X_K + BLOCK_K - 1) // BLOCK_K
    FEW: gl.constexpr = 32 if WIDE else 64
    KNOWN: gl.constexpr = BLOCK_M <= FEW or QUANTIZE
    UNROLL: gl.constexpr = unrolled(STAGES, BLOCK_N, BLOCK_K, NUM_WARPS) if KNOWN else 2
    ROUNDS: gl.constexpr = rounds_of(X_K, BLOCK_K, DEEP, UNROLL, KNOWN)
    FIRST: gl.constexpr = ROUNDS * UNROLL
    TAKEN: gl.constexpr = max(STEPS, FIRST)
    for step in gl.static_range(DEEP):
        if step < TAKEN:
            start_weights(step, w_stages, s_stages, w_from + step * (PARTS * W_STEP),
                          s_from + step * BLOCK_K // S_K * S_WIDTH, w_parts, s_parts, X_K - step * BLOCK_K,
                          (step + 1) * BLOCK_K <= X_K, S_K, S_PARTS)  # fmt: skip
        if not AHEAD:
            if step < TAKEN and not QUANTIZE:
                start_rows(step, x_stages, x_from + step * BLOCK_K, x_inside, x_columns, X_K - step * BLOCK_K,
                           (step + 1) * BLOCK_K <= X_K)  # fmt: skip
            async_copy.commit_group()
    if AHEAD:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
        for step in gl.static_range(DEEP):
            if step < TAKEN and not QUANTIZE:
                start_rows(step, x_stages, x_from + step * BLOCK_K, x_inside, x_columns, X_K - step * BLOCK_K,
                           (step + 1) * BLOCK_K <= X_K)  # fmt: skip
            async_copy.commit_group()
    m_place = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma))
    out_threads: gl.constexpr = min(32, OUT_N // 8)
    store: gl.constexpr = gl.BlockedLayout([1, 8], [32 // out_threads, out_threads], [NUM_WARPS, 1], [1, 0])
    EARLY: gl.constexpr = BLOCK_M <= 32
    # What the sum is multiplied with and added to, while weights come; of many tokens only afterwards.
    if QUANTIZE:
        x_factor = quantize_rows(x_stages, x, row_ids, tile_m, M, TOP_K, ALONE, ORDERED, K, BLOCK_M, BLOCK_K, x_shared)
        x_factor = gl.convert_layout(x_factor, gl.SliceLayout(0, mma))
    elif EARLY and x_factors is not None:
        x_factor = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), x_factors, M, TOP_K)
    if EARLY and row_weights is not None:
        row_weight = factors_at(rows_at(m_place, row_ids, M, BLOCK_M, ALONE), row_weights, M, 1)
    n_index = first_group * 16 + gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
    if w_factors is not None:
        factor = gl.load(w_factors + expert * groups_n * 16 + n_index, mask=n_index < groups_n * 16, other=0.0)
    if bias is not None:
        column = n_index
        if PAIRED:
            out = n_index // 16 * 8 + n_index % 8
            half = n_index % 16 // 8
            column = out * 2 + half if INTERLEAVED else out + half * (N // 2)
        addend = gl.load(bias + expert * N + column, mask=n_index < N, other=0.0).to(gl.float32)

    EXACT: gl.constexpr = KNOWN and not WIDE and X_K > LONG
    total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    if EXACT:
        summed = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    for done in range(ROUNDS):
        for nth in gl.static_range(UNROLL):
            stage = nth if UNROLL == STAGES else (done * UNROLL + nth) % STAGES
            ahead = (nth + DEEP) % STAGES if UNROLL == STAGES else (done * UNROLL + nth + DEEP) % STAGES
            s_places = (done * UNROLL + nth + DEEP) * BLOCK_K // S_K * S_WIDTH
            total = advance(
                total, stage, done * UNROLL + nth if QUANTIZE else stage, ahead, w_stages, s_stages, x_stages,
                w_from + (nth + DEEP) * (PARTS * W_STEP), s_from + s_places, x_from + (nth + DEEP) * BLOCK_K, w_parts,
                s_parts, x_inside, x_columns, X_K - (done * UNROLL + nth + DEEP) * BLOCK_K, True, KNOWN, QUANTIZE,
                W_FORMAT, GROUP, WIDE, S_K, S_PARTS, DEEP, PARTS, BLOCK_N, operand, w_registers, s_registers,
            )  # fmt: skip
        w_from += UNROLL * PARTS * W_STEP
        x_from += UNROLL * BLOCK_K
        if EXACT:
            summed += warpgroup_mma_wait(0, deps=(total,))
            total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, mma)
    for nth in gl.static_range(max(0, STEPS - FIRST)):
        total = advance(
            total, (FIRST + nth) % STAGES, FIRST + nth if QUANTIZE else (FIRST + nth) % STAGES,
            (FIRST + nth + DEEP) % STAGES, w_stages, s_stages, x_stages, w_from + (nth + DEEP) * (PARTS * W_STEP),
            s_from + (FIRST + nth + DEEP) * BLOCK_K // S_K * S_WIDTH, x_from + (nth + DEEP) * BLOCK_K, w_parts, s_parts,
            x_inside, x_columns, X_K - (FIRST + nth + DEEP) * BLOCK_K, FIRST + nth + DEEP < STEPS,
            (FIRST + nth + DEEP + 1) * BLOCK_K <= X_K, QUANTIZE, W_FORMAT, GROUP, WIDE, S_K, S_PARTS, DEEP, PARTS,
            BLOCK_N, operand, w_registers, s_registers,
        )  # fmt: skip
    total = warpgroup_mma_wait(0, deps=(total,))
    if EXACT:
        total += summed
    if LATE:
        gdc_launch_dependents()

    if w_factors is not None:
        total = total * gl.expand_dims(factor, 1)
    if QUANTIZE or x_factors is not None:
        if not EARLY and not QUANTIZE:
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
    columns = first_group * 16 * OUT_N // BLOCK_N + gl.arange(0, OUT_N, gl.SliceLayout(0, store))
    places = gl.expand_dims(rows.to(gl.int64) * n_out, 1) + gl.expand_dims(columns, 0)
    gl.store(y + places, result, mask=gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < n_out, 0))
