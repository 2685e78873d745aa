"""Every code of every element and scale format, and every bf16 number rounded to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_amd_quant.formats import e2m1, e4m3, e8m0, find_nan, nibbles

BYTES = torch.arange(256, dtype=torch.uint8)


def e4m3_value(byte: int, bias: int) -> float:
    """By the definition: OCP OFP8 for bias 7; for bias 8 the table of the CDNA3 ISA guide."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if (bias == 7 and byte & 0x7F == 0x7F) or (bias == 8 and byte == 0x80):
        return np.nan
    return sign * (mantissa / 8 * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - bias))


FN = np.array([e4m3_value(b, 7) for b in range(256)])
FNUZ = np.array([e4m3_value(b, 8) for b in range(256)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Codes of the nearest numbers of an ascending `grid` (code = index), ties to the even code, beyond it the last."""
    middles = (grid[1:] + grid[:-1]) / 2
    below = np.searchsorted(middles, values, side="left")  # a tie stays below
    tie = (below < middles.size) & (values == middles[np.minimum(below, middles.size - 1)])
    return below + (tie & (below % 2 == 1))


def test_e2m1_codes():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    values = e2m1.decode(nibbles.pack(codes)).numpy()
    expected = np.concatenate([E2M1, -E2M1])
    np.testing.assert_array_equal(values, np.tile(expected, 2))
    np.testing.assert_array_equal(np.signbit(values), np.tile(np.arange(16) >= 8, 2))  # -0 is a code of its own
    assert torch.equal(e2m1.encode(torch.from_numpy(values.copy())), nibbles.pack(codes))


@pytest.mark.parametrize("code", range(256))
def test_find_nan(code):
    """The two codes that are NaN, in rows that lie apart; neither the largest numbers beside them."""
    data = torch.tensor([0x7E, 0xFE, 0, 0x80], dtype=torch.uint8).repeat(3, 2)[:, ::2]
    data[2, 1] = code
    assert find_nan(data.view(torch.float8_e4m3fn)) == ((2, 1) if code & 0x7F == 0x7F else None)


def test_find_nan_in_nothing():
    assert find_nan(torch.empty(0, 32, dtype=torch.float8_e4m3fn)) is None


def test_nibbles_hold_the_even_index_low():
    packed = nibbles.pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8))
    assert packed.tolist() == [0x21, 0x0F]
    assert torch.equal(nibbles.pack(nibbles.unpack(BYTES)), BYTES)
    strided = BYTES.reshape(16, 16).T
    assert torch.equal(nibbles.unpack(strided), nibbles.unpack(strided.contiguous()))


@pytest.mark.parametrize(
    ("y", "rounded"),
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5.0, 4),
        (6.5, 6),
        (7.0, 6),
        (1e9, 6),
        (np.inf, 6),
    ],
)
def test_e2m1_midpoints_go_to_the_even_code(y: float, rounded: float):
    assert e2m1.decode(e2m1.encode(torch.tensor([y, -y]))).tolist() == [rounded, -rounded]


def test_e4m3fn_codes():
    data = BYTES.view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(e4m3.decode(data).numpy(), FN)
    np.testing.assert_array_equal(np.signbit(e4m3.decode(data).numpy()[:128]), False)
    again = e4m3.encode(e4m3.decode(data)).view(torch.uint8)
    assert torch.equal(again[~torch.from_numpy(np.isnan(FN))], BYTES[~torch.from_numpy(np.isnan(FN))])
    assert e4m3.decode(e4m3.encode(torch.tensor([torch.nan, -torch.nan]))).isnan().all()


def test_e4m3_codes_become_fnuz_codes_of_half_the_value():
    fnuz = e4m3.fn_to_fnuz(BYTES.view(torch.float8_e4m3fn))
    np.testing.assert_array_equal(FNUZ[fnuz.view(torch.uint8).numpy()] * 2, FN)
    np.testing.assert_array_equal((fnuz.float() * 2).numpy(), FN)  # torch reads the same
    assert fnuz.view(torch.uint8)[[0x80, 0x7F, 0xFF, 0x01, 0xFE]].tolist() == [0, 0x80, 0x80, 0x01, 0xFE]


def test_e8m0_codes():
    values = e8m0.decode(BYTES)
    expected = np.exp2(np.arange(256.0) - 127)
    np.testing.assert_array_equal(values[:255].numpy().astype(np.float64), expected[:255])
    assert values[0].item() == 2.0**-127  # an fp32 subnormal, exact
    assert values[255].isnan()
    np.testing.assert_array_equal(e8m0.decode(BYTES, torch.float64)[:255].numpy(), expected[:255])
    np.testing.assert_array_equal(e8m0.reciprocal(BYTES)[:255].numpy().astype(np.float64), 1 / expected[:255])
    assert e8m0.reciprocal(BYTES)[255].isnan()
    assert torch.equal(e8m0.encode(values), BYTES)


def test_e8m0_encode_marks_what_is_no_power_of_two():
    wrong = torch.tensor(
        [0.0, -0.0, -1.0, 3.0, 1.0000001, torch.inf, -torch.inf, torch.nan, 2.0**-128, 1.5 * 2.0**-127]
    )
    assert e8m0.encode(wrong).tolist() == [255] * 10


def test_every_bf16_number_rounds_to_the_nearest_code():
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    x = x[: x.numel() // 2 * 2]
    y = x.numpy().astype(np.float64)
    for sign, high in ((1, 0), (-1, 8)):
        codes = nibbles.unpack(e2m1.encode(sign * x)).numpy()
        np.testing.assert_array_equal(codes, nearest(y, E2M1) | high)
        codes = e4m3.encode(sign * x).view(torch.uint8).numpy()
        np.testing.assert_array_equal(codes, nearest(y, FN[:127]) | high << 4)


@pytest.mark.parametrize(("grid", "element"), [(E2M1, e2m1), (FN[:127], e4m3)], ids=["e2m1", "e4m3"])
def test_fp32_numbers_next_to_midpoints_do_not_round_twice(grid: np.ndarray, element):
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32).view(np.int32)
    near = np.concatenate([middles - 1, middles, middles + 1, middles[:1]]).view(np.float32)  # an even count
    near = near[: near.size // 2 * 2]
    values = element.decode(element.encode(torch.from_numpy(near.copy()))).numpy()
    np.testing.assert_array_equal(values, grid[nearest(near.astype(np.float64), grid)])
