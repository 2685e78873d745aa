"""Words of eight e4m3 codes -> bf16, exact, in few instructions of AMD's (`amd_gemm.py`).

| | by way of | instructions for 8 |
| --- | --- | --- |
| gfx942 | fp32, two at once, scaled there; of OCP codes negative zeros are cleared first | 12, OCP 20 |
| RDNA | fp16, where sign, exponent and mantissa are 2^-8 times the value; then fp32; sums are scaled | 24 |

NaN: FNUZ has a code that converts to it. The 0x7F of OCP is a number to both ways: in strided weights the whole word
becomes NaN by its factor, 6 instructions more; in those of a layout the block has, by its scale (`nan_by_scale`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .e2m1_values import scaled_bytes
from .int4_values import joined, upper_halves

_SPREAD = gl.constexpr("""
v_perm_b32 $0, $1, $1, $2
v_pk_ashrrev_i16 $0, 1, $0 op_sel_hi:[0,1]
""")
_FLOATS = gl.constexpr("""
v_fma_mix_f32 $0, $8, $12, 0 op_sel_hi:[1,0,0]
v_fma_mix_f32 $1, $8, $12, 0 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $2, $9, $12, 0 op_sel_hi:[1,0,0]
v_fma_mix_f32 $3, $9, $12, 0 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $4, $10, $12, 0 op_sel_hi:[1,0,0]
v_fma_mix_f32 $5, $10, $12, 0 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $6, $11, $12, 0 op_sel_hi:[1,0,0]
v_fma_mix_f32 $7, $11, $12, 0 op_sel:[1,0,0] op_sel_hi:[1,0,0]
""")


@gluon.jit
def halves(words, PLACES: gl.constexpr):
    """Two bytes of a word as fp16, 2^-8 times what they stand for."""
    spread = gl.inline_asm_elementwise(_SPREAD, "=&v,v,s", [words, PLACES], dtype=gl.int32, is_pure=True, pack=1)
    return spread & -0x40004001  # the sign came along to where the exponent begins


@gluon.jit
def with_nan(factors, low, high):
    """Factors, NaN where one of eight OCP codes is."""
    found = ((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101)
    return gl.where((found & -0x7F7F7F80) != 0, float("nan"), factors)


@gluon.jit
def without_negative_zeros(words):
    """Which are NaN in FNUZ."""
    magnitudes = words & 0x7F7F7F7F
    return magnitudes | words & (magnitudes + 0x7F7F7F7F) & -0x7F7F7F80


@gluon.jit
def e4m3_values(words, scales, ARCH: gl.constexpr, STRIDED: gl.constexpr, ROWS: gl.constexpr):
    """Values of codes, on gfx942 times their scale.

    Args:
        words: int64 [ROWS, 4], of 32 codes along K.
        scales: fp32 [ROWS, 1].
        ARCH: gfx942 or gfx11.
        STRIDED: OCP codes, among which may be NaN; else on gfx942 FNUZ ones, on gfx11 OCP ones without NaN.
    """
    low, high = words.to(gl.int32), (words >> 32).to(gl.int32)
    if ARCH == "gfx942":
        factors = scales
        if STRIDED:
            factors = with_nan(scales * 2.0, low, high)
            low, high = without_negative_zeros(low), without_negative_zeros(high)
        p, q, r, t = scaled_bytes(low, high, factors)
        a, b = (
            upper_halves(p.to(gl.int32), (p >> 32).to(gl.int32)),
            upper_halves(q.to(gl.int32), (q >> 32).to(gl.int32)),
        )
        c, d = (
            upper_halves(r.to(gl.int32), (r >> 32).to(gl.int32)),
            upper_halves(t.to(gl.int32), (t >> 32).to(gl.int32)),
        )
    else:
        factors = gl.full(low.shape, 256.0, gl.float32, low.type.layout)
        if STRIDED:
            factors = with_nan(factors, low, high)
        v = gl.inline_asm_elementwise(
            _FLOATS,
            "=&v,=&v,=&v,=&v,=&v,=&v,=&v,=&v,v,v,v,v,v",
            [
                halves(low, 0x010C000C),
                halves(low, 0x030C020C),
                halves(high, 0x010C000C),
                halves(high, 0x030C020C),
                factors,
            ],
            dtype=(gl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        a, b, c, d = (
            upper_halves(v[0], v[1]),
            upper_halves(v[2], v[3]),
            upper_halves(v[4], v[5]),
            upper_halves(v[6], v[7]),
        )
    return joined(a, b, c, d, ROWS)
