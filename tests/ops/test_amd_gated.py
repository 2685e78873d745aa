"""Linears on AMD that end in silu: their kernels do it where gates and ups alternate in the weights, elsewhere the op;
machine code of every arch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
from emulated_triton import emulated_triton
from op_layers import exact_linear, make_linear

from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.decode_weights import decode_weights
from sglang_amd_quant.ops.layout import fuses_activation, lay_out
from sglang_amd_quant.selection import Epilogue
from sglang_amd_quant.selection.amd_decode import AMD_MOE_DECODE_LAYOUTS

N, K = 96, 160  # the last step of K is not whole
OPEN = ("w4a16", "int4_w4a16")


def gated(scheme, arch, biased=False, static=False):
    """A layer as a checkpoint has it."""
    group = {"group": 32} if scheme == "int4_w4a16" else {}
    return make_linear(scheme, N, K, arch, static, epilogue=Epilogue(biased, "silu"), **group)


def close(out, plain, x, bias):
    """As `close_after_silu` in test_linear.py."""
    want = Activation()(exact_linear(plain, x, bias)[0])
    assert out.shape == want.shape
    assert (out.double() - want).abs().max() <= 2.0**-6 * want.abs().max()


def ran(layer, x, bias, device):
    device.launched.clear()
    with emulated_triton(device.arch_name) as made:
        out = layer(x, bias)
    assert all(launch.compiled.report.problems == [] for launch in made)
    return out, list(device.launched), [launch.compiled.variant.function for launch in made]


@pytest.mark.parametrize("biased", [False, True])
def test_kernels_activate_their_sums(device, biased):
    arch, plain_ones = device.arch_name, [(scheme, False) for scheme in OPEN]
    quantized = [("w4a8", False), ("mxfp4", False), ("mxfp8", False), ("w4a8", True)]
    for scheme, static in plain_ones if arch == "gfx950" else plain_ones + quantized:
        plain = gated(scheme, arch, biased, static)
        assert fuses_activation(plain.problem), scheme
        layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
        assert layer.weight.layout.name == AMD_MOE_DECODE_LAYOUTS[plain.problem.arch, plain.weight.scheme.weight]
        bias = torch.randn(N).bfloat16() if biased else None
        for m, by_decode in ((3, 1), (20, 1), (40, 0)):
            x = torch.randn(m, K).bfloat16()
            out, hip_ran, triton_ran = ran(layer, x, bias, device)
            assert len(hip_ran) == by_decode, (scheme, m)
            assert [n for n in triton_ran if n != "quant_mx_kernel"] == ["amd_gemm_kernel"] * (1 - by_decode)
            close(out, plain, x, bias)


def test_the_op_activates_where_rows_are_in_order(device):
    """As on gfx950, whose GEMM for many rows of quantized activations has no activation."""
    plain = gated("w4a8", device.arch_name, biased=True)
    assert fuses_activation(plain.problem) == (device.arch_name != "gfx950")
    layer = replace(plain, weight=decode_weights(plain.weight, device.arch_name))
    for m in (3, 40):
        x, bias = torch.randn(m, K).bfloat16(), torch.randn(N).bfloat16()
        out, hip_ran, triton_ran = ran(layer, x, bias, device)
        assert len(hip_ran) + len([n for n in triton_ran if n.endswith("gemm_kernel")]) == 1
        close(out, plain, x, bias)
