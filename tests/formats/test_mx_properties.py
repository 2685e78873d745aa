"""What holds for all blocks: the nearest element under the scale a mode asks for, bounded errors, idempotence."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.formats import dequantize_mx, fake_quantize_mx, nibbles, quantize_mx
from sglang_amd_quant.schemes import ScaleMode

EMAX = {"e2m1": 2, "e4m3": 8}
MAX = {"e2m1": 6.0, "e4m3": 448.0}
MANTISSA_BITS = {"e2m1": 1, "e4m3": 3}
EMIN = {"e2m1": 0, "e4m3": -6}  # exponent of the smallest normal number
CODES = {"e2m1": 8, "e4m3": 127}

elements = st.sampled_from(["e2m1", "e4m3"])
modes = st.sampled_from(list(ScaleMode))
blocks = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
quick = settings(max_examples=80, derandomize=True)


def grid(element: str) -> np.ndarray:
    """Magnitudes by code, from the definition of a binary float with subnormals."""
    m = 2 ** MANTISSA_BITS[element]
    code = np.arange(CODES[element])
    fraction, exponent = code % m / m, code // m
    return np.where(exponent == 0, fraction, 1 + fraction) * 2.0 ** (EMIN[element] - 1 + np.maximum(exponent, 1))


def oracle_exponent(amax: float, element: str, mode: ScaleMode) -> int:
    """The block's exponent in exact arithmetic, from the words of the definitions."""
    if amax == 0:
        return -127
    floor = math.frexp(amax)[1] - 1
    significand = Fraction(amax) / Fraction(2) ** floor  # 1 <= s < 2
    exponent = {
        ScaleMode.FLOOR: floor - EMAX[element],
        ScaleMode.CEIL: floor + (significand > 1) - EMAX[element],
        ScaleMode.RCEIL: floor + (significand > Fraction(MAX[element]) / 2 ** EMAX[element]) - EMAX[element],
        ScaleMode.EVEN: floor + (significand >= 2 - Fraction(1, 2 ** (MANTISSA_BITS[element] + 1))) - EMAX[element],
    }[mode]
    return max(exponent, -127)


def oracle_codes(y: np.ndarray, element: str) -> np.ndarray:
    """Nearest magnitude of each |y| in fp64, the even code of two."""
    distance = np.abs(np.abs(y)[:, None] - grid(element))
    nearest = distance == distance.min(axis=1, keepdims=True)
    codes = np.arange(CODES[element])
    return np.where(nearest, codes + 1000 * (codes % 2), 10**6).argmin(axis=1)


@quick
@given(blocks, elements, modes)
def test_is_the_nearest_element_under_the_scale_of_the_mode(block: list[float], element: str, mode: ScaleMode):
    x = torch.tensor([block])
    data, scales = quantize_mx(x, element, mode)
    exponent = oracle_exponent(float(x.abs().max()), element, mode)
    assert int(scales) - 127 == exponent
    codes = (nibbles.unpack(data) if element == "e2m1" else data.view(torch.uint8)).numpy()[0]
    y = np.array(block, np.float64) * 2.0**-exponent
    sign_bit = 8 if element == "e2m1" else 128
    np.testing.assert_array_equal(codes & (sign_bit - 1), oracle_codes(y, element))
    np.testing.assert_array_equal(codes >= sign_bit, np.signbit(y))


@quick
@given(blocks, elements, modes)
def test_error_is_at_most_half_a_step_or_the_saturated_part(block: list[float], element: str, mode: ScaleMode):
    """With y = x / scale: elements near y are 2^(max(floor(log2|y|), emin) - m) apart, so rounding errs by at most half
    of that. Beyond the largest element it errs by |y| - max, and a mode bounds |y| of its amax: FLOOR below 2^(emax+1),
    EVEN below (2 - 2^-(m+1)) 2^emax, RCEIL and CEIL at most max."""
    x = torch.tensor([block])
    _, scales = quantize_mx(x, element, mode)
    scale = 2.0 ** (int(scales) - 127)
    y = np.abs(np.array(block, np.float64)) / scale
    error = np.abs(fake_quantize_mx(x.double(), element, mode).numpy()[0] / scale - np.array(block) / scale)
    exponent = np.floor(np.log2(np.maximum(y, 2.0 ** EMIN[element])))
    assert (error <= np.maximum(2.0 ** (exponent - MANTISSA_BITS[element] - 1), y - MAX[element])).all()
    reach = {
        ScaleMode.FLOOR: 2.0 ** (EMAX[element] + 1),
        ScaleMode.EVEN: (2 - 2.0 ** -(MANTISSA_BITS[element] + 1)) * 2.0 ** EMAX[element],
        ScaleMode.RCEIL: np.nextafter(MAX[element], np.inf),
        ScaleMode.CEIL: np.nextafter(2.0 ** EMAX[element], np.inf),
    }[mode]
    assert y.max() < reach


@quick
@given(blocks, elements, modes)
def test_values_are_fixed_points(block: list[float], element: str, mode: ScaleMode):
    once = fake_quantize_mx(torch.tensor([block]), element, mode)
    assert torch.equal(fake_quantize_mx(once, element, mode), once) or once.isinf().any()


@quick
@given(blocks, elements, modes, st.integers(-20, 20))
def test_powers_of_two_only_move_the_scale(block: list[float], element: str, mode: ScaleMode, shift: int):
    x = torch.tensor([block])
    moved = x * 2.0**shift
    data, scales = quantize_mx(x, element, mode)
    moved_data, moved_scales = quantize_mx(moved, element, mode)
    if torch.equal(moved * 2.0**-shift, x) and 21 < int(scales) < 225:
        assert int(moved_scales) == int(scales) + shift
        assert torch.equal(moved_data.view(torch.uint8), data.view(torch.uint8))


@st.composite
def canonical_blocks(draw: st.DrawFn) -> tuple[str, ScaleMode, torch.Tensor, torch.Tensor]:
    """Blocks that hold what their scale is there for: an element whose magnitude the mode maps to that very scale.

    That is the top binade for FLOOR and EVEN; above max/2 for RCEIL; above half of 2^emax up to it for CEIL.
    """
    element, mode = draw(elements), draw(modes)
    values = grid(element)
    top = 2.0 ** EMAX[element]
    low, high = {
        ScaleMode.FLOOR: (np.nextafter(top, 0), MAX[element]),
        ScaleMode.EVEN: (np.nextafter(top, 0), MAX[element]),
        ScaleMode.RCEIL: (MAX[element] / 2, MAX[element]),
        ScaleMode.CEIL: (top / 2, top),
    }[mode]
    allowed = np.flatnonzero(values <= high)
    sign_bit = 8 if element == "e2m1" else 128
    codes = np.array(draw(st.lists(st.sampled_from(list(allowed)), min_size=32, max_size=32)), np.uint8)
    codes |= np.array(draw(st.lists(st.sampled_from([0, sign_bit]), min_size=32, max_size=32)), np.uint8)
    largest = draw(st.sampled_from(list(np.flatnonzero((values > low) & (values <= high)))))
    codes[draw(st.integers(0, 31))] = largest
    scale = draw(st.integers(0, 254 - EMAX[element]))
    data = torch.from_numpy(codes)[None]
    data = nibbles.pack(data) if element == "e2m1" else data.view(torch.float8_e4m3fn)
    return element, mode, data, torch.tensor([[scale]], dtype=torch.uint8)


@quick
@given(canonical_blocks())
def test_canonical_blocks_come_back_bit_for_bit(block: tuple[str, ScaleMode, torch.Tensor, torch.Tensor]):
    element, mode, data, scales = block
    again, again_scales = quantize_mx(dequantize_mx(data, scales, element), element, mode)
    assert torch.equal(again_scales, scales)
    assert torch.equal(again.view(torch.uint8), data.view(torch.uint8))


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", EMAX)
def test_blocks_do_not_see_each_other(element: str, mode: ScaleMode):
    x = (
        torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-20, 1.0, 1e20])[:, None, None]
    )
    whole = quantize_mx(x.reshape(3, 160), element, mode)
    for i in range(3):
        for j in range(5):
            data, scales = quantize_mx(x[i, j], element, mode)
            assert torch.equal(whole[0][i].view(torch.uint8).reshape(5, -1)[j], data.view(torch.uint8))
            assert whole[1][i, j] == scales
