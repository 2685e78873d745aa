"""int4 through both ops: on machine code of every AMD arch, laid out as selection says; and by the reference."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from op_layers import (
    as_served_on_a_cpu,
    assert_close,
    exact_linear,
    make_linear,
    make_moe,
    opchecks,
    tokens,
    with_values,
)

from sglang_amd_quant.ops import layout, linear, moe, routing
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out, lay_out_experts
from sglang_amd_quant.ops.linear import QuantizedLinear, bound
from sglang_amd_quant.ops.moe import QuantizedMoe
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import GemmProblem
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS
from sglang_amd_quant.selection.shipped_kernels import GPUS
from sglang_amd_quant.tensor import MxTensor

AMD = ("gfx950", "gfx942", "gfx1100", "gfx1151")
INT4 = SCHEMES["int4_w4a16"]
GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)


@pytest.fixture
def triton_only(monkeypatch):
    """Helpers run as kernels too, and only Triton's GEMMs can be launched."""
    monkeypatch.setattr(routing, "has_triton", lambda x: True)
    for module in (layout, linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: frozenset({"triton_int4_gemm", "triton_int4_moe"}))


def laid_out(layer):
    """The layer with its weights as after loading."""
    if isinstance(layer, QuantizedLinear):
        return replace(layer, weight=lay_out(layer.weight, layer.problem))
    w13, w2 = lay_out_experts(layer.w13, layer.w2, layer.gate_up, layer.down)
    return replace(layer, w13=w13, w2=w2)


def names(made):
    return [launch.compiled.variant.kernel.__name__ for launch in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (128, 256)])
@pytest.mark.parametrize("arch", AMD)
def test_linear(triton_only, arch, group, k, dtype):
    layer = laid_out(make_linear("int4_w4a16", 40, k, arch, group=group, symmetric=False))
    assert layer.weight.layout.name == AMD_DECODE_LAYOUTS[layer.problem.arch, "int4"]
    x, bias = torch.randn(3, 2 * k).to(dtype)[:, ::2], torch.randn(40)
    with emulated_triton(arch) as made:
        out = layer(x, bias)
    assert names(made) == ["amd_gemm_kernel"]
    assert out.dtype == dtype
    assert_close(out, exact_linear(layer, x, bias), k)


@pytest.mark.parametrize(
    ("arch", "dtype", "activation"),
    [
        ("gfx950", torch.bfloat16, GPT_OSS), ("gfx942", torch.float16, Activation()),
        ("gfx1100", torch.bfloat16, Activation("relu2", gated=False)), ("gfx1151", torch.float16, GPT_OSS),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("group", [32, 64])
def test_moe(triton_only, arch, dtype, activation, group):
    experts, hidden, inter, top_k = 4, 128, 64, 2
    layer = laid_out(
        make_moe(
            "int4_w4a16", experts, hidden, inter, top_k, arch, activation, biases=activation is GPT_OSS, group=group,
            symmetric=False, scale=1.5,
        )
    )  # fmt: skip
    given = tokens(9, hidden, experts, top_k, dtype, dropped=0.25)
    with emulated_triton(arch) as made:
        out = layer(*given)
    assert names(made)[-1] == "combine_kernel"
    assert names(made).count("amd_gemm_kernel") == 2
    want = as_served_on_a_cpu(layer)(*given)
    assert (out.shape, out.dtype) == (want.shape, dtype)
    assert torch.isfinite(out).all()
    # Both sum the same products in fp32 in another order, and round to 8 bits or more: at the end, and the hidden
    # values, of which one in I may go the other way.
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8


def test_slots_stay_apart_and_weights_may_belong_to_the_input(triton_only):
    for options in ({"combine": False}, {"combine": False, "weight_output": False}, {"weight_on_input": True}):
        top_k = 1 if "weight_on_input" in options else 2
        layer = laid_out(make_moe("int4_w4a16", 4, 128, 64, top_k, "gfx942", group=64, **options))
        given = tokens(9, 128, 4, top_k, dropped=0.25)
        with emulated_triton("gfx942"):
            out = layer(*given)
        want = as_served_on_a_cpu(layer)(*given)
        assert out.shape == want.shape
        assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8


def test_both_gemms_take_the_blocks_that_were_routed(triton_only):
    for arch in GPUS:
        layer = make_moe("int4_w4a16", 6, 128, 128, 2, arch, group=128)
        for m in (1, 60, 200, 1000):
            pair = moe.bound(layer.text).pair(m, torch.float16)
            assert pair.kernels == ("triton_int4_moe", "triton_int4_moe")
            assert pair.gate_up.config.block_m == pair.down.config.block_m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_reference_reads_words(group, symmetric, dtype):
    """On a CPU a checkpoint's tensor is laid out as words, and stands for the same values."""
    scheme = replace(INT4, block=group)
    weight = MxTensor.quantize(torch.randn(40, 256) / 4, scheme, symmetric=symmetric)
    problem = GemmProblem("linear", "int4_w4a16", "cpu", 0, 40, 256, group=group)
    words = lay_out(weight, problem)
    assert isinstance(words, MxTensor)
    assert (words.scales.dtype, words.zeros, words.layout.name) == (torch.int32, None, "strided")
    assert torch.equal(words.dequantize(), weight.dequantize())
    layer = QuantizedLinear(problem, words, ActQuant(scheme))
    x, bias = torch.randn(2, 3, 256, dtype=dtype), torch.randn(40, dtype=dtype)
    assert_close(layer(x, bias), exact_linear(layer, x, bias), 256)
    assert torch.equal(layer(x, bias), with_values(layer)(x, bias))
    assert bound(layer.text).operand.form == words.form


@pytest.mark.parametrize("arch", [*AMD, "sm_90", "cpu"])
def test_experts_are_laid_out_with_words(triton_only, arch):
    """With zero points of their own; other layouts than a checkpoint's where a pair of kernels reads them."""
    scheme = replace(INT4, block=64)
    plain = make_moe("int4_w4a16", 3, 128, 64, 2, arch, group=64)
    raw = [MxTensor.quantize(torch.randn(w.shape), scheme, symmetric=False) for w in (plain.w13, plain.w2)]
    laid = lay_out_experts(*raw, plain.gate_up, plain.down)
    for weight, source in zip(laid, raw, strict=True):
        assert isinstance(weight, MxTensor)
        assert weight.tensors[1].dtype == torch.int32
        assert torch.equal(weight.dequantize(), source.dequantize())
    assert isinstance(replace(plain, w13=laid[0], w2=laid[1]), QuantizedMoe)


def test_what_no_kernel_covers_is_the_references(triton_only):
    """A model in fp32, on weights that already lie as kernels read them."""
    layer = laid_out(make_linear("int4_w4a16", 40, 256, "gfx950", group=128, symmetric=False))
    x = torch.randn(3, 256)
    with emulated_triton("gfx950") as made:
        assert_close(layer(x), exact_linear(layer, x), 256)
    assert made == []
    choice = bound(layer.text).plan(3, torch.float32).choice
    assert any("reads bf16/fp16 activations, the model's are fp32" in reason for reason in choice.reasons)


@pytest.mark.parametrize("group", [32, 128])
def test_opcheck(group):
    """Schema, fake against real, and the traced ops with dynamic shapes."""
    layer = make_linear("int4_w4a16", 48, 128, group=group)
    x, bias = torch.randn(3, 128).bfloat16(), torch.randn(48).bfloat16()
    args = (x, layer.weight.tensors, bias, None, layer.text)
    torch.library.opcheck(torch.ops.amd_mx.linear.default, args, test_utils=opchecks("int4_w4a16"))
    experts = make_moe("int4_w4a16", 4, 128, 128, 2, group=group)
    given = (*tokens(3, 128, 4, 2, dropped=0.2), experts.w13.tensors, experts.w2.tensors)
    args = (*given, None, None, None, None, experts.text)
    torch.library.opcheck(torch.ops.amd_mx.fused_moe.default, args, test_utils=opchecks("int4_w4a16"))
    assert torch.equal(experts(*given[:3]), as_served_on_a_cpu(experts)(*given[:3]))
