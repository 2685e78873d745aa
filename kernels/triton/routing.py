"""Routing: from the experts of each token to rows sorted by expert, in blocks of one expert each.

Both GEMMs of a fused MoE use the same blocks. Nothing is read by the host: sizes are bounds that hold for any routing,
and what is over is marked as no work, so a captured graph may be replayed with other experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

CHUNK = 256
"""Routed rows a program counts and places."""

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
def count_kernel(
    ids, counts, row_ids, R, E, places, CHUNK: tl.constexpr, BINS: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """Counts of each chunk of rows by expert, [chunks, BINS]; and all places marked empty. Bin E is what is dropped."""
    chunk = tl.program_id(0)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + rows, mask=rows < R, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))
    for first in range(0, PLACES, 1024):
        place = chunk * PLACES + first + tl.arange(0, 1024)
        tl.store(row_ids + place, R, mask=(place < places) & (first + tl.arange(0, 1024) < PLACES))


@triton.jit
def place_kernel(
    ids, counts, starts, row_ids, block_experts, totals, R, E, chunks, blocks,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCKS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Rows of one chunk to their places, and a share of the block's experts.

    counts: of `count_kernel`. starts: [chunks, BINS] scratch. ALONE: one program does everything; `counts` is not read,
        and it marks empty places itself. BLOCKS: blocks a program tells the expert of.
    """
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + rows, mask=rows < R, other=-1).to(tl.int32)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    if ALONE:
        total = tl.histogram(expert, BINS)
        before = tl.zeros((BINS,), tl.int32)
        for first in range(0, blocks * BLOCK_M, 1024):
            place = first + tl.arange(0, 1024)
            tl.store(row_ids + place, R, mask=place < blocks * BLOCK_M)
    else:
        total = tl.zeros((BINS,), tl.int32)
        before = tl.zeros((BINS,), tl.int32)
        for other in range(chunks):
            count = tl.load(counts + other * BINS + bins)
            total += count
            before += tl.where(other < chunk, count, 0)
    total = tl.where(bins < E, total, 0)
    own = (total + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(own, 0)
    tl.store(starts + chunk * BINS + bins, (end - own) * BLOCK_M + before)
    if chunk == 0:
        tl.store(totals + bins, total, mask=bins < E)
    # Block b belongs to the expert of which b is not past the end, but of all before.
    STEP: tl.constexpr = min(32, 16384 // BINS)
    for first in range(0, BLOCKS, STEP):
        block = chunk * BLOCKS + first + tl.arange(0, STEP)
        passed = tl.sum((end[None, :] <= block[:, None]).to(tl.int32), 1)
        mine = (block < blocks) & (first + tl.arange(0, STEP) < BLOCKS)
        tl.store(block_experts + block, tl.where(passed < E, passed, -1), mask=mine)
    tl.debug_barrier()  # starts, and with ALONE the empty places, were written by other threads of this program
    inside = expert < E
    place = tl.load(starts + chunk * BINS + expert, mask=inside, other=0)
    index = tl.arange(0, CHUNK)
    SLICE: tl.constexpr = min(32, 8192 // CHUNK)
    for first in range(0, CHUNK, SLICE):
        earlier = first + tl.arange(0, SLICE)
        at = chunk * CHUNK + earlier
        theirs = tl.load(ids + at, mask=at < R, other=-1).to(tl.int32)
        same = (theirs[None, :] == expert[:, None]) & (earlier[None, :] < index[:, None])
        place += tl.sum(same.to(tl.int32), 1)
    tl.store(row_ids + place, rows, mask=inside)


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
    row_ids = torch.empty(blocks * block_m, dtype=torch.int32, device=device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=device)
    if rows == 0:
        return Routing(row_ids, block_experts, torch.zeros(experts, dtype=torch.int32, device=device), block_m)
    totals = torch.empty(experts, dtype=torch.int32, device=device)
    chunk = chunk_of(rows)
    chunks, bins = triton.cdiv(rows, chunk), triton.next_power_of_2(experts + 1)
    counts = torch.empty(chunks, bins, dtype=torch.int32, device=device)
    starts = torch.empty_like(counts)
    if chunks > 1:
        share = triton.cdiv(row_ids.numel(), chunks)
        count_kernel[(chunks,)](topk_ids, counts, row_ids, rows, experts, row_ids.numel(), chunk, bins, share)
    place_kernel[(chunks,)](
        topk_ids, counts, starts, row_ids, block_experts, totals, rows, experts, chunks, blocks,
        block_m, chunk, bins, triton.cdiv(blocks, chunks), chunks == 1,
    )  # fmt: skip
    return Routing(row_ids, block_experts, totals, block_m)


def chunk_of(rows: int) -> int:
    """Rows a program: as few programs as keep the counting of `rows` rows short, for each reads the counts of all."""
    return min(max(triton.next_power_of_2(rows), 32), CHUNK if rows <= 256 * CHUNK else 4 * CHUNK)


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
