"""Words of eight e2m1 codes -> bf16 or fp16, exact, in few instructions of AMD's (`amd_gemm.py`).

| | by way of | instructions for 8 |
| --- | --- | --- |
| fp16, gfx950 | its conversion of two codes, not scaled: fp16 has not the range | 4 |
| fp16, others | the upper byte of an fp16 by a look into a table of eight; the lower is zero | 12 |
| gfx950 | its conversion of two codes under a scale | 4 |
| gfx942 | e4m3 by a look into a table of eight, two of which become fp32 at once; scaled there | 24 |
| RDNA | either byte of a bf16 by such a look; sums are scaled | 20 |

What assembly owes the matrix unit is in `int4_values.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .int4_values import BYTES_TO_FLOATS, halves_of, joined, upper_halves
from .mx_gemm import e8m0_to_fp32

_SCALED = gl.constexpr("""
v_cvt_scalef32_pk_bf16_fp4 $0, $4, $5
v_cvt_scalef32_pk_bf16_fp4 $1, $4, $5 op_sel:[1,0,0]
v_cvt_scalef32_pk_bf16_fp4 $2, $4, $5 op_sel:[0,1,0]
v_cvt_scalef32_pk_bf16_fp4 $3, $4, $5 op_sel:[1,1,0]
s_nop 1
""")
_HALVES = gl.constexpr("""
v_cvt_scalef32_pk_f16_fp4 $0, $4, 1.0
v_cvt_scalef32_pk_f16_fp4 $1, $4, 1.0 op_sel:[1,0,0]
v_cvt_scalef32_pk_f16_fp4 $2, $4, 1.0 op_sel:[0,1,0]
v_cvt_scalef32_pk_f16_fp4 $3, $4, 1.0 op_sel:[1,1,0]
s_nop 1
""")
_SCALED_BYTES = gl.constexpr(BYTES_TO_FLOATS + """
v_pk_mul_f32 $0, $0, $6
v_pk_mul_f32 $1, $1, $6
v_pk_mul_f32 $2, $2, $6
v_pk_mul_f32 $3, $3, $6
""")  # fmt: skip


@gluon.jit
def e8m0_values(scales, ARCH: gl.constexpr):
    """Bytes -> fp32: 2^(byte - 127); 0 is a subnormal, 255 NaN. For gfx950's conversion, which reads the exponent only,
    the byte where that is."""
    exponents = scales.to(gl.int32) << 23
    return exponents.to(gl.float32, bitcast=True) if ARCH == "gfx950" else e8m0_to_fp32(scales)


@gluon.jit
def looked_up(upper, lower, selectors, LAST: gl.constexpr = False):
    """Of each byte of the selectors, below 8, that byte of a table: 4 to 7 are in `upper`. int32 all of them.

    LAST: nothing else reads the selectors, so that the result takes their registers."""
    WHERE: gl.constexpr = "=v,v,s,0" if LAST else "=v,v,s,v"
    return gl.inline_asm_elementwise(
        "v_perm_b32 $0, $1, $2, $3", WHERE, [upper, lower, selectors], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def chosen(upper, lower, PLACES: gl.constexpr):
    """Four bytes of two words, by their places."""
    return gl.inline_asm_elementwise(
        "v_perm_b32 $0, $1, $2, $3", "=v,v,v,s", [upper, lower, PLACES], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def scaled_bytes(first, second, scales):
    """Four bytes of each of two words, FNUZ e4m3, as fp32 times a scale: bits of two an int64, in order."""
    s = scales.to(gl.uint32, bitcast=True).to(gl.uint64)
    return gl.inline_asm_elementwise(
        _SCALED_BYTES,
        "=&v,=&v,=&v,=&v,v,v,v",
        [first, second, s << 32 | s],
        dtype=(gl.int64, gl.int64, gl.int64, gl.int64),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def e2m1_values(words, scales, ARCH: gl.constexpr, ROWS: gl.constexpr):
    """Values of codes, on CDNA times their scale.

    Args:
        words: int32 [ROWS, 4], of 32 codes along K, in sequence.
        scales: fp32 [ROWS, 1], as `e8m0_values` gives them.
        ARCH: gfx950, gfx942 or gfx11.
    """
    if ARCH == "gfx950":
        a, b, c, d = gl.inline_asm_elementwise(
            _SCALED,
            "=&v,=&v,=&v,=&v,v,v",
            [words, scales],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        values = joined(halves_of(a, False), halves_of(b, False), halves_of(c, False), halves_of(d, False), ROWS)
    else:
        even, odd = words & 0x07070707, (words >> 4) & 0x07070707  # magnitudes of elements 0, 2, 4, 6 and 1, 3, 5, 7
        even_signs, odd_signs = words << 4, words
        if ARCH == "gfx942":  # FNUZ: a negative zero is a NaN there
            even_signs &= even + 0x7F7F7F7F
            odd_signs &= odd + 0x7F7F7F7F
            first = looked_up(even * 0 + 0x54504C48, 0x44403800, even) | even_signs & -0x7F7F7F80
            second = looked_up(odd * 0 + 0x54504C48, 0x44403800, odd) | odd_signs & -0x7F7F7F80
            p, q, r, t = scaled_bytes(first, second, scales)  # elements 0 and 2, 4 and 6, 1 and 3, 5 and 7
            a, b = (
                upper_halves(p.to(gl.int32), r.to(gl.int32)),
                upper_halves((p >> 32).to(gl.int32), (r >> 32).to(gl.int32)),
            )
            c, d = (
                upper_halves(q.to(gl.int32), t.to(gl.int32)),
                upper_halves((q >> 32).to(gl.int32), (t >> 32).to(gl.int32)),
            )
            values = joined(a, b, c, d, ROWS)
        else:
            e_low = looked_up(even * 0 - 0x3F7FC000, -0x3F800000, even)
            o_low = looked_up(odd * 0 - 0x3F7FC000, -0x3F800000, odd)
            e_high = looked_up(even * 0 + 0x40404040, 0x3F3F3F00, even) | even_signs & -0x7F7F7F80
            o_high = looked_up(odd * 0 + 0x40404040, 0x3F3F3F00, odd) | odd_signs & -0x7F7F7F80
            e02, e46 = chosen(e_high, e_low, 0x05010400), chosen(e_high, e_low, 0x07030602)
            o13, o57 = chosen(o_high, o_low, 0x05010400), chosen(o_high, o_low, 0x07030602)
            a, b = chosen(o13, e02, 0x05040100), chosen(o13, e02, 0x07060302)
            c, d = chosen(o57, e46, 0x05040100), chosen(o57, e46, 0x07060302)
            values = joined(halves_of(a, False), halves_of(b, False), halves_of(c, False), halves_of(d, False), ROWS)
    return values


@gluon.jit
def e2m1_halves(words, ARCH: gl.constexpr, ROWS: gl.constexpr):
    """Values of codes in fp16; arguments as of `e2m1_values`."""
    if ARCH == "gfx950":
        a, b, c, d = gl.inline_asm_elementwise(
            _HALVES,
            "=&v,=&v,=&v,=&v,v",
            [words],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        even, odd = words & 0x07070707, (words >> 4) & 0x07070707  # magnitudes of elements 0, 2, 4, 6 and 1, 3, 5, 7
        e = looked_up(even * 0 + 0x46444240, 0x3E3C3800, even, True) | words << 4 & -0x7F7F7F80
        o = looked_up(odd * 0 + 0x46444240, 0x3E3C3800, odd, True) | words & -0x7F7F7F80
        # No assembly: of this LLVM sees that the matrix unit is to read it.
        a, b = (e & 0xFF) << 8 | (o & 0xFF) << 24, e & 0xFF00 | (o & 0xFF00) << 16
        c, d = (e >> 8) & 0xFF00 | (o & 0xFF0000) << 8, (e >> 16) & 0xFF00 | o & -0x1000000
    return joined(halves_of(a, True), halves_of(b, True), halves_of(c, True), halves_of(d, True), ROWS)
