"""Routing: from the experts of each token to rows sorted by expert, in blocks of one expert each.

Both GEMMs of a fused MoE use the same blocks. Nothing is read by the host: sizes are bounds that hold for any routing,
and what is over is marked as no work, so a captured graph may be replayed with other experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .overlap import begin_after_previous, overlap

CHUNK = 256
"""Routed rows a program counts and places, where there are more than ONE_LAUNCH."""

ONE_LAUNCH = 2048
"""Routed rows up to which every program counts all, and one launch does."""

MOST_EXPERTS, MOST_TOP_K = 1024, 16


@dataclass(frozen=True)
class Routing:
    """Rows in the order in which grouped GEMMs take them.

    Attributes:
        row_ids: [blocks * block_m] int32: routed row (token * top_k + slot) at each place, M * top_k where none is.
            Rows of an expert are in ascending order. Dropped rows are in no place.
        block_experts: [blocks] int32: the expert of each block, -1 for no work. Blocks ascend by expert.
        counts: [E] int32: rows of each expert.
        block_m: rows a block.
    """

    row_ids: torch.Tensor
    block_experts: torch.Tensor
    counts: torch.Tensor
    block_m: int


def block_bound(rows: int, experts: int, block_m: int) -> int:
    """Blocks that are enough for any routing of `rows` rows to `experts` experts.

    Each expert wastes part of one block, and one that has no row has no block. (Formula: aiter #3580.)
    """
    return rows if rows <= experts else triton.cdiv(rows - experts + 1, block_m) + experts - 1


@triton.jit
def mark_empty(
    row_ids, block_experts, R, first_place, places, first_block, blocks, chunk, chunks, BLOCK: tl.constexpr
):  # fmt: skip
    """No row and no expert in a chunk's share of places and blocks, from the first ones on."""
    for first in range(first_place + chunk * BLOCK, places, chunks * BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(row_ids + place, R, mask=place < places)
    for first in range(first_block + chunk * BLOCK, blocks, chunks * BLOCK):
        block = first + tl.arange(0, BLOCK)
        tl.store(block_experts + block, -1, mask=block < blocks)


@triton.jit
def experts_of(ids, first, R, E, ROWS: tl.constexpr):
    """Experts of ROWS rows from `first` on; E for what is dropped."""
    rows = first + tl.arange(0, ROWS)
    expert = tl.load(ids + rows, mask=rows < R, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < E), expert, E)


@triton.jit(do_not_specialize=["R", "E", "places", "blocks"])
def count_kernel(
    ids, counts, row_ids, block_experts, R, E, places, blocks, CHUNK: tl.constexpr, BINS: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Counts of each chunk of rows by expert, [chunks, BINS]; and everything marked empty."""
    begin_after_previous(OVERLAP)
    chunk = tl.program_id(0)
    tl.store(
        counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(experts_of(ids, chunk * CHUNK, R, E, CHUNK), BINS)
    )
    mark_empty(row_ids, block_experts, R, 0, places, 0, blocks, chunk, tl.num_programs(0), 1024)


@triton.jit(do_not_specialize=["R", "E", "places", "blocks"])
def place_kernel(
    ids, counts, row_ids, block_experts, totals, R, E, places, blocks,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, ALL: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Rows of one chunk to their places, and a share of the blocks to their experts.

    counts: of `count_kernel`; None: each program counts all rows itself, at most ALL, and marks a share of the empty.
    """
    begin_after_previous(OVERLAP)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    expert = experts_of(ids, chunk * CHUNK, R, E, CHUNK)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    if counts is None and ALL > CHUNK:
        every = experts_of(ids, 0, R, E, ALL)
        total = tl.histogram(every, BINS)
        before = tl.histogram(tl.where(tl.arange(0, ALL) < chunk * CHUNK, every, E), BINS)
    elif counts is None:  # this program's rows are all
        total = tl.histogram(expert, BINS)
        mark_empty(row_ids, block_experts, R, 0, places, 0, blocks, 0, 1, 256)
        tl.debug_barrier()  # before others of this program put rows and experts there
    else:
        for first in range(0, chunks, 4):
            for next in tl.static_range(4):
                other = first + next
                count = tl.load(counts + other * BINS + bins, mask=(bins < E) & (other < chunks), other=0)
                total += count
                before += tl.where(other < chunk, count, 0)
    total = tl.where(bins < E, total, 0)
    own = (total + BLOCK_M - 1) // BLOCK_M
    first_block = tl.cumsum(own, 0) - own
    if chunk == 0:
        tl.store(totals + bins, total, mask=bins < E)
    for nth in range(chunk, tl.max(own, 0), chunks):
        tl.store(block_experts + first_block + nth, bins, mask=nth < own)
    if counts is None and ALL > CHUNK:
        for nth in range(chunk, BLOCK_M, chunks):
            tl.store(row_ids + first_block * BLOCK_M + total + nth, R, mask=total + nth < own * BLOCK_M)
        used = tl.sum(own, 0)
        mark_empty(row_ids, block_experts, R, used * BLOCK_M, places, used, blocks, chunk, chunks, 256)
    index = tl.arange(0, CHUNK)
    place = tl.gather(first_block * BLOCK_M + before, expert, 0)
    SLICE: tl.constexpr = 32 if CHUNK <= 256 else 8192 // CHUNK
    for first in tl.static_range(0, CHUNK, SLICE):
        earlier = first + tl.arange(0, SLICE)
        at = chunk * CHUNK + earlier
        theirs = tl.load(ids + at, mask=at < R, other=-1).to(tl.int32)
        same = (theirs[None, :] == expert[:, None]) & (earlier[None, :] < index[:, None])
        place += tl.sum(same.to(tl.int32), 1)
    tl.store(row_ids + place, chunk * CHUNK + index, mask=expert < E)


def route(topk_ids: torch.Tensor, experts: int, block_m: int) -> Routing:
    """Sort routed rows by expert. No host read of device data; one launch for few rows, else two.

    Args:
        topk_ids: [M, top_k] int32 or int64, contiguous: local expert ids; any id outside [0, experts) drops its row.
        experts: E, at most 1024.
        block_m: rows a block of both GEMMs, a power of two.

    Raises:
        ValueError: more experts or slots than the kernels take.
    """
    m, top_k = topk_ids.shape
    if experts > MOST_EXPERTS or top_k > MOST_TOP_K:
        raise ValueError(
            f"routing to {experts} experts, top_k {top_k}: kernels take {MOST_EXPERTS} and {MOST_TOP_K}; "
            "spread the experts over ranks"
        )
    rows, device = m * top_k, topk_ids.device
    blocks = block_bound(rows, experts, block_m)
    if rows == 0:
        none, zeros = (torch.zeros(n, dtype=torch.int32, device=device) for n in (0, experts))
        return Routing(none, none, zeros, block_m)
    early = overlap(topk_ids)
    chunk, places = chunk_of(rows, bool(early)), blocks * block_m
    chunks, bins = triton.cdiv(rows, chunk), triton.next_power_of_2(experts + 1)
    counted = rows > ONE_LAUNCH
    # Scratch lives as long as the result: a launch that works beside this one must not be given its memory.
    counts, row_ids, totals, block_experts = _pieces(device, counted * chunks * bins, places, experts, blocks)
    if counted:
        count_kernel[(chunks,)](
            topk_ids, counts, row_ids, block_experts, rows, experts, places, blocks, chunk, bins, **early
        )  # fmt: skip
    place_kernel[(chunks,)](
        topk_ids, counts if counted else None, row_ids, block_experts, totals, rows, experts, places, blocks,
        block_m, chunk, bins, 0 if counted else triton.next_power_of_2(rows),
        num_warps=8 if early or bins > 512 else 4, **early,
    )  # fmt: skip
    return Routing(row_ids, block_experts, totals, block_m)


def _pieces(device: torch.device, *sizes: int) -> list[torch.Tensor]:
    """int32 tensors that share one allocation, each on a boundary of 16 bytes."""
    rooms = [triton.cdiv(size, 4) * 4 for size in sizes]
    whole = torch.empty(sum(rooms), dtype=torch.int32, device=device)
    return [piece[:size] for piece, size in zip(whole.split(rooms), sizes, strict=True)]


def chunk_of(rows: int, overlapping: bool) -> int:
    """Rows a program places. Few, where each counts all rows anyway; else as few programs as keep the counting of
    `rows` rows short, for each reads the counts of all. Where launches overlap, the second costs less than to compare
    more rows with each other (measured on an H200)."""
    if rows <= ONE_LAUNCH:
        return min(max(triton.next_power_of_2(rows), 32), 64)
    return 4 * CHUNK if rows > 256 * CHUNK else CHUNK // 2 if overlapping and rows <= 4096 else CHUNK


def route_torch(topk_ids: torch.Tensor, experts: int, block_m: int) -> Routing:
    """The twin of `route` in plain torch, on the host's time."""
    rows = topk_ids.numel()
    ids = topk_ids.reshape(-1).long()
    blocks = block_bound(rows, experts, block_m)
    row_ids = torch.full((blocks * block_m,), rows, dtype=torch.int32)
    block_experts = torch.full((blocks,), -1, dtype=torch.int32)
    counts = torch.zeros(experts, dtype=torch.int32)
    block = 0
    for expert in range(experts):
        mine = torch.nonzero(ids.cpu() == expert)[:, 0].int()
        counts[expert] = mine.numel()
        row_ids[block * block_m : block * block_m + mine.numel()] = mine
        used = -(-mine.numel() // block_m)
        block_experts[block : block + used] = expert
        block += used
    device = topk_ids.device
    return Routing(row_ids.to(device), block_experts.to(device), counts.to(device), block_m)
