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

from sglang_amd_quant.ops import layout, linear
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.decode_weights import decode_weights
from sglang_amd_quant.ops.layout import fuses_activation, lay_out
from sglang_amd_quant.selection import Epilogue, shipped
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
    quantized = [("w4a8", False), ("mxfp4", False), ("mxfp8", False), ("w4a8", True)]
    for scheme, static in [*((scheme, False) for scheme in OPEN), *quantized]:
        plain = gated(scheme, device.arch_name, biased, static)
        assert fuses_activation(plain.problem), scheme
        layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
        assert layer.weight.layout.name == AMD_MOE_DECODE_LAYOUTS[plain.problem.arch, plain.weight.scheme.weight]
        bias = torch.randn(N).bfloat16() if biased else None
        many = "moe_gemm_kernel" if device.arch_name == "gfx950" and scheme not in OPEN else "amd_gemm_kernel"
        for m, by_decode in ((3, 1), (20, 1), (40, 0)):
            x = torch.randn(m, K).bfloat16()
            out, hip_ran, triton_ran = ran(layer, x, bias, device)
            assert len(hip_ran) == by_decode, (scheme, m)
            assert [n for n in triton_ran if n != "quant_mx_kernel"] == [many] * (1 - by_decode)
            close(out, plain, x, bias)


def test_tiles_of_every_height(device, monkeypatch):
    """Where there are no decode kernels, or more rows."""
    names = frozenset(name for name in shipped() if name.startswith("triton_"))
    for module in (layout, linear):
        monkeypatch.setattr(module, "launchable", lambda arch: names)
    plain = gated("w4a8", device.arch_name)
    layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
    for m in (10, 20, 50, 140):
        x = torch.randn(m, K).bfloat16()
        out, hip_ran, triton_ran = ran(layer, x, None, device)
        assert not hip_ran
        assert triton_ran[-1] == ("moe_gemm_kernel" if device.arch_name == "gfx950" else "amd_gemm_kernel")
        close(out, plain, x, None)


def test_the_op_activates_where_rows_are_in_order(device):
    plain = gated("w4a8", device.arch_name, biased=True)
    layer = replace(plain, weight=decode_weights(plain.weight, device.arch_name))
    for m in (3, 40):
        x, bias = torch.randn(m, K).bfloat16(), torch.randn(N).bfloat16()
        out, hip_ran, triton_ran = ran(layer, x, bias, device)
        assert len(hip_ran) + len([n for n in triton_ran if n.endswith("gemm_kernel")]) == 1
        close(out, plain, x, bias)
