"""Dense and grouped GEMM of int4 weights: y = x w^T for prefill, in the scheme int4_w4a16.

x is bf16 or fp16; w is (q - z) * s: codes q of 0 to 15, and for each group of 32, 64 or 128 along K one word that holds
scale s and zero point z (`formats.group_words`). q - z is exact in x's dtype. Its products are summed within a group in
fp32, and the group's scale is applied to that sum in fp32, so nothing is rounded but sums.

Codes come as int32 words of eight: in sequence, as in a checkpoint's bytes, or paired as the decode kernels of a target
read them. Grouped (mixture of experts) as in `mx_gemm.py`; experts lie one after the other, each padded by itself. Of
gate_up weights as decode kernels read them 8 gates and 8 ups alternate (`decode_*` layouts): results and biases do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .tiles import STRIDED, TileConfig, column_offsets, gemm_torch, layout_constants, row_offsets, tile_of_program


@triton.jit
def codes_of(words, PAIRED: tl.constexpr):
    """int32 [R, C] words of eight codes -> int32 [R, C, 2, 2, 2], in order of K.

    Nibbles are in sequence, or PAIRED: 0, 2, 4, 6, 1, 3, 5, 7.
    """
    codes = tl.join(words, words >> (8 if PAIRED else 16))  # 0 to 3, and 4 to 7
    codes = tl.join(codes, codes >> (4 if PAIRED else 8))
    return tl.join(codes, codes >> (16 if PAIRED else 4)) & 15


@triton.jit
def blocks_of(words, VALUES: tl.constexpr, ROWS: tl.constexpr):
    """Words as tiles keep them -> [ROWS, 4] in order of K, of each 32-block: four of `cdna_int4`, two of `mma_int4`.

    So Triton loads 16 bytes a lane, and keeps elements along K together on their way to the matrix unit.

    Args:
        words: int32 [ROWS, 16], of which 4 q ... 4 q + 3 are word q of each block. `mma_int4`: [ROWS / 2, 16], of
            which these are word q of either block, for rows n and n + 8.
    """
    if VALUES == "cdna_int4":
        even, odd = tl.split(words.reshape(ROWS, 4, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        blocks = (first, second, third, fourth)
    else:
        first, second = tl.split(words.reshape(ROWS // 16, 8, 4, 2, 2).permute(0, 4, 1, 2, 3))
        blocks = (first.reshape(ROWS, 4), second.reshape(ROWS, 4))
    return blocks


@triton.jit
def shifted(codes, HALF: tl.constexpr):
    """Codes 0 to 15, as the last bits of a mantissa -> 1024 + code in fp16 if HALF, else 128 + code in fp32."""
    bits = (codes | 0x6400).to(tl.int16) if HALF else codes << 16 | 0x43000000
    return bits.to(tl.float16 if HALF else tl.float32, bitcast=True)


@triton.jit
def dequantize_codes(words, zeros, PAIRED: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Words [ROWS, DEPTH / 8] and int32 zero points [ROWS] -> q - z [ROWS, DEPTH], fp16 if HALF, else bf16.

    A difference of 15 at most has 4 significant bits, so the upper half of an fp32 is all of it.
    """
    codes = codes_of(words, PAIRED).reshape(ROWS, DEPTH)
    values = shifted(codes, HALF) - shifted(zeros, HALF)[:, None]
    if not HALF:
        values = (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values


@triton.jit
def int4_gemm_kernel(
    x, w, w_scales, bias, y, row_ids, block_experts, row_weights,
    M, N, K, tiles_m,
    GROUP: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, XCDS: tl.constexpr, EVEN_K: tl.constexpr,
    VALUES: tl.constexpr, SCALES: tl.constexpr, PAD: tl.constexpr, SCALE_PAD: tl.constexpr,
    PAIRS: tl.constexpr = None,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of y; see `int4_gemm` for the arguments.

    M: rows of y (routed rows when grouped). tiles_m: blocks along M. GROUP: elements that share a scale. TOP_K: rows of
        y that share a row of x. BLOCK_K: of one step, whole groups; or of one product, several of which make a group;
        whole tiles of `cdna_int4` and `mma_int4`. EVEN_K: steps end where K does. VALUES, SCALES: the weights' layouts,
        whose rows are padded to PAD words and SCALE_PAD scales. PAIRS: `halves` or `interleaved`, where 8 gates and 8
        ups alternate in the weights, for how they do in y; N is then whole 16s. `bias`, `row_ids` with
        `block_experts`, and `row_weights` may be None.
    """
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    PAIRED: tl.constexpr = VALUES != "strided"
    STEP: tl.constexpr = BLOCK_K if BLOCK_K > GROUP else GROUP
    TILE_K: tl.constexpr = 128 if VALUES == "cdna_int4" else 64 if VALUES == "mma_int4" else 0  # 256 or 128 words
    DEPTH: tl.constexpr = 32 if TILE_K else GROUP if BLOCK_K > GROUP else BLOCK_K
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    places = columns  # of y and of the bias
    if PAIRS == "halves":
        places = columns // 16 * 8 + columns % 8 + columns % 16 // 8 * (N // 2)
    elif PAIRS == "interleaved":
        places = columns // 16 * 16 + columns % 8 * 2 + columns % 16 // 8
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # K is whole groups, of 32 at least: so Triton sees by how much rows are aligned.
    w_cols = tl.cdiv(K // 32 * 4, PAD) * PAD
    s_cols = tl.cdiv(K // GROUP, SCALE_PAD) * SCALE_PAD
    if row_ids is not None:
        rows = tl.load(row_ids + rows)
        expert = tl.load(block_experts + tile_m).to(tl.int64)
        if expert < 0:
            nothing = tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty)
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(y + rows.to(tl.int64)[:, None] * N + places[None, :], nothing, mask=inside)
            return
        before = expert * (tl.cdiv(N, 16) * 16 if PAIRED else N)  # rows
        w += before * w_cols
        w_scales += before * s_cols
        if bias is not None:
            bias += expert * N
    row_mask = (rows < M)[:, None]
    column_mask = columns < N
    x_rows = x + (rows // TOP_K).to(tl.int64)[:, None] * (K // 32 * 32) + tl.arange(0, DEPTH)[None, :]
    stored = columns
    if VALUES == "mma_int4":
        stored = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2) // 8 * 16 + tl.arange(0, BLOCK_N // 2) % 8
    w_rows = w + row_offsets(stored.to(tl.int64), w_cols, VALUES)[:, None]
    s_rows = w_scales + row_offsets(columns.to(tl.int64), s_cols, SCALES)
    w_k = tl.arange(0, DEPTH // 8)[None, :]
    if TILE_K:
        tl.static_assert(BLOCK_K % TILE_K == 0, "a step is whole tiles of the layout")
        w_k = tl.arange(0, 16)[None, :]
        w_k = w_k // 4 * 64 + w_k % 4 if VALUES == "cdna_int4" else w_k

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, STEP):
        for g in tl.static_range(STEP // GROUP):
            x_mask, s_mask = row_mask, column_mask
            if not EVEN_K:
                x_mask = row_mask & (k + g * GROUP < K)
                s_mask = column_mask & (k + g * GROUP < K)
            words = tl.load(s_rows + column_offsets(k // GROUP + g, SCALES), mask=s_mask, other=0)
            products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for d in tl.static_range(GROUP // DEPTH):
                at = g * GROUP + d * DEPTH
                x_tile = tl.load(x_rows + k + at, mask=x_mask, other=0.0)
                if TILE_K:
                    if (g * GROUP + d * DEPTH) % TILE_K == 0:
                        w_mask = (stored < N)[:, None] if EVEN_K else (stored < N)[:, None] & (k + at < K)
                        blocks = blocks_of(tl.load(w_rows + (k + at) * 2 + w_k, mask=w_mask, other=0), VALUES, BLOCK_N)
                    w_tile = blocks[(g * GROUP + d * DEPTH) % TILE_K // 32]
                else:
                    w_at = column_offsets((k + at) // 8 + w_k, VALUES)
                    w_tile = tl.load(w_rows + w_at, mask=s_mask[:, None], other=0)
                values = dequantize_codes(w_tile, words & 15, PAIRED, HALF, BLOCK_N, DEPTH)
                products = tl.dot(x_tile, values.T, products)
            total += products * (words & -16).to(tl.float32, bitcast=True)[None, :]

    if bias is not None:
        total += tl.load(bias + places, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if row_weights is not None:
        total *= tl.load(row_weights + rows, mask=rows < M, other=0.0)[:, None]
    inside = row_mask & column_mask[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + places[None, :], total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Int4GemmConfig(TileConfig):
    """block_k is whole groups, or divides one: 32 to 128 of K go into one product, never more than a group."""

    def constants(self, group: int, top_k: int, k: int, arch: str) -> dict[str, object]:
        """The kernel's constexpr arguments on an arch."""
        step = max(self.block_k, group)
        return self.tile_constants(arch) | {"GROUP": group, "TOP_K": top_k, "EVEN_K": k % step == 0}


def int4_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    y: torch.Tensor,
    config: Int4GemmConfig,
    arch: str,
    *,
    group: int,
    bias: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    block_experts: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    top_k: int = 1,
    layout: tuple[str, str] = STRIDED,
    pairs: str | None = None,
) -> torch.Tensor:
    """y = x w^T (+ bias) (* row_weights), into y. No host read of device data: may be captured in a graph.

    Args:
        x: [M / top_k, K] bf16 or fp16; contiguous, like all that follow.
        w: uint8 [N, K/2], or int32 as a layout keeps it; with a leading E when grouped.
        w_scales: int32 [N, K/group] words of scale and zero point, or as a layout keeps them; likewise.
        y: [M, N] bf16, fp16 or fp32.
        config: tile and launch options.
        arch: what it is compiled for.
        group: elements of K that share a word, 32, 64 or 128.
        bias: [N], [E, N] when grouped.
        row_ids: [blocks * block_m] int32; makes the GEMM grouped.
        block_experts: [blocks] int32.
        row_weights: [M] fp32, the routing weights.
        top_k: rows of y a row of x.
        layout: names of the layouts of w and w_scales.
        pairs: where 8 gates and 8 ups alternate in w's rows, how they do in y and bias: `halves` or `interleaved`.
    """
    m, n = y.shape
    k = x.shape[-1]
    tiles_m = triton.cdiv(m, config.block_m) if row_ids is None else row_ids.numel() // config.block_m
    constants = config.constants(group, top_k, k, arch) | layout_constants(layout)
    grid = (tiles_m * triton.cdiv(n, config.block_n),)
    int4_gemm_kernel[grid](
        x, w.view(torch.int32), w_scales, bias, y, row_ids, block_experts, row_weights, m, n, k, tiles_m,
        **constants, PAIRS=pairs, **config.options(arch),
    )  # fmt: skip
    return y


def int4_gemm_torch(
    x: torch.Tensor,
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
    """The twin of `int4_gemm` in plain torch, for strided weights: the result [M, N] in `dtype` (fp64 as an oracle)."""
    codes = torch.stack([w & 15, w >> 4], -1).flatten(-2).unflatten(-1, (w_scales.shape[-1], -1))
    words = w_scales.unsqueeze(-1)
    values = (codes.to(dtype) - (words & 15)) * (words & -16).view(torch.float32).to(dtype)
    left = x.to(dtype).repeat_interleave(top_k, 0)
    return gemm_torch(left, values.flatten(-2), bias, row_ids, block_experts, row_weights)
