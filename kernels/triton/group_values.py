"""Weights of `group_gemm.py` as loaded -> values in x's dtype, exact and without their group's scale; and that scale.

| format | a value | exact in | scales |
| --- | --- | --- | --- |
| `int4` | q - z | bf16 and fp16: 4 significant bits | int32 words of scale and zero point z (`formats.group_words`) |
| `e2m1` | 0.5 to 6 | fp16 | uint8 e8m0 |
| `e4m3` | 2^-9 to 448, NaN | fp16 | uint8 e8m0 |
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mx_gemm import e8m0_to_fp32


@triton.jit
def codes_of(words):
    """int32 [R, C] words of eight codes in sequence -> int32 [R, C, 2, 2, 2], in order of K."""
    codes = tl.join(words, words >> 16)  # 0 to 3, and 4 to 7
    codes = tl.join(codes, codes >> 8)
    return tl.join(codes, codes >> 4) & 15


@triton.jit
def shifted(codes, HALF: tl.constexpr):
    """Codes 0 to 15, as the last bits of a mantissa -> 1024 + code in fp16 if HALF, else 128 + code in fp32."""
    bits = (codes | 0x6400).to(tl.int16) if HALF else codes << 16 | 0x43000000
    return bits.to(tl.float16 if HALF else tl.float32, bitcast=True)


@triton.jit
def int4_values(codes, zeros, HALF: tl.constexpr):
    """Codes [ROWS, DEPTH] and int32 zero points [ROWS] -> q - z, fp16 if HALF, else bf16.

    A difference of 15 at most has 4 significant bits, so the upper half of an fp32 is all of it.
    """
    values = shifted(codes, HALF) - shifted(zeros, HALF)[:, None]
    if not HALF:
        values = (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values


@triton.jit
def e2m1_to_half(codes):
    """int32 codes 0 to 15 -> fp16 of the same shape.

    Where fp16 keeps the last two bits of its exponent and the first of its mantissa, the magnitude bits are 2^-14 times
    the value, a subnormal for 1/2; so no matrix unit gets to see one.
    """
    bits = ((codes & 8) << 12 | (codes & 7) << 9).to(tl.int16)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def e4m3_to_half(data):
    """uint8 codes -> fp16 of the same shape: likewise, its bits are 2^-8 times the value."""
    codes = data.to(tl.uint16)
    values = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where(codes & 0x7F == 0x7F, float("nan"), values)


@triton.jit
def values_of(
    data, scales, FORMAT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """DEPTH elements of each row: uint8 [ROWS, DEPTH] of e4m3, else int32 [ROWS, DEPTH / 8]; and their group's scales
    [ROWS] as loaded -> [ROWS, DEPTH], fp16 if HALF, else bf16."""
    tl.static_assert(HALF or FORMAT == "int4", "MX weights go with fp16 x here; mx_gemm takes bf16")
    if FORMAT == "e4m3":
        values = e4m3_to_half(data)
    else:
        codes = codes_of(data).reshape(ROWS, DEPTH)
        values = e2m1_to_half(codes) if FORMAT == "e2m1" else int4_values(codes, scales & 15, HALF)
    return values


@triton.jit
def scale_of(scales, FORMAT: tl.constexpr):
    """Scales as loaded -> fp32."""
    return (scales & -16).to(tl.float32, bitcast=True) if FORMAT == "int4" else e8m0_to_fp32(scales)
