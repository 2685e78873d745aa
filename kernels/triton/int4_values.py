"""Words of eight int4 codes -> q - z in fp16 or bf16, exact, in few instructions of AMD's (`amd_gemm.py`).

| x | by way of | instructions for 8 |
| --- | --- | --- |
| fp16 | a nibble under the exponent of 1024: 1024 + q, or 1024 + 16 q, of which a sixteenth is 64 + q | 9 |
| bf16, CDNA | a byte as e4m3: q 2^-9 (gfx942's, which is FNUZ: q 2^-10), two of which become fp32 at once | 15 |
| bf16, RDNA | fp16 again, subtracted in fp32 | 17 |

Assembly where LLVM takes halves of a register apart, or does not find the conversion. What it does not know of assembly
is what CDNA asks for beside the matrix unit: that registers of sums in use are not written for three wait states
(`s_nop 2`, or writing no other registers than were read), and that results are read two after (`s_nop 1`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_HALVES = gl.constexpr("""
v_pk_add_f16 $0, $0, $4 op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]
v_pk_fma_f16 $1, $1, $6, $5 op_sel_hi:[1,1,0] neg_lo:[0,0,1] neg_hi:[0,0,1]
v_pk_add_f16 $2, $2, $4 op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]
v_pk_fma_f16 $3, $3, $6, $5 op_sel_hi:[1,1,0] neg_lo:[0,0,1] neg_hi:[0,0,1]
s_nop 1
""")
BYTES_TO_FLOATS = """
s_nop 2
v_cvt_pk_f32_fp8_e32 $0, $4
v_cvt_pk_f32_fp8_sdwa $1, $4 src0_sel:WORD_1
v_cvt_pk_f32_fp8_e32 $2, $5
v_cvt_pk_f32_fp8_sdwa $3, $5 src0_sel:WORD_1
"""
_FLOATS_CDNA = gl.constexpr(
    BYTES_TO_FLOATS
    + """
v_pk_fma_f32 $0, $0, $7, $6 neg_lo:[0,0,1] neg_hi:[0,0,1]
v_pk_fma_f32 $1, $1, $7, $6 neg_lo:[0,0,1] neg_hi:[0,0,1]
v_pk_fma_f32 $2, $2, $7, $6 neg_lo:[0,0,1] neg_hi:[0,0,1]
v_pk_fma_f32 $3, $3, $7, $6 neg_lo:[0,0,1] neg_hi:[0,0,1]
"""
)
_FLOATS_RDNA = gl.constexpr("""
v_fma_mix_f32 $0, $8, 1.0, $12 op_sel_hi:[1,0,0]
v_fma_mix_f32 $1, $8, 1.0, $12 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $2, $9, $14, $13 op_sel_hi:[1,0,0]
v_fma_mix_f32 $3, $9, $14, $13 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $4, $10, 1.0, $12 op_sel_hi:[1,0,0]
v_fma_mix_f32 $5, $10, 1.0, $12 op_sel:[1,0,0] op_sel_hi:[1,0,0]
v_fma_mix_f32 $6, $11, $14, $13 op_sel_hi:[1,0,0]
v_fma_mix_f32 $7, $11, $14, $13 op_sel:[1,0,0] op_sel_hi:[1,0,0]
""")


@gluon.jit
def paired(words):
    """Nibbles in order of K -> as the assembly takes them: 0, 2, 4, 6, 1, 3, 5, 7."""
    w = words.to(gl.uint32, bitcast=True)
    w = w & 0xF00FF00F | (w & 0x00F000F0) << 4 | (w & 0x0F000F00) >> 4
    w = w & 0xFF0000FF | (w & 0x0000FF00) << 8 | (w & 0x00FF0000) >> 8
    return w.to(gl.int32, bitcast=True)


@gluon.jit
def joined(a, b, c, d, ROWS: gl.constexpr):
    """Elements 0 and 1, 2 and 3, 4 and 5, 6 and 7 of each word, [ROWS, 4, 2] -> [ROWS, 32]."""
    values = gl.join(gl.join(a, c), gl.join(b, d))
    return values.permute((0, 1, 3, 4, 2)).reshape((ROWS, 32))


@gluon.jit
def halves_of(pairs, HALF: gl.constexpr):
    """int32 [R, C] of two fp16 each if HALF, else of two bf16 -> [R, C, 2]."""
    bits = gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16))
    return bits.to(gl.float16 if HALF else gl.bfloat16, bitcast=True)


@gluon.jit
def upper_halves(low, high):
    """Bits of fp32 of 8 significant bits at most, two int32 [R, C] -> bf16 [R, C, 2]."""
    return gl.join(low >> 16, high >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def int4_values(words, zeros, ARCH: gl.constexpr, HALF: gl.constexpr, PAIRED: gl.constexpr, ROWS: gl.constexpr):
    """q - z.

    Args:
        words: int32 [ROWS, 4], of 32 codes along K.
        zeros: int32 [ROWS, 1], whose last four bits are zero points.
        ARCH: gfx950, gfx942 or gfx11.
        HALF: in fp16, else bf16.
        PAIRED: nibbles are elements 0, 2, 4, 6, 1, 3, 5, 7; else in order.
    """
    zeros = zeros & 15
    words = words if PAIRED else paired(words)
    if HALF or ARCH == "gfx11":
        # As from a register: of two constants LLVM makes two instructions, where there is one for both.
        exponent = gl.inline_asm_elementwise("v_mov_b32 $0, 0x64006400", "=v", [], dtype=gl.int32, is_pure=True, pack=1)
        upper = words >> 8
        a, b = words & 0x000F000F | exponent, words & 0x00F000F0 | exponent
        c, d = upper & 0x000F000F | exponent, upper & 0x00F000F0 | exponent
    if HALF:
        a, b, c, d = gl.inline_asm_elementwise(
            _HALVES,
            "=v,=v,=v,=v,v,v,s,0,1,2,3",
            [zeros | 0x6400, zeros << 4 | 0x5400, 0x2C002C00, a, b, c, d],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        values = joined(halves_of(a, HALF), halves_of(b, HALF), halves_of(c, HALF), halves_of(d, HALF), ROWS)
    elif ARCH == "gfx11":
        z = zeros.to(gl.float32)
        v = gl.inline_asm_elementwise(
            _FLOATS_RDNA,
            "=&v,=&v,=&v,=&v,=&v,=&v,=&v,=&v,v,v,v,v,v,v,s",
            [a, b, c, d, -1024.0 - z, -64.0 - z, 0.0625],
            dtype=(gl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        low, high = upper_halves(v[0], v[1]), upper_halves(v[4], v[5])
        values = joined(low, upper_halves(v[2], v[3]), high, upper_halves(v[6], v[7]), ROWS)
    else:
        z = zeros.to(gl.float32).to(gl.uint32, bitcast=True).to(gl.uint64)
        ONE: gl.constexpr = 0x4400000044000000 if ARCH == "gfx950" else 0x4480000044800000  # 2^9 or 2^10, twice
        # Elements 0 and 4, 1 and 5, 2 and 6, 3 and 7.
        p, q, r, s = gl.inline_asm_elementwise(
            _FLOATS_CDNA,
            "=&v,=&v,=&v,=&v,v,v,v,s",
            [words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F, z << 32 | z, ONE],
            dtype=(gl.int64, gl.int64, gl.int64, gl.int64),
            is_pure=True,
            pack=1,
        )
        a, b = upper_halves(p.to(gl.int32), q.to(gl.int32)), upper_halves(r.to(gl.int32), s.to(gl.int32))
        c = upper_halves((p >> 32).to(gl.int32), (q >> 32).to(gl.int32))
        values = joined(a, b, c, upper_halves((r >> 32).to(gl.int32), (s >> 32).to(gl.int32)), ROWS)
    return values
