"""Every plan for sm_90 is one that its kernels can follow; `tests/device` runs some of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_amd_quant.kernels.hip.manifest import QUANTIZED_M, find

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.decode_gemm import decode_gemm
from sglang_amd_quant.runtime.decode_plans import (
    MOST_X_WAVES,
    DecodePlan,
    entry_point,
    lds_of,
    plans,
    prepared_bytes,
)
from sglang_amd_quant.runtime.decode_wanted import RESIDENT
from sglang_amd_quant.selection.hopper_decode import (
    COMMON,
    DECODE_WEIGHTS,
    EARLY_PREPARED,
    MOST_ADDED,
    TILE_K,
    TILE_ROWS,
    prepared_lds,
)

H100, IN_CLUSTERS = 132, 120
"""Multiprocessors, and those that clusters of more than two blocks find places on."""

APART = 114 * 1024 - 1024 + 128
"""Bytes of shared memory of which a multiprocessor does not have twice as many, with what each block takes besides."""

MOST_WAVES = 64
"""Of a multiprocessor; each block on it takes a KiB of shared memory besides its own."""


@st.composite
def problems(draw: st.DrawFn, schemes: tuple[str, ...], rows: int, n: int, k: int) -> tuple[str, int, int, int, bool]:
    """scheme, M, N, K of these sizes at most, and whether an activation follows."""
    scheme, activated = draw(st.sampled_from(schemes)), draw(st.booleans())
    group = DECODE_WEIGHTS[scheme].group
    m = draw(st.integers(1, rows))
    columns = 16 * draw(st.integers(1, n // 16)) if activated else draw(st.integers(1, n))
    return scheme, m, columns, group * draw(st.integers(1, k // group)), activated


EARLY_SCHEMES = tuple(scheme for scheme, w in DECODE_WEIGHTS.items() if w.x_bytes == 1)
ANY = problems(tuple(DECODE_WEIGHTS), 64, 40000, 16384)
SMALL = problems(EARLY_SCHEMES, QUANTIZED_M[-1], 8192, 8192)
"""Every other one has plans with waves for x; of any, one in a hundred."""


def places(plan: DecodePlan) -> int:
    """Blocks for which there is room at the same time, but for registers."""
    by_memory = (arch_facts("sm_90").lds_bytes + 1024) // (plan.lds + 1024)
    resident = min(by_memory, MOST_WAVES // (plan.waves + plan.x_waves))
    return (H100 if plan.split <= 2 else IN_CLUSTERS) * resident


def check(plan: DecodePlan, scheme: str, m: int, n: int, k: int, activated: bool) -> None:
    """What `kernels/hip/include/decode_sm90*.h` takes for granted."""
    w, tiles = DECODE_WEIGHTS[scheme], -(-k // DECODE_WEIGHTS[scheme].tile_k)
    owned, part = divmod(plan.row_tiles * TILE_ROWS, plan.split)
    assert plan.lds <= arch_facts("sm_90").lds_bytes
    assert plan.waves <= 16
    assert plan.x_waves <= MOST_X_WAVES  # so 24 waves together
    assert plan.rows in w.rows
    assert m <= plan.rows
    assert part == 0
    assert owned % TILE_ROWS == 0 or not activated
    assert plan.waves_n % 4 == 0 or plan.rows < w.wide_from
    assert 1 <= plan.split <= tiles
    assert plan.split * max(1, plan.share) <= 8
    assert plan.cluster == (2 if plan.paired else plan.split * max(1, plan.share))
    assert plan.groups * plan.row_tiles * TILE_ROWS >= n or not plan.one_group
    if plan.share > 0:
        sizes = plan.rows, plan.split, plan.waves_k, plan.waves_n, plan.depth, plan.chunk
        need = prepared_lds(w, *sizes, paired=plan.paired)
    else:
        need = lds_of(scheme, plan, k)
    assert plan.lds == need or (need < plan.lds == APART and plan.blocks <= H100)
    if plan.paired or plan.own_rows:
        assert plan.depth * plan.chunk * w.tile_bytes >= 16 * 32  # results go through a wave's ring: `OwnTile::store`
    if plan.paired:
        assert plan.rows in w.paired
        assert plan.split == plan.waves_k == plan.share == 1
        assert plan.waves_n > COMMON
        assert plan.groups % 2 == 0
    if plan.early:
        assert plan.rows in QUANTIZED_M
        assert plan.share in (0, RESIDENT)
        assert plan.depth * plan.chunk * plan.waves_k * plan.split * TILE_K >= k
        assert -(-m // plan.rows) * plan.blocks <= places(plan)  # all of them start at once
        if plan.rows >= EARLY_PREPARED:
            assert plan.share == RESIDENT
            assert -(-tiles // (plan.split * plan.waves_k)) <= MOST_ADDED
            # sums of four waves go, as halves, where their weights were
            assert plan.split == 1 or plan.waves_k > 1 or plan.depth * plan.chunk * TILE_K >= 2 * plan.rows


@settings(max_examples=60)
@given(ANY | SMALL)
def test_every_plan_is_one_that_its_kernel_can_follow(problem: tuple[str, int, int, int, bool]) -> None:
    scheme, m, n, k, activated = problem
    found = plans(scheme, m, n, k, H100, activated)
    for plan in found:
        check(plan, *problem)
    assert len(set(found)) == len(found)
    early = [plan.early for plan in found]
    assert early == sorted(early, reverse=early[0])  # those first, or last


@settings(max_examples=20)
@given(ANY | SMALL, ANY | SMALL)
def test_plans_are_the_same_whatever_was_asked_before(
    problem: tuple[str, int, int, int, bool], other: tuple[str, int, int, int, bool]
) -> None:
    scheme, m, n, k, activated = problem
    found = plans(scheme, m, n, k, H100, activated)
    plans(*other[:4], H100, other[4])
    assert plans(scheme, m, n, k, H100, activated) is found
    assert plans.__wrapped__(scheme, m, n, k, H100, activated) == found


@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8"])
def test_small_weights_are_in_shared_memory_before_few_rows_of_x(scheme: str) -> None:
    for k, n in ((6144, 2304), (2048, 6144), (6144, 1536), (1536, 6144)):
        for m in (1, 2, 4, 8, 16):
            first = plans(scheme, m, n, k, H100)[0]
            assert first.early
            assert first.share == 0  # waves of its own quantize x
        assert plans(scheme, 32, n, k, H100)[0].early
        assert plans(scheme, 64, n, k, H100)[0].early
    assert not plans(scheme, 1, 28672, 8192, H100)[0].early  # streams


@pytest.mark.parametrize("m", [1, 16, 32])
@pytest.mark.parametrize("scheme", ["mxfp8", "w4a16", "int4_w4a16_g128"])
def test_a_plan_has_room_for_x_of_its_k(scheme: str, m: int) -> None:
    plan = next(p for p in plans(scheme, m, 1024, 2048, H100) if p.share <= 0 and not p.early)
    k = 8192
    assert lds_of(scheme, plan, k) > plan.lds
    x, y = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(m, 1024, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="take a plan for this K"):
        decode_gemm(x, None, None, None, y, scheme=scheme, n=1024, cu_count=H100, plan=plan)


@pytest.mark.parametrize("scheme", list(DECODE_WEIGHTS))
def test_sixty_four_rows_of_x_stream_or_are_waited_for_by_weights(scheme: str) -> None:
    """No kernel holds them while weights stream."""
    for n, k in ((1536, 6144), (4096, 4096), (28672, 8192)):
        assert all(p.share > 0 or p.early for p in plans(scheme, 64, n, k, H100))


def test_blocks_are_pairs_where_multiprocessors_then_have_less() -> None:
    for n, most in ((28672, 14), (24576, 12), (20480, 12), (29584, 16), (57344, 28)):
        first = plans("w4a8", 64, n, 8192, H100)[0]
        assert first.paired == (most % 14 == 0)
        assert -(-first.groups // H100) * first.row_tiles == most
    assert not any(p.paired for p in plans("mxfp8", 64, 28672, 8192, H100))  # tiles took less
    assert not any(p.paired for p in plans("w4a8", 32, 28672, 8192, H100))


def test_small_e4m3_weights_leave_half_of_the_multiprocessors_to_the_next_launch() -> None:
    for n, k, waves_n, least in ((6144, 2048, 12, 3), (4096, 1536, 8, 1), (6144, 1536, 12, 1), (8192, 1536, 16, 1)):
        for m in (1, 3, 8, 16):
            first = plans("mxfp8", m, n, k, H100)[0]
            if m < least:  # alone, more of them are faster
                assert first.blocks > H100
                continue
            assert (first.split, first.waves_k, first.waves_n) == (2, 1, waves_n)
            assert H100 // 3 < first.blocks <= H100 // 2
    assert plans("mxfp8", 8, 8192, 2048, H100)[0].blocks > H100 // 2  # so few have no room for all of it


def test_waves_that_have_all_of_k_have_a_kernel_of_their_own() -> None:
    n, k = 24576, 4096
    x, y = torch.empty(64, k, dtype=torch.bfloat16), torch.empty(64, n, dtype=torch.bfloat16)
    for plan in plans("w4a8", 64, n, k, H100)[:40]:
        room = torch.empty(prepared_bytes("w4a8", plan, 64, k), dtype=torch.uint8)
        *_, gemm = decode_gemm(x, None, None, None, y, scheme="w4a8", n=n, cu_count=H100, plan=plan, prepared=room)
        kind = "paired" if plan.paired else "own" if plan.split * plan.waves_k == 1 else "prepared"
        assert plan.early or gemm.kernel == f"decode_{kind}_w4a8_m64"


def test_a_block_that_has_a_multiprocessor_for_itself_has_its_registers_too() -> None:
    for n, k, alone in ((28672, 8192, True), (24576, 4096, True), (6144, 4096, False), (1536, 6144, False)):
        first = plans("w4a8", 1, n, k, H100)[0]
        assert (first.blocks <= H100) >= alone
        assert ("alone" in entry_point("w4a8", first)) == alone
    for plan in plans("w4a8", 8, 8192, 8192, H100):
        beside = 2 * (plan.lds + 1024) <= (228 << 10)
        name = entry_point("w4a8", plan)
        assert name == f"decode_{'early_' * plan.early or 'alone_' * (not beside)}w4a8_m8"
        assert name in {e.name for e in find(name, "sm_90")[0].entry_points}
    assert not any("alone" in entry_point("mxfp8", plan) for plan in plans("mxfp8", 1, 28672, 8192, H100))


@pytest.mark.parametrize(
    ("n", "split", "waves_n", "most"),
    [(8192, 1, 4, 4), (4096, 2, 4, 2), (10240, 2, 12, 6), (5120, 4, 12, 3), (24576, 1, 12, 12)],
)
@pytest.mark.parametrize("m", [12, 32, 64])
def test_row_tiles_that_fall_evenly_to_multiprocessors_have_a_block_each(
    m: int, n: int, split: int, waves_n: int, most: int
) -> None:
    """`most`: row tiles of a multiprocessor with all of K, where 132 have n / 16 / 132 in the mean."""
    first = plans("w4a8", m, n, 6400, H100)[0]
    assert (first.split, first.waves_n) == (split, waves_n)
    assert first.blocks <= H100
    assert first.lds >= APART
    assert first.waves_n / first.split == most < 1.45 * n / 16 / H100


def test_blocks_share_k_where_they_cannot_hold_long_rows_of_x() -> None:
    for m, wanted in ((1, (8, 12)), (8, (8, 12)), (16, (8, 12)), (32, (1, 4)), (64, (1, 4))):
        first = plans("w4a8", m, 8192, 28672, H100)[0]
        assert (first.split, first.waves_n) == wanted


@pytest.mark.parametrize(("m", "k", "blocks"), [(64, 8128, 1), (64, 8192, 2), (16, 28672, 4), (100, 28672, 1)])
def test_long_rows_of_x_are_prepared_by_several_blocks(m: int, k: int, blocks: int) -> None:
    plan = next(p for p in plans("mxfp8", m, 4096, k, H100) if p.share > 0)
    x, y = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(m, 4096, dtype=torch.bfloat16)
    room = torch.empty(prepared_bytes("mxfp8", plan, m, k), dtype=torch.uint8)
    first, _ = decode_gemm(x, None, None, None, y, scheme="mxfp8", n=4096, cu_count=H100, plan=plan, prepared=room)
    assert first.grid == m * blocks


def test_a_plan_with_waves_for_many_rows_of_x_wants_them_prepared_and_few_tiles_a_wave() -> None:
    """The kernel neither quantizes them itself nor adds up more than the matrix unit does at once."""
    plan = plans("mxfp8", 64, 1536, 6144, H100)[0]
    assert plan.early
    for other, k, match in (
        (replace(plan, share=0), 6144, "have them prepared"), (replace(plan, chunk=12), 12288, "holds less"),
        (replace(plan, depth=1, chunk=1), 512, "no room for their sums"),
    ):  # fmt: skip
        x, y = torch.empty(64, k, dtype=torch.bfloat16), torch.empty(64, 1536, dtype=torch.bfloat16)
        with pytest.raises(ShapeError, match=match):
            decode_gemm(x, None, None, None, y, scheme="mxfp8", n=1536, cu_count=H100, plan=other)
