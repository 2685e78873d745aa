"""Floating-point vector instructions, one at a time against numpy (names: wave_data.py)."""

import numpy as np
import pytest
from wave_data import ARCHES, SAME, SPECIAL_F32, U32, cases, doubles, evaluate, floats, halves, is_gfx9, same, text_of


def f16(x):
    return np.asarray(x, np.float64).astype(np.float16)


def dpf(f):
    return lambda a, b, c, d: f(a.f32, b.f32, c.f32)


def fma64(a, b, c):
    """Exact enough for fp32: the product of two fp32 is exact in fp64, and one rounding of the sum is harmless but for
    ties that the test data do not hit."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def med3(a, b, c):
    return np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))


FLOAT = [
    ("v_add_f32 D, A, B", SAME, dpf(lambda a, b, c: a + b)),
    ("v_sub_f32 D, A, B", SAME, dpf(lambda a, b, c: a - b)),
    ("v_subrev_f32 D, A, B", SAME, dpf(lambda a, b, c: b - a)),
    ("v_mul_f32 D, A, B", SAME, dpf(lambda a, b, c: a * b)),
    ("v_mul_f32 D, 0.5, B", SAME, dpf(lambda a, b, c: np.float32(0.5) * b)),
    ("v_add_f32_e64 D, -A, |B|", SAME, dpf(lambda a, b, c: -a + np.abs(b))),
    ("v_add_f32_e64 D, -|A|, B", SAME, dpf(lambda a, b, c: -np.abs(a) + b)),
    ("v_mul_f32_e64 D, A, B mul:2", SAME, dpf(lambda a, b, c: a * b * np.float32(2))),
    ("v_mul_f32_e64 D, A, B mul:4", SAME, dpf(lambda a, b, c: a * b * np.float32(4))),
    ("v_mul_f32_e64 D, A, B div:2", SAME, dpf(lambda a, b, c: a * b * np.float32(0.5))),
    ("v_add_f32_e64 D, A, B clamp", SAME, dpf(lambda a, b, c: np.nan_to_num(np.clip(a + b, 0, 1), nan=0))),
    ("v_fma_f32 D, A, B, C", SAME, dpf(fma64)),
    ("v_fma_f32 D, A, -B, C", SAME, dpf(lambda a, b, c: fma64(a, -b, c))),
    ("v_fmac_f32 D, A, B", SAME, lambda a, b, c, d: fma64(a.f32, b.f32, d.f32)),
    ("v_fmaak_f32 D, A, B, 0x40490fdb", SAME, dpf(lambda a, b, c: fma64(a, b, np.float32(np.pi)))),
    ("v_fmamk_f32 D, A, 0x40490fdb, B", SAME, dpf(lambda a, b, c: fma64(a, np.float32(np.pi), b))),
    ("v_min_f32 D, A, B", SAME, dpf(lambda a, b, c: np.fmin(a, b))),
    ("v_max_f32 D, A, B", SAME, dpf(lambda a, b, c: np.fmax(a, b))),
    ("v_max3_f32 D, A, B, C", SAME, dpf(lambda a, b, c: np.fmax(np.fmax(a, b), c))),
    ("v_min3_f32 D, A, B, C", SAME, dpf(lambda a, b, c: np.fmin(np.fmin(a, b), c))),
    ("v_med3_f32 D, A, B, C", SAME, dpf(med3)),
    ("v_floor_f32 D, A", SAME, dpf(lambda a, b, c: np.floor(a))),
    ("v_ceil_f32 D, A", SAME, dpf(lambda a, b, c: np.ceil(a))),
    ("v_trunc_f32 D, A", SAME, dpf(lambda a, b, c: np.trunc(a))),
    ("v_rndne_f32 D, A", SAME, dpf(lambda a, b, c: np.rint(a))),
    ("v_frexp_mant_f32 D, A", SAME, dpf(lambda a, b, c: np.where(np.isfinite(a), np.frexp(a)[0], a))),
    ("v_ldexp_f32 D, A, 3", SAME, dpf(lambda a, b, c: np.ldexp(a, 3))),
    ("v_pk_add_f32 DD, AA, BB", None, dpf(lambda a, b, c: a + b)),
    ("v_pk_mul_f32 DD, AA, BB op_sel_hi:[0,1]", None, dpf(lambda a, b, c: a * b)),
    ("v_pk_fma_f32 DD, AA, BB, CC neg_lo:[1,0,0]", None, dpf(lambda a, b, c: fma64(-a, b, c))),
    ("v_pk_fma_f32 DD, AA, BB, CC op_sel:[1,0,0]", None,
     lambda a, b, c, d: fma64(a.words[:, 1].view(np.float32), b.f32, c.f32)),
    (None, "v_dual_fmac_f32 D, A, B :: v_dual_mul_f32 v13, v1, v5", lambda a, b, c, d: fma64(a.f32, b.f32, d.f32)),
]  # fmt: skip


def flushed(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float32)


TRANSCENDENTAL = [  # function in fp64, and the ulps granted
    ("v_rcp_f32 D, A", lambda a: 1 / a),
    ("v_rsq_f32 D, |A|", lambda a: 1 / np.sqrt(np.abs(a))),
    ("v_sqrt_f32 D, |A|", lambda a: np.sqrt(np.abs(a))),
    ("v_exp_f32 D, A", np.exp2),
    ("v_log_f32 D, |A|", lambda a: np.log2(np.abs(a))),
    ("v_sin_f32 D, A", lambda a: np.sin(2 * np.pi * a)),
    ("v_cos_f32 D, A", lambda a: np.cos(2 * np.pi * a)),
]

F64 = [
    ("v_add_f64 DD, AA, BB", lambda a, b, c, d: a.f64 + b.f64),
    ("v_mul_f64 DD, AA, BB", lambda a, b, c, d: a.f64 * b.f64),
    ("v_max_f64 DD, AA, BB", lambda a, b, c, d: np.fmax(a.f64, b.f64)),
    ("v_fma_f64 DD, AA, BB, 0", lambda a, b, c, d: a.f64 * b.f64 + 0),
    ("v_add_f64 DD, -AA, |BB|", lambda a, b, c, d: -a.f64 + np.abs(b.f64)),
    ("s_mov_b32 s36, 0; s_mov_b32 s37, 0x40080000; v_mul_f64 DD, AA, s[36:37]", lambda a, b, c, d: a.f64 * 3),
    ("v_floor_f64 DD, AA", lambda a, b, c, d: np.floor(a.f64)),
    ("v_rndne_f64 DD, AA", lambda a, b, c, d: np.rint(a.f64)),
    ("v_ldexp_f64 DD, AA, -3", lambda a, b, c, d: np.ldexp(a.f64, -3)),
]


def pair(w):
    """Both f16 halves of a register, [lanes, 2]."""
    return w.words.view(np.float16)[:, :2]


def bits(x):
    """Floats as what their registers hold: one f32, two f16, or one f16 below a cleared upper half."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint16).astype(U32) if x.dtype == np.float16 and x.ndim == 1 else x.view(U32).reshape(len(x))


HALF = [
    ("v_add_f16 D, A, B", lambda a, b, c, d: bits(a.f16 + b.f16)),
    ("v_mul_f16 D, A, B", lambda a, b, c, d: bits(a.f16 * b.f16)),
    ("v_max_f16 D, A, B", lambda a, b, c, d: bits(np.fmax(a.f16, b.f16))),
    ("v_fma_f16 D, A, B, C",
     lambda a, b, c, d: bits(f16(a.f16.astype(float) * b.f16 + c.f16)) | d.u32 & 0xFFFF0000),
    ("v_pk_add_f16 D, A, B", lambda a, b, c, d: bits(pair(a) + pair(b))),
    ("v_pk_mul_f16 D, A, B neg_hi:[1,0]", lambda a, b, c, d: bits(pair(a) * pair(b) * np.array([1, -1], np.float16))),
    ("v_pk_fma_f16 D, A, B, C", lambda a, b, c, d: bits(f16(pair(a).astype(float) * pair(b) + pair(c)))),
    ("v_pk_maximum3_f16 D, A, B, C",
     lambda a, b, c, d: bits(np.maximum(np.maximum(pair(a), pair(b)), pair(c)))),
    ("v_cvt_f32_f16 D, A", lambda a, b, c, d: bits(a.f16.astype(np.float32))),
    ("v_cvt_f32_f16_sdwa D, A dst_sel:DWORD src0_sel:WORD_1",
     lambda a, b, c, d: bits(pair(a)[:, 1].astype(np.float32))),
    ("v_dot2_f32_f16 D, A, B, C",
     lambda a, b, c, d: bits(((pair(a).astype(float) * pair(b)).sum(1) + c.f32).astype(np.float32))),
]  # fmt: skip

MIX = [  # fp32 registers or, where op_sel_hi says so, halves of one; unlike other packed instructions, fp32 by default
    ("v_fma_mix_f32 D, A, -B, C op_sel:[1,0,0] op_sel_hi:[1,1,0]",
     lambda a, b, c, d: bits((-pair(a)[:, 1].astype(float) * pair(b)[:, 0] + c.f32).astype(np.float32))),
    ("v_fma_mixlo_f16 D, A, B, 0 op_sel_hi:[1,0,0]",
     lambda a, b, c, d: bits(f16(pair(a)[:, 0].astype(float) * b.f32 + 0.0)) | d.u32 & 0xFFFF0000),
    ("v_fma_mixlo_f16 D, |C|, 1.0, 0", lambda a, b, c, d: bits(f16(np.abs(c.f32))) | d.u32 & 0xFFFF0000),
    ("v_fma_mixhi_f16 D, C, 1.0, 0", lambda a, b, c, d: bits(f16(c.f32 + np.float32(0))) << 16 | d.u32 & 0xFFFF),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@np.errstate(all="ignore")
def test_float(arch):
    rows = cases(FLOAT, arch)
    inputs, results = evaluate(arch, floats, [text_of(r, arch) for r in rows])
    for row, wave in zip(rows, results, strict=True):
        assert same(wave.f32, row[2](*inputs)), text_of(row, arch)


@pytest.mark.parametrize("arch", ARCHES)
@np.errstate(all="ignore")
def test_transcendental(arch):
    inputs, results = evaluate(arch, floats, [r[0].replace(" D, |A|", "_e64 D, |A|") for r in TRANSCENDENTAL])
    a = flushed(inputs[0].f32).astype(np.float64)
    for (text, function), wave in zip(TRANSCENDENTAL, results, strict=True):
        exact = function(a)
        expected = flushed(exact)
        tolerance = 2 * np.spacing(np.abs(expected))  # the hardware promises about 1 ulp
        if "sin" in text or "cos" in text:
            tolerance = np.maximum(tolerance, 2.0**-22)  # near a zero of the function
        good = (wave.f32 == expected) | (np.isnan(wave.f32) & np.isnan(expected))
        good |= np.abs(wave.f32 - expected) <= tolerance
        if "sin" in text or "cos" in text:
            good |= np.abs(a) > 2.0**20  # no accuracy is promised
        assert good.all(), (text, a[~good], wave.f32[~good], expected[~good])


@np.errstate(all="ignore")
def test_double():
    inputs, results = evaluate("gfx950", doubles, [r[0] for r in F64])
    for (text, function), wave in zip(F64, results, strict=True):
        assert same(wave.f64, function(*inputs)), text


@np.errstate(all="ignore")
def test_half():
    inputs, results = evaluate("gfx950", halves, [r[0] for r in HALF])
    for (text, function), wave in zip(HALF, results, strict=True):
        parts = np.float32 if "f32" in text.split()[0] else np.float16
        assert same(np.ascontiguousarray(wave.u32).view(parts), function(*inputs).view(parts)), text


@pytest.mark.parametrize("arch", ARCHES)
@np.errstate(all="ignore")
def test_mixed_precision(arch):
    def data():
        operands, scalars = halves()
        operands[:, 2] = floats()[0][:, 2]
        return operands, scalars

    inputs, results = evaluate(arch, data, [r[0] for r in MIX])
    for (text, function), wave in zip(MIX, results, strict=True):
        parts = np.float32 if "f32" in text.split()[0] else np.float16
        assert same(np.ascontiguousarray(wave.u32).view(parts), function(*inputs).view(parts)), text


@pytest.mark.parametrize("arch", ARCHES)
@np.errstate(all="ignore")
def test_division(arch):
    """The sequence compilers emit for an IEEE fp32 division is correctly rounded, whatever the operands."""
    vcc = "vcc" if is_gfx9(arch) else "vcc_lo"
    other = "s[36:37]" if is_gfx9(arch) else "s36"
    text = (
        f"v_div_scale_f32 v20, {other}, B, B, A; v_div_scale_f32 v21, {vcc}, A, B, A; v_rcp_f32 v22, v20;"
        "v_fma_f32 v23, -v20, v22, 1.0; v_fmac_f32 v22, v23, v22; v_mul_f32 v24, v21, v22;"
        "v_fma_f32 v25, -v20, v24, v21; v_fmac_f32 v24, v25, v22; v_fma_f32 v26, -v20, v24, v21;"
        "v_div_fmas_f32 v27, v26, v22, v24; v_div_fixup_f32 D, v27, B, A"
    )
    rng = np.random.default_rng(5)

    def data():
        operands, scalars = floats()
        values = operands.view(np.float32)
        values[:, :2, 0] = rng.standard_normal((64, 2)) * 2.0 ** rng.integers(-120, 120, (64, 2))
        values[:17, 0, 0] = SPECIAL_F32
        values[4:21, 1, 0] = SPECIAL_F32
        return operands, scalars

    for _ in range(4):
        inputs, (wave,) = evaluate(arch, data, [text])
        assert same(wave.f32, inputs[0].f32 / inputs[1].f32)
