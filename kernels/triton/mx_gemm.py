"""Dense and grouped MX GEMM: y = x w^T for prefill, in the formats of the schemes mxfp8, w4a8, mxfp4 and w4a16.

x is `e4m3` or `e2m1` with one e8m0 scale per 32 elements of K, or `bf16` without; w is `e4m3` or `e2m1` with scales.
Where the hardware multiplies MX blocks (gfx950) they go to `tl.dot_scaled` as they are. Elsewhere both sides are
dequantized to bf16, which is exact: a code has at most 4 significant bits and a scale is a power of two, so only
scales whose products leave fp32's range as well are lost.

Grouped (mixture of experts): rows come sorted by expert, in blocks of BLOCK_M that belong to one expert each, as
SGLang's moe_align_block_size lays them out: `row_ids[i]` is the routed row (token * top_k + choice) of sorted place
i, or anything from M on for padding, and `block_experts[b]` the expert of block b, negative for a block to be
skipped, whose rows become zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tiles import STRIDED, TileConfig, column_offsets, gemm_torch, layout_constants, row_offsets, tile_of_program


@triton.jit
def e2m1_to_fp32(packed):
    """[R, C] bytes of two e2m1 codes, low nibble first -> [R, 2 C] fp32.

    Where fp32 keeps the last two bits of its exponent and the first of its mantissa, the three magnitude bits are
    2^-126 times the value, a subnormal for 1/2.
    """
    codes = tl.interleave(packed & 15, packed >> 4).to(tl.uint32)
    return ((codes & 7) << 22 | (codes & 8) << 28).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def e4m3_to_fp32(data):
    """e4m3 -> fp32 of the same shape: likewise, its bits are 2^-120 times the value."""
    codes = data.to(tl.uint8, bitcast=True).to(tl.uint32)
    values = ((codes & 0x7F) << 20 | (codes & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(codes & 0x7F == 0x7F, float("nan"), values)


@triton.jit
def e8m0_to_fp32(scales):
    """Bytes -> fp32 of the same shape: 2^(byte - 127); 0 is a subnormal, 255 NaN."""
    bits = tl.maximum(scales.to(tl.int32) << 23, 1 << 22)
    return tl.where(scales == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def dequantize(data, scales, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [ROWS, BLOCK_K (/ 2)] and scales [ROWS, BLOCK_K / 32] -> bf16 [ROWS, BLOCK_K].

    The product has 4 significant bits at most, so the upper half of an fp32 is all of it: no rounding to do.
    """
    values = e2m1_to_fp32(data) if FORMAT == "e2m1" else e4m3_to_fp32(data)
    blocks = values.reshape(ROWS, BLOCK_K // 32, 32) * e8m0_to_fp32(scales)[:, :, None]
    bits = blocks.reshape(ROWS, BLOCK_K).to(tl.uint32, bitcast=True) >> 16
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mx_gemm_kernel(
    x, x_scales, w, w_scales, bias, y, row_ids, block_experts, row_weights,
    M, N, K, tiles_m,
    X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, XCDS: tl.constexpr, SCALED: tl.constexpr, EVEN_K: tl.constexpr,
    VALUES: tl.constexpr, SCALES: tl.constexpr, PAD: tl.constexpr, SCALE_PAD: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of y; see `mx_gemm` for the arguments.

    M: rows of y (routed rows when grouped). tiles_m: blocks along M. TOP_K: rows of y that share a row of x. SCALED:
        use tl.dot_scaled. EVEN_K: BLOCK_K divides K. VALUES, SCALES: the weights' layouts, whose rows are padded to
        PAD bytes and SCALE_PAD scales. `bias`, `row_ids` with `block_experts`, and `row_weights` may be
        None.
    """
    X_PACK: tl.constexpr = 2 if X_FORMAT == "e2m1" else 1
    W_PACK: tl.constexpr = 2 if W_FORMAT == "e2m1" else 1
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if row_ids is not None:
        rows = tl.load(row_ids + rows)
        expert = tl.load(block_experts + tile_m).to(tl.int64)
        if expert < 0:
            nothing = tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty)
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], nothing, mask=inside)
            return
        w += expert * N * (K // W_PACK)
        w_scales += expert * N * (K // 32)
        if bias is not None:
            bias += expert * N
    row_mask = (rows < M)[:, None]
    column_mask = (columns < N)[:, None]
    x_rows = (rows // TOP_K).to(tl.int64)[:, None]
    x_k = tl.arange(0, BLOCK_K // X_PACK)[None, :]
    w_k = tl.arange(0, BLOCK_K // W_PACK)[None, :]
    s_k = tl.arange(0, BLOCK_K // 32)[None, :]

    w_cols = K // W_PACK if PAD == 1 else tl.cdiv(K // W_PACK, PAD) * PAD
    s_cols = K // 32 if SCALE_PAD == 1 else tl.cdiv(K // 32, SCALE_PAD) * SCALE_PAD
    w_rows = row_offsets(columns.to(tl.int64)[:, None], w_cols, VALUES)
    s_rows = row_offsets(columns.to(tl.int64)[:, None], s_cols, SCALES)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_mask, w_mask, xs_mask, ws_mask = row_mask, column_mask, row_mask, column_mask
        if not EVEN_K:
            x_mask = row_mask & (k // X_PACK + x_k < K // X_PACK)
            w_mask = column_mask & (k // W_PACK + w_k < K // W_PACK)
            xs_mask = row_mask & (k // 32 + s_k < K // 32)
            ws_mask = column_mask & (k // 32 + s_k < K // 32)
        x_tile = tl.load(x + x_rows * (K // X_PACK) + (k // X_PACK + x_k), mask=x_mask, other=0.0)
        w_tile = tl.load(w + w_rows + column_offsets(k // W_PACK + w_k, VALUES), mask=w_mask, other=0.0)
        w_scale = tl.load(w_scales + s_rows + column_offsets(k // 32 + s_k, SCALES), mask=ws_mask, other=127)
        if X_FORMAT == "bf16":
            if SCALED:
                total = tl.dot_scaled(x_tile, None, "bf16", w_tile.T, w_scale, W_FORMAT, total)
            else:
                total = tl.dot(x_tile, dequantize(w_tile, w_scale, W_FORMAT, BLOCK_N, BLOCK_K).T, total)
        else:
            x_scale = tl.load(x_scales + x_rows * (K // 32) + (k // 32 + s_k), mask=xs_mask, other=127)
            if SCALED:
                total = tl.dot_scaled(x_tile, x_scale, X_FORMAT, w_tile.T, w_scale, W_FORMAT, total)
            else:
                left = dequantize(x_tile, x_scale, X_FORMAT, BLOCK_M, BLOCK_K)
                total = tl.dot(left, dequantize(w_tile, w_scale, W_FORMAT, BLOCK_N, BLOCK_K).T, total)

    if bias is not None:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if row_weights is not None:
        total *= tl.load(row_weights + rows, mask=rows < M, other=0.0)[:, None]
    inside = row_mask & (columns < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class MxGemmConfig(TileConfig):
    """Scaled MFMA needs num_warps >= 2, and block_k >= 128 (nonkdim 16) or 64 (32)."""

    def constants(self, x_format: str, w_format: str, top_k: int, k: int, arch: str) -> dict[str, object]:
        """The kernel's constexpr arguments on an arch."""
        return self.tile_constants(arch) | {
            "X_FORMAT": x_format,
            "W_FORMAT": w_format,
            "TOP_K": top_k,
            "SCALED": arch == "gfx950",
            "EVEN_K": k % self.block_k == 0,
        }


def mx_gemm(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    y: torch.Tensor,
    config: MxGemmConfig,
    arch: str,
    *,
    bias: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    block_experts: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    top_k: int = 1,
    layout: tuple[str, str] = STRIDED,
) -> torch.Tensor:
    """y = x w^T (+ bias) (* row_weights), into y. No host read of device data: may be captured in a graph.

    Args:
        x: [M / top_k, K] float8_e4m3fn or bf16, or [M / top_k, K/2] uint8 (e2m1); contiguous, like all that follow.
        x_scales: [M / top_k, K/32] uint8 e8m0; None for bf16.
        w: [N, K] float8_e4m3fn or [N, K/2] uint8 (e2m1); with a leading E when grouped.
        w_scales: [N, K/32] uint8 e8m0; with a leading E when grouped.
        y: [M, N] bf16, fp16 or fp32.
        config: tile and launch options.
        arch: what it is compiled for.
        bias: [N], [E, N] when grouped.
        row_ids: [blocks * block_m] int32; makes the GEMM grouped.
        block_experts: [blocks] int32.
        row_weights: [M] fp32, the routing weights.
        top_k: rows of y a row of x.
        layout: names of the layouts of w and w_scales, which then have the shapes that those give them; dense only.

    Raises:
        ValueError: grouped weights in another layout than strided.
    """
    m, n = y.shape
    k = x.shape[-1] * (2 if element_of(x) == "e2m1" else 1)
    if layout != STRIDED and row_ids is not None:
        raise ValueError(f"grouped weights in layouts {layout}: the kernel finds experts in strided ones; keep them so")
    tiles_m, grid = config.grid(m, n, row_ids)
    constants = config.constants(element_of(x), element_of(w), top_k, k, arch) | layout_constants(layout)
    mx_gemm_kernel[grid](
        x, x_scales, w, w_scales, bias, y, row_ids, block_experts, row_weights, m, n, k, tiles_m,
        **constants, **config.options(arch),
    )  # fmt: skip
    return y


def element_of(data: torch.Tensor) -> str:
    """Format name of a tensor's elements: `e2m1` (uint8, packed), `e4m3` or `bf16`."""
    return {torch.uint8: "e2m1", torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16"}[data.dtype]


def mx_gemm_torch(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    block_experts: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The twin of `mx_gemm` in plain torch: the same arguments, the result [M, N] in `dtype` (fp64 as an oracle)."""
    left, right = values_torch(x, x_scales, dtype).repeat_interleave(top_k, 0), values_torch(w, w_scales, dtype)
    return gemm_torch(left, right, bias, row_ids, block_experts, row_weights)


def values_torch(data: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes and scales -> values [..., K]."""
    if data.dtype == torch.uint8:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=dtype, device=data.device)
        table = torch.cat([table, -table])
        data = torch.stack([table[(data & 15).long()], table[(data >> 4).long()]], -1).flatten(-2)
    values = data.to(dtype)
    if scales is None:
        return values
    factor = torch.exp2(scales.to(dtype) - 127).masked_fill(scales == 255, torch.nan)
    return values * factor.repeat_interleave(32, -1)
