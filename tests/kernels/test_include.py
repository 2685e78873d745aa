"""Everything that kernels/hip/include offers, run on every target, against torch and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_amd_quant.runtime.launch import LaunchDescription

PROBE = Path(__file__).with_name("include_probe.hip")
THREADS = 256
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Code object of the probes for a target, compiled once."""
    work = tmp_path_factory.mktemp("probe")

    built: dict[Any, bytes] = {}

    def get(target: Any, *defines: str) -> bytes:
        key = target.arch.name, defines
        if key not in built:
            built[key] = target.build(PROBE, work / "-".join((target.arch.name, *defines)), defines)
        return built[key]

    return get


def run(target: Any, code: Any, name: str, *args: Any, grid: int = 1, block: int = THREADS, lds: int = 0) -> Any:
    """Launch one probe."""
    return target.run(code(target), LaunchDescription(f"{name}_probe", grid, block, args, lds))


def bits32(x: np.ndarray) -> np.ndarray:
    """Bit patterns, with all NaNs made equal and -0 kept apart from 0."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    """What torch says the codes mean."""
    return torch.from_numpy(codes.view(np.uint8).copy()).view(torch.float8_e4m3fn).float().numpy()


def samples(count: int, seed: int = 0) -> np.ndarray:
    """Floats over the whole range of narrow formats, with ties, zeros, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(count) * np.exp2(rng.uniform(-14, 11, count))).astype(np.float32)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7, 448, 464, 480, 2**-10, 3 * 2**-10, 2**-6, 17 * 2**-10])
    special = np.concatenate([ties, -ties, [0, -0.0, np.inf, -np.inf, 2**-9, 2**-133, 65504, 65520, 3e38]])
    x[: special.size] = special
    return x


def test_every_e2m1_code_becomes_its_value_and_back(target: Any, code: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 2**32, THREADS, dtype=np.uint32)
    codes[:2] = 0x76543210, 0xFEDCBA98
    values, again = np.full((THREADS, 8), np.nan, np.float32), np.zeros(THREADS, np.uint32)
    run(target, code, "floats_from_e2m1", codes, values)
    nibbles = codes[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    np.testing.assert_array_equal(bits32(values), bits32(E2M1[nibbles]))
    run(target, code, "e2m1_from_floats", values, again)
    np.testing.assert_array_equal(again, codes)


def test_floats_round_to_the_nearest_e2m1_with_ties_to_even(target: Any, code: Any) -> None:
    x, codes = samples(THREADS * 8), np.zeros(THREADS, np.uint32)
    run(target, code, "e2m1_from_floats", x, codes)
    found = (codes[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).ravel()
    magnitude = np.minimum(np.abs(x), 6)
    distance = np.abs(magnitude[:, None].astype(np.float64) - E2M1[:8])
    distance += np.arange(8) % 2 * 1e-300  # of two equally near, the even code
    nearest = np.lexsort((np.broadcast_to(np.arange(8) % 2, distance.shape), distance), axis=1)[:, 0]
    np.testing.assert_array_equal(found, nearest | np.signbit(x) * 8)


def test_every_e4m3_code_becomes_its_value(target: Any, code: Any) -> None:
    codes = np.arange(1024, dtype=np.uint32).astype(np.uint8).view(np.uint32)  # 256 words hold every code four times
    values = np.zeros((THREADS, 4), np.float32)
    run(target, code, "floats_from_e4m3", codes, values)
    np.testing.assert_array_equal(bits32(values.ravel()), bits32(e4m3_values(codes)))


def test_floats_round_to_e4m3_as_torch_does_and_saturate(target: Any, code: Any) -> None:
    x, codes = samples(THREADS * 4), np.zeros(THREADS, np.uint32)
    x[100] = np.nan
    run(target, code, "e4m3_from_floats", x, codes)
    expected = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    found = codes.view(np.uint8)
    np.testing.assert_array_equal(np.where(np.isnan(x), found & 0x7F, found), np.where(np.isnan(x), 0x7F, expected))


def test_e8m0_bytes_become_powers_of_two(target: Any, code: Any) -> None:
    codes, values = np.arange(256, dtype=np.uint32), np.zeros(256, np.float32)
    run(target, code, "float_from_e8m0", codes, values)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(bits32(values), bits32(expected))


def test_times_power_of_two_is_exact(target: Any, code: Any) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(THREADS) * np.exp2(rng.uniform(-120, 120, THREADS))).astype(np.float32)
    exponent = rng.integers(-254, 255, THREADS, dtype=np.int32)
    found = np.zeros(THREADS, np.float32)
    run(target, code, "times_power_of_two", x, exponent, found)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(x.astype(np.float64), exponent).astype(np.float32)
    normal = np.abs(expected) >= 2.0**-126
    np.testing.assert_array_equal(found[normal], expected[normal])
    assert (np.abs(found[~normal]) <= 2.0**-126).all()


def test_bf16_both_ways(target: Any, code: Any) -> None:
    x, narrow = samples(THREADS), np.zeros(THREADS, np.uint16)
    x[50] = np.array([0x7F7FFFFF], np.uint32).view(np.float32)[0]
    x[51] = np.nan
    run(target, code, "bf16_from_float", x, narrow)
    expected = torch.from_numpy(x).bfloat16()
    found = torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert found.isnan().sum() == 1
    pairs, single = np.zeros((THREADS, 2), np.float32), np.zeros(THREADS, np.float32)
    run(target, code, "float_from_bf16", narrow, single)
    np.testing.assert_array_equal(bits32(single), bits32(found.float().numpy()))
    both = np.stack([narrow, narrow[::-1]], 1).copy()
    run(target, code, "floats_from_bf16x2", both.view(np.uint32).ravel(), pairs)
    np.testing.assert_array_equal(bits32(pairs[:, 0]), bits32(single))
    np.testing.assert_array_equal(bits32(pairs[:, 1]), bits32(single[::-1].copy()))


def test_half_both_ways(target: Any, code: Any) -> None:
    x, halves, back = samples(2 * THREADS), np.zeros(THREADS, np.uint32), np.zeros((THREADS, 2), np.float32)
    run(target, code, "half2_from_floats", x, halves)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(halves.view(np.float16), expected)
    run(target, code, "floats_from_half2", halves, back)
    np.testing.assert_array_equal(back.ravel(), expected.astype(np.float32))


def test_fma2(target: Any, code: Any) -> None:
    a, b, c = (np.random.default_rng(s).standard_normal(2 * THREADS).astype(np.float32) for s in range(3))
    found = np.zeros_like(a)
    run(target, code, "fma2", a, b, c, found)
    np.testing.assert_array_equal(found, (a.astype(np.float64) * b + c).astype(np.float32))


def test_lanes_and_waves(target: Any, code: Any) -> None:
    wave = target.arch.wave
    x = np.random.default_rng(0).integers(-1000, 1000, THREADS, dtype=np.int32)
    out = np.zeros((13, THREADS), np.int32)
    run(target, code, "wave", x, out)
    i = np.arange(THREADS)
    lane, first = i % wave, i // wave * wave
    rows = [np.full(THREADS, wave), lane, i // wave]
    rows += [x[first + (lane ^ min(1 << n, wave // 2))] for n in range(6)]
    rows.append(x[first + (lane * 7 + 3) % wave])
    rows.append(np.repeat(x.reshape(-1, wave).sum(1), wave))
    rows.append(np.repeat(x.reshape(-1, 4).sum(1), 4))
    rows.append(np.repeat(x.reshape(-1, 8).max(1), 8))
    np.testing.assert_array_equal(out, np.stack(rows))


def test_the_barrier_orders_lds(target: Any, code: Any) -> None:
    x, out = np.arange(THREADS, dtype=np.int32), np.zeros(THREADS, np.int32)
    run(target, code, "barrier", x, out, lds=4 * THREADS)
    np.testing.assert_array_equal(out, np.roll(x, -128))


def test_streaming_loads_and_copies_into_lds(target: Any, code: Any) -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (2 * THREADS, 4), dtype=np.uint32)
    streamed, copied = np.zeros_like(x[:THREADS]), np.zeros_like(x)
    run(target, code, "stream", x, streamed)
    np.testing.assert_array_equal(streamed, x[:THREADS])
    run(target, code, "copy", x, copied, lds=32 * THREADS)
    np.testing.assert_array_equal(copied, x)


# ---- matrix instructions: the layout formulas of matrix.h, as index arrays [lane, element]


def a_layout(arch: str, element: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices (row, k) of A and (k, column) of B that each lane holds, for 16-bit elements or `e4m3`."""
    if arch.startswith("gfx11"):
        lane, i = np.mgrid[:32, :16]
        return lane % 16, i, i, lane % 16
    if arch.startswith("gfx9"):
        e = 8 if element == "e4m3" or arch == "gfx950" else 4
        lane, i = np.mgrid[:64, :e]
        return lane % 16, e * (lane // 16) + i, e * (lane // 16) + i, lane % 16
    pack = 4 if element == "e4m3" else 2  # elements a word
    lane, i = np.mgrid[:32, : 4 * pack]
    g, t, word, part = lane // 4, lane % 4, i // pack, i % pack
    row, k = g + 8 * (word % 2), pack * t + 4 * pack * (word // 2) + part
    lane, i = np.mgrid[:32, : 2 * pack]
    return row, k, pack * (lane % 4) + 4 * pack * (i // pack) + i % pack, lane // 4


def d_layout(arch: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices (row, column) of D that each lane holds."""
    if arch.startswith("gfx11"):
        lane, i = np.mgrid[:32, :8]
        return 2 * i + lane // 16, lane % 16
    if arch.startswith("gfx9"):
        lane, i = np.mgrid[:64, :4]
        return 4 * (lane // 16) + i, lane % 16
    lane, i = np.mgrid[:32, :4]
    return lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2


def check_matrix(target: Any, code: Any, name: str, lanes: tuple, values: tuple) -> None:
    """Run a matrix probe on operands by lane, compare with the product of `values`, to fp32's accuracy over K terms."""
    row, column = d_layout(target.arch.name)
    c = np.random.default_rng(9).standard_normal((16, values[1].shape[1])).astype(np.float32)
    out = c[row, column].copy()
    run(target, code, name, *lanes, out, block=target.arch.wave)
    exact = values[0].astype(np.float64) @ values[1].astype(np.float64) + c
    # K products and C are added in fp32 in some order: at most K roundings (or truncations) of the largest partial sum
    bound = (values[0].shape[1] + 1) * 2.0**-23 * (np.abs(values[0]) @ np.abs(values[1]) + np.abs(c))
    assert (np.abs(out - exact[row, column]) <= bound[row, column]).all()


@pytest.mark.parametrize("element", ["half", "bf16", "e4m3"])
def test_matrix_instructions(target: Any, code: Any, element: str) -> None:
    arch = target.arch.name
    if element == "e4m3" and arch.startswith("gfx11"):
        pytest.skip("no such instruction")
    row, ka, kb, column = a_layout(arch, element)
    rng = np.random.default_rng(1)
    shape_a, shape_b = (16, int(ka.max()) + 1), (int(kb.max()) + 1, int(column.max()) + 1)
    if element == "e4m3":
        kind = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    else:
        kind = {"half": torch.float16, "bf16": torch.bfloat16}[element]
    a, b = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(kind) for s in (shape_a, shape_b))
    raw = [t.view(torch.uint8 if t.itemsize == 1 else torch.int16).numpy() for t in (a, b)]
    lanes = (
        np.ascontiguousarray(raw[0][row, ka]).view(np.uint32),
        np.ascontiguousarray(raw[1][kb, column]).view(np.uint32),
    )
    check_matrix(target, code, f"matrix_{element}", lanes, (a.float().numpy(), b.float().numpy()))


@pytest.mark.parametrize("a_element", ["e2m1", "e4m3"])
@pytest.mark.parametrize("b_element", ["e2m1", "e4m3"])
def test_scaled_matrix_instruction(target: Any, code: Any, a_element: str, b_element: str) -> None:
    if target.arch.name != "gfx950":
        pytest.skip("no such instruction")
    rng = np.random.default_rng(2)
    lane, i = np.mgrid[:64, :32]
    q = lane // 16
    k = {"e2m1": 32 * q + i, "e4m3": np.where(i < 16, 16 * q + i, 64 + 16 * q + i - 16)}
    lanes, values, scales = [], [], []
    for element in (a_element, b_element):  # [row or column, k]
        codes = rng.integers(0, 16 if element == "e2m1" else 256, (16, 128), dtype=np.uint8)
        if element == "e4m3":
            codes[codes & 0x7F == 0x7F] = 0x3A
        scale = rng.integers(122, 133, (16, 4), dtype=np.uint8)
        exact = E2M1[codes] if element == "e2m1" else e4m3_values(codes).reshape(16, 128)
        values.append(exact * np.exp2(scale.astype(np.float32) - 127).repeat(32, 1))
        held = codes[lane % 16, k[element]]
        packed = held[:, ::2] | held[:, 1::2] << 4 if element == "e2m1" else held
        words = np.zeros((64, 32), np.uint8)
        words[:, : packed.shape[1]] = packed
        words[:, packed.shape[1] :] = 0xA5  # not read
        lanes.append(words.view(np.uint32).copy())
        scales.append(scale[np.arange(64) % 16, np.arange(64) // 16] | np.uint32(0xA5A5A500))
    values[1] = values[1].T
    name = f"matrix_mx_{a_element}_{b_element}"
    check_matrix(target, code, name, (*lanes, *scales), tuple(values))


def test_dot2(target: Any, code: Any) -> None:
    if target.arch.vendor != "amd":
        pytest.skip("no such instruction")
    a, b = (np.random.default_rng(s).standard_normal((THREADS, 2)).astype(np.float16) for s in (3, 4))
    c = np.random.default_rng(5).standard_normal(THREADS).astype(np.float32)
    out = c.copy()
    run(target, code, "dot2", a.view(np.uint32).ravel(), b.view(np.uint32).ravel(), out)
    exact = (a.astype(np.float64) * b).sum(1) + c
    np.testing.assert_allclose(out, exact, rtol=0, atol=3 * 2.0**-23 * 16)  # three terms below 16


def test_a_missing_barrier_is_found(target: Any, code: Any) -> None:
    if target.arch.vendor != "amd":
        pytest.skip("the emulator finds it")
    from emulator.errors import KernelFault

    x, out = np.arange(THREADS, dtype=np.int32), np.zeros(THREADS, np.int32)
    broken = LaunchDescription("barrier_probe", 1, THREADS, (x, out), 4 * THREADS)
    with pytest.raises(KernelFault, match="no barrier between"):
        target.run(code(target, "WITHOUT_BARRIER"), broken)
