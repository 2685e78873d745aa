"""Conversions between number formats, against torch and torchao rather than against our own decoders."""

import numpy as np
import pytest
import torch
from assembling import Wave, run_instructions

f4_unpacked_to_f32 = pytest.importorskip("torchao.prototype.mx_formats.kernels").f4_unpacked_to_f32
f32_to_f4_unpacked = pytest.importorskip("torchao.prototype.mx_formats.kernels").f32_to_f4_unpacked

FP8 = {
    ("gfx950", "fp8"): torch.float8_e4m3fn,
    ("gfx950", "bf8"): torch.float8_e5m2,
    ("gfx942", "fp8"): torch.float8_e4m3fnuz,
    ("gfx942", "bf8"): torch.float8_e5m2fnuz,
}
NO_SCALARS = np.zeros(16, np.uint32)
SATURATE = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1;"


def operands(a=None, b=None, c=None):
    """[lanes, 4, 4] with the given first words; D holds 0x55555555."""
    words = np.full((64, 4, 4), 0x55555555, np.uint32)
    for position, values in enumerate((a, b, c)):
        if values is not None:
            words[:, position, 0] = (
                np.asarray(values).view(np.uint32) if np.asarray(values).dtype != np.uint32 else values
            )
    return words


def one(arch, text, **values):
    return run_instructions(arch, [text], operands(**values), NO_SCALARS)[0]


def decode(codes, dtype):
    return torch.tensor(np.asarray(codes, np.uint8)).view(dtype).float().numpy()


def encode(values, dtype):
    return torch.tensor(np.asarray(values, np.float32)).to(dtype).view(torch.uint8).numpy()


def sample(seed, spread=8):
    """64 floats over several binades, with ties and values below and above the small formats' range."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(64) * 2.0 ** rng.integers(-spread, spread, 64)).astype(np.float32)
    x[:8] = [0, -0.0, 1.0625, 1.1875, -2.5, 17.0, 0.001953125 * 1.5, -0.0009765625]
    return x


@pytest.mark.parametrize(("arch", "name"), FP8)
def test_decode_every_code(arch, name):
    """All 256 codes, four to a register, by the scalar and by the packed conversion."""
    codes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    expected = decode(codes, FP8[arch, name]).reshape(64, 4)
    packed = codes.view(np.uint32)[:, 0]
    texts = [f"v_cvt_f32_{name}_sdwa D, A src0_sel:BYTE_{k}" for k in range(4)]
    texts += [f"v_cvt_pk_f32_{name} DD, A", f"v_cvt_pk_f32_{name}_sdwa DD, A src0_sel:WORD_1"]
    waves = run_instructions(arch, texts, operands(a=packed), NO_SCALARS)
    for k in range(4):
        assert np.array_equal(waves[k].f32, expected[:, k], equal_nan=True)
    for half in range(2):
        pair = waves[4 + half].words[:, :2].view(np.float32)
        assert np.array_equal(pair, expected[:, 2 * half : 2 * half + 2], equal_nan=True)


@pytest.mark.parametrize(("arch", "name"), FP8)
def test_encode(arch, name):
    dtype = FP8[arch, name]
    a, b = sample(1, 5), sample(2, 5)
    limit = torch.finfo(dtype).max
    a, b = a.clip(-limit, limit), b.clip(-limit, limit)
    expected = encode(a, dtype).astype(np.uint32) | encode(b, dtype).astype(np.uint32) << 8
    assert np.array_equal(one(arch, f"v_cvt_pk_{name}_f32 D, A, B", a=a, b=b).u32, expected | 0x55550000)
    upper = one(arch, f"v_cvt_pk_{name}_f32 D, A, B op_sel:[0,0,1]", a=a, b=b)
    assert np.array_equal(upper.u32, expected << 16 | 0x5555)


@pytest.mark.parametrize(("arch", "name"), FP8)
def test_encode_out_of_range(arch, name):
    """Beyond the largest number: NaN (infinity where there is one), or the largest number under MODE.FP16_OVFL."""
    dtype = FP8[arch, name]
    limit = torch.finfo(dtype).max
    huge = np.full(64, 1e30, np.float32) * np.where(np.arange(64) % 2, -1, 1).astype(np.float32)
    plain = one(arch, f"v_cvt_pk_{name}_f32 D, A, A", a=huge)
    values = decode(plain.u32 & 255, dtype)
    assert np.all(np.isinf(values) if dtype == torch.float8_e5m2 else np.isnan(values))
    clamped = one(arch, SATURATE + f"v_cvt_pk_{name}_f32 D, A, A", a=huge)
    assert np.array_equal(decode(clamped.u32 & 255, dtype), np.sign(huge) * np.float32(limit))
    nan = one(arch, SATURATE + f"v_cvt_pk_{name}_f32 D, A, A", a=np.full(64, np.nan, np.float32))
    assert np.isnan(decode(nan.u32 & 255, dtype)).all()


def scale_operand(seed):
    """Powers of two as fp32, with mantissa bits that must be ignored."""
    exponents = np.random.default_rng(seed).integers(117, 138, 64).astype(np.uint32)
    return exponents << 23 | 0x2AAAAA, (2.0 ** (exponents.astype(int) - 127)).astype(np.float32)


def f4(codes):
    return f4_unpacked_to_f32(torch.tensor(np.asarray(codes, np.uint8))).numpy()


def test_scaled_decode():
    """gfx950: v_cvt_scalef32_pk_{f32,bf16,f16}_{fp4,fp8,bf8}."""
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 1 << 32, 64, dtype=np.uint32)
    bits, scale = scale_operand(4)
    for byte in range(4):
        code = packed >> 8 * byte & 255
        expected = np.stack([f4(code & 15), f4(code >> 4)], 1) * scale[:, None]
        select = f" op_sel:[{byte & 1},{byte >> 1},0]"
        wave = one("gfx950", f"v_cvt_scalef32_pk_f32_fp4 DD, A, B{select}", a=packed, b=bits)
        assert np.array_equal(wave.words[:, :2].view(np.float32), expected)
        wave = one("gfx950", f"v_cvt_scalef32_pk_bf16_fp4 D, A, B{select}", a=packed, b=bits)
        pair = torch.tensor(np.ascontiguousarray(wave.u32).view(np.uint16)).view(torch.bfloat16).float().numpy()
        assert np.array_equal(pair.reshape(64, 2), expected)
    for name in ("fp8", "bf8"):
        for word in range(2):
            codes = packed.view(np.uint8).reshape(64, 4)[:, 2 * word : 2 * word + 2]
            expected = decode(codes, FP8["gfx950", name]) * scale[:, None]
            text = f"v_cvt_scalef32_pk_f32_{name} DD, A, B op_sel:[{word},0,0]"
            got = one("gfx950", text, a=packed, b=bits).words[:, :2].view(np.float32)
            assert np.array_equal(got, expected, equal_nan=True), (name, word)


def test_scaled_encode():
    """gfx950: v_cvt_scalef32_pk_{fp4,fp8,bf8}_{f32,bf16}: the value is divided by the scale, then rounded."""
    bits, scale = scale_operand(5)
    a, b = sample(6, 2) * scale, sample(7, 2) * scale

    def to_f4(x):
        return f32_to_f4_unpacked(torch.tensor(x)).numpy().astype(np.uint32)

    fp4 = to_f4(a / scale) | to_f4(b / scale) << 4
    for byte in range(4):
        text = f"v_cvt_scalef32_pk_fp4_f32 D, A, B, C op_sel:[0,0,{byte & 1},{byte >> 1}]"
        expected = 0x55555555 & ~(255 << 8 * byte) | fp4 << 8 * byte
        assert np.array_equal(one("gfx950", text, a=a, b=b, c=bits).u32, expected)
    for name in ("fp8", "bf8"):
        dtype = FP8["gfx950", name]
        expected = encode(a / scale, dtype).astype(np.uint32) | encode(b / scale, dtype).astype(np.uint32) << 8
        text = f"v_cvt_scalef32_pk_{name}_f32 D, A, B, C op_sel:[0,0,0,1]"
        assert np.array_equal(one("gfx950", text, a=a, b=b, c=bits).u32, expected << 16 | 0x5555)
    halves = torch.tensor(np.stack([a, b], 1)).to(torch.bfloat16)
    packed = halves.view(torch.uint16).numpy().view(np.uint32)[:, 0]
    quotient = (halves.float() / torch.tensor(scale)[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    wave = one("gfx950", "v_cvt_scalef32_pk_fp8_bf16 D, A, B", a=packed, b=bits)
    assert np.array_equal(wave.u32, np.ascontiguousarray(quotient).view(np.uint16)[:, 0] | np.uint32(0x55550000))


@pytest.mark.parametrize("seed", range(3))
def test_bf16_and_f16(seed):
    a, b = sample(10 + seed, 20), sample(20 + seed, 20)
    a[8:12] = [np.inf, -np.inf, np.nan, 65519.0]
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wave = one("gfx950", f"v_cvt_pk_{name}_f32 D, A, B", a=a, b=b)
        got = torch.tensor(np.ascontiguousarray(wave.u32).view(np.uint16)).view(dtype).float().numpy().reshape(64, 2)
        expected = torch.tensor(np.stack([a, b], 1)).to(dtype).float().numpy()
        assert np.array_equal(got, expected, equal_nan=True), name
    wave = one("gfx942", "v_cvt_pkrtz_f16_f32 D, A, B", a=a, b=b)
    got = np.ascontiguousarray(wave.u32).view(np.float16).reshape(64, 2).astype(np.float64)
    finite = np.isfinite(np.stack([a, b], 1)) & (np.abs(np.stack([a, b], 1)) < 65504)
    values = np.stack([a, b], 1).astype(np.float64)
    assert np.all(np.abs(got[finite]) <= np.abs(values[finite]))  # towards zero ...
    step = np.spacing(np.abs(got[finite]).astype(np.float16)).astype(np.float64)
    assert np.all(np.abs(values[finite]) - np.abs(got[finite]) < step)  # ... by less than one place


def test_bf16_dot_on_gfx11():
    rng = np.random.default_rng(30)
    a, b = (torch.tensor(rng.standard_normal((32, 2)), dtype=torch.bfloat16) for _ in range(2))
    pack = [x.view(torch.uint16).numpy().view(np.uint32)[:, 0] for x in (a, b)]
    words = np.zeros((32, 4, 4), np.uint32)
    words[:, 0, 0], words[:, 1, 0] = pack
    wave: Wave = run_instructions("gfx1100", ["v_dot2_f32_bf16 D, A, B, 1.0"], words, NO_SCALARS)[0]
    exact = (a.double() * b.double()).sum(1).numpy() + 1
    assert np.array_equal(wave.f32, exact.astype(np.float32))
