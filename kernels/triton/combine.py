"""Combine: the sum over a token's experts, in the order of its slots, so that grouping never changes the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .overlap import begin_after_previous, overlap


@triton.jit
def combine_kernel(
    routed, topk_ids, y, N, E, scale, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """One token, BLOCK_N columns; see `combine`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    experts = ()
    for slot in tl.static_range(TOP_K):  # `routed` alone is what the launch in front writes
        experts = experts + (tl.load(topk_ids + token * TOP_K + slot),)
    begin_after_previous(OVERLAP)
    for slot in tl.static_range(TOP_K):
        here = (experts[slot] >= 0) & (experts[slot] < E)
        mask = here if EVEN_N else (columns < N) & here
        part = tl.load(routed + (token * TOP_K + slot) * N + columns, mask=mask, other=0.0)
        total += part.to(tl.float32)
    tl.store(y + token * N + columns, (total * scale).to(y.dtype.element_ty), mask=None if EVEN_N else columns < N)


def combine(
    routed: torch.Tensor, topk_ids: torch.Tensor, experts: int, y: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """y[m] = scale * sum over slots of routed[m * top_k + slot], in fp32; rows of dropped slots are not read.

    Args:
        routed: [M * top_k, N] bf16 or fp32, contiguous: outputs of the down GEMM, routing weights applied.
        topk_ids: [M, top_k] int32 or int64, contiguous.
        experts: ids outside [0, experts) are dropped.
        y: [M, N] bf16 or fp32, contiguous.
        scale: `routed_scaling_factor`.
    """
    m, n = y.shape
    if m:
        block = min(triton.next_power_of_2(n), 1024)
        grid = (m, triton.cdiv(n, block))
        combine_kernel[grid](
            routed, topk_ids, y, n, experts, scale, topk_ids.shape[1], block, n % block == 0, **overlap(y)
        )  # fmt: skip
    return y


def combine_torch(routed: torch.Tensor, topk_ids: torch.Tensor, experts: int, scale: float = 1.0) -> torch.Tensor:
    """The twin of `combine` in plain torch: fp32 [M, N], the same additions in the same order."""
    m, top_k = topk_ids.shape
    here = ((topk_ids >= 0) & (topk_ids < experts)).unsqueeze(-1)
    parts = torch.where(here, routed.view(m, top_k, -1).float(), 0.0)
    total = torch.zeros_like(parts[:, 0])
    for slot in range(top_k):
        total = total + parts[:, slot]
    return total * scale
