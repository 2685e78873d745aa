"""Swizzled or strided is chosen once, at load time, from measurements, rules, and the kernels that are there."""

from dataclasses import replace

import pytest

from sglang_amd_quant.selection import GemmProblem, Selector, choose_layout, shipped
from sglang_amd_quant.selection.packs import Packs

GATE_UP = GemmProblem("moe_gate_up", "w4a8", "gfx950", 1, 5760, 2880, e_local=128, e_total=128, top_k=4)
DOWN = replace(GATE_UP, op="moe_down", n=2880, k=2880)
EMPTY = Selector(Packs([]))


@pytest.mark.parametrize(
    ("tp", "ep", "layout"),
    [(1, 1, "cdna4_scale"), (2, 1, "cdna4_scale"), (4, 1, "strided"), (8, 1, "strided"), (8, 4, "cdna4_scale")],
)
def test_the_rule_of_vllm_44804(tp, ep, layout):
    """Swizzled up to two ranks a weight, strided from four on: it wins 23 of 28 cells there."""
    choice = choose_layout(replace(GATE_UP, tp=tp, ep=ep), EMPTY)
    assert (choice.layout, choice.source) == (layout, "rule")
    assert "vllm#44804" in choice.reasons[0]


def test_nothing_is_swizzled_for_kernels_that_are_not_there():
    here = shipped()
    choice = choose_layout(GATE_UP, Selector(Packs([]), available=here))
    assert (choice.layout, choice.source) == ("decode_preshuffle", "rule")
    decode = {name for name in here if name.startswith("hip_moe_decode")}
    choice = choose_layout(GATE_UP, Selector(Packs([]), available=here - decode))
    assert (choice.layout, choice.source) == ("strided", "default")
    assert any("cdna4_scale refused" in reason and "no available kernel" in reason for reason in choice.reasons)


def test_measurements_of_both_decide_before_the_rule(packs_of):
    row = {
        "op": "moe_gate_up", "scheme": "w4a8", "N": 5760, "K": 2880, "kernel": "triton_moe_a8w4", "block_m": 16,
        "block_n": 128, "block_k": 256, "num_warps": 4, "num_stages": 2, "E": 128,
    }  # fmt: skip
    rows = [
        {**row, "layout": layout, "M": m, "us": us}
        for layout, m, us in (
            ("cdna4_scale", 1, 20), ("strided", 1, 25), ("cdna4_scale", 64, 90), ("strided", 64, 70),
            ("cdna4_scale", 256, 1),  # measured one way only: no comparison
        )
    ]  # fmt: skip
    choice = choose_layout(GATE_UP, Selector(packs_of(*rows)))
    assert (choice.layout, choice.source) == ("strided", "exact")
    assert "2 common entries: strided 95.0 us, cdna4_scale 110.0 us" in choice.reasons[0]
    assert choose_layout(GATE_UP, Selector(packs_of(*rows[::2]))).source == "rule"


INT4 = GemmProblem("moe_gate_up", "int4_w4a16", "gfx11", 1, 1024, 2048, e_local=256, e_total=256, top_k=8, group=128)
INT4_LINEAR = replace(INT4, op="linear", e_local=1, e_total=1, top_k=1)


def test_a_layout_that_kernels_cannot_serve_everywhere_is_refused():
    """exllama is the rule for gfx11 int4 where published kernels are planned with; those of this package do not read
    it, and of N that is not whole 16s no gates and ups alternate by eight."""
    assert choose_layout(INT4, EMPTY).layout == "exllama"
    here = shipped()
    assert choose_layout(INT4, Selector(Packs([]), available=here)).layout == "decode_rdna_int4"
    assert choose_layout(replace(INT4, n=1048), Selector(Packs([]), available=here)).layout == "strided"
    decode = {name for name in here if name.startswith("hip_moe_decode")}
    choice = choose_layout(INT4, Selector(Packs([]), available=here - decode))
    assert (choice.layout, choice.source) == ("strided", "default")
    assert any("exllama refused" in reason and "no available kernel" in reason for reason in choice.reasons)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("arch", "layout"),
    [("gfx950", "cdna_int4+tile_group"), ("gfx942", "cdna_int4+tile_group"), ("gfx1151", "rdna_int4+tile_group"),
     ("sm_90", "mma_int4+tile_group")],
)  # fmt: skip
def test_int4_linears_lie_as_decode_kernels_read_them(arch, layout, group):
    problem = replace(INT4_LINEAR, arch=arch, cu_count=0, group=group)
    assert choose_layout(problem, EMPTY).layout == layout


def test_linears_lie_as_the_decode_kernels_read_them():
    for arch, layout in (("gfx950", "mxfp8_lane"), ("gfx942", "cdna3_e4m3"), ("gfx1100", "preshuffle")):
        mxfp8 = GemmProblem("linear", "mxfp8", arch, 1, 2304, 6144)
        assert choose_layout(mxfp8, EMPTY).layout == f"{layout}+tile_scale"
    for arch, layout in (("gfx950", "preshuffle"), ("gfx942", "cdna3_e2m1"), ("gfx1100", "preshuffle")):
        mxfp4 = GemmProblem("linear", "w4a16", arch, 1, 2304, 6144)
        assert choose_layout(mxfp4, EMPTY).layout == f"{layout}+tile_scale"


def test_no_rule_no_swizzle():
    for arch in ("cpu", "gfx1250"):
        assert choose_layout(GemmProblem("linear", "mxfp8", arch, 1, 2304, 6144), EMPTY).layout == "strided"


@pytest.mark.parametrize("problem", [GATE_UP, DOWN, replace(DOWN, tp=8, k=384)])
def test_the_layout_chosen_has_a_kernel_for_every_m(problem):
    select = Selector()
    layout = choose_layout(problem, select).layout
    for m in (1, 3, 17, 100, 5000):
        choice = select(replace(problem, m=m, layout=layout))
        assert choice.source != "reference"
        assert choice.layout == layout


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1151", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_of_either_dtype_have_a_kernel_for_every_scheme_and_m(arch, dtype):
    """MXFP8 weights with activations as they are too, which no scheme is called yet."""
    here = Selector(Packs([]), available=shipped())
    operands = [(s, "") for s in ("mxfp8", "w4a8", "mxfp4", "w4a16")] + [("w4a8", "fp8_static"), ("mxfp8", "bf16")]
    experts = {"e_local": 64, "e_total": 64, "top_k": 8}
    for scheme, act in operands:
        for op in ("linear", "moe_gate_up", "moe_down"):
            more = {} if op == "linear" else experts
            problem = GemmProblem(op, scheme, arch, 0, 1536, 2048, act=act, out_dtype=dtype, **more)
            layout = choose_layout(problem, here).layout
            for m in (1, 3, 8, 17, 64, 100, 5000):
                choice = here(replace(problem, m=m, layout=layout))
                assert choice.source != "reference", (scheme, act, op, m, choice.reasons)
                assert ("_fp16_" in choice.kernel) == (dtype == "fp16" and problem.act == "bf16")
                assert layout == "strided" or arch != "sm_90" or "_fp16_" not in choice.kernel
