"""The fused-MoE op: fakes, and the path through routing, grouped GEMMs and combine against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from op_layers import MX, as_served_on_a_cpu, make_moe, opchecks, tokens

from sglang_amd_quant.errors import ShapeError, UnsupportedError
from sglang_amd_quant.ops import moe
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out_experts
from sglang_amd_quant.ops.moe import KERNELS, bound, decide
from sglang_amd_quant.ops.operand import Operand
from sglang_amd_quant.selection import amd_decode, choose, kernels, shipped

E, H, INTER, TOP_K = 6, 64, 96, 2
GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)
OTHERS = [Activation("gelu"), Activation("relu2", gated=False), Activation(limit=1.0, clamp="after_silu")]
STEP = {"w4a16": 0.0, "w4a8": 2**-3, "mxfp8": 2**-3, "mxfp4": 2**-1}


def close(got, want, scheme="w4a16", static=False):
    """Both sum the same products in fp32, in another order, and round to bf16, by at most 2^-8 each: both at the end,
    and where a kernel says so the outputs of slots before they are summed. An error before the second quantization may
    move a value over a rounding boundary: one step of the format in one of I terms, whose share of the output is
    1/sqrt(I)."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.isfinite(got).all()
    slack = 3 * 2**-8 + (STEP[scheme] or (2**-3 if static else 0)) / math.sqrt(INTER)
    assert (got.double() - want.double()).abs().max() <= want.double().abs().max() * slack


def test_every_shipped_moe_kernel_is_in_a_pair():
    mine = {name for name in shipped() if any(op.startswith("moe") for op in kernels()[name].ops)}
    assert mine == {name for pair in KERNELS for name in pair}


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("options", [{}, {"biases": True, "activation": GPT_OSS}, {"combine": False}, {"static": True}])
def test_opcheck(scheme, options):
    layer = make_moe(scheme, E, H, INTER, TOP_K, **options)
    x, ids, weights = tokens(3, H, E, TOP_K, dropped=0.2)
    a = layer.problem
    args = (
        x, ids, weights, layer.w13.tensors, layer.w2.tensors, layer.b13, layer.b2,
        a.act13.scale, a.act2.scale, layer.text,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.amd_mx.fused_moe.default, args, test_utils=opchecks(scheme))
    assert torch.equal(layer(x, ids, weights), as_served_on_a_cpu(layer)(x, ids, weights))


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 7, 130])
def test_every_scheme(triton_twins, scheme, m):
    layer = make_moe(scheme, E, H, INTER, TOP_K, arch="gfx950")
    given = tokens(m, H, E, TOP_K, dropped=0.25)
    close(layer(*given), as_served_on_a_cpu(layer)(*given), scheme)
    first, second = triton_twins
    assert first["config"].block_m == second["config"].block_m
    assert first["row_ids"] is second["row_ids"]
    assert (first["top_k"], second["top_k"]) == (TOP_K, 1)
    assert second["row_weights"] is not None


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx11", "sm_90"])
def test_both_gemms_take_the_blocks_that_were_routed(triton_twins, arch):
    layer = make_moe("w4a8", E, H, INTER, TOP_K, arch=arch)
    for m in (1, 60, 200, 1000):
        pair = bound(layer.text).pair(m, torch.bfloat16)
        assert pair.kernels == ("triton_mx_moe", "triton_mx_moe")
        assert pair.gate_up.config.block_m == pair.down.config.block_m


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, Activation("relu2", gated=False)], ids=lambda a: a.kind)
@pytest.mark.parametrize("biases", [False, True])
def test_activations_biases_and_static_fp8(triton_twins, static, activation, biases):
    layer = make_moe(
        "w4a8" if static else "w4a16", E, H, INTER, TOP_K, "sm_90", activation, static=static, biases=biases, scale=2.5
    )
    given = tokens(9, H, E, TOP_K, dropped=0.25)
    close(layer(*given), as_served_on_a_cpu(layer)(*given), static=static)
    assert len(triton_twins) == 2


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_slots_stay_apart(triton_twins, static):
    for weight_output in (False, True):
        layer = make_moe(
            "w4a8", E, H, INTER, TOP_K, "gfx942", static=static, combine=False, weight_output=weight_output
        )
        x, ids, weights = tokens(9, H, E, TOP_K, dropped=0.25)
        out = layer(x, ids, weights)
        close(out, as_served_on_a_cpu(layer)(x, ids, weights), "w4a8", static)
        assert out.shape == (9, TOP_K, H)
        assert not out[ids < 0].any()


def test_weight_on_input(triton_twins):
    layer = make_moe("w4a8", E, H, INTER, 1, "gfx950", weight_on_input=True)
    given = tokens(9, H, E, 1)
    close(layer(*given), as_served_on_a_cpu(layer)(*given), "w4a8")
    assert triton_twins[1]["row_weights"] is None


def test_model_in_fp16(triton_twins):
    """Quantized activations come in any dtype; unquantized ones only as the kernel reads them."""
    given = tokens(5, H, E, TOP_K, dtype=torch.float16)
    layer = make_moe("mxfp8", E, H, INTER, TOP_K, "gfx950")
    close(layer(*given), as_served_on_a_cpu(layer)(*given), "mxfp8")
    assert len(triton_twins) == 2
    layer = make_moe("w4a16", E, H, INTER, TOP_K, "gfx950")
    assert torch.equal(layer(*given), as_served_on_a_cpu(layer)(*given))
    assert len(triton_twins) == 2


@pytest.mark.parametrize("ids", [torch.full((4, TOP_K), -1), torch.full((4, TOP_K), E), torch.zeros(0, TOP_K)])
def test_nothing_to_do(triton_twins, ids):
    layer = make_moe("w4a8", E, H, INTER, TOP_K, "gfx950", biases=True)
    out = layer(torch.randn(len(ids), H).bfloat16(), ids.int(), torch.rand(ids.shape))
    assert out.shape == (len(ids), H)
    assert not out.any()


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS], ids=lambda a: a.kind)
@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
def test_fused_launcher(moe_twins, scheme, activation, arch):
    layer = make_moe(scheme, E, H, INTER, TOP_K, arch, activation, biases=activation is GPT_OSS, scale=1.5)
    for m in (1, 70, 700):
        given = tokens(m, H, E, TOP_K, dropped=0.25)
        assert bound(layer.text).pair(m, torch.bfloat16).kernels == ("triton_moe", "triton_moe")
        close(layer(*given), as_served_on_a_cpu(layer)(*given), scheme)
    assert [call.get("epilogue").activation for call in moe_twins] == [activation.kind, "none"] * 3


@pytest.mark.parametrize(
    "options",
    [{"static": True}, {"combine": False}, {"combine": False, "weight_output": False}, {"weight_on_input": True}],
    ids="-".join,
)
def test_fused_launcher_does_what_sglang_asks(moe_twins, options):
    top_k = 1 if "weight_on_input" in options else TOP_K
    layer = make_moe("w4a8", E, H, INTER, top_k, "gfx950", **options)
    given = tokens(9, H, E, top_k, dropped=0.25)
    close(layer(*given), as_served_on_a_cpu(layer)(*given), "w4a8")
    assert len(moe_twins) == 2


@pytest.mark.parametrize("activation", OTHERS, ids=lambda a: a.kind)
def test_other_activations_run_between_two_kernels(moe_twins, activation):
    layer = make_moe("mxfp8", E, H, INTER, TOP_K, "gfx950", activation, biases=True)
    given = tokens(9, H, E, TOP_K, dropped=0.25)
    assert bound(layer.text).pair(9, torch.bfloat16).kernels == ("triton_mx_moe", "triton_moe")
    close(layer(*given), as_served_on_a_cpu(layer)(*given), "mxfp8")


def packed(layer):
    """The layer with its weights laid out as after loading, and the names of the layouts."""
    w13, w2 = lay_out_experts(layer.w13, layer.w2, layer.gate_up, layer.down)
    return replace(layer, w13=w13, w2=w2), [w13.layout.name, w2.layout.name]


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS], ids=lambda a: a.kind)
def test_hopper_launcher(hopper_twins, scheme, activation):
    plain = make_moe(scheme, E, H, INTER, TOP_K, "sm_90", activation, biases=activation is GPT_OSS, scale=1.5)
    layer, names = packed(plain)
    expected = "hopper_bf16" if scheme == "w4a16" else "hopper_e4m3"
    assert names == [expected, expected]
    for m in (1, 70):
        given = tokens(m, H, E, TOP_K, dropped=0.25)
        close(layer(*given), as_served_on_a_cpu(plain)(*given), scheme)
    assert hopper_twins == [expected.removeprefix("hopper_")] * 4
    assert layer(*tokens(0, H, E, TOP_K)).shape == (0, H)


@pytest.mark.parametrize(
    "options",
    [{"static": True}, {"combine": False}, {"combine": False, "weight_output": False}, {"weight_on_input": True}],
    ids=lambda o: "-".join(o),
)
def test_hopper_launcher_does_what_sglang_asks(hopper_twins, options):
    top_k = 1 if "weight_on_input" in options else TOP_K
    plain = make_moe("w4a8", E, H, INTER, top_k, "sm_90", **options)
    layer, _ = packed(plain)
    given = tokens(9, H, E, top_k, dropped=0.25)
    close(layer(*given), as_served_on_a_cpu(plain)(*given), "w4a8")
    assert len(hopper_twins) == 2


@pytest.mark.parametrize("activation", OTHERS, ids=lambda a: a.kind)
def test_hopper_leaves_other_activations_to_strided_weights(hopper_twins, activation):
    layer, names = packed(make_moe("w4a8", E, H, INTER, TOP_K, "sm_90", activation))
    assert names == ["strided", "strided"]
    assert bound(layer.text).pair(4, torch.bfloat16).kernels == ("triton_mx_moe", "triton_mx_moe")


def test_packed_weights_serve_no_other_dtype(hopper_twins):
    layer, _ = packed(make_moe("w4a16", E, H, INTER, TOP_K, "sm_90"))
    with pytest.raises(UnsupportedError, match="packed as hopper_bf16: their kernel does not run this call.*fp16"):
        layer(*tokens(3, H, E, TOP_K, dtype=torch.float16))


def test_where_one_gemm_has_no_kernel_both_are_the_references(triton_twins, monkeypatch):
    layer = make_moe("w4a8", E, H, INTER, TOP_K, "gfx950")
    monkeypatch.setattr(moe, "KERNELS", {("triton_mx_moe", "another"): KERNELS["triton_mx_moe", "triton_mx_moe"]})
    pair = bound(layer.text).pair(4, torch.bfloat16)
    assert pair.kernels == ("reference", "reference")
    given = tokens(4, H, E, TOP_K)
    assert torch.equal(layer(*given), as_served_on_a_cpu(layer)(*given))
    assert triton_twins == []


def test_gate_up_gives_way_where_no_kernel_for_down_takes_its_blocks(monkeypatch):
    """Blocks of four rows are a decode kernel's alone: where there is no place for down's launch, Triton does both."""
    layer = make_moe("mxfp4", E, H, INTER, TOP_K, "gfx942")
    layout = "decode_cdna3_e2m1"
    gate_up, down = (replace(p, m=1, layout=layout, cu_count=304) for p in (layer.gate_up, layer.down))
    names = frozenset(shipped())
    assert {c.kernel for c in decide(gate_up, down, names, choose)[:2]} == {"hip_moe_decode_gfx942_e2m1"}
    monkeypatch.setattr(amd_decode, "WORKSPACE_BYTES", 0)
    amd_decode._why_none_fits.cache_clear()
    pair = decide(replace(gate_up, k=4096), replace(down, k=1 << 20), names, choose)
    amd_decode._why_none_fits.cache_clear()
    assert pair.kernels == ("triton_e2m1_moe", "triton_e2m1_moe")


def test_weights_of_dropped_slots_may_be_anything():
    layer = make_moe("w4a16", E, H, INTER, TOP_K)
    x, ids, weights = tokens(3, H, E, TOP_K)
    ids[0, 1] = ids[2, 0] = -1
    ids[1, 0] = E
    want = layer(x, ids, weights)
    for row, slot, value in ((0, 1, torch.nan), (2, 0, torch.inf), (1, 0, -torch.inf)):
        weights[row, slot] = value
    assert torch.equal(layer(x, ids, weights), want)


def test_text_reads_back():
    layer = make_moe("w4a8", E, H, INTER, TOP_K, "gfx1151", GPT_OSS, static=True, combine=False, scale=0.5)
    read = bound(layer.text)
    assert read.gate_up == Operand.of(layer.gate_up, layer.w13, layer.problem.act13)
    assert read.down == Operand.of(layer.down, layer.w2, layer.problem.act2)
    assert read.problem(layer.problem.act13.scale, layer.problem.act2.scale) == layer.problem


class TestMistakes:
    @pytest.mark.parametrize("values", [False, True])
    def test_shapes(self, values):
        layer = make_moe("w4a16", E, H, INTER, TOP_K)
        layer = as_served_on_a_cpu(layer) if values else layer
        x, ids, weights = tokens(3, H, E, TOP_K)
        with pytest.raises(ShapeError, match="hidden size is 64"):
            layer(x[:, 1:], ids, weights)
        with pytest.raises(ShapeError, match=r"\[M, top_k\] twice"):
            layer(x, ids[1:], weights)
        with pytest.raises(ShapeError, match=r"\[M, top_k\] twice"):
            layer(x, ids, weights[:, 1:])

    def test_weights_of_another_layer(self):
        layer = make_moe("w4a16", E, H, INTER, TOP_K)
        with pytest.raises(ShapeError, match=r"weights \[6, 64, 96\]"):
            replace(layer, w13=layer.w2)
