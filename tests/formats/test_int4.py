"""int4 groups: the codes compared with compressed-tensors, and what holds for every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import dequantize_int4, group_words, nibbles, quantize_int4, split_words

GROUPS = (32, 64, 128)


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    x[0] = 0
    x[1].abs_()
    x[2] *= 1e-30
    x[3] += 3
    return x.to(dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_codes_are_those_of_compressed_tensors(group: int, symmetric: bool):
    """Same scales but for bf16's rounding; under those scales the same zero points and codes."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    x = weights()
    data, scales, *rest = quantize_int4(x, group, symmetric)
    zeros = rest[0] if rest else torch.full_like(scales, 8, dtype=torch.uint8)
    args = ct.QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group)
    groups = x.unflatten(-1, (-1, group))
    low, high = groups.aminmax(dim=-1)
    their_scales, their_zeros = calculate_qparams(low, high, args)
    used = scales > 0  # a group of zeros: scale 0 here, a small number there
    assert torch.equal(scales[used], their_scales.to(torch.bfloat16)[used])
    given_scales = scales.float().masked_fill(~used, 1)
    theirs = quantize(x, given_scales, zeros.float() - 8, args)
    assert torch.equal(nibbles.unpack(data).int() - 8, theirs.int())
    if not symmetric:
        unrounded = -8 - low.clamp(max=0) / given_scales
        assert torch.equal(zeros.int() - 8, unrounded.round().clamp(-8, 7).int())
        near = their_zeros.round().int() - (zeros.int() - 8)
        assert near[used].abs().max() <= 1  # theirs from the unrounded scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shapes_and_round_trip(group: int, symmetric: bool, dtype: torch.dtype):
    x = weights(dtype).reshape(2, 24, 512).mT.contiguous().mT
    out = quantize_int4(x, group, symmetric)
    assert [t.dtype for t in out] == [torch.uint8, torch.bfloat16, torch.uint8][: len(out)]
    assert [t.shape for t in out] == [(2, 24, 256), (2, 24, 512 // group), (2, 24, 512 // group)][: len(out)]
    assert len(out) == 2 + (not symmetric)
    back = dequantize_int4(*out, dtype=dtype)
    assert back.dtype == dtype
    assert torch.equal(back, dequantize_int4(*out).to(dtype))
    assert torch.equal(dequantize_int4(*(t.mT.contiguous().mT for t in out), dtype=dtype), back)
    expected = (nibbles.unpack(out[0]).float() - (8 if symmetric else out[2].repeat_interleave(group, -1))) * out[
        1
    ].float().repeat_interleave(group, -1)
    assert torch.equal(back, expected.to(dtype))


@settings(max_examples=50, derandomize=True)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    st.booleans(),
)
def test_error_is_at_most_half_a_step_or_what_the_range_cuts_off(group: list[float], symmetric: bool):
    """A code is off by at most 1/2. The scale is amax / 7.5 or range / 15, rounded to bf16: by at most 2^-8 of itself.

    Symmetric: the largest code is 7 where amax wants 7.5 (1 + 2^-8): off by under 0.53. Asymmetric: 15 codes span the
    range, the zero point is off by at most 1/2, and the scale's rounding moves the far end by 15 * 2^-8: under 1.06.
    """
    x = torch.tensor([group])
    out = quantize_int4(x, 32, symmetric)
    scale = out[1].double()
    if scale.item() >= 2.0**-120:  # below, bf16 and fp32 lose digits to subnormals
        error = (dequantize_int4(*out, dtype=torch.float64) - x.double()).abs() / scale
        assert error.max() <= (0.53 if symmetric else 1.06)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_nan_and_inf_groups(symmetric: bool):
    x = torch.randn(4, 64)
    x[0], x[1, 3], x[2, 3], x[3, 40] = 0, torch.nan, torch.inf, -torch.inf
    out = quantize_int4(x, 32, symmetric)
    back = dequantize_int4(*out)
    assert not back[0].any()
    assert out[1][0].tolist() == [0, 0]
    assert back.unflatten(-1, (2, 32)).isnan().all(-1).tolist() == [[0, 0], [1, 0], [1, 0], [0, 1]]
    assert back.isnan().sum() == 3 * 32


def test_groups_of_one_sign_reach_from_zero():
    """An asymmetric range always holds zero, so that zero weights stay zero."""
    x = torch.linspace(1, 2, 32).unsqueeze(0)
    data, scales, zeros = quantize_int4(x, 32, symmetric=False)
    assert zeros.item() == 0
    assert scales.item() == torch.tensor(2 / 15).bfloat16().item()
    assert (dequantize_int4(data, scales, zeros) - x).abs().max() <= (0.5 + 15 * 2.0**-8) * 2 / 15


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize_int4(x, 16), SchemeError, "group 16.*32, 64, 128"),
        (lambda x: quantize_int4(x[:, :96], 64), ShapeError, r"\[4, 96\].*group 64"),
        (lambda x: quantize_int4(x.int(), 32), SchemeError, "torch.int32"),
        (lambda x: quantize_int4(x[0, 0], 32), ShapeError, r"\[\]"),
        (lambda x: dequantize_int4(quantize_int4(x, 32)[0], torch.ones(4, 3)), ShapeError, r"\[4, 64\].*\[4, 3\]"),
        (lambda x: dequantize_int4(quantize_int4(x, 32)[0], torch.ones(3, 4)), ShapeError, r"\[3, 4\]"),
        (lambda x: dequantize_int4(*quantize_int4(x, 32), torch.ones(4, 1)), ShapeError, r"zeros \[4, 1\]"),
    ],
)
def test_errors(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(torch.ones(4, 128))


def test_no_value_is_read_by_the_host():
    out = quantize_int4(torch.empty(4, 64, device="meta"), 32, symmetric=False)
    assert dequantize_int4(*out).shape == (4, 64)


def test_empty():
    assert dequantize_int4(*quantize_int4(torch.empty(0, 64), 32)).shape == (0, 64)
    assert dequantize_int4(*quantize_int4(torch.empty(4, 0), 32)).shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_words_hold_every_16_bit_scale_exactly(dtype: torch.dtype):
    scales = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
    zeros = (torch.arange(2**16) % 16).to(torch.uint8)
    there, zero = split_words(group_words(scales, zeros))
    wanted = scales.float()
    assert torch.equal(there.isnan(), wanted.isnan())
    assert torch.equal(there[~wanted.isnan()], wanted[~wanted.isnan()])
    assert torch.equal(zero, zeros)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=20), st.integers(0, 15)
)
@settings(max_examples=200)
def test_words_round_other_scales_to_19_bits(values: list[float], zero: int):
    scales = torch.tensor(values)
    there, zeros = split_words(group_words(scales, torch.full(scales.shape, zero, dtype=torch.uint8)))
    finite = there.isfinite()  # what lies within 2^-20 of fp32's largest rounds to infinity
    assert (finite | (scales.abs() >= 3.4028e38)).all()
    assert ((there - scales).abs() <= scales.abs() * 2.0**-20)[finite].all()  # half of the last of 19 bits
    assert (zeros == zero).all()


def test_words_without_zero_points_have_8():
    assert group_words(torch.zeros(2, 3)).tolist() == [[8] * 3] * 2
