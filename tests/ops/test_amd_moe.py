"""MX experts on AMD through the op: decode kernels for few rows, else weights in registers all the way, on one copy
of the weights; machine code of every arch, helpers too."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from op_layers import as_served_on_a_cpu, make_moe, tokens
from test_moe import GPT_OSS, OTHERS, close

from sglang_amd_quant.ops import layout, linear, moe
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out_experts
from sglang_amd_quant.selection.amd_decode import AMD_MOE_DECODE_LAYOUTS

E, H, INTER, TOP_K = 6, 160, 96, 2  # the last step of K is not whole
QUANTIZED = ("w4a8", "mxfp4", "mxfp8", "w4a8_static", "mxfp8_static")
"""Where no matrix unit multiplies MX."""


def schemes(device):
    return ("w4a16",) if device.arch_name == "gfx950" else ("w4a16", *QUANTIZED)


def experts(scheme, device, activation=GPT_OSS, top_k=TOP_K, **options):
    """A layer as a checkpoint has it, and as after loading."""
    scheme, _, static = scheme.partition("_")
    plain = make_moe(scheme, E, H, INTER, top_k, device.arch_name, activation, bool(static), **options)
    if plain.b13 is not None:
        plain = replace(plain, b13=plain.b13.bfloat16(), b2=plain.b2.bfloat16())
    w13, w2 = lay_out_experts(plain.w13, plain.w2, plain.gate_up, plain.down)
    return plain, replace(plain, w13=w13, w2=w2)


def ran(layer, plain, given, device, arch):
    """Names of decode kernels and of Triton's that ran; what they gave is close to the reference."""
    device.launched.clear()
    with emulated_triton(arch) as made:
        out = layer(*given)
    assert all(launch.compiled.report.problems == [] for launch in made)
    act = plain.problem.act2
    close(out, as_served_on_a_cpu(plain)(*given), plain.gate_up.scheme, act.scale is not None)
    return list(device.launched), [launch.compiled.variant.function for launch in made]


def test_both_gemms_one_or_none_by_decode_kernels(device):
    """4 routed rows: both; 14: gate_up alone; 40: neither. Gates and ups alternate in the one copy of the weights."""
    for scheme in schemes(device):
        plain, layer = experts(scheme, device, biases=True, scale=1.5)
        own = AMD_MOE_DECODE_LAYOUTS[plain.gate_up.arch, plain.w13.scheme.weight]
        assert [layer.w13.layout.name, layer.w2.layout.name] == [own, own]
        values = [] if scheme == "w4a16" or "static" in scheme else ["quant_mx_kernel"]
        for m, by_decode, by_triton in (
            (2, 2, []),
            (7, 1, [*values, "amd_gemm_kernel"]),
            (20, 0, [*values, "amd_gemm_kernel", *values, "amd_gemm_kernel"]),
        ):
            given = tokens(m, H, E, TOP_K, dropped=0.2)
            hip_ran, triton_ran = ran(layer, plain, given, device, device.arch_name)
            assert len(hip_ran) == by_decode, (scheme, m)
            assert [n for n in triton_ran if n in ("amd_gemm_kernel", "quant_mx_kernel")] == by_triton, (scheme, m)


@pytest.mark.parametrize("activation", [Activation("swigluoai", limit=2.0, alpha=1.5, beta=0.5), *OTHERS])
def test_any_activation(device, activation):
    """Those of no kernel run in torch; down of few rows is a decode kernel's all the same."""
    for scheme in schemes(device):
        plain, layer = experts(scheme, device, activation)
        for m, by_decode in ((2, 1), (9, 0)):
            hip_ran, triton_ran = ran(layer, plain, tokens(m, H, E, TOP_K, dropped=0.2), device, device.arch_name)
            assert triton_ran.count("amd_gemm_kernel") + len(hip_ran) == 2
            assert layer.w13.layout.name == "strided" or len(hip_ran) == by_decode


@pytest.mark.parametrize(
    "options", [{"combine": False}, {"combine": False, "weight_output": False}, {"weight_on_input": True}], ids="-".join
)
def test_what_sglang_asks(device, options):
    for scheme in schemes(device):
        top_k = 1 if "weight_on_input" in options else TOP_K
        plain, layer = experts(scheme, device, Activation(), top_k, **options)
        _, triton_ran = ran(layer, plain, tokens(20, H, E, top_k, dropped=0.25), device, device.arch_name)
        assert triton_ran.count("amd_gemm_kernel") == 2


def test_nothing_routed_here_is_nothing(device):
    for scheme in schemes(device):
        _, layer = experts(scheme, device, biases=True)
        x, ids, weights = tokens(20, H, E, TOP_K)
        with emulated_triton(device.arch_name):
            assert not layer(x, torch.full_like(ids, -1), weights).any()


def test_strided_weights(device, monkeypatch):
    """Where a layer has no decode kernels."""
    names = frozenset({"triton_e2m1_moe", "triton_e2m1_bf16_moe", "triton_e4m3_moe"})
    for module in (layout, linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: names)
    for scheme in schemes(device):
        plain, layer = experts(scheme, device, biases=True)
        assert layer.w13.layout.name == layer.w2.layout.name == "strided"
        _, triton_ran = ran(layer, plain, tokens(9, H, E, TOP_K, dropped=0.2), device, device.arch_name)
        assert triton_ran.count("amd_gemm_kernel") == 2


def test_both_gemms_take_the_blocks_that_were_routed(device):
    for scheme in schemes(device):
        _, layer = experts(scheme, device)
        for m in (20, 60, 200, 1000, 5000):
            pair = moe.bound(layer.text).pair(m, torch.bfloat16)
            assert pair.kernels[0] == pair.kernels[1]
            assert pair.kernels[0].startswith(("triton_e2m1_", "triton_e4m3_"))
            assert pair.gate_up.config.block_m == pair.down.config.block_m
