"""Static per-tensor fp8, and MXFP8 for gfx942's FNUZ."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import dequantize_mx, e8m0, fn_to_fnuz, mx_fn_to_fnuz, quantize_fp8_static, quantize_mx

DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
BYTES = torch.arange(256, dtype=torch.uint8)


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_come_back_through_any_power_of_two_scale(dtype: torch.dtype):
    values = BYTES.view(dtype).float()
    for exponent in (-20, 0, 20):
        scale = torch.tensor(2.0**exponent)
        data = quantize_fp8_static(values * scale, scale, dtype)
        assert same_values(data.float(), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_nearest_code_of_the_product_with_the_reciprocal(dtype: torch.dtype):
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scale = torch.tensor(0.0123)
    data = quantize_fp8_static(x, scale, dtype)
    y = (x.float() * (1 / scale)).double().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    codes = BYTES.view(dtype).double()
    codes = codes[~codes.isnan()]
    distance = (y.flatten()[:, None] - codes).abs().amin(-1)
    assert torch.equal((data.double() - y).abs().flatten(), distance)


def test_agrees_with_quarks_division_wherever_that_has_no_other_rounding(quark):
    from quark.torch.kernel.hw_emulation.hw_emulation_interface import real_quantize_fp8_e4m3_per_tensor_with_scale

    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 40
    theirs = real_quantize_fp8_e4m3_per_tensor_with_scale(x, torch.tensor(0.125))
    assert torch.equal(quantize_fp8_static(x, torch.tensor(0.125)).view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturates_and_keeps_nan(dtype: torch.dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, torch.nan, -1e-30, -0.0])
    values = quantize_fp8_static(x, 1.0, dtype).float()
    assert values[:4].tolist() == [largest, -largest, largest, -largest]
    assert values[4].isnan()
    assert values[5:].tolist() == [0, 0]  # in FNUZ, 0x80 would be NaN


def test_shapes_strides_and_scales():
    x = torch.randn(6, 4, 10).mT
    for scale in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]], dtype=torch.bfloat16)):
        data = quantize_fp8_static(x, scale)
        assert data.shape == x.shape
        assert data.is_contiguous()
        assert torch.equal(data.float(), quantize_fp8_static(x.contiguous(), 0.5).float())
    assert quantize_fp8_static(torch.empty(0, 3), 1.0).shape == (0, 3)
    assert quantize_fp8_static(torch.tensor(3.0), 1.0).float().item() == 3
    with pytest.raises(ShapeError, match=r"scale \[2\]"):
        quantize_fp8_static(x, torch.ones(2))
    with pytest.raises(SchemeError, match="float8_e5m2"):
        quantize_fp8_static(x, 1.0, torch.float8_e5m2)


def test_every_code_under_every_scale_keeps_its_product_in_fnuz():
    """Also where the scale cannot double (254) or is NaN (255)."""
    data = BYTES.view(torch.float8_e4m3fn).reshape(1, 256).expand(256, 256)
    scales = BYTES.reshape(256, 1).expand(256, 8)
    fnuz, doubled = mx_fn_to_fnuz(data, scales)
    assert fnuz.dtype == torch.float8_e4m3fnuz
    assert doubled[:, 0].tolist() == [*range(1, 255), 254, 255]
    products = fnuz.float() * e8m0.decode(doubled).repeat_interleave(32, -1)
    assert same_values(products, dequantize_mx(data, scales, "e4m3"))


def test_fnuz_of_what_quantize_mx_made():
    x = torch.randn(4, 3, 64)
    data, scales = quantize_mx(x, "e4m3")
    fnuz, doubled = mx_fn_to_fnuz(data, scales)
    assert torch.equal(doubled, scales + 1)
    assert torch.equal(fnuz.float() * 2, data.float())
    assert torch.equal(fn_to_fnuz(data.mT).float(), fnuz.float().mT)
    with pytest.raises(ShapeError, match=r"e4m3 data \[4, 3, 64\] with scales \[4, 3, 1\]"):
        mx_fn_to_fnuz(data, scales[..., :1])
