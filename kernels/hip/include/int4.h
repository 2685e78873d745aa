// int4 in groups: words of scale and zero point, and codes less zero points as halves.
#pragma once
#include "convert.h"

/// A half, twice.
DEVICE Half2 two_halves(uint16_t half) {
#if TARGET_AMD
    const auto value = bits<_Float16>(half);
    return bits<Half2>(Half2Vector{value, value});
#else
    return half * 0x00010001u;
#endif
}

DEVICE Half2 minus_half2(Half2 a, Half2 b) {
#if TARGET_AMD
    return bits<Half2>(bits<Half2Vector>(a) - bits<Half2Vector>(b));
#else
    Half2 difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
#endif
}

/// a / 16 - b.
DEVICE Half2 sixteenth_minus_half2(Half2 a, Half2 b) {
#if TARGET_AMD
    return bits<Half2>(__builtin_elementwise_fma(bits<Half2Vector>(a), Half2Vector{0.0625, 0.0625}, -bits<Half2Vector>(b)));
#else
    Half2 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x2c002c00u), "r"(b ^ 0x80008000u));
    return result;
#endif
}

/// A group's scale and zero point z, from their word (`formats.group_words`): an fp32 whose last four bits are z.
struct Int4Group {
    float scale;
    Half2 near, far;  // 1024 + z and 64 + z, twice

    DEVICE explicit Int4Group(uint32_t word)
        : scale(bits<float>(word & ~15u)),
          near(two_halves(static_cast<uint16_t>((word & 15) | 0x6400))),
          far(minus_half2(near, 0x63806380)) {}  // less 960

    /// Eight codes q as q - z, in their order and exact: 0x6400 | q is 1024 + q as a half, and 0x6400 | 16 q is 16 (64 + q).
    DEVICE void halves(uint32_t codes, Half2* h) const {
        uint32_t exponents = 0x64006400;
#if TARGET_AMD
        asm("" : "+v"(exponents));  // in a register: of two constants, gfx9 would make two instructions
#endif
#pragma unroll
        for (int i = 0; i < 2; i++) {
            h[2 * i] = minus_half2((codes >> 8 * i & 0x000f000fu) | exponents, near);
            h[2 * i + 1] = sixteenth_minus_half2((codes >> 8 * i & 0x00f000f0u) | exponents, far);
        }
    }
};
