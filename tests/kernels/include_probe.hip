// One kernel for each thing that kernels/hip/include offers; tests/kernels/test_include.py compares them with torch and numpy.
#include "mx_dot.h"

#define PROBE KERNEL(256, 1)

static DEVICE int index() { return block_index() * 256 + thread_index(); }

// ---- convert.h: one word of input, or eight floats, a thread

PROBE floats_from_e2m1_probe(const uint32_t* in, float* out) {
    float values[8];
    floats_from_e2m1(in[index()], values);
    for (int i = 0; i < 8; i++) out[index() * 8 + i] = values[i];
}
PROBE e2m1_from_floats_probe(const float* in, uint32_t* out) {
    float values[8];
    for (int i = 0; i < 8; i++) values[i] = in[index() * 8 + i];
    out[index()] = e2m1_from_floats(values);
}
PROBE floats_from_e4m3_probe(const uint32_t* in, float* out) {
    float values[4];
    floats_from_e4m3(in[index()], values);
    for (int i = 0; i < 4; i++) out[index() * 4 + i] = values[i];
}
PROBE e4m3_from_floats_probe(const float* in, uint32_t* out) {
    float values[4];
    for (int i = 0; i < 4; i++) values[i] = in[index() * 4 + i];
    out[index()] = e4m3_from_floats(values);
}
PROBE float_from_e8m0_probe(const uint32_t* in, float* out) { out[index()] = float_from_e8m0(in[index()]); }
PROBE times_power_of_two_probe(const float* in, const int* exponent, float* out) {
    out[index()] = times_power_of_two(in[index()], exponent[index()]);
}
PROBE bf16_from_float_probe(const float* in, uint16_t* out) { out[index()] = bf16_from_float(in[index()]); }
PROBE float_from_bf16_probe(const uint16_t* in, float* out) { out[index()] = float_from_bf16(in[index()]); }
PROBE floats_from_bf16x2_probe(const uint32_t* in, float* out) {
    const Float2 pair = floats_from_bf16x2(in[index()]);
    out[2 * index()] = pair.x, out[2 * index() + 1] = pair.y;
}
PROBE half2_from_floats_probe(const float* in, uint32_t* out) {
    out[index()] = half2_from_floats({in[2 * index()], in[2 * index() + 1]});
}
PROBE floats_from_half2_probe(const uint32_t* in, float* out) {
    const Float2 pair = floats_from_half2(in[index()]);
    out[2 * index()] = pair.x, out[2 * index() + 1] = pair.y;
}
PROBE fma2_probe(const float* a, const float* b, const float* c, float* out) {
    const int i = 2 * index();
    const Float2 sum = fma2({a[i], a[i + 1]}, {b[i], b[i + 1]}, {c[i], c[i + 1]});
    out[i] = sum.x, out[i + 1] = sum.y;
}

// ---- wave.h

PROBE wave_probe(const int* in, int* out) {
    const int i = index();
    out[i] = WAVE;
    out[256 + i] = lane_index();
    out[512 + i] = wave_index();
    for (int mask = 1, row = 3; row < 9; mask *= 2, row++)  // of masks above the wave's width, the last is repeated
        out[256 * row + i] = shuffle_xor(in[i], smaller(mask, WAVE / 2));
    out[256 * 9 + i] = shuffle(in[i], (lane_index() * 7 + 3) % WAVE);
    out[256 * 10 + i] = sum_lanes(in[i]);
    out[256 * 11 + i] = sum_lanes<4>(in[i]);
    out[256 * 12 + i] = max_lanes<8>(in[i]);
}

// Each wave reads what another wrote.
PROBE barrier_probe(const int* in, int* out) {
    int* lds = reinterpret_cast<int*>(dynamic_lds());
    lds[thread_index()] = in[index()];
#ifndef WITHOUT_BARRIER
    block_barrier();
#endif
    out[index()] = lds[(thread_index() + 128) % 256];
}

// ---- memory.h

PROBE stream_probe(const Words* in, Words* out) { store_words(out + index(), stream_words(in + index())); }

// Two copies a wave; the first is used while the second may still be under way.
PROBE copy_probe(const Words* in, Words* out) {
    uint8_t* lds = dynamic_lds() + wave_index() * WAVE * 32;
    copy_to_lds(lds, in + index());
    copy_to_lds(lds + WAVE * 16, in + 256 + index());
    wait_for_copies<1>();
    out[index()] = load_words(lds + 16 * lane_index());
    wait_for_copies();
    out[256 + index()] = load_words(lds + WAVE * 16 + 16 * lane_index());
}

// ---- matrix.h: operands as packed words a lane, results as floats a lane; the host applies the layout formulas

template <typename T>
DEVICE T lane_words(const uint32_t* from) {
    Packed<sizeof(T) / 4> words;
    for (unsigned i = 0; i < sizeof(T) / 4; i++) words.v[i] = from[lane_index() * (sizeof(T) / 4) + i];
    return bits<T>(words);
}
template <typename A, typename B, typename F>
DEVICE void matrix_probe(const uint32_t* a, const uint32_t* b, float* out, F multiply) {
    const Accumulator sum = multiply(lane_words<A>(a), lane_words<B>(b), lane_words<Accumulator>(reinterpret_cast<const uint32_t*>(out)));
    constexpr int count = sizeof(Accumulator) / 4;
    for (int i = 0; i < count; i++) out[lane_index() * count + i] = sum.v[i];
}

#if TARGET_GFX9
typedef Packed<MATRIX_ELEMENTS / 2> A16;
typedef A16 B16;
#elif TARGET_GFX11
typedef Packed<8> A16;
typedef A16 B16;
#else
typedef Packed<4> A16;
typedef Packed<2> B16;
#endif

PROBE matrix_half_probe(const uint32_t* a, const uint32_t* b, float* out) {
    matrix_probe<A16, B16>(a, b, out, [](A16 x, B16 y, Accumulator z) { return matrix_half(x, y, z); });
}
PROBE matrix_bf16_probe(const uint32_t* a, const uint32_t* b, float* out) {
    matrix_probe<A16, B16>(a, b, out, [](A16 x, B16 y, Accumulator z) { return matrix_bf16(x, y, z); });
}
#if TARGET_GFX9
PROBE matrix_e4m3_probe(const uint32_t* a, const uint32_t* b, float* out) {
    matrix_probe<Packed<2>, Packed<2>>(a, b, out, [](Packed<2> x, Packed<2> y, Accumulator z) { return matrix_e4m3(x, y, z); });
}
#elif TARGET_SM90
PROBE matrix_e4m3_probe(const uint32_t* a, const uint32_t* b, float* out) {
    matrix_probe<A16, B16>(a, b, out, [](A16 x, B16 y, Accumulator z) { return matrix_e4m3(x, y, z); });
}
#endif
#if TARGET_GFX950
template <MxElement A, MxElement B>
DEVICE void mx_probe(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* out) {
    matrix_probe<Packed<8>, Packed<8>>(a, b, out, [=](Packed<8> x, Packed<8> y, Accumulator z) {
        return matrix_mx<A, B>(x, sa[lane_index()], y, sb[lane_index()], z);
    });
}
PROBE matrix_mx_e2m1_e2m1_probe(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* out) {
    mx_probe<MxElement::e2m1, MxElement::e2m1>(a, b, sa, sb, out);
}
PROBE matrix_mx_e2m1_e4m3_probe(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* out) {
    mx_probe<MxElement::e2m1, MxElement::e4m3>(a, b, sa, sb, out);
}
PROBE matrix_mx_e4m3_e2m1_probe(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* out) {
    mx_probe<MxElement::e4m3, MxElement::e2m1>(a, b, sa, sb, out);
}
PROBE matrix_mx_e4m3_e4m3_probe(const uint32_t* a, const uint32_t* b, const uint32_t* sa, const uint32_t* sb, float* out) {
    mx_probe<MxElement::e4m3, MxElement::e4m3>(a, b, sa, sb, out);
}
#endif
#if TARGET_AMD
PROBE dot2_probe(const uint32_t* a, const uint32_t* b, float* out) {
    out[index()] = dot2(a[index()], b[index()], out[index()]);
}
#endif
