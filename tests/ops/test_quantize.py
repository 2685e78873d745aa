"""What kernels are fed: codes and scales of the formats, static fp8 with its factor apart."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.formats import dequantize_mx, quantize_mx
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.quantize import activated_values, bf16_values, quantize_activation
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.schemes import SCHEMES, ScaleMode


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "w4a8"])
@pytest.mark.parametrize("mode", [None, ScaleMode.FLOOR])
def test_mx_is_what_the_reference_multiplies(scheme, mode):
    act, x = ActQuant(SCHEMES[scheme], mode), torch.randn(3, 192).bfloat16()[:, ::2]
    found = quantize_activation(x, act)
    for got, want in zip(found[:2], quantize_mx(x, act.scheme.act, mode), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert found.factor is None
    assert torch.equal(dequantize_mx(found.data, found.scales, act.scheme.act, x.dtype), act(x))


def test_bf16_stays_and_becomes_contiguous():
    x = torch.randn(3, 64).bfloat16()
    assert quantize_activation(x, ActQuant(SCHEMES["w4a16"])).data is x
    assert quantize_activation(x.T, ActQuant(SCHEMES["w4a16"])).data.is_contiguous()


def test_static_fp8_has_unit_scales_and_a_factor():
    x, scale = torch.randn(3, 64), torch.tensor(0.01)
    found = quantize_activation(x, ActQuant(SCHEMES["w4a8"], scale=scale))
    assert found.scales.unique().tolist() == [127]
    values = dequantize_mx(found.data, found.scales, "e4m3") * found.factor
    assert torch.equal(values, ActQuant(SCHEMES["w4a8"], scale=scale)(x))


@pytest.mark.parametrize("scheme", ["w4a16", "mxfp4", "w4a8", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bf16_has_what_the_reference_multiplies(scheme, dtype):
    """With its factor apart; behind an activation too, whose result is rounded to the model's dtype first."""
    scale = torch.tensor(0.01) if scheme == "static" else None
    act, sums = ActQuant(SCHEMES["w4a8" if scheme == "static" else scheme], scale=scale), torch.randn(3, 192)
    dtype = torch.bfloat16 if scheme == "w4a16" else dtype
    hidden = Activation()(sums).to(dtype)
    for values in (bf16_values(hidden, act), activated_values(sums, Activation(), act, dtype)):
        assert (values.data.dtype, values.scales) == (torch.bfloat16, None)
        factor = 1.0 if values.factor is None else values.factor
        assert torch.equal(values.data.float() * factor, act(hidden).float())


def test_partial_blocks():
    with pytest.raises(ShapeError, match="multiple of 32"):
        quantize_activation(torch.randn(2, 48), ActQuant(SCHEMES["mxfp8"]))
