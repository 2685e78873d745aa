// Matrix instructions, and which element of which matrix each lane holds. All compute D = A B + C with A of shape
// [rows, k], B of shape [k, columns], and C, D of shape [rows, columns] in fp32.
//
// Layouts are formulas: `l` is the lane, `i` counts the elements a lane holds, lowest bits first. They are confirmed on
// every target by tests/kernels/test_include.py (AMD: in the emulator).
#pragma once
#include "convert.h"

#if TARGET_AMD
typedef _Float16 Half4Vector __attribute__((ext_vector_type(4)));
typedef _Float16 Half8Vector __attribute__((ext_vector_type(8)));
typedef _Float16 Half16Vector __attribute__((ext_vector_type(16)));
typedef __bf16 Bf16x8Vector __attribute__((ext_vector_type(8)));
typedef short Short4Vector __attribute__((ext_vector_type(4)));
typedef short Short16Vector __attribute__((ext_vector_type(16)));
typedef int Int8Vector __attribute__((ext_vector_type(8)));
typedef float Float4Vector __attribute__((ext_vector_type(4)));
typedef float Float8Vector __attribute__((ext_vector_type(8)));
#endif

template <int Count>
struct alignas(Count == 1 || Count == 2 || Count == 4 ? 4 * Count : 4) Floats {
    float v[Count];
};
template <int Count>
struct Packed {
    uint32_t v[Count];
};

#if TARGET_GFX9
// ---- gfx950 and gfx942, wave 64, 16 x 16 outputs: D[row][column] with row = 4 (l / 16) + i, column = l % 16, i < 4.
typedef Floats<4> Accumulator;

/// Elements of A and of B a lane holds, and k of one instruction: gfx950's is twice as deep.
constexpr int MATRIX_ELEMENTS = TARGET_GFX950 ? 8 : 4;
constexpr int MATRIX_K = 4 * MATRIX_ELEMENTS;

/// 16 x 16 x MATRIX_K, halves. A[l % 16][e (l / 16) + i] and B[e (l / 16) + i][l % 16], e = MATRIX_ELEMENTS.
DEVICE Accumulator matrix_half(Packed<MATRIX_ELEMENTS / 2> a, Packed<MATRIX_ELEMENTS / 2> b, Accumulator c) {
#if TARGET_GFX950
    return bits<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x32_f16(bits<Half8Vector>(a), bits<Half8Vector>(b),
                                                                    bits<Float4Vector>(c), 0, 0, 0));
#else
    return bits<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x16f16(bits<Half4Vector>(a), bits<Half4Vector>(b),
                                                                   bits<Float4Vector>(c), 0, 0, 0));
#endif
}

/// 16 x 16 x MATRIX_K, bf16; layout as `matrix_half`.
DEVICE Accumulator matrix_bf16(Packed<MATRIX_ELEMENTS / 2> a, Packed<MATRIX_ELEMENTS / 2> b, Accumulator c) {
#if TARGET_GFX950
    return bits<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x32_bf16(bits<Bf16x8Vector>(a), bits<Bf16x8Vector>(b),
                                                                     bits<Float4Vector>(c), 0, 0, 0));
#else
    return bits<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x16bf16_1k(bits<Short4Vector>(a), bits<Short4Vector>(b),
                                                                       bits<Float4Vector>(c), 0, 0, 0));
#endif
}

/// 16 x 16 x 32, e4m3: OCP codes on gfx950, FNUZ codes on gfx942. A[l % 16][8 (l / 16) + i], B[8 (l / 16) + i][l % 16].
DEVICE Accumulator matrix_e4m3(Packed<2> a, Packed<2> b, Accumulator c) {
    return bits<Accumulator>(__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8(bits<int64_t>(a), bits<int64_t>(b),
                                                                        bits<Float4Vector>(c), 0, 0, 0));
}
#endif

#if TARGET_GFX950
enum class MxElement { e4m3 = 0, e2m1 = 4 };  // the instruction's cbsz and blgp fields

/// 16 x 16 x 128 over MX blocks: A and B are e4m3 or e2m1 with one e8m0 scale a row (column) and 32 elements of k.
///
/// With q = l / 16, e2m1: A[l % 16][32 q + i], i < 32, in the first four words (the other four are not read).
/// e4m3: A[l % 16][16 q + i] for i < 16 and A[l % 16][64 + 16 q + i - 16] for 16 <= i < 32. B likewise, [k][l % 16].
/// Scales: the low byte of `scale_a` belongs to A[l % 16][32 q ... 32 q + 31], that of `scale_b` to B[same k][l % 16].
template <MxElement A, MxElement B>
DEVICE Accumulator matrix_mx(Packed<8> a, uint32_t scale_a, Packed<8> b, uint32_t scale_b, Accumulator c) {
    return bits<Accumulator>(__builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(
        bits<Int8Vector>(a), bits<Int8Vector>(b), bits<Float4Vector>(c), static_cast<int>(A), static_cast<int>(B), 0,
        scale_a, 0, scale_b));
}
#endif

#if TARGET_GFX11
// ---- gfx11, wave 32, 16 x 16 x 16: A[l % 16][i] and B[i][l % 16], i < 16, the same in lanes l and l + 16;
//      D[2 i + l / 16][l % 16], i < 8.
typedef Floats<8> Accumulator;

DEVICE Accumulator matrix_half(Packed<8> a, Packed<8> b, Accumulator c) {
    return bits<Accumulator>(__builtin_amdgcn_wmma_f32_16x16x16_f16_w32(bits<Half16Vector>(a), bits<Half16Vector>(b),
                                                                        bits<Float8Vector>(c)));
}

DEVICE Accumulator matrix_bf16(Packed<8> a, Packed<8> b, Accumulator c) {
    return bits<Accumulator>(__builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(bits<Short16Vector>(a), bits<Short16Vector>(b),
                                                                         bits<Float8Vector>(c)));
}
#endif

#if TARGET_AMD
/// a.x b.x + a.y b.y + c in fp32, halves in: two multiply-adds an instruction without a matrix's layout.
DEVICE float dot2(Half2 a, Half2 b, float c) {
    return __builtin_amdgcn_fdot2(bits<Half2Vector>(a), bits<Half2Vector>(b), c, false);
}
#endif

#if TARGET_SM90
// ---- sm_90, wave 32, 16 x 8 x 16: with g = l / 4 and t = l % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"),
//      A: word w < 4 holds A[g + 8 (w % 2)][2 t + 8 (w / 2)] and the next k;  B: word w < 2 holds B[2 t + 8 w][g] and the
//      next k;  D: i < 4 is D[g + 8 (i / 2)][2 t + i % 2].
typedef Floats<4> Accumulator;

DEVICE Accumulator matrix_half(Packed<4> a, Packed<2> b, Accumulator c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
    return c;
}

DEVICE Accumulator matrix_bf16(Packed<4> a, Packed<2> b, Accumulator c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
    return c;
}

/// 16 x 8 x 32, e4m3 (OCP). As 16 x 8 x 16, with four codes where that has two: A[g + 8 (w % 2)][4 t + 16 (w / 2) ...].
DEVICE Accumulator matrix_e4m3(Packed<4> a, Packed<2> b, Accumulator c) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
    return c;
}
#endif
