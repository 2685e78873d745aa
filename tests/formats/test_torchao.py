"""Bit for bit torchao's `to_mx`, in every mode and for both elements; where not, why and by how much."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.formats import dequantize_mx, quantize_mx
from sglang_amd_quant.schemes import ScaleMode

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")

DTYPES = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn}
MODES = list(ScaleMode)


def torchao(x: torch.Tensor, element: str, mode: ScaleMode) -> tuple[torch.Tensor, torch.Tensor]:
    theirs = mx_tensor.ScaleCalculationMode[mode.name]
    scales, data = mx_tensor.to_mx(x.contiguous(), DTYPES[element], 32, theirs)
    return data.view(torch.uint8), scales.view(torch.uint8)


def ours(x: torch.Tensor, element: str, mode: ScaleMode) -> tuple[torch.Tensor, torch.Tensor]:
    data, scales = quantize_mx(x, element, mode)
    return data.view(torch.uint8), scales


def of_blocks(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return data.reshape(*scales.shape, -1)


def test_all_modes_are_compared():
    assert {m.name for m in mx_tensor.ScaleCalculationMode} == {m.name for m in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", DTYPES)
def test_same_bits(sample: torch.Tensor, element: str, mode: ScaleMode):
    """All blocks with a scale above 2^-127, RCEIL of fp32 excepted where torchao's log2 is not exact (below)."""
    data, scales = ours(sample, element, mode)
    their_data, their_scales = torchao(sample, element, mode)
    same = torch.ones_like(scales, dtype=torch.bool)
    if mode is ScaleMode.RCEIL and sample.dtype == torch.float32:
        same = scales == their_scales
        assert same.float().mean() > 0.8
    assert torch.equal(scales[same], their_scales[same])
    same &= scales > 0
    assert torch.equal(of_blocks(data, scales)[same], of_blocks(their_data, scales)[same])


@pytest.mark.parametrize("element", DTYPES)
def test_rceil_of_fp32_differs_only_where_log2_rounds(boundaries: torch.Tensor, element: str):
    """torchao takes ceil(log2(amax / max)) in fp32; log2 of a number just above a power of two rounds down to an
    integer, and the block saturates. Ours is the exact ceiling, as torchao's own path on Blackwell (cvt.rp) is."""
    largest = {"e2m1": 6.0, "e4m3": 448.0}[element]
    _, scales = ours(boundaries, element, ScaleMode.RCEIL)
    _, theirs = torchao(boundaries, element, ScaleMode.RCEIL)
    ratio = boundaries.abs().amax(-1, keepdim=True).double() / largest
    exact = torch.frexp(ratio)
    ceiling = exact.exponent - (exact.mantissa == 0.5).int()
    assert torch.equal(scales.int() - 127, ceiling.clamp(min=-127))
    differs = scales != theirs
    assert differs.any(), "torchao's log2 became exact: drop this exception"
    assert (scales - theirs)[differs].unique().tolist() == [1]
    excess = ratio[differs] / torch.exp2(theirs[differs].double() - 127) - 1
    assert excess.max() <= 2.0**-17 * 0.6931472  # half an ulp of an fp32 log2 of up to 128, times ln 2: relative


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", DTYPES)
def test_dequantizes_the_same(sample: torch.Tensor, element: str, mode: ScaleMode):
    data, scales = quantize_mx(sample, element, mode)
    theirs = mx_tensor.to_dtype(data, scales, DTYPES[element], 32, torch.float32)
    assert torch.equal(dequantize_mx(data, scales, element), theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", DTYPES)
def test_tiny_blocks_keep_values_that_torchao_halves_or_drops(element: str, mode: ScaleMode):
    """Scale byte 0 is 2^-127, but torchao divides by 2^-126 (or by 1, in RCEIL) before it stores 0."""
    step = {"e2m1": 0.5, "e4m3": 0.125}[element]  # between codes near 1
    x = torch.full((1, 32), 1.0) * 2.0**-127
    x[0, 0] = 1 + step
    x[0, 0] *= 2.0**-127
    data, scales = ours(x, element, mode)
    their_data, their_scales = torchao(x, element, mode)
    assert scales.item() == their_scales.item() == 0
    back = dequantize_mx(data if element == "e2m1" else data.view(torch.float8_e4m3fn), scales, element)
    assert torch.equal(back, x)
    assert not torch.equal(data, their_data)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("element", DTYPES)
def test_zeros_nan_and_inf(element: str, mode: ScaleMode):
    x = torch.ones(4, 32)
    x[0] = 0
    x[1, 7] = torch.nan
    x[2, 7] = torch.inf
    x[3, 7] = -torch.inf
    data, scales = ours(x, element, mode)
    their_data, their_scales = torchao(x, element, mode)
    inf = 254 if mode is ScaleMode.RCEIL else int(scales[2])
    assert their_scales.flatten().tolist() == [0, 255, inf, inf]
    emax = {"e2m1": 2, "e4m3": 8}[element]
    assert scales.flatten().tolist() == [0, 255, 255 - emax, 255 - emax]
    assert torch.equal(data[[0, 2, 3]], their_data[[0, 2, 3]])
    if element == "e4m3":  # torchao: NaN throughout in RCEIL, else only where it was
        assert data[1].view(torch.float8_e4m3fn).float().isnan().all()
        assert their_data[1, 7] & 0x7F == 0x7F
