"""int4 for few rows: AMD's decode kernels in the emulator, and the Triton GEMM on the same copy of the weights."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from op_layers import as_served_on_a_cpu, assert_close, exact_linear, make_linear, make_moe, quantized, tokens
from sglang_amd_quant.kernels.hip.manifest import find

from sglang_amd_quant.ops import hip, layout, linear, moe, operand, packed
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out, lay_out_experts
from sglang_amd_quant.selection import kernels, shipped
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS

GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)
DTYPES = [torch.bfloat16, torch.float16]
INT4 = frozenset(name for name in shipped() if "int4_w4a16" in kernels()[name].schemes)


@pytest.fixture
def device(emulated, monkeypatch):
    """The emulated device, which can launch all kernels for int4."""
    for module in (layout, operand, packed):
        monkeypatch.setattr(module, "current_arch", lambda: emulated.arch_name)
    monkeypatch.setattr(hip, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(hip, "_workspaces", {})
    monkeypatch.setattr(hip, "_spares", {})
    for module in (layout, linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: INT4)
    return emulated


def decode(dtype, group):
    return f"decode_int4_w4a16{'_fp16' if dtype == torch.float16 else ''}_g{group}"


def launched(device):
    """What ran since it was last asked."""
    found, device.launched[:] = list(device.launched), []
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "k"), [(32, 160), (64, 192), (128, 384)])
def test_linear(device, group, k, dtype):
    """Up to 32 rows by the decode kernel, more by Triton's, which reads what it reads."""
    plain = make_linear("int4_w4a16", 40, k, device.arch_name, group=group, symmetric=False)
    layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
    assert layer.weight.layout.name == AMD_DECODE_LAYOUTS[layer.problem.arch, "int4"]
    layer.prepare()
    for m, bias in ((1, None), (5, torch.randn(40).bfloat16()), (32, torch.randn(40)), (33, None)):
        x = torch.randn(m, k + 8).to(dtype)[:, 3:-5]
        with emulated_triton(device.arch_name) as made:
            out = layer(x, bias)
        assert_close(out, exact_linear(plain, x, bias), k)
        assert len(made) == (m > 32)
        assert [name.rpartition("_m")[0] for name in launched(device)] == ([decode(dtype, group)] if m <= 32 else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "hidden", "inter", "group"),
    [(Activation(), 160, 96, 32), (GPT_OSS, 256, 128, 128)],
    ids=["silu", "gpt-oss"],
)
def test_both_gemms_one_or_none(device, activation, hidden, inter, group, dtype):
    """4 routed rows: both by the decode kernel; 14: gate_up alone; 40: neither, on the same copy of the weights."""
    biases = activation is GPT_OSS
    plain = make_moe(
        "int4_w4a16", 6, hidden, inter, 2, device.arch_name, activation, biases=biases, group=group, symmetric=False,
        scale=1.5,
    )  # fmt: skip
    if biases:
        plain = replace(plain, b13=plain.b13.bfloat16(), b2=plain.b2.bfloat16())
    w13, w2 = lay_out_experts(plain.w13, plain.w2, plain.gate_up, plain.down)
    assert w13.layout.name == w2.layout.name == AMD_MOE_DECODE_LAYOUTS[plain.gate_up.arch, "int4"]
    layer = replace(plain, w13=w13, w2=w2)
    layer.prepare()
    for m, heights, by_triton in ((2, [4, 4], 0), (7, [16], 1), (20, [], 2)):
        given = tokens(m, hidden, 6, 2, dtype, dropped=0.2)
        with emulated_triton(device.arch_name) as made:
            out = layer(*given)
        want = as_served_on_a_cpu(plain)(*given)
        assert (out.shape, out.dtype) == (want.shape, dtype)
        # as in test_int4.py; and the slots' outputs are rounded before they are summed
        assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8
        assert launched(device) == [f"moe_{decode(dtype, group)}_m{height}" for height in heights]
        assert len(made) == by_triton


def run_moe(plain, device, given):
    """What the layer as laid out gives, and what ran."""
    w13, w2 = lay_out_experts(plain.w13, plain.w2, plain.gate_up, plain.down)
    with emulated_triton(device.arch_name) as made:
        return replace(plain, w13=w13, w2=w2)(*given), launched(device), len(made)


@pytest.mark.parametrize(("m", "by_decode"), [(2, 2), (20, 0)])
def test_an_expert_may_be_beyond_fp16_where_the_sum_is_not(device, m, by_decode):
    plain = make_moe("int4_w4a16", 2, 64, 64, 2, device.arch_name, group=32)
    w13, w2 = torch.full((2, 128, 64), 0.5), torch.full((2, 64, 64), 300.0)
    w2[1] *= -0.9
    plain = replace(plain, w13=quantized(w13, "int4_w4a16", 32), w2=quantized(w2, "int4_w4a16", 32))
    given = torch.full((m, 64), 0.1).half(), torch.tensor([[0, 1]] * m).int(), torch.ones(m, 2)
    out, ran, _ = run_moe(plain, device, given)
    want = as_served_on_a_cpu(plain)(*given)
    assert len(ran) == by_decode
    assert want.isfinite().all()
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_that_bf16_does_not_hold_is_added_whole(device, dtype):
    """Decode kernels read bf16: the Triton kernel runs instead, at every M."""
    plain = make_moe("int4_w4a16", 2, 64, 64, 2, device.arch_name, biases=True, group=32)
    plain = replace(plain, b13=plain.b13 * 0, b2=torch.full_like(plain.b2, 1003.0))
    given = torch.zeros(2, 64).to(dtype), torch.tensor([[0, 1]] * 2).int(), torch.full((2, 2), 0.5)
    out, ran, by_triton = run_moe(plain, device, given)
    assert (ran, by_triton) == ([], 2)
    assert torch.equal(out, torch.full_like(out, 1003.0))


@pytest.mark.parametrize(
    "activation", [Activation("gelu"), Activation("relu2", gated=False)], ids=["gated", "not gated"]
)
def test_other_activations_run_between_two_kernels(device, activation):
    """Decode kernels have none of them: Triton reads gates and ups that alternate all the same."""
    plain = make_moe("int4_w4a16", 4, 128, 128, 2, device.arch_name, activation, biases=True, group=64)
    w13, w2 = lay_out_experts(plain.w13, plain.w2, plain.gate_up, plain.down)
    layer, given = replace(plain, w13=w13, w2=w2), tokens(9, 128, 4, 2, dropped=0.2)
    with emulated_triton(device.arch_name) as made:
        out = layer(*given)
    want = as_served_on_a_cpu(plain)(*given)
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8
    assert len(made) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_on_sm_90_it_is_launched_on_what_it_reads(monkeypatch, group, dtype):
    """The description; what it computes is seen on a device (tests/device)."""
    started = []
    there = type("Device", (), {"arch_name": "sm_90", "cu_count": 132, "start": lambda self, d: started.append(d)})()
    monkeypatch.setattr(hip, "device_of", lambda x: there)
    for module in (layout, linear):
        monkeypatch.setattr(module, "launchable", lambda arch: frozenset({"hip_decode_int4", "triton_hopper_int4"}))
    for module in (layout, operand):
        monkeypatch.setattr(module, "current_arch", lambda: "sm_90")
    plain = make_linear("int4_w4a16", 64, 384, "sm_90", group=group, symmetric=False)
    layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
    assert layer.weight.layout.name == "mma_int4+tile_group"
    x, bias = torch.randn(5, 384).to(dtype), torch.randn(64).to(dtype)
    layer(torch.randn(32, 384).to(dtype), bias)
    assert started[-1].kernel.removeprefix("decode_").removeprefix("prepared_") == f"{decode(dtype, group)[7:]}_m32"
    started.clear()
    layer(x, bias)
    (d,) = started
    assert d.kernel == f"{decode(dtype, group)}_m8"
    named = dict(zip([p.partition(":")[0] for p in find(d.kernel)[1].params], d.args, strict=True))
    assert (named["m"], named["n"], named["k"], named["carry"], named["factors"]) == (5, 64, 384, 0, None)
    assert (named["w"], named["scales"]) == tuple(layer.weight.tensors)
    assert named["bias"] is (bias if dtype == torch.bfloat16 else None)
    assert linear.bound(layer.text).plan(65, dtype).choice.kernel == "triton_hopper_int4"
