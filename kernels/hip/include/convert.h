// Numbers narrower than float, in and out: bf16, half, e4m3, e2m1 and the e8m0 scale.
//
// Formats: OCP Microscaling Formats (MX) v1.0, sections 5.2 to 5.4. Codes are always OCP codes, also on gfx942, whose own
// e4m3 is FNUZ. Conversions to a narrower format round to nearest, ties to even, and saturate; every function here is
// compared with torch over all codes, on every target (tests/kernels/test_include.py).
#pragma once
#include "wave.h"

#if TARGET_AMD
typedef _Float16 Half2Vector __attribute__((ext_vector_type(2)));
typedef float Float2Vector __attribute__((ext_vector_type(2)));
#endif

/// Two halves (or two bf16) in one register, the first in the low bits.
typedef uint32_t Half2;
typedef uint32_t Bf16x2;

struct Float2 {
    float x, y;
};

/// a * b + c, elementwise: one v_pk_fma_f32 on gfx9, two fused multiply-adds elsewhere.
DEVICE Float2 fma2(Float2 a, Float2 b, Float2 c) {
#if TARGET_AMD
    return bits<Float2>(__builtin_elementwise_fma(bits<Float2Vector>(a), bits<Float2Vector>(b), bits<Float2Vector>(c)));
#else
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

/// e^x, to a few ulp.
DEVICE float exponential(float x) {
#if TARGET_AMD
    return __builtin_amdgcn_exp2f(x * 1.44269504f);
#else
    return exp2f(x * 1.44269504f);
#endif
}

/// a / b, on sm_90 within two units in the last place: an exact one is a function call there. 0 if b > 2^126.
DEVICE float quotient_of(float a, float b) {
#if TARGET_SM90
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// ---- bf16 and half

/// `bf16` in the low 16 bits (what lies above is dropped).
DEVICE float float_from_bf16(uint32_t bf16) { return bits<float>(bf16 << 16); }

DEVICE Float2 floats_from_bf16x2(Bf16x2 pair) { return {bits<float>(pair << 16), bits<float>(pair & 0xffff0000u)}; }

/// The nearest bf16, ties to even; NaN stays NaN.
DEVICE uint16_t bf16_from_float(float value) {
#if TARGET_SM90
    uint16_t bf16;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bf16) : "f"(value));
    return bf16;
#else
    const uint32_t u = bits<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(u >> 16 | 0x40);  // rounding up could carry a NaN over to infinity
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

DEVICE Bf16x2 bf16x2_from_floats(Float2 v) {
#if TARGET_AMD
    return bf16_from_float(v.x) | static_cast<uint32_t>(bf16_from_float(v.y)) << 16;
#else
    Bf16x2 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(v.y), "f"(v.x));
    return pair;
#endif
}

#if TARGET_SM90
/// Elementwise, rounded to bf16; subnormals count.
DEVICE Bf16x2 times_bf16(Bf16x2 a, Bf16x2 b) {
    Bf16x2 product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}
DEVICE Bf16x2 plus_bf16(Bf16x2 a, Bf16x2 b) {
    Bf16x2 sum;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
DEVICE Bf16x2 minus_bf16(Bf16x2 a, Bf16x2 b) {
    Bf16x2 difference;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

/// `value`, at most `most` from zero; both elementwise.
DEVICE Bf16x2 clamp_bf16(Bf16x2 value, Bf16x2 most) {
    Bf16x2 within;
    asm("{.reg .b32 t;\n\tmin.bf16x2 t, %1, %2;\n\tmax.bf16x2 %0, t, %3;}"
        : "=r"(within)
        : "r"(value), "r"(most), "r"(most ^ 0x80008000u));
    return within;
}
#endif

/// The nearest halves, ties to even; what does not fit becomes infinity.
DEVICE Half2 half2_from_floats(Float2 v) {
#if TARGET_AMD
    return bits<Half2>(__builtin_convertvector(bits<Float2Vector>(v), Half2Vector));
#else
    Half2 h;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(v.y), "f"(v.x));
    return h;
#endif
}

DEVICE Float2 floats_from_half2(Half2 h) {
#if TARGET_AMD
    return bits<Float2>(__builtin_convertvector(bits<Half2Vector>(h), Float2Vector));
#else
    Float2 v;
    asm("{.reg .f16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;}" : "=f"(v.x), "=f"(v.y) : "r"(h));
    return v;
#endif
}

// ---- e8m0: the exponent byte of a float, 2^(code - 127); 255 is NaN, there is no zero

DEVICE float float_from_e8m0(uint32_t code) {
    if (code == 255) return bits<float>(0x7fc00000u);
    return bits<float>(larger(code << 23, 0x00400000u));  // code 0 is 2^-127, a subnormal float
}

/// value * 2^exponent, exact whenever the result is a normal float; |exponent| <= 254.
DEVICE float times_power_of_two(float value, int exponent) {
#if TARGET_AMD
    return __builtin_amdgcn_ldexpf(value, exponent);
#else
    const int half = exponent >> 1;  // 2^exponent itself may not be a float, its two halves are
    return value * bits<float>((half + 127) << 23) * bits<float>((exponent - half + 127) << 23);
#endif
}

// ---- e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 by the low three bits of a code, sign in the fourth; eight codes in a word

/// `halves_from_e2m1` returns values times 2^-E2M1_HALF_EXPONENT ...
constexpr int E2M1_HALF_EXPONENT = TARGET_SM90 ? 14 : 0;

/// ... and code k of the word, k = 4 * (its bit offset), in half `e2m1_half_of(k)` of the result, counted from 0.
/// Both are whatever costs fewest instructions; a dot product absorbs them into its other factor.
constexpr DEVICE int e2m1_half_of(int k) {
    return TARGET_SM90 ? 2 * (k % 4) + k / 4 : k;
}

#if TARGET_AMD
/// Byte i of the result is byte `selector.byte[i]` of the eight bytes low, high; 12 gives zero.
DEVICE uint32_t permute_bytes(uint32_t high, uint32_t low, uint32_t selector) {
    return __builtin_amdgcn_perm(high, low, selector);
}
#endif

/// Eight e2m1 codes as eight halves: 4 instructions on gfx950, 12 on other AMD targets, 15 on sm_90.
DEVICE void halves_from_e2m1(uint32_t codes, Half2 (&halves)[4]) {
#if TARGET_GFX950
    halves[0] = bits<Half2>(__builtin_amdgcn_cvt_scalef32_pk_f16_fp4(codes, 1.0f, 0));
    halves[1] = bits<Half2>(__builtin_amdgcn_cvt_scalef32_pk_f16_fp4(codes, 1.0f, 1));
    halves[2] = bits<Half2>(__builtin_amdgcn_cvt_scalef32_pk_f16_fp4(codes, 1.0f, 2));
    halves[3] = bits<Half2>(__builtin_amdgcn_cvt_scalef32_pk_f16_fp4(codes, 1.0f, 3));
#elif TARGET_AMD
    // The half of an e2m1 value has nothing in its low byte, so a table of eight high bytes is looked up for four codes at
    // once, and the sign is put in after: 00 38 3c 3e | 40 42 44 46 are the high bytes of 0 .5 1 1.5 | 2 3 4 6.
    const uint32_t even = permute_bytes(0x46444240u, 0x3e3c3800u, codes & 0x07070707u) | (codes << 4 & 0x80808080u);
    const uint32_t odd = permute_bytes(0x46444240u, 0x3e3c3800u, codes >> 4 & 0x07070707u) | (codes & 0x80808080u);
    halves[0] = permute_bytes(odd, even, 0x040c000cu);  // 12: zero; 0..3: bytes of even; 4..7: bytes of odd
    halves[1] = permute_bytes(odd, even, 0x050c010cu);
    halves[2] = permute_bytes(odd, even, 0x060c020cu);
    halves[3] = permute_bytes(odd, even, 0x070c030cu);
#else
    // Code seee at bit 15 and 11..9 of a half is the value times 2^-14: the exponent biases are 1 and 15, and e2m1's one
    // subnormal lands on a subnormal half. Codes i and i + 4 are 16 bits apart, so both are placed by the same shifts.
    halves[0] = (codes << 12 & 0x80008000u) | (codes << 9 & 0x0e000e00u);
    halves[1] = (codes << 8 & 0x80008000u) | (codes << 5 & 0x0e000e00u);
    halves[2] = (codes << 4 & 0x80008000u) | (codes << 1 & 0x0e000e00u);
    halves[3] = (codes & 0x80008000u) | (codes >> 3 & 0x0e000e00u);
#endif
}

/// Eight e2m1 codes as eight floats, in the order of the codes.
DEVICE void floats_from_e2m1(uint32_t codes, float (&values)[8]) {
    Half2 halves[4];
    halves_from_e2m1(codes, halves);
    float unordered[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Float2 pair = floats_from_half2(halves[i]);
        unordered[2 * i] = pair.x;
        unordered[2 * i + 1] = pair.y;
    }
#pragma unroll
    for (int k = 0; k < 8; k++) values[k] = unordered[e2m1_half_of(k)] * static_cast<float>(1 << E2M1_HALF_EXPONENT);
}

/// Eight floats as eight e2m1 codes; |value| > 6 saturates. NaN has no code: the caller's scale is NaN then.
DEVICE uint32_t e2m1_from_floats(const float (&values)[8]) {
    uint32_t codes = 0;
#if TARGET_GFX950
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(codes, values[0], values[1], 1.0f, 0);
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(codes, values[2], values[3], 1.0f, 1);
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(codes, values[4], values[5], 1.0f, 2);
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_f32(codes, values[6], values[7], 1.0f, 3);
#else
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const uint32_t u = bits<uint32_t>(values[k]), magnitude = u & 0x7fffffffu;
        // From 1 upwards one mantissa bit is kept (bit 22); below, codes are multiples of a half, which is what is left of
        // a float after adding 2^22.
        const uint32_t normal = ((magnitude + 0x1fffffu + (magnitude >> 22 & 1)) >> 22) - (126 << 1);
        const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 4194304.0f) - bits<uint32_t>(4194304.0f);
        codes |= (smaller(magnitude < 0x3f800000u ? small : normal, 7u) | u >> 31 << 3) << 4 * k;
    }
#endif
    return codes;
}

// ---- e4m3 (fn): largest value 448, 0x7f and 0xff are NaN; four codes in a word

/// Four e4m3 codes as four floats.
DEVICE void floats_from_e4m3(uint32_t codes, float (&values)[4]) {
#if TARGET_GFX950
    const Float2 low = bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, false));
    const Float2 high = bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, true));
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
#elif TARGET_SM90
#pragma unroll
    for (int i = 0; i < 2; i++) {
        Half2 h;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(static_cast<uint16_t>(codes >> 16 * i)));
        const Float2 pair = floats_from_half2(h);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
#else
    // The code's seven low bits, moved to the top of a float's fraction and bottom of its exponent, are the value times
    // 2^-120 (biases 7 and 127). gfx942's own conversion reads 0x80 as NaN and 0x7f as a number: not used.
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t code = codes >> 8 * i, magnitude = code & 0x7f;
        const float value = bits<float>(magnitude << 20) * 0x1p120f;
        values[i] = bits<float>((magnitude == 0x7f ? 0x7fc00000u : bits<uint32_t>(value)) | (code & 0x80) << 24);
    }
#endif
}

/// Four floats as four e4m3 codes; |value| > 448 saturates, NaN becomes NaN.
DEVICE uint32_t e4m3_from_floats(const float (&values)[4]) {
    uint32_t codes = 0;
#if TARGET_SM90
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
        codes |= static_cast<uint32_t>(pair) << 16 * i;
    }
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t u = bits<uint32_t>(values[i]);
        const float magnitude = __builtin_fminf(bits<float>(u & 0x7fffffffu), 448.0f);
#if TARGET_GFX950
        uint32_t code = __builtin_amdgcn_cvt_pk_fp8_f32(magnitude, 0.0f, 0, false);
#elif TARGET_GFX942
        // The FNUZ code of half a value is the OCP code of the value: its exponent bias is 8 instead of 7.
        uint32_t code = __builtin_amdgcn_cvt_pk_fp8_f32(0.5f * magnitude, 0.0f, 0, false);
#else
        // From 2^-6 upwards three mantissa bits are kept; below, codes are multiples of 2^-9, which is what is left of a
        // float after adding 2^14.
        const uint32_t m = bits<uint32_t>(magnitude);
        const uint32_t normal = ((m + 0x7ffffu + (m >> 20 & 1)) >> 20) - (120 << 3);
        const uint32_t small = bits<uint32_t>(magnitude + 16384.0f) - bits<uint32_t>(16384.0f);
        uint32_t code = m < 0x3c800000u ? small : normal;
#endif
        if (values[i] != values[i]) code = 0x7f;
        codes |= (code | u >> 31 << 7) << 8 * i;
    }
#endif
    return codes;
}
