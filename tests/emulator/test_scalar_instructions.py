"""Scalar instructions and comparisons, one at a time against Python and numpy (names: wave_data.py)."""

import numpy as np
import pytest
from wave_data import ARCHES, SCALARS, U32, doubles, evaluate, expand, floats, integers, is_gfx9, kind

SALU = [
    ("s_mov_b32 S, P", lambda p, q, r: (p[0], None)),
    ("s_mov_b64 SS, PP", lambda p, q, r: (p64(p), None)),
    ("s_movk_i32 S, 0xff80", lambda p, q, r: (0xFFFFFF80, None)),
    ("s_add_u32 S, P, Q", lambda p, q, r: (p[0] + q[0], p[0] + q[0] >> 32)),
    ("s_sub_u32 S, P, Q", lambda p, q, r: (p[0] - q[0], q[0] > p[0])),
    ("s_add_u32 S, P, Q; s_addc_u32 S, Q, R",
     lambda p, q, r: (q[0] + r[0] + (p[0] + q[0] >> 32), q[0] + r[0] + (p[0] + q[0] >> 32) >> 32)),
    ("s_sub_u32 S, P, Q; s_subb_u32 S, Q, R",
     lambda p, q, r: (q[0] - r[0] - (q[0] > p[0]), q[0] < r[0] + (q[0] > p[0]))),
    ("s_add_i32 S, P, Q", lambda p, q, r: (p[0] + q[0], overflow(signed(p[0]) + signed(q[0])))),
    ("s_sub_i32 S, P, Q", lambda p, q, r: (p[0] - q[0], overflow(signed(p[0]) - signed(q[0])))),
    ("s_mov_b32 S, P; s_addk_i32 S, 0x8000", lambda p, q, r: (p[0] - 0x8000, overflow(signed(p[0]) - 0x8000))),
    ("s_mul_i32 S, P, Q", lambda p, q, r: (p[0] * q[0], None)),
    ("s_mul_hi_u32 S, P, Q", lambda p, q, r: (p[0] * q[0] >> 32, None)),
    ("s_mul_hi_i32 S, P, Q", lambda p, q, r: (signed(p[0]) * signed(q[0]) >> 32, None)),
    ("s_min_i32 S, P, Q", lambda p, q, r: (min(signed(p[0]), signed(q[0])), signed(p[0]) < signed(q[0]))),
    ("s_max_u32 S, P, Q", lambda p, q, r: (max(p[0], q[0]), p[0] > q[0])),
    ("s_and_b32 S, P, Q", lambda p, q, r: (p[0] & q[0], p[0] & q[0] != 0)),
    ("s_and_b64 SS, PP, QQ", lambda p, q, r: (p64(p) & p64(q), True)),
    ("s_xor_b32 S, P, P", lambda p, q, r: (0, False)),
    ("s_andn2_b32 S, P, Q", lambda p, q, r: (p[0] & ~q[0], p[0] & ~q[0] != 0)),
    ("s_orn2_b64 SS, PP, QQ", lambda p, q, r: (p64(p) | ~p64(q), True)),
    ("s_not_b32 S, P", lambda p, q, r: (~p[0], True)),
    ("s_lshl_b32 S, P, 7", lambda p, q, r: (p[0] << 7, True)),
    ("s_lshl_b64 SS, PP, 35", lambda p, q, r: (p64(p) << 35, True)),
    ("s_lshr_b64 SS, PP, 35", lambda p, q, r: (p64(p) >> 35, True)),
    ("s_ashr_i32 S, P, 5", lambda p, q, r: (signed(p[0]) >> 5, True)),
    ("s_bfe_u32 S, P, 0x80005", lambda p, q, r: (p[0] >> 5 & 255, p[0] >> 5 & 255 != 0)),
    ("s_bfe_i32 S, P, 0x80005", lambda p, q, r: (signed(p[0] << 19 & 0xFFFFFFFF) >> 24, None)),
    ("s_bfm_b32 S, 5, 9", lambda p, q, r: (31 << 9, None)),
    ("s_bcnt1_i32_b32 S, P", lambda p, q, r: (p[0].bit_count(), True)),
    ("s_bcnt1_i32_b64 S, PP", lambda p, q, r: (p64(p).bit_count(), True)),
    ("s_brev_b32 S, P", lambda p, q, r: (int(f"{p[0]:032b}"[::-1], 2), None)),
    ("s_ff1_i32_b32 S, P", lambda p, q, r: ((p[0] & -p[0]).bit_length() - 1, None)),
    ("s_flbit_i32_b32 S, P", lambda p, q, r: (32 - p[0].bit_length(), None)),
    ("s_flbit_i32_i64 S, PP",
     lambda p, q, r: (64 - (p64(p) if p[1] < 1 << 31 else ~p64(p) & (1 << 64) - 1).bit_length(), None)),
    ("s_sext_i32_i8 S, P", lambda p, q, r: ((p[0] & 255) - (p[0] << 1 & 256), None)),
    ("s_pack_lh_b32_b16 S, P, Q", lambda p, q, r: (p[0] & 0xFFFF | q[0] & 0xFFFF0000, None)),
    ("s_lshl3_add_u32 S, P, Q", lambda p, q, r: ((p[0] << 3) + q[0], (p[0] << 3) + q[0] >> 32 != 0)),
    ("s_cmp_lt_i32 P, Q; s_cselect_b32 S, P, Q", lambda p, q, r: (min(signed(p[0]), signed(q[0])), None)),
    ("s_cmp_ge_u32 P, Q; s_cselect_b64 SS, PP, QQ", lambda p, q, r: (p64(p) if p[0] >= q[0] else p64(q), None)),
    ("s_cmpk_lt_i32 P, 0x80; s_cselect_b32 S, 1, 2", lambda p, q, r: (1 if signed(p[0]) < 0x80 else 2, None)),
    ("s_bitcmp1_b32 P, 3; s_cselect_b32 S, 1, 2", lambda p, q, r: (1 if p[0] >> 3 & 1 else 2, None)),
    ("s_mov_b64 s[36:37], exec; s_and_saveexec_b64 SS, PP; s_mov_b64 SS, exec; s_mov_b64 exec, s[36:37]",
     lambda p, q, r: (p64(p), None)),
    ("s_mov_b32 S, 1; s_cmp_eq_u32 P, P; s_cbranch_scc1 3; s_mov_b32 S, 2; s_mov_b32 S, 3; s_nop 0",
     lambda p, q, r: (1, None)),
]  # fmt: skip


def p64(p):
    return p[0] | p[1] << 32


def signed(x):
    return x - (1 << 32) if x >> 31 else x


def overflow(x):
    return not -(1 << 31) <= x < 1 << 31


COMPARE = {
    "lt": np.less, "eq": np.equal, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ne": np.not_equal, "neq": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b), "nlt": lambda a, b: ~(a < b), "nge": lambda a, b: ~(a >= b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "u": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHES)
@np.errstate(all="ignore")
def test_compare(arch):
    result = "SS" if is_gfx9(arch) else "S"
    for data, kinds in ((integers, ["u32", "i32", "u64", "i64"]), (floats, ["f32"]), (doubles, ["f64"])):
        floating = data is not integers
        names = [n for n in COMPARE if n not in (("ne",) if floating else ("neq", "lg", "nlt", "nge", "o", "u"))]
        rows = [(name, k) for name in names for k in kinds]
        pairs = [("AA", "BB") if k.endswith("64") else ("A", "B") for _, k in rows]
        texts = [f"v_cmp_{n}_{k} {result}, {a}, {b}" for (n, k), (a, b) in zip(rows, pairs, strict=True)]
        inputs, results = evaluate(arch, data, texts)
        for (name, k), wave, text in zip(rows, results, texts, strict=True):
            mask = int(wave.words[0, 0]) | int(wave.words[0, 1]) << 32
            expected = COMPARE[name](inputs[0].view(kind(k)), inputs[1].view(kind(k)))
            assert np.array_equal(expand(mask, len(expected)), expected), text


@pytest.mark.parametrize("arch", ARCHES)
def test_compare_sets_exec(arch):
    """v_cmpx masks what follows; gfx9's form writes VCC as well."""
    wide = is_gfx9(arch)
    start, vcc = ("s_mov_b64 s[36:37], exec", "vcc, ") if wide else ("s_mov_b32 s36, exec_lo", "")
    end = "s_mov_b64 exec, s[36:37]" if wide else "s_mov_b32 exec_lo, s36"
    text = f"{start}; v_cmpx_gt_u32 {vcc}A, B; v_mov_b32 D, C; {end}"
    (a, b, c, d), (wave,) = evaluate(arch, integers, [text])
    assert np.array_equal(wave.u32, np.where(a.u32 > b.u32, c.u32, d.u32))


@np.errstate(all="ignore")
def test_class():
    values = np.array([np.nan, -np.inf, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, np.inf], np.float32)
    bit_of = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # quiet NaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf

    def data():
        operands, scalars = floats()
        operands[:9, 0, 0] = values.view(U32)
        return operands, scalars

    texts = [f"s_movk_i32 s36, {1 << b:#x}; v_cmp_class_f32 SS, A, s36" for b in range(10)]
    _, results = evaluate("gfx950", data, texts)
    for b, wave in enumerate(results):
        assert np.array_equal(expand(int(wave.words[0, 0]), 9), np.array(bit_of) == b)


RENAMED_ON_GFX11 = {
    "s_andn2": "s_and_not1",
    "s_orn2": "s_or_not1",
    "s_ff1_i32_b32": "s_ctz_i32_b32",
    "s_flbit_i32_b32": "s_clz_i32_u32",
}


@pytest.mark.parametrize("arch", ARCHES)
def test_scalar(arch):
    rows = [r for r in SALU if is_gfx9(arch) or "exec" not in r[0]]
    texts = [r[0] for r in rows]
    if not is_gfx9(arch):
        for old, new in RENAMED_ON_GFX11.items():
            texts = [t.replace(old, new) for t in texts]
    _, results = evaluate(arch, integers, texts)
    p, q, r = ([int(x) for x in SCALARS[name]] for name in "PQR")
    for (_, function), wave, text in zip(rows, results, texts, strict=True):
        value, scc = function(p, q, r)
        wide = "SS" in text
        got = int(wave.words[0, 0]) | (int(wave.words[0, 1]) << 32 if wide else 0)
        assert got == value % (1 << (64 if wide else 32)), text
        assert scc is None or int(wave.words[0, 2]) == bool(scc), text
