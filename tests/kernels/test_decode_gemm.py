"""The decode GEMM on AMD, in the emulator: against fp64, against its plans, under several schedules, and counted."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decode_problems import FORMATS, Problem, activations, code_object, group_of, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sglang_amd_quant.kernels.hip import manifest

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.formats import group_words
from sglang_amd_quant.runtime import decode_plans
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.decode_gemm import Epilogue
from sglang_amd_quant.runtime.decode_gemm_amd import (
    RESIDENT_WAVES,
    bytes_in_flight,
    decode_gemm_amd,
    lds_bytes,
    modelled_us,
    plan_within,
    plans,
)
from sglang_amd_quant.schemes import ScaleMode
from sglang_amd_quant.selection import Config, GemmProblem, kernel
from sglang_amd_quant.selection.amd_decode import WORKSPACE_BYTES
from sglang_amd_quant.selection.arch import canonical
from sglang_amd_quant.selection.buckets import block_bound
from sglang_amd_quant.selection.legality import legal
from sglang_amd_quant.toolchain.build import build

SEED_SHAPES = ((2304, 6144), (6144, 2048), (1536, 6144), (6144, 1536))
CU_COUNTS = {"gfx950": 256, "gfx942": 304, "gfx1100": 96, "gfx1151": 40}
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of one rounding to the result's type."""


@pytest.fixture
def amd(target: Any) -> Any:
    """An AMD target; sm_90 has tests of its own."""
    if target.arch.vendor != "amd":
        pytest.skip("see tests/device")
    return target


def assert_close(problem: Problem, y: torch.Tensor) -> None:
    """Each element within the derived bound and one rounding, and all together within 1e-3."""
    exact, magnitudes = problem.reference()
    bound = problem.bound(magnitudes)
    e = problem.epilogue
    if e.row_weights is not None:
        exact, bound = exact * e.row_weights.double()[:, None], bound * e.row_weights.double().abs()[:, None]
    if e.residual is not None:
        exact, bound = exact + e.residual.double(), bound + 2.0**-23 * e.residual.double().abs()
    error, bound = (y.double() - exact).abs(), bound + ROUNDING[problem.out] * exact.abs() + 2.0**-25
    written = ~exact.isnan()
    assert (error[written] <= bound[written]).all(), (error / bound)[written].max()
    assert error[written].norm() <= max(1e-3, ROUNDING[problem.out]) * exact[written].norm()
    assert y[~written].isnan().all()  # rows that were dropped are not written


def problem_of(scheme: str, seed: int) -> tuple[Problem, int]:
    """A random dense problem, and a number that chooses its plan."""
    rng = random.Random(f"{scheme} {seed}")
    group = group_of(scheme)
    m, n, k = (
        rng.randint(1, 32),
        rng.choice((1, 15, 16, 17, 33, rng.randint(1, 70))),
        group * rng.randint(1, 1280 // group),
    )
    if seed % 4 == 0:
        m = rng.choice((1, 3, 4))
    out = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    x = activations(m, k, seed) * 2.0**-6  # sums stay below fp16's 65504
    make = lambda *shape: torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).bfloat16()
    bias, residual = rng.choice((None, make(n))), rng.choice((None, make(m, n)))
    row_weights = rng.choice((None, make(m).float()))
    epilogue = Epilogue(bias=bias, residual=residual, row_weights=row_weights)
    return Problem(scheme, x, weights(scheme, (n, k), seed), epilogue, out), rng.randrange(1 << 30)


@pytest.mark.parametrize("scheme", FORMATS)
def test_random_problems_and_plans(amd: Any, scheme: str) -> None:
    """8 for each scheme and target (of int4: 4 for each group): the best plan, or any other."""
    for seed in range(4 if FORMATS[scheme][0] == "int4" else 8):
        problem, choice = problem_of(scheme, seed)
        found = problem.plans(amd.arch.name)
        y, counters = problem.run(amd, found[0 if seed % 2 else choice % len(found)])
        assert_close(problem, y)
        for argument in (1, 2):  # weights and scales: each byte once
            assert counters.traffic[argument].loaded == counters.traffic[argument].loaded_distinct
        if amd.arch.name == "gfx950" and FORMATS[scheme][1] not in (
            "bf16",
            "fp16",
        ):  # one instruction a tile and 16 rows of x
            tiles = -(-problem.n // 16) * -(-problem.w.k // 128)
            assert counters.matrix == tiles * (2 if found[0].rows == 32 else 1)


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "int4_w4a16_g64"])
@pytest.mark.parametrize(("activation", "limit", "interleaved"), [("silu", None, False), ("swigluoai", 7.0, True)])
def test_an_activation_between_gate_and_up(
    amd: Any, scheme: str, activation: str, limit: float | None, interleaved: bool
) -> None:
    n, k = 96, 320
    bias = torch.from_numpy(np.random.default_rng(3).standard_normal(n)).bfloat16()
    epilogue = Epilogue(bias=bias, activation=activation, limit=limit, interleaved=interleaved)
    problem = Problem(scheme, activations(5, k, 1) * 2.0**-3, weights(scheme, (n, k), 2), epilogue)
    sums, magnitudes = problem.reference()
    gate, up = (sums.unflatten(1, (-1, 2, 8))[:, :, i].flatten(1) for i in (0, 1))
    slack = problem.bound(magnitudes).unflatten(1, (-1, 2, 8)).amax(2).flatten(1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    slope, shift = (1.0, 0.0) if activation == "silu" else (1.702, 1.0)
    exact = gate * torch.sigmoid(slope * gate) * (up + shift)
    # The function's slopes are at most 1.2 |up + shift| and |gate|; its exponential errs by 2^-22 of its argument.
    slack = slack * (1.2 * (up + shift).abs() + gate.abs() + 1) + exact.abs() * (4 + slope * gate.abs()) * 2.0**-22
    for plan in (problem.plans(amd.arch.name)[0], next(p for p in problem.plans(amd.arch.name) if p.split > 1)):
        y, _ = problem.run(amd, plan)
        assert ((y.double() - exact).abs() <= slack).all()


def grouped(scheme: str, block_m: int, top_k: int = 2) -> Problem:
    """Seven tokens, four experts; expert 1 gets nothing, and two ids are dropped."""
    ids = torch.tensor([[0, 2], [2, 3], [3, -1], [2, 0], [0, 3], [4, 2], [2, 3]], dtype=torch.int32)[:, :top_k]
    bias = torch.from_numpy(np.random.default_rng(4).standard_normal((4, 40))).bfloat16()
    row_weights = torch.linspace(0.25, 1.5, ids.numel())
    epilogue = Epilogue(bias=bias, row_weights=row_weights)
    k = 416 // group_of(scheme) * group_of(scheme)
    return Problem(scheme, activations(7, k, 5), weights(scheme, (4, 40, k), 6), epilogue, ids=ids, block_m=block_m)


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("block_m", manifest.AMD_MOE_DECODE_M)
def test_grouped_by_expert(amd: Any, scheme: str, block_m: int) -> None:
    problem = grouped(scheme, block_m)
    for plan in (problem.plans(amd.arch.name)[0], next(p for p in problem.plans(amd.arch.name) if p.split == 2)):
        assert_close(problem, problem.run(amd, plan)[0])


@pytest.mark.parametrize("scheme", ["mxfp8", "w4a16", "int4_w4a16_fp16_g32"])
def test_blocks_that_share_k_give_the_same_bits_in_any_order(amd: Any, scheme: str) -> None:
    from emulator.launch import IN_ORDER, REVERSED, random_schedule

    dense = Problem(scheme, activations(6, 1120, 1), weights(scheme, (50, 1120), 2))
    for problem in (dense, grouped(scheme, 4)):
        plan = next(p for p in problem.plans(amd.arch.name) if p.split >= 3 and p.groups > 1)
        first, _ = problem.run(amd, plan, schedule=IN_ORDER)
        assert_close(problem, first)
        for schedule in (REVERSED, random_schedule(1), random_schedule(2)):
            y, _ = problem.run(amd, plan, schedule=schedule)
            assert torch.equal(y.nan_to_num(), first.nan_to_num())


def test_more_rows_than_a_kernel_holds(amd: Any) -> None:
    problem = Problem("mxfp4", activations(75, 256, 1), weights("mxfp4", (34, 256), 2))
    assert_close(problem, problem.run(amd)[0])


def test_rows_of_x_and_y_that_lie_apart(amd: Any) -> None:
    wide = torch.full((5, 296), float("nan"), dtype=torch.bfloat16)
    wide[:, :288] = activations(5, 288, 1)
    problem = Problem("w4a8", wide[:, :288], weights("w4a8", (20, 288), 2))
    assert_close(problem, problem.run(amd)[0])


@pytest.mark.parametrize("scheme", FORMATS)
def test_nan_and_infinity(amd: Any, scheme: str) -> None:
    """A NaN scale, weight or activation makes its row or column NaN and no other; an infinite activation saturates, or
    stays infinite where activations are not quantized."""
    weight, act = FORMATS[scheme]
    k = 224 // group_of(scheme) * group_of(scheme)
    w, x = weights(scheme, (19, k), 1), activations(3, k, 2)
    w.scales[5, k // group_of(scheme) - 1] = 0x7FC00005 if weight == "int4" else 255
    nan_rows = [5]
    if weight == "e4m3":
        w.data.view(torch.uint8)[9, 17] = 0xFF
        nan_rows.append(9)
    x[1, 40] = float("nan")
    y, _ = Problem(scheme, x, w).run(amd)
    expected = torch.zeros(3, 19, dtype=torch.bool)
    expected[1], expected[:, nan_rows] = True, True
    assert torch.equal(y.isnan(), expected)
    x[1, 40], w = float("inf"), weights(scheme, (19, k), 1)
    if weight != "int4":
        w.scales[:] -= 40  # 448 * 2^120 times these stays below fp32's largest number
    problem = Problem(scheme, x, w)
    y, _ = problem.run(amd)
    if act in ("bf16", "fp16"):
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()
    else:
        assert_close(problem, y)


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("scheme", ["mxfp8", "w4a8", "mxfp4"])
def test_activations_in_every_scale_mode(amd: Any, scheme: str, mode: ScaleMode) -> None:
    """Magnitudes up to the end of a binade, which saturate in some modes; subnormal ones; and blocks of zeros."""
    x = activations(5, 256, 3)
    x[:, ::32] = torch.tensor([1.9921875, -1.75, 1.5, 1.0078125, -1.9921875]).bfloat16()[:, None] * 2.0**9
    x[:, 64:96] = 0
    x[:, 128:160] *= 2.0**-138
    problem = Problem(scheme, x, weights(scheme, (16, 256), 4), mode=mode)
    assert_close(problem, problem.run(amd)[0])


@pytest.mark.parametrize("scheme", ["mxfp8", "w4a8", "w4a16", "mxfp4", "w8a16"])
def test_scales_and_activations_over_the_whole_range(amd: Any, scheme: str) -> None:
    w = weights(scheme, (16, 256), 1)
    w.scales[:] = torch.linspace(30, 220, w.scales.numel()).reshape(w.scales.shape).to(torch.uint8)
    x = (activations(2, 256, 2).float() * torch.linspace(-20, 20, 256).exp2()).bfloat16()
    x[:, 64:96] = 0
    problem = Problem(scheme, x, w)
    assert_close(problem, problem.run(amd)[0])


@pytest.mark.parametrize("scheme", ["int4_w4a16_g32", "int4_w4a16_g128", "int4_w4a16_fp16_g64"])
def test_int4_scales_and_activations_over_the_whole_range(amd: Any, scheme: str) -> None:
    """Activations down to the subnormal numbers of fp16 (2^-24 to 2^5), or over forty binades of bf16, of which those
    within 2^-28 of the largest of 128 are exact as halves."""
    w = weights(scheme, (16, 256), 1)
    scales = torch.linspace(-97, 93, w.scales.numel()).reshape(w.scales.shape).round().exp2()
    w.scales[:] = group_words(scales, torch.arange(w.scales.numel(), dtype=torch.uint8).reshape(scales.shape) % 16)
    low, high = (-22, 2) if FORMATS[scheme][1] == "fp16" else (-20, 20)
    x = (activations(2, 256, 2).float().clamp(-8, 8) * torch.linspace(low, high, 256).exp2()).bfloat16()
    x[:, 64:96] = 0
    problem = Problem(scheme, x, w)
    assert_close(problem, problem.run(amd)[0])


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("scheme", ["w4a16", "mxfp4"])
def test_a_clamp_keeps_nan(amd: Any, scheme: str, activation: str) -> None:
    """Of a gate, of an up, and of a row of activations."""
    w = weights(scheme, (32, 128), 2)
    w.scales[3, 0] = w.scales[16 + 9, 0] = 255  # row tiles alternate 8 gates and 8 ups: gate 3, up 9
    x = activations(3, 128, 1)
    x[1, 5] = torch.nan
    y, _ = Problem(scheme, x, w, Epilogue(activation=activation, limit=7.0)).run(amd)
    assert y[1].isnan().all()
    assert y[[0, 2]].isnan().nonzero()[:, 1].unique().tolist() == [3, 9]


@pytest.mark.parametrize("m", [1, 16, 32])
@pytest.mark.parametrize("scheme", ["mxfp8", "w4a8", "mxfp4", "w4a16", "int4_w4a16_g128", "int4_w4a16_fp16_g32"])
def test_lds_banks_do_not_meet(amd: Any, scheme: str, m: int) -> None:
    """Modelled conflicts are at most 5 % of the cycles that LDS is busy for."""
    k = 2048 if m == 16 else 1024
    problem = Problem(scheme, activations(m, k, 1), weights(scheme, (64, k), 2))
    _, c = problem.run(amd)
    banks = 64 if amd.arch.name == "gfx950" else 32
    cycles = max(c.lds_accesses, (c.lds_loaded + c.lds_stored) / (4 * banks)) + c.lds_bank_conflicts
    assert c.lds_bank_conflicts <= 0.05 * cycles, (c.lds_bank_conflicts, cycles)


@pytest.mark.parametrize("scheme", FORMATS)
def test_machine_code(amd: Any, scheme: str) -> None:
    """No register is spilled, weights are loaded 16 bytes a lane, and as many waves fit as plans count with."""
    code_object(amd.arch.name, scheme)  # asserts that no report has problems: spills, claims
    (built,) = build([amd.arch.name], code_objects=(manifest.find(f"decode_{scheme}_m4", amd.arch.name)[0],))
    for report in built.reports:
        assert report.spills == report.scratch == 0
        assert report.loads is not None
        parts = (2 if FORMATS[scheme][0] == "e4m3" else 1) * 64 // amd.arch.wave  # of a tile
        assert report.loads[16] >= 2 * 4 * parts  # four tiles, before the loop and in it
        assert amd.arch.occupancy(report.vgpr, 0, 1) * amd.arch.simds >= RESIDENT_WAVES


@pytest.mark.parametrize("shape", SEED_SHAPES)
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
def test_enough_bytes_are_on_their_way(amd: Any, shape: tuple[int, int], m: int) -> None:
    """At least 24 KB of weights a CU, or all of the weights there are for it."""
    arch, (n, k) = amd.arch.name, shape
    for scheme, element in (("mxfp8", 1), ("mxfp4", 0.5), ("int4_w4a16_g128", 0.5), ("int4_w4a16_fp16_g32", 0.5)):
        p = plans(arch, scheme, m, n, k, CU_COUNTS[arch])[0]
        row_blocks = -(-m // p.rows)
        share = n * k * element * row_blocks / CU_COUNTS[arch]
        assert bytes_in_flight(scheme, p, row_blocks, CU_COUNTS[arch]) >= min(24 << 10, share), p


# ---- plans: no target needed


@settings(max_examples=60)
@given(
    st.integers(1, 100),
    st.integers(1, 20000),
    st.integers(1, 500),
    st.sampled_from(manifest.AMD_ARCHS),
    st.sampled_from(list(FORMATS)),
)
def test_every_plan_fits_the_device(m: int, n: int, blocks: int, arch: str, scheme: str) -> None:
    k = group_of(scheme) * (blocks * 32 // group_of(scheme) or 1)
    facts, tiles = arch_facts(arch), -(-k // 128)
    for p in plans(arch, scheme, m, n, k, CU_COUNTS[arch])[:50]:
        assert p.rows in manifest.AMD_DECODE_M
        assert m <= p.rows or p.rows == 32
        assert p.threads == p.waves_k * p.waves_n * facts.wave <= 512
        assert p.lds == lds_bytes(arch, scheme, p.rows, tiles, p.split, p.waves_k, p.waves_n) <= facts.lds_bytes
        assert 1 <= p.split <= tiles
        assert 1 <= p.groups <= -(-n // (16 * p.waves_n))
        assert modelled_us(arch, scheme, p, m, n, k, CU_COUNTS[arch]) > 0


@settings(max_examples=100)
@given(
    st.integers(1, 64),
    st.integers(1, 160000),
    st.integers(1, 450),
    st.sampled_from(manifest.AMD_ARCHS),
    st.sampled_from(["mxfp8", "w4a8", "mxfp4", "w4a16", "int4_w4a16"]),
    st.sampled_from([0, 4, 16]),
    st.integers(1, 256),
)
@example(32, 57344, 64, "gfx942", "mxfp4", 0, 1)  # Llama 3.1 70B's gate_up: more partial sums than there is room for
@example(6, 4096, 56, "gfx942", "w4a8", 16, 256)  # DeepSeek-R1's
@example(64, 16384, 40, "gfx950", "w4a16", 16, 128)
def test_a_kernel_is_chosen_only_where_a_launch_has_place(
    m: int, n: int, blocks: int, arch: str, scheme: str, block_m: int, experts: int
) -> None:
    """Legality knows it without the planner, for linears and for routed rows."""
    group, weight = (128 if scheme == "int4_w4a16" else 32), {"mxfp8": "e4m3", "int4_w4a16": "int4"}.get(scheme, "e2m1")
    family, op, n = canonical(arch), "moe_gate_up" if block_m else "linear", -(-n // 16) * 16
    spec = kernel(f"hip_{'moe_' * (block_m > 0)}decode_{family}_{weight}")
    moe = {"e_local": experts, "e_total": experts, "top_k": min(8, experts)} if block_m else {}
    problem = GemmProblem(op, scheme, family, m, n, 128 * blocks, group=group, layout=spec.layouts[0], **moe)
    config, name = Config(block_m=block_m or None), f"{scheme}_g128" if weight == "int4" else scheme
    rows = problem.rows if block_m else m
    routed = (block_m, block_bound(rows, experts, block_m)) if block_m else (0, 0)
    place = (WORKSPACE_BYTES, arch, name, rows, n, problem.k, CU_COUNTS[arch], *routed)
    refused = [r.rule for r in legal(problem, spec, config)]
    if "launch" in refused:
        with pytest.raises(ShapeError, match="workspace|fit in LDS"):
            plan_within(*place)
    else:
        p = plan_within(*place)
        assert p.workspace_bytes(routed[1] or -(-m // p.rows), n) <= WORKSPACE_BYTES


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 32), (1, 0, 32), (1, 8, 0), (1, 8, 48)])
def test_problems_outside_the_contract(m: int, n: int, k: int) -> None:
    with pytest.raises(ShapeError, match="K a multiple of 32"):
        plans("gfx950", "mxfp8", m, n, k, 256)


def test_what_does_not_fit_together_is_refused() -> None:
    x, y = torch.zeros(4, 256, dtype=torch.bfloat16), torch.zeros(4, 32)
    given_ = {"arch": "gfx950", "scheme": "mxfp8", "n": 32, "cu_count": 4}
    assert decode_gemm_amd(x, None, None, y, **given_).kernel == "decode_mxfp8_m4"
    for bad in ({"n": 33}, {"top_k": 2}, {"epilogue": Epilogue(activation="silu")}):
        with pytest.raises(ShapeError):
            decode_gemm_amd(x, None, None, y, **(given_ | bad))
    with pytest.raises(ShapeError, match="16-byte aligned"):
        decode_gemm_amd(torch.zeros(4, 257, dtype=torch.bfloat16)[:, :256], None, None, y, **given_)
    with pytest.raises(ShapeError, match="4 GiB apart"):
        decode_gemm_amd(
            torch.empty(1, 256, dtype=torch.bfloat16).as_strided((1, 256), (1 << 31, 1)), None, None, y[:1], **given_
        )
    with pytest.raises(ShapeError, match="of float16: mxfp8 takes bfloat16"):
        decode_gemm_amd(x.half(), None, None, y, **given_)
    with pytest.raises(ShapeError, match="of bfloat16: int4_w4a16_fp16_g64 takes float16"):
        decode_gemm_amd(x, None, None, y, **(given_ | {"scheme": "int4_w4a16_fp16_g64"}))
    with pytest.raises(ShapeError, match="K a multiple of 128"):
        plans("gfx942", "int4_w4a16_g128", 1, 8, 192, 256)
    with pytest.raises(ShapeError, match="bf16, fp16 or fp32"):
        decode_gemm_amd(x, None, None, y.double(), **given_)
    split = next(p for p in plans("gfx950", "mxfp8", 4, 32, 256, 4) if p.split == 2)
    with pytest.raises(ShapeError, match="bytes of workspace"):
        decode_gemm_amd(x, None, None, y, **given_, plan=split)
    with pytest.raises(ShapeError, match="blocks of 8 routed rows"):
        plans("gfx950", "mxfp8", 8, 32, 256, 4, block_m=8, blocks=2)
    assert replace(split, split=1).workspace_bytes(1, 32) == 0


@pytest.mark.parametrize("group", manifest.INT4_GROUPS)
def test_int4_on_hopper_has_plans(group: int) -> None:
    """Plans are tried on a GPU (tests/device); here, that they fit into it, and name kernels that there are."""
    scheme, tiles = f"int4_w4a16_fp16_g{group}", -(-640 // (128 if group == 128 else 64))
    for m in (1, 3, 8, 9, 16, 17, 64, 130):
        found = decode_plans.plans(scheme, m, 200, 640, 132)
        assert all(p.split <= tiles and p.lds <= arch_facts("sm_90").lds_bytes for p in found)
        # few rows are held by blocks, more than 32 stream
        assert {p.share > 0 for p in found} == ({False} if m <= 8 else {True} if m > 32 else {False, True})
        for p in found:
            manifest.find(f"decode{'_prepared' * (p.share > 0)}_{scheme}_m{p.rows}", "sm_90")
            assert not p.share or manifest.find(f"prepare_{scheme}", "sm_90")
