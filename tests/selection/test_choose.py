"""The lookup order, and a test for each trap of the seeds and of their users' threads."""

import logging
from dataclasses import replace

import pytest

from sglang_amd_quant.selection import BoundChoices, GemmProblem, Selector, choose, kernels, shipped
from sglang_amd_quant.selection.explain import explain
from sglang_amd_quant.selection.lds import lds_bytes
from sglang_amd_quant.selection.packs import Packs, installed_packs

A8W4 = GemmProblem("moe_gate_up", "w4a8", "gfx950", 1024, 1024, 7168, e_local=256, e_total=256, top_k=8)
ROW = {"op": "moe_gate_up", "scheme": "w4a8", "N": 1024, "K": 7168, "kernel": "triton_moe_a8w4"}
TILE = {"block_m": 32, "block_n": 128, "block_k": 256, "num_warps": 4, "num_stages": 2}
LINEAR = {"op": "linear", "scheme": "mxfp8", "N": 2048, "K": 4096, "kernel": "triton_gemm_mx"}
DENSE = GemmProblem("linear", "mxfp8", "gfx950", 64, 2048, 4096)
MEASURED = {
    "source": "measured", "us": 9.5, "err": 0.001, "device": "MI355X", "versions": "x", "date": "2026-11-21",
}  # fmt: skip


def test_each_step_of_the_lookup_order(packs_of):
    """One entry at a time: what it is taken as for M=1024, E=256."""
    for row, source in (
        ({"E": 256, "top_k": 8, "M": 1024, **TILE}, "exact"),
        ({"M_routed": 8192, **TILE}, "exact"),
        (TILE, "exact"),  # keyed by BLOCK_M, as #3580: routing gives 32
        ({"E": 128, "M": 1024, **TILE}, "nearest_e"),
        ({"E": 256, "top_k": 4, "M": 1024, **TILE}, "nearest_e"),
        ({"E": 256, "M": 512, **TILE}, "borrowed"),
        ({**TILE, "block_m": 64}, "borrowed"),
        ({"E": 256, "M": 128, **TILE}, "heuristic"),  # too far to lend
    ):
        assert Selector(packs_of({**ROW, **row}))(A8W4).source == source, row
    exact_m = {"E": 256, "M": 1024, **TILE}
    assert Selector(packs_of({**ROW, **exact_m}))(replace(A8W4, m=1000)).source == "padded_m"
    published = Selector(Packs([]), available={"triton_moe_a8w4"})
    assert published(replace(A8W4, arch="sm_90", cu_count=132)).source == "default"
    assert Selector(Packs([]))(replace(A8W4, arch="cpu", cu_count=0)).source == "reference"


def test_earlier_steps_win(packs_of):
    rows = [
        {**ROW, **TILE, "block_m": 64, "block_n": 16, "num_stages": 1},  # borrowed, at best
        {**ROW, **TILE, "E": 128, "M": 1024, "num_stages": 1},  # nearest E
        {**ROW, **TILE, "E": 256, "M": 1024, "block_n": 256},  # exact
    ]
    assert Selector(packs_of(*rows))(A8W4).config.block_n == 256
    assert Selector(packs_of(*rows[:2]))(A8W4).source == "nearest_e"


@pytest.mark.parametrize(
    ("m", "tuned", "hit"), [(100, 112, 0), (100, 128, 1), (3, 4, 1), (3, 16, 0), (9000, 8192, None)]
)
def test_padded_m_is_looked_up_at_both_granularities(packs_of, m, tuned, hit):
    """N is 2048, so M above 8192 is not capped: 9000 counts as 16384 and finds nothing at 8192 but a donor."""
    select = Selector(packs_of({**LINEAR, **TILE, "block_m": 64, "M": tuned}))
    choice = select(replace(DENSE, m=m))
    assert choice.source == ("borrowed" if hit is None else "padded_m")


def test_fine_granularity_comes_before_coarse(packs_of):
    rows = [{**LINEAR, **TILE, "M": 128, "block_n": 128}, {**LINEAR, **TILE, "M": 112, "block_n": 64}]
    assert Selector(packs_of(*rows))(replace(DENSE, m=100)).config.block_n == 64


def test_padded_lookup_beyond_8192_tokens(packs_of):
    select = Selector(packs_of({**LINEAR, "N": 6144, **TILE, "M": 8192}))
    assert select(replace(DENSE, n=6144, m=32_800)).source == "padded_m"


# ---- traps -------------------------------------------------------------------------------------------------------


def test_bm32_does_not_take_bm16s_stages_over_the_lds():
    """The shipped entry bm16_n1024_k7168 estimates 165 876 B: measured, so it stands. At BLOCK_M 32 its two stages
    would be 184 308 B of 163 840: the borrowed config is staged again."""
    select = Selector(installed_packs())
    exact = select(replace(A8W4, m=256))
    assert (exact.source, exact.config.tile, exact.config.num_stages) == ("exact", (16, 256, 512), 2)
    assert any("165,876" in why and "measured" in why for why in exact.why)
    borrowed = select(A8W4)
    assert (borrowed.source, borrowed.config.tile, borrowed.config.num_stages) == ("borrowed", (32, 256, 512), 1)
    assert lds_bytes(*borrowed.config.tile, 8, 4, 1, async_copy=True) <= 163_840
    assert "re-staged: block_m=32 num_stages=1" in borrowed.why


@pytest.mark.parametrize("layout", ["cdna4_scale", "cdna4_scale_256"])
def test_tp8_small_k_under_the_swizzle(packs_of, layout):
    """#3580's review: bm16_n2880_k360 has BLOCK_K 128, which the swizzle cannot be read with. K is really 384."""
    down = GemmProblem("moe_down", "w4a8", "gfx950", 1, 2880, 384, e_local=128, e_total=128, top_k=4, tp=8)
    row = {**ROW, "op": "moe_down", "N": 2880, "K": 384, **TILE, "block_m": 16, "block_k": 128}
    select = Selector(packs_of(row))
    assert select(replace(down, layout="strided")).config.block_k == 128
    swizzled = select(replace(down, layout=layout))
    assert swizzled.config.block_k >= 256
    assert [r.source for r in swizzled.refused] == ["exact", "rule"]
    assert f"layout {layout} needs BLOCK_K >= 256, this has 128" in swizzled.refused[0].why


def test_a_limit_of_registers_stays_with_its_block_m(packs_of):
    """64 registers hold the sums of 8 rows, and not those of 32, for which the entry is borrowed."""
    problem = replace(A8W4, arch="sm_90", cu_count=132, m=16, layout="hopper_e4m3")
    row = {**ROW, "arch": "sm_90", "cu_num": 132, "M": 16, "layout": "hopper_e4m3", "kernel": "triton_hopper_e4m3",
           "block_m": 8, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4,
           "params": "group_m=8;max_registers=64"}  # fmt: skip
    select = Selector(packs_of(row))
    assert dict(select(problem).config.params)["max_registers"] == 64
    many = select(replace(problem, e_local=8, e_total=8, m=32))
    assert (many.source, many.config.block_m) == ("borrowed", 32)
    assert not dict(many.config.params).get("max_registers")


def test_proxy_skips_donors_that_the_swizzle_cannot_use(packs_of):
    rows = [{**ROW, **TILE, "block_m": 16, "block_k": 128}, {**ROW, **TILE, "block_m": 64}]
    choice = Selector(packs_of(*rows))(replace(A8W4, layout="cdna4_scale"))
    assert (choice.source, choice.config.tile) == ("borrowed", (32, 128, 256))
    assert [r.source for r in choice.refused] == ["borrowed"]


def test_proxy_lends_in_the_published_order_16_32_64_128(packs_of):
    rows = [{**ROW, **TILE, "block_m": bm, "block_n": bn} for bm, bn in ((128, 256), (64, 128), (16, 64))]
    assert Selector(packs_of(*rows))(A8W4).config.block_n == 64


def test_e24_under_ep8_finds_its_neighbour(packs_of):
    """sglang#37072: 192 experts at EP8 are 24 a rank; no entry, and no neighbour was looked at."""
    ep8 = replace(A8W4, e_local=24, e_total=192, ep=8, tp=8)
    rows = [{**ROW, **TILE, "E": e, "top_k": 8, "M": 1024, "block_n": bn} for e, bn in ((192, 64), (32, 128), (8, 256))]
    choice = Selector(packs_of(*rows))(ep8)
    assert (choice.source, choice.config.block_n) == ("nearest_e", 128)
    assert "E=32 stands in for E=24" in choice.why


def test_nearest_e_stays_on_its_side_of_e_min(packs_of):
    """#3783's bound widens at 128 experts, so an entry from 128 says nothing of 96, however near."""
    row = {"op": "moe_gate_up", "scheme": "mxfp8", "N": 3072, "K": 4096, "kernel": "triton_moe_mxfp8", "M": 8}
    tile = {"block_m": 64, "block_n": 128, "block_k": 128, "num_warps": 8, "num_stages": 2}
    problem = GemmProblem("moe_gate_up", "mxfp8", "gfx950", 8, 3072, 4096, e_local=96, e_total=192, top_k=4)
    rows = [{**row, **tile, "E": 128, "block_n": 256}, {**row, **tile, "E": 32}]
    choice = Selector(packs_of(*rows))(problem)
    assert (choice.source, choice.config.block_n) == ("nearest_e", 128)
    assert Selector(packs_of(rows[0]))(problem).source == "borrowed"
    assert Selector(packs_of(rows[0]))(replace(problem, e_local=192)).source == "nearest_e"


def test_cu_num_128_still_finds_entries_of_256(packs_of):
    """aiter#4735: MI350P has 128 CUs, and a hard cu_num key hid the whole database from it."""
    row = {**LINEAR, **TILE, "M": 64, "cu_num": 256}
    small = replace(DENSE, cu_count=128)
    choice = Selector(packs_of(row))(small)
    assert choice.source == "exact"
    assert "tuned on 256 compute units, this device has 128" in choice.why
    own = {**row, "cu_num": 128, "block_n": 64}
    assert Selector(packs_of(row, own))(small).config.block_n == 64
    assert Selector(packs_of(row, own))(DENSE).config.block_n == 128


def test_duplicate_owners_have_one_winner_one_warning_and_no_write(write_pack, monkeypatch, caplog):
    """aiter#5184: two owners made a container unable to start."""
    first = write_pack("a.csv", {**LINEAR, **TILE, "M": 64}, {**LINEAR, **TILE, "M": 32})
    second = write_pack("b.csv", {**LINEAR, **TILE, "M": 64, "block_n": 64}, {**LINEAR, **TILE, "M": 32, "block_n": 64})
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second)]
    for order, block_n in (((first, second), 128), ((second, first), 64)):
        monkeypatch.setenv("SGLANG_AMD_MX_PACKS", ":".join(map(str, order)))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            packs = installed_packs()
            assert Selector(packs)(DENSE).config.block_n == block_n
            assert installed_packs() is packs
        assert [record.message.split(":")[0] for record in caplog.records] == [
            "2 pack entries have two owners, the first in order wins"
        ]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second)] == before


def test_a_measured_entry_stands_before_a_published_one_without_a_warning(write_pack, monkeypatch, caplog):
    published = write_pack("a.csv", {**LINEAR, **TILE, "M": 64})
    measured = write_pack("b.csv", {**LINEAR, **TILE, "M": 64, "block_n": 64, **MEASURED})
    monkeypatch.setenv("SGLANG_AMD_MX_PACKS", f"{published}:{measured}")
    choice = Selector()(DENSE)
    assert (choice.config.block_n, choice.us) == (64, 9.5)
    assert not caplog.records


def test_extra_packs_add_and_never_replace(write_pack, monkeypatch):
    monkeypatch.setenv("SGLANG_AMD_MX_PACKS", str(write_pack("own.csv", {**LINEAR, **TILE, "M": 64})))
    select = Selector()
    assert select(DENSE).source == "exact"
    assert select(GemmProblem("linear", "mxfp8", "gfx950", 1, 2304, 6144)).source == "exact"  # shipped


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        ({"block_n": 0}, "block_n=0"),
        ({"block_k": 96}, "block_k=96"),
        ({"num_warps": 64}, "num_warps=64"),
        ({"num_stages": 99}, "num_stages=99"),
        ({"params": "depth=3"}, "no parameter depth"),
        ({"kernel": "flydsl_gemm_v3"}, "stale entry"),
        ({"kernel": "hip_moe_w4a16_wmma"}, "not mxfp8 linear gfx950"),
        ({"kernel": "hip_mxfp8_gemv"}, "no parameter block_m"),
    ],
)
def test_a_garbage_entry_is_refused_with_the_reason_and_the_lookup_goes_on(packs_of, garbage, why):
    choice = Selector(packs_of({**LINEAR, **TILE, "M": 64, **garbage}))(DENSE)
    assert choice.source == "heuristic"
    assert any(why in text for r in choice.refused for text in r.why), choice.refused


def test_an_entry_for_one_m_does_not_cross_a_rules_bound(packs_of):
    """#3783's use_hip=0 at M=64 must not send M=16 to Triton: the envelope engages there."""
    select = Selector(packs_of({**LINEAR, **TILE, "block_m": 64, "M": 64}))
    assert select(replace(DENSE, m=128)).source == "borrowed"
    assert (select(replace(DENSE, m=16)).source, select(replace(DENSE, m=16)).kernel) == ("rule", "hip_mxfp8_gemv")


def test_a_measurement_overrules_the_estimate_and_nothing_else(packs_of):
    big = {**LINEAR, **TILE, "block_m": 128, "block_n": 256, "block_k": 256, "M": 64}
    choice = Selector(packs_of(big))(DENSE)
    assert (choice.source, choice.config.num_stages) == ("exact", 2)
    assert any("221,168" in why for why in choice.why)
    assert Selector(packs_of({**big, "num_warps": 1}))(DENSE).source != "exact"


def test_no_heuristic_is_no_error():
    """aiter#1689: M=32800 had no heuristic and raised."""
    select = Selector(Packs([]))
    for m in (32_800, 131_073):
        assert select(replace(DENSE, m=m)).kernel == "triton_gemm_mx"
        assert select(replace(A8W4, m=m)).kernel == "triton_moe_a8w4"


def test_weights_beyond_2_gib_stay_on_a_kernel():
    """MiniMax-M3 TP2 with its fused shared expert: 2.43e9 bytes, out of the 32-bit kernel's reach."""
    problem = GemmProblem("moe_gate_up", "mxfp8", "gfx950", 1, 3072, 6144, 0, 129, 129, 5, layout="strided")
    assert Selector()(problem).kernel == "triton_moe_mxfp8"


def test_shipped_15_entries_of_3580_are_found_under_the_real_shapes():
    """gpt-oss-120b: TP1, TP2 and TP4, as the planner gives them, unpadded."""
    shapes = {
        1: (("moe_gate_up", 5760, 2880), ("moe_down", 2880, 2880)),
        2: (("moe_gate_up", 2880, 2880), ("moe_down", 2880, 1440)),
        4: (("moe_gate_up", 1472, 2880), ("moe_down", 2880, 736)),
    }
    select = Selector()
    for tp, gemms in shapes.items():
        for op, n, k in gemms:
            for m, block_m in ((1024, 32), (2048, 64), (8192, 128)):
                choice = select(GemmProblem(op, "w4a8", "gfx950", m, n, k, 0, 128, 128, 4, tp))
                assert (choice.source, choice.config.tile) == ("exact", (block_m, 128, 256)), (tp, op, m)
                assert (choice.config.num_stages, choice.config.num_warps) == (2, 4)


# ---- what a user must not be misled about ------------------------------------------------------------------------


def test_run_time_never_chooses_a_kernel_that_is_not_there():
    choice = choose(A8W4)
    assert choice.kernel in shipped()
    assert choice.in_build
    assert any("no kernel binary in this build" in why for r in choice.refused for why in r.why)
    planned = Selector()(A8W4)
    assert planned.kernel not in shipped()
    assert not planned.in_build
    assert any("no kernel binary in this build" in why for why in planned.why)


def test_a_device_offers_only_what_it_can_launch():
    choice = choose(A8W4, frozenset(["reference"]))
    assert choice.kernel == "reference"
    assert choose(A8W4, frozenset(kernels())).kernel == "triton_moe_a8w4"


@pytest.mark.parametrize("arch", ["gfx90a", "cpu", "sm_120"])
def test_an_arch_without_kernels_gets_the_reference_and_the_reason(arch):
    choice = Selector()(replace(DENSE, arch=arch, cu_count=0))
    assert choice.kernel == choice.source == "reference"
    assert arch in choice.why[0]


def test_no_rows_nothing_to_launch():
    assert Selector()(replace(DENSE, m=0)).why == ("no rows: there is nothing to launch",)


def test_routing_fixes_block_m_for_the_second_gemm():
    select = Selector()
    up = select(replace(A8W4, m=2048))
    down = select(replace(A8W4, op="moe_down", m=2048, n=7168, k=512, block_m=up.config.block_m))
    assert down.config.block_m == up.config.block_m == 64


def test_choices_are_cached_and_bound_by_layer():
    select = Selector()
    assert select(A8W4) is select(replace(A8W4))
    bound = BoundChoices(DENSE)
    assert bound[7] is bound[7] is choose(replace(DENSE, m=7))


def test_explain_of_no_rows_agrees():
    for row in installed_packs().rows:
        experts = {} if row.op == "linear" else {"e_local": row.e or 8, "e_total": row.e or 8, "top_k": row.top_k or 4}
        nothing = GemmProblem(row.op, row.scheme, row.arch, 0, row.n, row.k, **experts)
        assert explain(nothing).planned.choice.kernel == "reference"
