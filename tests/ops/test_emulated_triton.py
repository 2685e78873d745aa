"""Both ops from end to end on AMD machine code: every Triton kernel that they launch runs in the emulator."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from emulated_triton import emulated_triton
from op_layers import MX, as_served_on_a_cpu, assert_close, exact_linear, make_linear, make_moe, tokens

from sglang_amd_quant.ops import linear, moe, quantize, routing
from sglang_amd_quant.ops.activation import Activation

GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    """Helpers run as kernels too, and only Triton's GEMMs can be launched."""
    for module in (quantize, routing):
        monkeypatch.setattr(module, "has_triton", lambda x: True)
    names = frozenset({"triton_mx_gemm", "triton_moe"})
    for module in (linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: names)
        module.bound.cache_clear()


def names(made):
    return [launch.compiled.variant.kernel.__name__ for launch in made]


def check_linear(arch, scheme, m, gemm):
    """m rows by a GEMM's kernel, behind that which quantizes them."""
    layer = make_linear(scheme, 40, 320, arch=arch)
    x, bias = torch.randn(m, 320).bfloat16(), torch.randn(40).bfloat16()
    with emulated_triton(arch) as made:
        out = layer(x, bias)
    assert names(made) == (["quant_mx_kernel"] if scheme != "w4a16" else []) + [gemm]
    assert_close(out, exact_linear(layer, x, bias), 320)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1100"])
def test_linear(arch, scheme):
    check_linear(arch, scheme, 3, "mx_gemm_kernel")


@pytest.mark.parametrize(
    ("arch", "scheme"),
    [("gfx950", "w4a16"), *((arch, s) for arch in ("gfx942", "gfx1100") for s in ("w4a16", "w4a8", "mxfp4"))],
)
def test_linear_where_codes_stay_in_registers(arch, scheme, monkeypatch):
    """What selection picks there for more rows than decode kernels take."""
    names_here = frozenset({"triton_e2m1_gemm", "triton_e2m1_bf16_gemm", "triton_mx_gemm"})
    monkeypatch.setattr(linear, "launchable", lambda arch: names_here)
    check_linear(arch, scheme, 35, "amd_gemm_kernel")


@pytest.mark.parametrize(("arch", "scheme"), [*(("gfx950", scheme) for scheme in MX), ("gfx942", "w4a8")])
def test_moe(arch, scheme):
    experts, hidden, inter, top_k = 4, 96, 64, 2
    activation = GPT_OSS if scheme in ("w4a16", "mxfp4") else Activation()
    layer = make_moe(scheme, experts, hidden, inter, top_k, arch, activation, biases=activation is GPT_OSS)
    given = tokens(9, hidden, experts, top_k, dropped=0.25)
    with emulated_triton(arch) as made:
        out = layer(*given)
    assert names(made)[-1] == "combine_kernel"
    assert names(made).count("moe_gemm_kernel") == 2
    want = as_served_on_a_cpu(layer)(*given)
    step = {"w4a16": 0.0, "w4a8": 2**-3, "mxfp8": 2**-3, "mxfp4": 2**-1}[scheme] / inter**0.5
    assert torch.isfinite(out).all()
    # as in test_moe.py: three roundings to bf16, and one step of the format in one of I terms
    assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * (3 * 2**-8 + step)
