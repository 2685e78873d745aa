"""Routing against a loop over tokens, and that its sizes never depend on the ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.ops.routing import Routing, combine, route
from sglang_amd_quant.selection.buckets import block_bound


def expected(ids: list[int], experts: int, block_m: int) -> tuple[list[int], list[int]]:
    """Blocks filled expert by expert; dropped rows stand nowhere."""
    row_ids, block_experts = [], []
    for expert in range(experts):
        mine = [row for row, e in enumerate(ids) if e == expert]
        blocks = -(-len(mine) // block_m)
        row_ids += mine + [len(ids)] * (blocks * block_m - len(mine))
        block_experts += [expert] * blocks
    return row_ids, block_experts


@settings(max_examples=300)
@given(st.data(), st.integers(0, 40), st.integers(1, 8), st.integers(1, 9), st.sampled_from([1, 4, 16, 128]))
def test_against_a_loop(data, m, top_k, experts, block_m):
    ids = data.draw(st.lists(st.integers(-2, experts + 1), min_size=m * top_k, max_size=m * top_k))
    found = route(torch.tensor(ids, dtype=torch.int32).reshape(m, top_k), experts, block_m)
    row_ids, block_experts = expected(ids, experts, block_m)
    bound = block_bound(m * top_k, experts, block_m)
    assert len(block_experts) <= bound == found.blocks
    assert found.block_experts.tolist() == block_experts + [-1] * (bound - len(block_experts))
    assert found.row_ids.tolist() == row_ids + [m * top_k] * (bound * block_m - len(row_ids))
    assert found.counts.tolist() == [ids.count(expert) for expert in range(experts)]
    assert {t.dtype for t in (found.row_ids, found.block_experts, found.counts)} == {torch.int32}


def test_the_twin_is_the_kernels_twin():
    """kernels/triton/routing.py has a twin of its own: both give the same, place by place."""
    pytest.importorskip("triton")
    from sglang_amd_quant.kernels.triton import routing as theirs

    for m, top_k, experts, block_m in ((7, 2, 5, 16), (0, 4, 8, 16), (200, 8, 128, 32)):
        ids = torch.randint(-1, experts, (m, top_k), dtype=torch.int32)
        got, want = route(ids, experts, block_m), theirs.route_torch(ids, experts, block_m)
        for name in ("row_ids", "block_experts", "counts"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_the_bound_is_reached():
    """One row for every expert and all others with one: every expert but that one wastes a block."""
    ids = [*range(8), *[0] * 16]
    assert len(expected(ids, 8, 16)[1]) == block_bound(len(ids), 8, 16) == 9
    assert len(expected([*range(8)], 8, 16)[1]) == block_bound(8, 8, 16) == 8


def test_combine_does_not_read_what_is_dropped():
    ids = torch.tensor([[1, -1], [0, 3], [9, -1]], dtype=torch.int32)
    routed = torch.randn(6, 5)
    routed[[1, 4, 5]] = torch.nan
    want = torch.stack([routed[0], routed[2] + routed[3], torch.zeros(5)]) * 0.5
    assert torch.equal(combine(routed, ids, 4, 0.5), want)


def test_sizes_do_not_depend_on_the_ids():
    """Traced without values: nothing is read from the ids."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = route(torch.empty(5, 2, dtype=torch.int32), 8, 16)
    assert (found.row_ids.shape, found.block_experts.shape) == ((8 * 16,), (8,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_ids_of_any_integer_dtype_and_stride(dtype):
    ids = torch.tensor([[0, 3, 1], [2, -1, 0]], dtype=dtype)
    a, b = route(ids, 4, 4), route(ids.T.contiguous().T, 4, 4)
    assert torch.equal(a.row_ids, b.row_ids)
    assert a.row_ids[:4].tolist() == [0, 5, 6, 6]


@pytest.mark.parametrize(("shape", "experts", "block_m"), [((4,), 2, 16), ((4, 2), 0, 16), ((4, 2), 2, 0)])
def test_mistakes(shape, experts, block_m):
    with pytest.raises(ShapeError, match="topk_ids"):
        route(torch.zeros(shape, dtype=torch.int32), experts, block_m)


def test_parts_of_two_routings():
    with pytest.raises(ShapeError, match="one call of `route`"):
        Routing(*(torch.zeros(n, dtype=torch.int32) for n in (32, 3, 4)), block_m=16, rows=5)
