"""Routing at its edges, in the emulator: no token, none that stays, one expert for all, the most experts and slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
from emulated_triton import emulated_triton
from sglang_amd_quant.kernels.triton.routing import (
    CHUNK,
    MOST_EXPERTS,
    MOST_TOP_K,
    ONE_LAUNCH,
    Routing,
    block_bound,
    chunk_of,
    route,
    route_torch,
)


def same(a: Routing, b: Routing) -> None:
    """Equal in every field."""
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.block_experts, b.block_experts)
    assert torch.equal(a.row_ids, b.row_ids)


@pytest.mark.parametrize(
    ("ids", "experts", "block_m"),
    [
        pytest.param(torch.zeros(0, 4, dtype=torch.int32), 8, 16, id="no token"),
        pytest.param(torch.full((1, 1), 5), 8, 16, id="one row"),
        pytest.param(torch.full((5, 2), -1), 8, 16, id="all dropped"),
        pytest.param(torch.full((70, 1), 9), 8, 16, id="experts of other ranks"),
        pytest.param(torch.full((300, 2), 3, dtype=torch.int32), 8, 64, id="one expert"),
        pytest.param(torch.arange(601)[:, None] % 40 - 3, 32, 8, id="programs that count all"),
        pytest.param(torch.arange(ONE_LAUNCH + 30)[:, None] ** 2 % 11, 9, 8, id="counted before"),
        pytest.param(
            torch.stack([torch.randperm(MOST_EXPERTS)[:MOST_TOP_K] for _ in range(20)]),
            MOST_EXPERTS,
            16,
            id="most experts and slots",
        ),
    ],
)
def test_edges(ids: torch.Tensor, experts: int, block_m: int) -> None:
    with emulated_triton("gfx950") as launches:
        made = route(ids, experts, block_m)
    assert len(launches) == (ids.numel() > 0) + (ids.numel() > ONE_LAUNCH)
    assert all(launch.compiled.report.problems == [] for launch in launches)
    same(made, route_torch(ids, experts, block_m))


@given(st.integers(1, 1 << 20))
def test_chunks_are_powers_of_two_and_no_larger_where_launches_overlap(rows: int) -> None:
    usual, overlapping = chunk_of(rows, False), chunk_of(rows, True)
    assert 32 <= overlapping <= usual <= 4 * CHUNK
    assert usual & (usual - 1) == 0 == usual % overlapping


def test_scratch_lives_as_long_as_the_result() -> None:
    """Else a launch beside this one might be given its memory while it is being written."""
    ids = torch.randint(0, 8, (ONE_LAUNCH, 2), dtype=torch.int32)
    with emulated_triton("gfx950"):
        made = route(ids, 8, 16)
    chunks, bins = -(-ids.numel() // chunk_of(ids.numel(), False)), 16
    kept = made.row_ids.numel() + made.block_experts.numel() + made.counts.numel() + chunks * bins
    assert made.row_ids.untyped_storage().nbytes() >= 4 * kept


def test_the_bound_is_never_passed_and_sometimes_reached() -> None:
    g = torch.Generator().manual_seed(0)
    reached = 0
    for _ in range(200):
        experts, block_m = int(torch.randint(1, 9, (), generator=g)), 2 ** int(torch.randint(0, 4, (), generator=g))
        rows = int(torch.randint(1, 40, (), generator=g))
        counts = torch.bincount(torch.randint(0, experts, (rows,), generator=g), minlength=experts)
        used = int((-(-counts // block_m)).sum())
        assert used <= block_bound(rows, experts, block_m)
        reached += used == block_bound(rows, experts, block_m)
    assert reached


def test_too_many_experts_or_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="spread the experts over ranks"):
        route(torch.zeros(1, 2, dtype=torch.int32), MOST_EXPERTS + 1, 16)
    with pytest.raises(ValueError, match="top_k 17"):
        route(torch.zeros(1, MOST_TOP_K + 1, dtype=torch.int32), 32, 16)
