// Activations of the decode kernels on AMD: from eight bf16 a lane to codes or halves.
#pragma once
#include "decode.h"

/// `value` of the lane `Lanes` further back among sixteen, around their end.
template <int Lanes>
DEVICE uint32_t rotated(uint32_t value) {
    return __builtin_amdgcn_update_dpp(0, value, 0x120 + Lanes, 15, 15, true);
}

/// `value` of the lane whose place among four neighbouring lanes is this one's xor Mask: 1 or 2.
template <int Mask>
DEVICE uint32_t quad_xor(uint32_t value) {
    constexpr int permutation = Mask == 1 ? 1 | 0 << 2 | 3 << 4 | 2 << 6 : 2 | 3 << 2 | 0 << 4 | 1 << 6;
    return __builtin_amdgcn_update_dpp(0, value, permutation, 15, 15, true);
}

/// a * b of less than 2^24 each, in a quarter of the time that others take.
DEVICE uint32_t small_product(uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); }

typedef uint16_t Uint16x2 __attribute__((ext_vector_type(2)));
DEVICE uint32_t max_u16x2(uint32_t a, uint32_t b) { return bits<uint32_t>(__builtin_elementwise_max(bits<Uint16x2>(a), bits<Uint16x2>(b))); }

/// The largest magnitude, as a float's bits, of eight bf16 and their MX block's other 24, which the three neighbouring lanes have (the
/// other 120 of four blocks: fifteen lanes).
template <int Blocks = 1>
DEVICE uint32_t largest_around(const Words& x) {
    uint32_t pairs = 0;  // magnitudes of bf16 order as integers do
#pragma unroll
    for (int i = 0; i < 4; i++) pairs = max_u16x2(pairs, x.v[i] & 0x7fff7fffu);
    pairs = max_u16x2(pairs, quad_xor<1>(pairs));
    pairs = max_u16x2(pairs, quad_xor<2>(pairs));
    if constexpr (Blocks == 4) {
        pairs = max_u16x2(pairs, rotated<4>(pairs));
        pairs = max_u16x2(pairs, rotated<8>(pairs));
    }
    return larger(pairs << 16, pairs & 0xffff0000u);
}

/// The e8m0 code of what a block of this largest magnitude is divided by to be `A`, e4m3 or e2m1.
template <Act A>
DEVICE int exponent_for(uint32_t largest, int carry) {
    return largest > 0x7f800000u ? 255 : larger(static_cast<int>((largest + carry) >> 23) - (A == Act::e2m1 ? 2 : 8), 0);
}

/// Eight activations brought into the range of `A`; `exponent` is the e8m0 code of what that divided them by (fp8_static: by 1 / inverse,
/// and the code means nothing).
template <Act A, int Blocks = 1>
DEVICE void scale_activations(const Words& x, int carry, float inverse, float (&v)[8], int& exponent) {
    floats_from_words(x, v);
    if constexpr (A == Act::fp8_static) {
        exponent = 127;
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= inverse;
        return;
    }
    const uint32_t largest = largest_around<Blocks>(x);
    float up;
    if constexpr (A == Act::bf16) {
        // Brought up to 2^14..2^15 for halves; a bf16 has 8 significant bits, so what lies within 2^-28 of the largest is exact.
        const int biased = smaller(larger(static_cast<int>(largest >> 23), 15), 254);
        exponent = biased - 14;
        up = bits<float>(static_cast<uint32_t>(268 - biased) << 23);
    } else {
        exponent = exponent_for<A>(largest, carry);
        up = exponent >= 254 ? 0x1p-127f : bits<float>(static_cast<uint32_t>(254 - exponent) << 23);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= up;
}

#if TARGET_GFX950
typedef __bf16 Bf16Vector __attribute__((ext_vector_type(2)));
typedef short Int16x2 __attribute__((ext_vector_type(2)));

/// Eight bf16 divided by the power of two with this e8m0 code, as e4m3 where `saturate_conversions` holds: two an instruction.
DEVICE uint64_t e4m3_under(const Words& x, int exponent) {
    const float scale = bits<float>(static_cast<uint32_t>(exponent) << 23);  // of which the exponent is read
    const auto four = [&](int i) {
        const Int16x2 low = __builtin_amdgcn_cvt_scalef32_pk_fp8_bf16(Int16x2{}, bits<Bf16Vector>(x.v[i]), scale, false);
        return bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_fp8_bf16(low, bits<Bf16Vector>(x.v[i + 1]), scale, true));
    };
    return four(0) | static_cast<uint64_t>(four(2)) << 32;
}

/// Likewise as e2m1, which always saturates.
DEVICE uint32_t e2m1_under(const Words& x, int exponent) {
    const float scale = bits<float>(static_cast<uint32_t>(exponent) << 23);
    uint32_t codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_bf16(0, bits<Bf16Vector>(x.v[0]), scale, 0);
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_bf16(codes, bits<Bf16Vector>(x.v[1]), scale, 1);
    codes = __builtin_amdgcn_cvt_scalef32_pk_fp4_bf16(codes, bits<Bf16Vector>(x.v[2]), scale, 2);
    return __builtin_amdgcn_cvt_scalef32_pk_fp4_bf16(codes, bits<Bf16Vector>(x.v[3]), scale, 3);
}

/// Whether conversions give the largest number where they else give infinity or NaN (MODE.FP16_OVFL). No load or store moves past this.
template <bool On>
DEVICE void saturate_conversions() {
    asm volatile("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), %0" ::"n"(On) : "memory");
}
#endif

#if TARGET_GFX9
/// Four values as e4m3 codes, saturating: OCP codes on gfx950; on gfx942 FNUZ codes of half the values, which are the same
/// bits but for NaN and -0. A NaN stays one where the format has to carry it, that is, if no block's scale does.
template <Act A>
DEVICE uint32_t fp8_codes(float a, float b, float c, float d) {
    constexpr float UNIT = TARGET_GFX942 ? 0.5f : 1.0f;
    const auto in_range = [](float v) {
        const float kept = __builtin_amdgcn_fmed3f(v * UNIT, -448.0f * UNIT, 448.0f * UNIT);
        return A == Act::fp8_static && v != v ? v : kept;
    };
    const int low = __builtin_amdgcn_cvt_pk_fp8_f32(in_range(a), in_range(b), 0, false);
    return __builtin_amdgcn_cvt_pk_fp8_f32(in_range(c), in_range(d), low, true);
}
#else
template <Act A>
DEVICE uint32_t fp8_codes(float a, float b, float c, float d) { return e4m3_from_floats({a, b, c, d}); }
#endif

/// Eight values rounded to e4m3, as halves; on gfx942 halved, as it reads the codes.
template <Act A>
DEVICE void halves_of_fp8(const float (&v)[8], Half2 (&h)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t codes = fp8_codes<A>(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
#if TARGET_GFX9
        h[2 * i] = half2_from_floats(bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, false)));
        h[2 * i + 1] = half2_from_floats(bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, true)));
#else
        float rounded[4];
        floats_from_e4m3(codes, rounded);
        h[2 * i] = half2_from_floats({rounded[0], rounded[1]});
        h[2 * i + 1] = half2_from_floats({rounded[2], rounded[3]});
#endif
    }
}
