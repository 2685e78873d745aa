"""Which rows of a fused MoE lie together: tokens sorted by expert, in blocks of one expert each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_amd_quant.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Routing:
    """Routed rows (token * top_k + slot) in blocks of `block_m`, all rows of a block for one expert.

    Sizes follow from M, top_k, E and `block_m` alone, never from what was routed where: nothing waits for the device,
    and a captured graph replays on other ids. A kernel writes row r of its result where `row_ids` holds r, so a
    result lies in token order.

    Attributes:
        row_ids: int32 [blocks * block_m]. Every routed row stands here once, those of one expert in token order; other
            places hold `rows` (padding).
        block_experts: int32 [blocks]; -1: rows that no expert here takes, whose results are zero, or padding only.
        block_m: rows of a block.
        rows: M * top_k.
    """

    row_ids: torch.Tensor
    block_experts: torch.Tensor
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
        """Blocks of rows, padding included."""
        return int(self.block_experts.shape[0])


Router = Callable[[torch.Tensor, int, int], Routing]
"""topk_ids, experts, block_m -> Routing, with the rows of `route_torch` (the order within an expert is free)."""


def block_bound(rows: int, num_experts: int, block_m: int) -> int:
    """The most blocks that `rows` routed rows can need: E experts and the dropped rows, each in whole blocks.

    With fewer rows than groups each row may have a block of its own; else every group may waste all but one row of
    its last block (aiter #3580's `n_blocks`, with one group more).
    """
    groups = num_experts + 1
    return rows if rows <= groups else -(-(rows - groups + 1) // block_m) + groups - 1


def router_for(topk_ids: torch.Tensor) -> Router:
    """What routes on the device of `topk_ids`: the seam for a device kernel. torch's runs everywhere."""
    return route_torch


def route(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """Sort routed rows by expert.

    Args:
        topk_ids: [M, top_k] local expert ids, any integer dtype; ids outside [0, num_experts) are dropped.
        num_experts: experts held here.
        block_m: rows of a block.

    Raises:
        ShapeError: topk_ids is not [M, top_k], or no experts or block rows are given.
    """
    if topk_ids.dim() != 2 or num_experts < 1 or block_m < 1:
        what = f"topk_ids {tuple(topk_ids.shape)}, {num_experts} experts, block_m {block_m}"
        raise ShapeError(what, "not [M, top_k] with at least one of each", "pass the ids that SGLang dispatched")
    return router_for(topk_ids)(topk_ids, num_experts, block_m)


def route_torch(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Routing:
    """The twin of device kernels, in torch: arguments and result as `route`; rows keep their order (stable sort)."""
    ids = topk_ids.reshape(-1).long()
    rows, device = ids.numel(), ids.device
    blocks = block_bound(rows, num_experts, block_m)
    group = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(0, group, torch.ones_like(ids))
    block_ends = torch.cumsum((counts + block_m - 1) // block_m, 0)
    order = torch.argsort(group, stable=True)
    sorted_group = group[order]
    first_row = torch.cumsum(counts, 0) - counts
    first_place = (block_ends - (counts + block_m - 1) // block_m) * block_m
    place = first_place[sorted_group] + torch.arange(rows, device=device) - first_row[sorted_group]
    row_ids = torch.full((blocks * block_m,), rows, dtype=torch.int32, device=device)
    row_ids.scatter_(0, place, order.int())
    expert = torch.searchsorted(block_ends, torch.arange(blocks, device=device), right=True)
    block_experts = torch.where(expert < num_experts, expert, -1).int()
    return Routing(row_ids, block_experts, block_m, rows)
