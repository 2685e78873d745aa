"""Which rows of a fused MoE lie together: tokens sorted by expert, in blocks of one expert each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.ops.devices import has_triton
from sglang_amd_quant.selection.buckets import block_bound

if TYPE_CHECKING:
    from sglang_amd_quant.ops.moe import MoeCall

MOST_EXPERTS, MOST_TOP_K = 1024, 16
"""What the device kernels take (`kernels/triton/routing.py`)."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Routed rows (token * top_k + slot) in blocks of `block_m`, all rows of a block for one expert.

    Sizes follow from M, top_k, E and `block_m` alone, never from what was routed where: nothing waits for the device,
    and a captured graph replays on other ids. A kernel writes row r of its result where `row_ids` holds r, so a
    result lies in token order; rows of dropped slots stand nowhere and are not written: `combine` reads past them.

    Attributes:
        row_ids: int32 [blocks * block_m]: routed rows, those of one expert in token order; `rows` where none is.
        block_experts: int32 [blocks], ascending; -1 for blocks without work, which are last.
        counts: int32 [E]: rows of each expert.
        block_m: rows of a block.
        rows: M * top_k.
    """

    row_ids: torch.Tensor
    block_experts: torch.Tensor
    counts: torch.Tensor
    block_m: int
    rows: int

    def __post_init__(self) -> None:
        if self.row_ids.shape != (self.blocks * self.block_m,) or self.block_experts.dim() != 1:
            raise ShapeError(
                f"row_ids {tuple(self.row_ids.shape)}, block_experts {tuple(self.block_experts.shape)}",
                f"not [blocks * {self.block_m}] and [blocks]",
                "take both from one call of `route`",
            )

    @property
    def blocks(self) -> int:
        """Blocks of rows, those without work included."""
        return int(self.block_experts.shape[0])


def route(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """Sort routed rows by expert: by a kernel where there is one, else by its twin in torch.

    Args:
        topk_ids: [M, top_k] local expert ids, any integer dtype; ids outside [0, num_experts) are dropped.
        num_experts: experts held here.
        block_m: rows of a block; for the kernel a power of two.

    Raises:
        ShapeError: topk_ids is not [M, top_k], or no experts or block rows are given.
    """
    if topk_ids.dim() != 2 or num_experts < 1 or block_m < 1:
        what = f"topk_ids {tuple(topk_ids.shape)}, {num_experts} experts, block_m {block_m}"
        raise ShapeError(what, "not [M, top_k] with at least one of each", "pass the ids that SGLang dispatched")
    if has_triton(topk_ids) and num_experts <= MOST_EXPERTS and topk_ids.shape[1] <= MOST_TOP_K:
        from sglang_amd_quant.kernels.triton import routing

        made = routing.route(as_read(topk_ids), num_experts, block_m)
        return Routing(made.row_ids, made.block_experts, made.counts, block_m, topk_ids.numel())
    return route_torch(topk_ids, num_experts, block_m)


def as_read(topk_ids: torch.Tensor) -> torch.Tensor:
    """topk_ids of any integer type as kernels read them: contiguous int32 or int64."""
    return (topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.int()).contiguous()


def route_torch(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """The twin in torch, on any device, without host reads: arguments and result as `route`."""
    ids = topk_ids.reshape(-1).long()
    rows, device = ids.numel(), ids.device
    blocks = block_bound(rows, num_experts, block_m)
    places = blocks * block_m
    group = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(0, group, torch.ones_like(ids))
    own = (counts + block_m - 1) // block_m
    own[num_experts] = 0  # what is dropped takes no block
    ends = torch.cumsum(own, 0)
    order = torch.argsort(group, stable=True)
    expert = group[order]
    place = ((ends - own) * block_m - torch.cumsum(counts, 0) + counts)[expert] + torch.arange(rows, device=device)
    row_ids = torch.full((places + 1,), rows, dtype=torch.int32, device=device)
    place = torch.where(expert < num_experts, place, places)  # what is dropped goes past the end
    row_ids.scatter_(0, place, order.int())
    block_experts = torch.searchsorted(ends[:-1].contiguous(), torch.arange(blocks, device=device), right=True)
    block_experts = torch.where(block_experts < num_experts, block_experts, -1).int()
    return Routing(row_ids[:places], block_experts, counts[:-1].int(), block_m, rows)


def combine(
    routed: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """scale times the sum over each token's slots, in fp32 and in slot order; dropped slots are not read.

    Args:
        routed: [M * top_k, N] fp32 or bf16, routing weights applied; undefined where a slot is dropped.
        topk_ids: [M, top_k].
        num_experts: ids outside [0, num_experts) are dropped.
        scale: `routed_scaling_factor`.
        dtype: of the result.

    Returns:
        [M, N].
    """
    m, n = topk_ids.shape[0], routed.shape[1]
    if has_triton(routed):
        from sglang_amd_quant.kernels.triton import combine as kernel

        y = torch.empty(m, n, dtype=dtype, device=routed.device)
        return kernel.combine(routed, topk_ids.contiguous(), num_experts, y, scale)
    return slots(routed, topk_ids, num_experts).sum(dim=1).mul(scale).to(dtype)


def slots(routed: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """routed [M * top_k, N] as fp32 [M, top_k, N], 0 where a slot is dropped."""
    here = ((topk_ids >= 0) & (topk_ids < num_experts)).unsqueeze(-1)
    return torch.where(here, routed.view(*topk_ids.shape, -1).float(), 0.0)


def weighted_input(call: MoeCall) -> torch.Tensor:
    """x, times its routing weight where that belongs to the input."""
    if not call.problem.weight_on_input:
        return call.x.contiguous()
    return (call.x.float() * call.topk_weights.float()[:, :1]).to(call.x.dtype)


def row_weights(call: MoeCall) -> torch.Tensor | None:
    """fp32 [rows]: what rows of the down GEMM are multiplied by, None for nothing."""
    weighted = call.problem.weight_output and not call.problem.weight_on_input
    return call.topk_weights.float().reshape(-1).contiguous() if weighted else None


def combined(call: MoeCall, routed: torch.Tensor) -> torch.Tensor:
    """routed [rows, H] as the op returns it: summed in slot order, or slot by slot."""
    p = call.problem
    if p.combine:
        return combine(routed, call.topk_ids, p.num_experts, p.scale, call.x.dtype)
    return slots(routed, call.topk_ids, p.num_experts).to(call.x.dtype)
