"""Models in fp16 on MX weights: both ops from end to end on machine code of every AMD arch, laid out as selection
says."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from op_layers import MX, as_served_on_a_cpu, assert_close, exact_linear, make_linear, make_moe, tokens

from sglang_amd_quant.formats import dequantize_mx, quantize_mx
from sglang_amd_quant.ops import layout, linear, moe, quantize, routing
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out, lay_out_experts
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import kernels, shipped
from sglang_amd_quant.selection.shipped_kernels import GPUS

AMD = ("gfx950", "gfx942", "gfx1100", "gfx1151")
GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)
RELU2 = Activation("relu2", gated=False)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    """Helpers run as kernels too. What a layer may be given are this package's kernels, of which an arch has its own;
    none of HIP is for fp16 here, so only Triton's are launched."""
    for module in (quantize, routing):
        monkeypatch.setattr(module, "has_triton", lambda x: True)
    for module in (layout, linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: shipped())


def in_fp16(layer):
    """A linear or an MoE of a model in fp16, laid out for it."""
    if isinstance(layer, linear.QuantizedLinear):
        problem = replace(layer.problem, out_dtype="fp16")
        return replace(layer, problem=problem, weight=lay_out(layer.weight, problem))
    gate_up, down = (replace(p, out_dtype="fp16") for p in (layer.gate_up, layer.down))
    w13, w2 = lay_out_experts(layer.w13, layer.w2, gate_up, down)
    return replace(layer, gate_up=gate_up, down=down, w13=w13, w2=w2)


def names(made):
    assert all(launch.compiled.report.problems == [] for launch in made)
    return [launch.compiled.variant.kernel.__name__ for launch in made]


@pytest.mark.parametrize("arch", AMD)
@pytest.mark.parametrize("scheme", [*MX, "static"])
def test_linear(arch, scheme):
    static, scheme = scheme == "static", "w4a8" if scheme == "static" else scheme
    plain = make_linear(scheme, 40, 320, arch=arch, static=static)
    layer = in_fp16(plain)
    x, bias = torch.randn(3, 640).half()[:, ::2], torch.randn(40)
    with emulated_triton(arch) as made:
        out = layer(x, bias)
    quantized = ["quant_mx_kernel"] if plain.act.scheme.act != "bf16" and not static else []
    registers = scheme == "w4a16" or arch != "gfx950"  # which has a matrix unit for MX
    assert names(made) == [*quantized, "amd_gemm_kernel" if registers else "mx_gemm_kernel"]
    assert out.dtype == torch.float16
    assert_close(out, exact_linear(plain, x, bias), 320 + 2 * static)  # of static fp8 each factor is rounded once more


@pytest.mark.parametrize(
    ("arch", "scheme", "activation"),
    [
        *((arch, "w4a16", Activation()) for arch in AMD), ("gfx950", "w4a16", GPT_OSS), ("gfx1100", "w4a16", RELU2),
        ("gfx950", "mxfp4", GPT_OSS), ("gfx950", "mxfp8", Activation()), ("gfx942", "w4a8", GPT_OSS),
        ("gfx1100", "w4a8", Activation()), ("gfx1151", "mxfp8", Activation()), ("gfx942", "mxfp8", RELU2),
        ("gfx950", "static", GPT_OSS), ("gfx1100", "static", Activation()),
    ],
    ids=lambda v: v.kind if isinstance(v, Activation) else v,
)  # fmt: skip
def test_moe(arch, scheme, activation):
    experts, hidden, inter, top_k = 4, 96, 64, 2
    static, scheme = scheme == "static", "w4a8" if scheme == "static" else scheme
    plain = make_moe(
        scheme, experts, hidden, inter, top_k, arch, activation, static, biases=activation is GPT_OSS, scale=1.5
    )
    given = tokens(9, hidden, experts, top_k, torch.float16, dropped=0.25)
    with emulated_triton(arch) as made:
        out = in_fp16(plain)(*given)
    gemms = [name for name in names(made) if "gemm" in name]
    fused = "mx_gemm_kernel" if activation is RELU2 else "moe_gemm_kernel"
    registers = scheme == "w4a16" or arch != "gfx950"  # which has a matrix unit for MX
    assert gemms == (["amd_gemm_kernel"] * 2 if registers else [fused, "moe_gemm_kernel"])
    want = as_served_on_a_cpu(plain)(*given)
    assert (out.shape, out.dtype) == (want.shape, torch.float16)
    assert torch.isfinite(out).all()
    # As in test_moe.py: three roundings, here to fp16, and one step of the hidden values' format in one of I terms.
    step = 0.0 if scheme == "w4a16" else {"e2m1": 2**-1, "e4m3": 2**-3}[plain.problem.act2.scheme.act] / inter**0.5
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * (3 * 2**-11 + step)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_an_expert_may_be_beyond_fp16_where_the_sum_is_not(scheme):
    """Two experts whose biases are a token's result, of opposite signs."""
    plain = make_moe(scheme, 2, 64, 32, 2, "gfx942", GPT_OSS, biases=True)
    x, ids, weights = tokens(3, 64, 2, 2, torch.float16)
    ids[:] = torch.tensor([0, 1], dtype=ids.dtype)
    weights[:] = 1.0
    plain.b2[0], plain.b2[1] = 1e5, -1e5 + 512
    with emulated_triton("gfx942"):
        out = in_fp16(plain)(x, ids, weights)
    want = as_served_on_a_cpu(plain)(x, ids, weights)
    assert torch.isfinite(want).all()
    assert torch.isfinite(out).all()
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 2**-5


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("scheme", [*MX, "static"])
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, RELU2], ids=lambda a: a.kind)
def test_no_m_is_the_references(arch, scheme, activation):
    """Whatever the activation, N and K."""
    static, scheme = scheme == "static", "w4a8" if scheme == "static" else scheme
    dense = in_fp16(make_linear(scheme, 72, 160, arch, static))
    experts = in_fp16(make_moe(scheme, 6, 96, 96, 2, arch, activation, static))
    for m in (1, 3, 8, 17, 64, 200, 5000):
        assert linear.bound(dense.text).plan(m, torch.float16).choice.kernel.startswith("triton_")
        pair = moe.bound(experts.text).pair(m, torch.float16)
        assert pair.kernels in moe.KERNELS
        assert not any(kernels()[name].code_objects for name in pair.kernels)
        assert pair.gate_up.config.block_m == pair.down.config.block_m


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4"])
def test_the_largest_numbers_stay_finite_in_the_reference_as_in_kernels(scheme):
    """65504 is rounded to 65536, which is no fp16."""
    act, x = ActQuant(SCHEMES[scheme]), torch.full((2, 32), 65504.0).half()
    codes = quantize_mx(x, act.scheme.act)
    assert torch.equal(act(x), dequantize_mx(*codes, act.scheme.act))
    assert act(x).unique().tolist() == [65536.0]
