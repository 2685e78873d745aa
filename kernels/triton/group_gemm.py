"""Dense and grouped GEMM of weights that are scaled group by group: y = x w^T for prefill.

x is bf16 or fp16; w is int4 in groups of 32, 64 or 128 along K (the scheme int4_w4a16), or, for fp16 x, e2m1 or e4m3
in MX blocks of 32 (w4a16, and MXFP8 with activations as they are). A weight without its group's scale is
exact in x's dtype. Its products are summed within a group in fp32, and the group's scale is applied to that sum in
fp32: nothing is rounded but sums, and scales may be beyond what fp16 holds.

Codes of 4 bits come as int32 words of eight in sequence, as in a checkpoint's bytes; e4m3 as bytes. Grouped (mixture of
experts) as in `mx_gemm.py`; experts lie one after the other, each padded by itself.

On AMD int4, e2m1, and e4m3 with bf16 x where no matrix unit multiplies that, have a kernel of their own, `amd_gemm.py`,
for strided weights and the layout that decode kernels read there; in int4's words are paired. Of gate_up weights as
those read them 8 gates and 8 ups alternate (`decode_*` layouts): results and biases do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .amd_gemm import LAYOUTS, amd_gemm_kernel
from .group_values import scale_of, values_of
from .mx_gemm import values_torch
from .quant_mx import NO_FRONT, Front
from .tiles import STRIDED, TileConfig, gemm_torch, layout_constants, tile_of_program

SHORT = 1 << 31
"""Bytes from which rows that routing gathers are beyond what buffer loads reach."""


@triton.jit
def group_gemm_kernel(
    x, x_scale, w, w_scales, bias, y, row_ids, block_experts, row_weights,
    M, N, K, tiles_m,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, XCDS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One BLOCK_M x BLOCK_N tile of y, of strided weights; see `group_gemm` for the arguments.

    M: rows of y (routed rows when grouped). tiles_m: blocks along M. FORMAT: of the weights, as in `group_values.py`.
        GROUP: elements that share a scale. TOP_K: rows of y that share a row of x. BLOCK_K: of one step, whole groups;
        or of one product, several of which make a group. EVEN_K: steps end where K does. `x_scale`, `bias`,
        `row_ids` with `block_experts`, and `row_weights` may be None.
    """
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    PER: tl.constexpr = 1 if FORMAT == "e4m3" else 8  # codes a stored column
    STEP: tl.constexpr = BLOCK_K if BLOCK_K > GROUP else GROUP
    DEPTH: tl.constexpr = GROUP if BLOCK_K > GROUP else BLOCK_K
    tile_m, tile_n = tile_of_program(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M, XCDS)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    # K is whole groups, of 32 at least: so Triton sees by how much rows are aligned.
    w_cols, s_cols = K // 32 * (32 // PER), K // GROUP
    if row_ids is not None:
        rows = tl.load(row_ids + rows)
        expert = tl.load(block_experts + tile_m).to(tl.int64)
        if expert < 0:
            nothing = tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty)
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], nothing, mask=inside)
            return
        before = expert * N  # rows
        w += before * w_cols
        w_scales += before * s_cols
        if bias is not None:
            bias += expert * N
    row_mask = (rows < M)[:, None]
    column_mask = columns < N
    x_rows = x + (rows // TOP_K).to(tl.int64)[:, None] * (K // 32 * 32) + tl.arange(0, DEPTH)[None, :]
    w_rows, w_k = w + columns.to(tl.int64)[:, None] * w_cols, tl.arange(0, DEPTH // PER)[None, :]
    s_rows = w_scales + columns.to(tl.int64) * s_cols

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, STEP):
        for g in tl.static_range(STEP // GROUP):
            x_mask, s_mask = row_mask, column_mask
            if not EVEN_K:
                x_mask = row_mask & (k + g * GROUP < K)
                s_mask = column_mask & (k + g * GROUP < K)
            scales = tl.load(s_rows + (k // GROUP + g), mask=s_mask, other=0)
            products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for d in tl.static_range(GROUP // DEPTH):
                at = g * GROUP + d * DEPTH
                x_tile = tl.load(x_rows + k + at, mask=x_mask, other=0.0)
                w_tile = tl.load(w_rows + ((k + at) // PER + w_k), mask=s_mask[:, None], other=0)
                values = values_of(w_tile, scales, FORMAT, HALF, BLOCK_N, DEPTH)
                products = tl.dot(x_tile, values.T, products)
            total += products * scale_of(scales, FORMAT)[None, :]

    if x_scale is not None:
        total *= tl.load(x_scale)
    if bias is not None:
        total += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if row_weights is not None:
        total *= tl.load(row_weights + rows, mask=rows < M, other=0.0)[:, None]
    inside = row_mask & column_mask[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class GroupGemmConfig(TileConfig):
    """block_k is whole groups, or divides one: 32 to 128 of K go into one product, never more than a group.

    `amd_gemm_kernel` has no use for num_stages (it is always a step ahead) and nonkdim (16).
    """

    def constants(
        self, w_format: str, group: int, top_k: int, k: int, arch: str, x: torch.dtype,
        layout: tuple[str, str] = STRIDED,
    ) -> dict[str, object]:  # fmt: skip
        """The constexpr arguments of an arch's kernel."""
        kernel = kernel_of(w_format, layout[0], arch, x)
        given = self.tile_constants(arch) | layout_constants(layout) | {
            "FORMAT": w_format, "GROUP": group, "TOP_K": top_k, "EVEN_K": k % max(self.block_k, group) == 0,
            "ARCH": _family(arch), "WARPS": self.num_warps,
        }  # fmt: skip
        return {name: value for name, value in given.items() if name in kernel.arg_names}

    def options_of(self, kernel: Any, arch: str) -> dict[str, int]:
        """Compile options of a kernel. Two waves a SIMD keep its sums in registers that all instructions read:
        with more than 256 for each, they would lie in accumulation registers, a move apart."""
        if kernel is not amd_gemm_kernel:
            return self.options(arch)
        return {"num_warps": self.num_warps, **({"waves_per_eu": 2} if arch.startswith("gfx9") else {})}


def kernel_of(w_format: str, values: str, arch: str, x: torch.dtype) -> Any:
    """The kernel for weights in a layout of values. Raises ValueError where none reads it."""
    own = LAYOUTS.get((_family(arch), w_format)) if w_format != "e4m3" or x == torch.bfloat16 else None
    if values not in ("strided", own):
        raise ValueError(
            f"{w_format} weights in layout {values} on {arch}: takes strided ones{f' and {own}' * bool(own)}"
        )
    return amd_gemm_kernel if own else group_gemm_kernel


def word_of(w_format: str, kernel: Any) -> torch.dtype:
    """What a kernel has weights in: eight codes, or of `group_gemm_kernel` a code of e4m3."""
    if w_format != "e4m3":
        return torch.int32
    return torch.int64 if kernel is amd_gemm_kernel else torch.uint8


def _family(arch: str) -> str:
    """What AMD's kernel calls an arch."""
    return "gfx11" if arch.startswith("gfx11") else arch


def group_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    y: torch.Tensor,
    config: GroupGemmConfig,
    arch: str,
    *,
    group: int,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    block_experts: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    top_k: int = 1,
    layout: tuple[str, str] = STRIDED,
    pairs: str | None = None,
    activation: Front = NO_FRONT,
) -> torch.Tensor:
    """y = x w^T (* x_scale) (+ bias), activated, (* row_weights), into y.

    No host read of device data: may be captured in a graph.

    Args:
        x: [M / top_k, K] bf16 or fp16; contiguous, like all that follow.
        w: uint8 [N, K/2] of int4 or e2m1, float8_e4m3fn [N, K], or as a layout keeps it (int4 in int32, e4m3 in
            `cdna3_e4m3` as float8_e4m3fnuz); with a leading E when grouped.
        w_scales: int32 [N, K/group] words of scale and zero point of int4, or as a layout keeps them; uint8 e8m0
            [N, K/32] of the others; likewise.
        y: [M, N] bf16, fp16 or fp32; [M, N / 2] after an activation.
        config: tile and launch options.
        arch: what it is compiled for.
        group: elements of K that share a scale: 32, and of int4 64 or 128.
        x_scale: fp32 scalar that products are multiplied by, of static fp8 activations; None = 1.
        bias: [N], [E, N] when grouped.
        row_ids: [blocks * block_m] int32; makes the GEMM grouped.
        block_experts: [blocks] int32.
        row_weights: [M] fp32, the routing weights.
        top_k: rows of y a row of x.
        layout: names of the layouts of w and w_scales.
        pairs: where 8 gates and 8 ups alternate in w's rows, how they do in y and bias: `halves` or `interleaved`.
        activation: `silu` or `swigluoai` of such pairs, by AMD's kernel.

    Raises:
        ValueError: weights in a layout that is not read on the arch, MX ones with bf16 x where they are `mx_gemm`'s, or
            an activation of rows that no pairs are in.
    """
    w_format = format_of(w, w_scales)
    exact = x.dtype == torch.float16 or (_family(arch), w_format) in LAYOUTS
    if w_format != "int4" and (group != 32 or not exact):
        raise ValueError(
            f"{w_format} weights in groups of {group} with x of {x.dtype} on {arch}: takes groups of 32 with fp16, or "
            "bf16 on AMD where no matrix unit multiplies them; use mx_gemm"
        )
    activated = activation.kind != "none"
    m, n = y.shape[0], y.shape[1] * (2 if activated else 1)
    k = x.shape[-1]
    tiles_m, grid = config.grid(m, n, row_ids)
    kernel = kernel_of(w_format, layout[0], arch, x.dtype)
    if activated and (pairs is None or kernel is not amd_gemm_kernel):
        raise ValueError(f"{activation.kind} of {w_format} weights {layout[0]} on {arch}: no pairs; activate y instead")
    constants = config.constants(w_format, group, top_k, k, arch, x.dtype, layout)
    if kernel is amd_gemm_kernel:
        long = row_ids is not None and x.numel() * x.element_size() >= SHORT
        constants |= {"LONG": long, "PAIRS": pairs}
        if activated:
            constants |= {"ACTIVATION": activation.kind, "LIMIT": activation.limit}
            constants |= {"ALPHA": activation.alpha, "BETA": activation.beta}
    kernel[grid](
        x, x_scale, w.view(word_of(w_format, kernel)), w_scales, bias, y, row_ids, block_experts, row_weights,
        m, n, k, tiles_m, **constants, **config.options_of(kernel, arch),
    )  # fmt: skip
    return y


def format_of(w: torch.Tensor, w_scales: torch.Tensor) -> str:
    """Format name of weights: `int4` (scales in words), `e4m3` or `e2m1`."""
    return "int4" if w_scales.dtype == torch.int32 else "e4m3" if w.is_floating_point() else "e2m1"


def group_gemm_torch(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_ids: torch.Tensor | None = None,
    block_experts: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    top_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The twin of `group_gemm` in plain torch, for strided weights: the result [M, N] in `dtype` (fp64: an oracle)."""
    left = x.to(dtype).repeat_interleave(top_k, 0) * (1.0 if x_scale is None else x_scale.to(dtype))
    right = values_torch(w, w_scales, dtype) if format_of(w, w_scales) != "int4" else _int4_values(w, w_scales, dtype)
    return gemm_torch(left, right, bias, row_ids, block_experts, row_weights)


def _int4_values(w: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of two codes and words -> values [..., N, K]."""
    codes = torch.stack([w & 15, w >> 4], -1).flatten(-2).unflatten(-1, (words.shape[-1], -1))
    words = words.unsqueeze(-1)
    return ((codes.to(dtype) - (words & 15)) * (words & -16).view(torch.float32).to(dtype)).flatten(-2)
