"""Grouped MX GEMM of a fused MoE on AMD and wherever else Triton runs, with what surrounds it in its epilogue.

Where the hardware multiplies MX blocks (gfx950), `tl.dot_scaled` becomes scaled MFMA; elsewhere both sides are
dequantized to bf16, which is exact (`mx_gemm.py`). Gate and up columns of one output column belong to one tile: two
accumulators, fed from rows 2 j and 2 j + 1 of the weights or j and j + I, so weights stay as checkpoints have them; or
they lie as the decode kernels (`kernels/hip/decode_gemm.hip`) read them, of whose rows 8 gates and 8 ups alternate.
The result may leave as MX blocks, quantized for the next GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .mx_codes import largest_bits, over_scale, scale_byte, store_codes
from .mx_gemm import MxGemmConfig, dequantize, element_of, mx_gemm_torch
from .quant_mx import CARRY, DEFAULT_MODE, Front, activate, quant_mx_torch
from .routing import Routing
from .tiles import STRIDED, column_offsets, layout_constants, row_offsets, tile_of_program


@triton.jit
def weight_step(
    total, left, x_tile, x_scale, w, w_scales, w_rows, s_rows, k, K,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """total + x times BLOCK_K of K of the weights whose rows begin at w_rows and s_rows. `left`: x dequantized, unless
    SCALED."""
    W_PACK: tl.constexpr = 2 if W_FORMAT == "e2m1" else 1
    w_k = k // W_PACK + tl.arange(0, BLOCK_K // W_PACK)[None, :]
    s_k = k // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    w_mask = w_k < K // W_PACK if MASKED else None
    s_mask = s_k < K // 32 if MASKED else None
    w_tile = tl.load(w + w_rows + column_offsets(w_k, VALUES), mask=w_mask, other=0.0 if MASKED else None)
    w_scale = tl.load(w_scales + s_rows + column_offsets(s_k, SCALES), mask=s_mask, other=127 if MASKED else None)
    if SCALED:
        total = tl.dot_scaled(x_tile, x_scale, X_FORMAT, w_tile.T, w_scale, W_FORMAT, total)
    else:
        total = tl.dot(left, dequantize(w_tile, w_scale, W_FORMAT, BLOCK_N, BLOCK_K).T, total)
    return total


@triton.jit
def k_step(
    first, second, x, x_scales, x_rows, w, w_scales, w_rows, s_rows, w_rows2, s_rows2, k, K,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, PAIRED: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VALUES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """One step along K of the accumulators of gate and up, or of the first alone."""
    X_PACK: tl.constexpr = 2 if X_FORMAT == "e2m1" else 1
    x_k = k // X_PACK + tl.arange(0, BLOCK_K // X_PACK)[None, :]
    s_k = k // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    x_mask = x_k < K // X_PACK if MASKED else None
    s_mask = s_k < K // 32 if MASKED else None
    x_tile = tl.load(x + x_rows * (K // X_PACK) + x_k, mask=x_mask, other=0.0 if MASKED else None)
    x_scale = None
    left = x_tile
    if x_scales is not None:
        x_scale = tl.load(x_scales + x_rows * (K // 32) + s_k, mask=s_mask, other=127 if MASKED else None)
        if not SCALED:
            left = dequantize(x_tile, x_scale, X_FORMAT, BLOCK_M, BLOCK_K)
    elif not SCALED:
        left = x_tile.to(tl.bfloat16)
    first = weight_step(
        first, left, x_tile, x_scale, w, w_scales, w_rows, s_rows, k, K, X_FORMAT, W_FORMAT, SCALED, MASKED,
        BLOCK_N, BLOCK_K, VALUES, SCALES,
    )  # fmt: skip
    if PAIRED:
        second = weight_step(
            second, left, x_tile, x_scale, w, w_scales, w_rows2, s_rows2, k, K, X_FORMAT, W_FORMAT, SCALED, MASKED,
            BLOCK_N, BLOCK_K, VALUES, SCALES,
        )  # fmt: skip
    return first, second


@triton.jit(do_not_specialize=["M", "tiles_m"])
def moe_gemm_kernel(
    x, x_scales, x_scale, w, w_scales, bias, y, y_scales, row_ids, block_experts, row_weights,
    M, N, K, tiles_m, alpha, limit, beta,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr, OUT: tl.constexpr, CARRY: tl.constexpr, EMAX: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, XCDS: tl.constexpr,
    SCALED: tl.constexpr, ARCH: tl.constexpr, STEP: tl.constexpr, RAGGED: tl.constexpr,
    VALUES: tl.constexpr = "strided", SCALES: tl.constexpr = "strided", PAD: tl.constexpr = 1,
    SCALE_PAD: tl.constexpr = 1,
):  # fmt: skip
    """BLOCK_M routed rows and BLOCK_N columns of the result; see `moe_gemm` for the arguments. Without row_ids all rows
    in order, of one expert.

    M: routed rows. N: columns of the result, so half the weights' rows with an activation. OUT: `e4m3`, `e2m1` or
        `none`: y is what it is. HALF: what is quantized is rounded to fp16 before, else to bf16. STEP: what K
        has beyond whole BLOCK_Ks goes by so many; RAGGED: with masks. VALUES, SCALES, PAD,
        SCALE_PAD: as in `mx_gemm_kernel`.
    """
    PAIRED: tl.constexpr = ACTIVATION != "none"
    W_PACK: tl.constexpr = 2 if W_FORMAT == "e2m1" else 1
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tile_m.to(tl.int64) * 0
    if row_ids is not None:
        rows = tl.load(row_ids + rows)
        expert = tl.load(block_experts + tile_m).to(tl.int64)
        if expert < 0:
            return
    n_rows = 2 * N if PAIRED else N
    w_cols = K // W_PACK if PAD == 1 else tl.cdiv(K // W_PACK, PAD) * PAD
    s_cols = K // 32 if SCALE_PAD == 1 else tl.cdiv(K // 32, SCALE_PAD) * SCALE_PAD
    stored = n_rows if VALUES == "strided" else tl.cdiv(n_rows, 16) * 16
    w += expert * stored * w_cols
    w_scales += expert * stored * s_cols
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # What lies beyond reads the last row or column, and is stored nowhere: masks in the loop cost a pair of scalar
    # registers each.
    column = tl.minimum(columns, N - 1)
    if PAIRED and INTERLEAVED:
        b_rows, b_rows2 = 2 * column, 2 * column + 1
    else:
        b_rows, b_rows2 = column, column + N
    rows1, rows2 = b_rows, b_rows2
    if PAIRED and VALUES != "strided":
        rows1 = column // 8 * 16 + column % 8
        rows2 = rows1 + 8
    wide1, wide2 = rows1.to(tl.int64)[:, None], rows2.to(tl.int64)[:, None]
    w_rows, w_rows2 = row_offsets(wide1, w_cols, VALUES), row_offsets(wide2, w_cols, VALUES)
    s_rows, s_rows2 = row_offsets(wide1, s_cols, SCALES), row_offsets(wide2, s_cols, SCALES)
    x_rows = (tl.minimum(rows, M - 1) // TOP_K).to(tl.int64)[:, None]

    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = first
    whole = K // BLOCK_K * BLOCK_K
    # The end of K comes first: behind the loop over whole blocks it needs registers beside all that this one leaves.
    if STEP < BLOCK_K or RAGGED:
        for k in tl.range(whole, K, STEP, num_stages=1):
            first, second = k_step(
                first, second, x, x_scales, x_rows, w, w_scales, w_rows, s_rows, w_rows2, s_rows2, k, K,
                X_FORMAT, W_FORMAT, PAIRED, SCALED, RAGGED, BLOCK_M, BLOCK_N, STEP, VALUES, SCALES,
            )  # fmt: skip
    for k in range(0, whole, BLOCK_K):
        first, second = k_step(
            first, second, x, x_scales, x_rows, w, w_scales, w_rows, s_rows, w_rows2, s_rows2, k, K,
            X_FORMAT, W_FORMAT, PAIRED, SCALED, False, BLOCK_M, BLOCK_N, BLOCK_K, VALUES, SCALES,
        )  # fmt: skip

    if x_scale is not None:
        static = tl.load(x_scale)
        first *= static
        second *= static
    if bias is not None:
        bias += expert * n_rows
        first += tl.load(bias + b_rows).to(tl.float32)[None, :]
        if PAIRED:
            second += tl.load(bias + b_rows2).to(tl.float32)[None, :]
    if PAIRED:
        first = activate(first, second, ACTIVATION, CLAMP, alpha, limit, beta)
    if row_weights is not None:
        first *= tl.load(row_weights + rows, mask=rows < M, other=0.0)[:, None]

    wide = rows.to(tl.int64)[:, None]
    x_inside = (rows < M)[:, None]
    if OUT == "none":
        tl.store(y + wide * N + columns[None, :], first.to(y.dtype.element_ty), mask=x_inside & (columns < N)[None, :])
    else:
        blocks = first.to(tl.float16 if HALF else tl.bfloat16).to(tl.float32).reshape(BLOCK_M, BLOCK_N // 32, 32)
        largest = largest_bits(blocks, 2)
        scale = scale_byte(largest, CARRY, EMAX)
        small = (blocks * over_scale(largest, CARRY, EMAX)[:, :, None]).reshape(BLOCK_M, BLOCK_N)
        s_columns = tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)[None, :]
        s_mask = x_inside & (s_columns < N // 32)
        tl.store(y_scales + wide * (N // 32) + s_columns, scale.to(tl.uint8), mask=s_mask)
        store_codes(y, wide, tile_n * BLOCK_N, N, x_inside, small, OUT, BLOCK_M, BLOCK_N, ARCH)


@dataclass(frozen=True)
class Epilogue:
    """What a GEMM does with its sums besides rounding them.

    Attributes:
        activation: `none`, `silu` or `swigluoai`: halves the columns.
        interleaved: gate and up rows of the weights alternate; else all gates come first.
        limit, alpha, beta: as `ops.activation.Activation` has them.
        out: None: y as it is; `e4m3` or `e2m1`: MX blocks of the result rounded to the model's dtype.
        mode: scale rounding of these; None: the format's default.
        half: that dtype is fp16, not bf16.
    """

    activation: str = "none"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.702
    beta: float = 1.0
    out: str | None = None
    mode: str | None = None
    half: bool = False

    def constants(self) -> dict[str, object]:
        """The kernel's constexpr arguments."""
        return {
            "ACTIVATION": self.activation,
            "INTERLEAVED": self.interleaved,
            "CLAMP": self.limit is not None,
            "OUT": self.out or "none",
            "CARRY": CARRY[self.out][self.mode or DEFAULT_MODE[self.out]] if self.out else 0,
            "EMAX": 2 if self.out == "e2m1" else 8,
            "HALF": self.half,
        }


PLAIN = Epilogue()


def last_steps(k: int, block_k: int, scaled: bool) -> dict[str, object]:
    """The constexpr arguments that say how K ends: in steps of 32 or 64 that divide K and need no masks; of 128, which
    do, where a matrix instruction with scales takes no less."""
    step = min(128 if scaled else min(k & -k, 64), block_k)
    return {"STEP": step, "RAGGED": k % step > 0}


def moe_gemm(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    y: torch.Tensor,
    y_scales: torch.Tensor | None,
    routing: Routing | None,
    config: MxGemmConfig,
    arch: str,
    *,
    top_k: int = 1,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    layout: tuple[str, str] = STRIDED,
) -> torch.Tensor:
    """y[r] = x[r // top_k] w[expert of r]^T through the epilogue, for each routed row r that has a place.

    No host read of device data: may be captured in a graph. Rows that are dropped are not written.

    Args:
        x: [R / top_k, K] float8_e4m3fn or bf16, or [R / top_k, K/2] uint8 (e2m1); contiguous, like all that follow.
        x_scales: [R / top_k, K/32] uint8 e8m0; None for bf16 and for static fp8.
        w: [E, N, K] float8_e4m3fn or [E, N, K/2] uint8 (e2m1).
        w_scales: [E, N, K/32] uint8 e8m0.
        y: [R, N] bf16, fp16 or fp32, N halved by an activation; or the codes of `epilogue.out`.
        y_scales: [R, N/32] uint8 for these.
        routing: of `config.block_m`; None: a dense layer, whose weights are one expert's.
        config: tile and launch options; block_n counts columns of y, at least 32 with `epilogue.out`.
        arch: what it is compiled for.
        top_k: routed rows a row of x.
        x_scale: fp32 scalar of static fp8 activations.
        bias: [E, N].
        row_weights: [R] fp32, the routing weights.
        epilogue: what happens to the sums.
        layout: names of the layouts of w and w_scales, which then have the shapes that those give them. Where it is not
            strided, an activation finds 8 gates and 8 ups alternate among the rows; the bias stays as it is.
    """
    n = y.shape[1] * (2 if epilogue.out == "e2m1" else 1)
    k = x.shape[1] * (2 if element_of(x) == "e2m1" else 1)
    block_m = config.block_m if routing is None else routing.block_m
    if block_m != config.block_m or (epilogue.out and (n % 32 or config.block_n % 32)):
        raise ValueError(
            f"blocks of {block_m} rows, N {n} and {config}: routing must be made for the config, and MX output "
            "needs whole blocks of 32 columns; route again, or quantize afterwards"
        )
    row_ids, experts = (None, None) if routing is None else (routing.row_ids, routing.block_experts)
    tiles_m = triton.cdiv(y.shape[0], block_m) if experts is None else experts.numel()
    if tiles_m:
        constants = config.constants(element_of(x), element_of(w), top_k, k, arch) | epilogue.constants()
        scaled = constants["SCALED"] and element_of(x) != "bf16"
        constants |= layout_constants(layout) | last_steps(k, config.block_k, bool(scaled))
        del constants["EVEN_K"]
        moe_gemm_kernel[(tiles_m * triton.cdiv(n, config.block_n),)](
            x, x_scales, x_scale, w, w_scales, bias, y, y_scales, row_ids, experts, row_weights,
            y.shape[0], n, k, tiles_m, epilogue.alpha, epilogue.limit or 0.0, epilogue.beta,
            ARCH=arch, **constants, **config.options(arch),
        )  # fmt: skip
    return y


def moe_gemm_torch(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    routing: Routing,
    *,
    top_k: int = 1,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    epilogue: Epilogue = PLAIN,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The twin of `moe_gemm` in plain torch: y in `dtype` and None, or codes and scales. Dropped rows are zero."""
    values = mx_gemm_torch(
        x, x_scales, w, w_scales, row_ids=routing.row_ids, block_experts=routing.block_experts, top_k=top_k,
        dtype=dtype,
    )  # fmt: skip
    experts = torch.full((values.shape[0] + 1,), -1, dtype=torch.int64, device=x.device)
    experts[routing.row_ids.long()] = routing.block_experts.repeat_interleave(routing.block_m).long()
    here = (experts[:-1] >= 0)[:, None]
    if x_scale is not None:
        values = values * x_scale.to(dtype)
    if bias is not None:
        values = values + torch.where(here, bias.to(dtype)[experts[:-1].clamp(min=0)], 0)
    if epilogue.activation != "none":
        front = Front(epilogue.activation, epilogue.interleaved, epilogue.limit, epilogue.alpha, epilogue.beta)
        values = front(values)
    if row_weights is not None:
        values = values * row_weights.to(dtype)[:, None]
    if epilogue.out:
        rounded = values.to(torch.float16 if epilogue.half else torch.bfloat16)
        return quant_mx_torch(rounded, epilogue.out, "mx", epilogue.mode)
    return values, None
