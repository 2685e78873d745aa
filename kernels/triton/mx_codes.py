"""Values to MX codes and scales, and through them: what kernels that quantize share.

Bit for bit what `sglang_amd_quant.formats.quantize_mx` gives. ARCH says which conversions there are: `sm_90` and
`gfx950` have one to e4m3, gfx950 one to e2m1; everything else takes integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def least_of(element):
    """fp32's exponent of an element's least normal number."""
    return 121 if element == "e4m3" else 127


@triton.constexpr_function
def dropped_of(element):
    """Bits of fp32's mantissa that an element has not."""
    return 20 if element == "e4m3" else 22


@triton.jit
def roundable(y, ELEMENT: tl.constexpr):
    """|y| up to the element's largest, which NaN becomes too, and what to add and take away again to round it to the
    element, ties to even: a power of two that leaves an ulp of just one code. fp32 bits of both."""
    LARGEST: tl.constexpr = 0x43E00000 if ELEMENT == "e4m3" else 0x40C00000  # 448, 6
    LEAST: tl.constexpr = least_of(ELEMENT)
    DROPPED: tl.constexpr = dropped_of(ELEMENT)
    size = tl.minimum(y.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, LARGEST)
    return size, tl.maximum(size & 0x7F800000, LEAST << 23) + (DROPPED << 23)


@triton.jit
def encode(y, ELEMENT: tl.constexpr):
    """fp32 -> codes, uint32: nearest, ties to even, saturating at the element's largest, which NaN becomes too. Integer
    arithmetic, for an ARCH without a conversion."""
    LEAST: tl.constexpr = least_of(ELEMENT)
    DROPPED: tl.constexpr = dropped_of(ELEMENT)
    SIGN: tl.constexpr = 0x80 if ELEMENT == "e4m3" else 8
    BELOW: tl.constexpr = 24 if ELEMENT == "e4m3" else 28  # from fp32's sign down to the code's
    size, shift = roundable(y, ELEMENT)
    total = size.to(tl.float32, bitcast=True) + shift.to(tl.float32, bitcast=True)
    code = total.to(tl.uint32, bitcast=True) - shift + ((shift - ((LEAST + DROPPED) << 23)) >> DROPPED)
    return code | (y.to(tl.uint32, bitcast=True) >> BELOW & SIGN)


_HALVES = """
cvt.rn.f16x2.f32 half{i}, {high}, {low};
abs.f16x2 size, half{i};
min.f16x2 size, size, six;
max.u16x2 shift, size, one;
and.b32 shift, shift, 0x7C007C00;
fma.rn.f16x2 size, shift, many, size;
sub.u32 size, size, shift;
shr.u32 shift, shift, 9;
add.u32 code{i}, size, shift;
"""
"""Two codes from two values, in the halves of a register, less their signs and plus 0x241E, as `encode` does it in
fp32: 2^9 times the exponent is added, and the mantissa is what is left."""

_SIGNED = """
prmt.b32 sign, half{i}, half{j}, 0x7351;
shr.u32 sign, sign, 4;
and.b32 sign, sign, 0x08080808;
shl.b32 code{j}, code{j}, 8;
add.u32 code{i}, code{i}, code{j};
sub.u32 code{i}, code{i}, 0x4242421E;
or.b32 code{i}, code{i}, sign;
shr.u32 code{j}, code{i}, 12;
add.u32 code{i}, code{i}, code{j};
"""
"""Four codes with their signs, of two registers, as two bytes in the lower half of one."""

_BYTES = tl.constexpr(
    "{ .reg .b32 six, one, many, size, shift, sign, half0, half1, half2, half3, code0, code1, code2, code3;"
    "mov.b32 six, 0x46004600; mov.b32 one, 0x3C003C00; mov.b32 many, 0x60006000;"
    + "".join(_HALVES.format(i=i, low=f"${1 + i}", high=f"${5 + i}") for i in range(4))
    + _SIGNED.format(i=0, j=1)
    + _SIGNED.format(i=2, j=3)
    + "prmt.b32 $0, code0, code2, 0x5410; }"
)


@triton.jit
def e2m1_of_halves(low, high):
    """fp32 -> bytes of two e2m1 codes, on sm_90: two values an instruction, as fp16.

    Right for what was bf16 or fp16 before a power of two was applied: fp16 holds it, but for what rounds to 0.
    """
    return tl.inline_asm_elementwise(_BYTES, "=r,r,r,r,r,r,r,r,r", [low, high], dtype=tl.uint8, is_pure=True, pack=4)


_LATER = "\ns_nop 0\n"
"""gfx950 wants a wait state before an instruction that reads a register of which another has written a part."""

_TWICE_TWO = tl.constexpr(_LATER.join(["v_cvt_pk_fp8_f32 $0, $1, $3", "v_cvt_pk_fp8_f32 $0, $2, $4 op_sel:[0,0,1]"]))
"""Two codes of e4m3 from two values, twice: gfx950's conversion."""

_TWICE_FOUR = tl.constexpr(
    _LATER.join(
        f"v_cvt_scalef32_pk_fp4_f32 $0, ${low}, ${low + 2}, 1.0 op_sel:[0,0,{byte % 2},{byte // 2}]"
        for byte, low in enumerate((1, 5, 2, 6))
    )
)
"""Four of e2m1 from two pairs, twice."""


@triton.jit
def e4m3_codes(y, ARCH: tl.constexpr):
    """fp32 values to nearest, saturated, as bytes of e4m3; gfx950 has a conversion of two at once (`store_codes`)."""
    return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if ARCH == "sm_90" else encode(y, "e4m3").to(tl.uint8)


@triton.jit
def store_codes(data, wide, first, K, inside_m, y, ELEMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                ARCH: tl.constexpr):  # fmt: skip
    """Store values over their scales, fp32 [BLOCK_M, BLOCK_K], as the codes of rows `wide`, columns `first` and on, of
    K columns in data. Two e2m1 codes a byte, the first in the low half. Of values that were bf16 or fp16 before a power
    of two was applied: see `e2m1_of_halves`."""
    # Bits of a word: on gfx950 a register holds two words of 16, but not four bytes.
    WORD: tl.constexpr = 16 if ARCH == "gfx950" else 8
    PER: tl.constexpr = WORD // (8 if ELEMENT == "e4m3" else 4)
    words = first // PER + tl.arange(0, BLOCK_K // PER)
    mask = inside_m & (words < K // PER)[None, :]
    offsets = wide * (K // PER) + words[None, :]
    if PER > 1:
        even, odd = tl.split(y.reshape(BLOCK_M, BLOCK_K // 2, 2))
    if WORD == 16:
        data = data.to(tl.pointer_type(tl.int16))
    places = data + offsets
    if ARCH == "gfx950":
        if ELEMENT == "e4m3":
            even, odd = tl.clamp(even, -448.0, 448.0), tl.clamp(odd, -448.0, 448.0)
            codes = tl.inline_asm_elementwise(
                _TWICE_TWO, "=&v,v,v,v,v", [even, odd], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            a, c = tl.split(even.reshape(BLOCK_M, BLOCK_K // 4, 2))
            b, d = tl.split(odd.reshape(BLOCK_M, BLOCK_K // 4, 2))
            codes = tl.inline_asm_elementwise(
                _TWICE_FOUR, "=&v,v,v,v,v,v,v,v,v", [a, b, c, d], dtype=tl.int16, is_pure=True, pack=2
            )
    elif ELEMENT == "e4m3":
        codes = e4m3_codes(y, ARCH)
    elif ARCH == "sm_90":
        codes = e2m1_of_halves(even, odd)
    else:
        codes = (encode(even, ELEMENT) | encode(odd, ELEMENT) << 4).to(tl.uint8)
    tl.store(places, codes, mask=mask)


@triton.jit
def store_ordered(data, wide, first, K, inside_m, y, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ARCH: tl.constexpr):
    """As `store_codes` of e4m3, but in `x_order` of `hopper_pack.py`, K rounded up to 64: the 4 x 4 words of every 64
    bytes are transposed. Two stores, each of every second word, so that no value goes to another thread."""
    here, there = tl.split(e4m3_codes(y, ARCH).reshape(BLOCK_M, BLOCK_K // 8, 2, 4).permute(0, 1, 3, 2))
    width = tl.cdiv(K, 64) * 64
    columns = first + tl.arange(0, BLOCK_K // 2) // 4 * 8 + tl.arange(0, BLOCK_K // 2) % 4
    columns = (columns & -64) | (columns & 8) << 2 | (columns & 48) >> 2 | (columns & 3)
    columns = tl.max_contiguous(tl.multiple_of(columns, 4), 4)  # the compiler does not see it, and would store bytes
    mask = inside_m & (columns < width)[None, :]
    places = data + wide * width + columns[None, :]
    tl.store(places, here.reshape(BLOCK_M, BLOCK_K // 2), mask=mask)
    tl.store(places + 16, there.reshape(BLOCK_M, BLOCK_K // 2), mask=mask)


@triton.jit
def scale_bits(largest, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """Bits of the largest magnitude -> the e8m0 byte of its block where fp32 has its exponent; of NaN anything."""
    return tl.maximum(((largest + CARRY) & 0x7F800000).to(tl.int32) - (EMAX << 23), 0)


@triton.jit
def scale_byte(largest, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """Bits of the largest magnitude -> e8m0 byte; 255 for NaN."""
    return tl.where(largest > 0x7F800000, 255, scale_bits(largest, CARRY, EMAX) >> 23)


@triton.jit
def over_scale(largest, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """What values are multiplied with to be divided by their block's scale; of a block with NaN anything."""
    return ((254 << 23) - scale_bits(largest, CARRY, EMAX)).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(byte):
    """2^(byte - 127) as fp32; 0 is a subnormal, 255 NaN."""
    bits = tl.maximum(byte << 23, 1 << 22)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def largest_bits(values, axis: tl.constexpr):
    """fp32 bits of the largest magnitude along an axis of fp32, bf16 or fp16, whose own bits are in the same order; a
    NaN's are larger than any number's."""
    if values.dtype == tl.float32:
        bits = tl.max((values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis).to(tl.uint32)
    else:
        bits = tl.max((values.to(tl.uint16, bitcast=True) & 0x7FFF).to(tl.int32), axis).to(tl.uint16)
        bits = bits.to(values.dtype, bitcast=True).to(tl.float32).to(tl.uint32, bitcast=True)
    return bits


@triton.jit
def rounded_to(small, scale, ELEMENT: tl.constexpr, ARCH: tl.constexpr):
    """Values over their block's scale after a round trip through `ELEMENT`, times that scale, a byte."""
    if ELEMENT == "e4m3" and ARCH == "sm_90":
        kept = small.to(tl.float8e4nv).to(tl.float32)
    else:
        size, shift = roundable(small, ELEMENT)
        shift = shift.to(tl.float32, bitcast=True)
        size = (size.to(tl.float32, bitcast=True) + shift - shift).to(tl.uint32, bitcast=True)
        kept = (size | (small.to(tl.uint32, bitcast=True) & 0x80000000)).to(tl.float32, bitcast=True)
    return kept * power_of_two(scale)
