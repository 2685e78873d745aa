// What becomes of activations on sm_90: rounded to the scheme's format under scales that blocks of 32 share.
#pragma once

/// Magnitude, as a float's bits, of the largest of 32 values, of which four neighbouring lanes have eight each.
DEVICE uint32_t largest_of_block(const Words& x) {
    uint32_t pair = 0;  // magnitudes of bf16 order as integers do
#pragma unroll
    for (int i = 0; i < 4; i++) pair = __vmaxu2(pair, x.v[i] & 0x7fff7fffu);
    pair = __vmaxu2(pair, shuffle_xor(pair, 1));
    pair = __vmaxu2(pair, shuffle_xor(pair, 2));
    return larger(pair << 16, pair & 0xffff0000u);
}

/// A block of 32 activations, of which four neighbouring lanes have eight each (`v`), quantized as `A`: on return v holds
/// codes times `factor`'s inverse, that is, elements of the format, and `factor` is the block's scale.
template <Act A>
DEVICE void quantize_activations(const Words& x, int carry, float static_scale, float (&v)[8], float& factor) {
    floats_from_words(x, v);
    const uint32_t largest = largest_of_block(x);
    if constexpr (A == Act::bf16) {
        // Brought up to 2^14..2^15 for halves; a bf16 has 8 significant bits, so what lies within 2^-28 of the largest is exact.
        const int biased = smaller(larger(static_cast<int>(largest >> 23), 15), 254);
        factor = times_power_of_two(1.0f, biased - 127 - 14);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= bits<float>(static_cast<uint32_t>(268 - biased) << 23);
        return;
    }
    constexpr int EMAX = A == Act::e2m1 ? 2 : 8;
    const int exponent = largest > 0x7f800000u ? 255 : larger(static_cast<int>((largest + carry) >> 23) - EMAX, 0);
    const float up = exponent >= 254 ? 0x1p-127f : bits<float>(static_cast<uint32_t>(254 - exponent) << 23);
    factor = A == Act::fp8_static ? static_scale : float_from_e8m0(exponent);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = A == Act::fp8_static ? v[i] / static_scale : v[i] * up;
    if constexpr (A == Act::e2m1) {
        float rounded[8];
        floats_from_e2m1(e2m1_from_floats(v), rounded);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = rounded[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float rounded[4];
            floats_from_e4m3(e4m3_from_floats({v[i], v[i + 1], v[i + 2], v[i + 3]}), rounded);
#pragma unroll
            for (int j = 0; j < 4; j++) v[i + j] = rounded[j];
        }
    }
}

/// What rounding needs to know of an element format: bits of the fraction, exponents of the least normal and of the largest
/// value, and that one's fraction as bf16 has it.
template <Act A>
struct Element;
template <>
struct Element<Act::e4m3> {
    static constexpr int FRACTION = 3, EMIN = -6, EMAX = 8, LARGEST = 0x60;  // 1.75 x 2^8
};
template <>
struct Element<Act::e2m1> {
    static constexpr int FRACTION = 1, EMIN = 0, EMAX = 2, LARGEST = 0x40;  // 1.5 x 2^2
};

/// What a block of 32 activations, laid out as for `quantize_activations`, is worth once it is quantized, exactly: bf16. Static
/// activations are left without their scale.
template <Act A>
DEVICE Words rounded_as_floats(const Words& x, int carry, float static_scale) {
    Words out;
    float factor, v[8];
    quantize_activations<A>(x, carry, static_scale, v, factor);
    const float scale = A == Act::fp8_static ? 1.0f : factor;
#pragma unroll
    for (int p = 0; p < 4; p++) out.v[p] = bf16x2_from_floats({v[2 * p] * scale, v[2 * p + 1] * scale});
    return out;
}

/// The same, out of the way.
template <Act A>
__device__ __noinline__ Words rounded_rarely(Words x, int carry) {
    return rounded_as_floats<A>(x, carry, 1.0f);
}

/// The same, two values at a time: adding what puts the format's last bit where bf16 has its own rounds to it, to nearest, ties to
/// even.
template <Act A>
DEVICE Words rounded_activations(const Words& x, int carry, float static_scale) {
    if constexpr (A == Act::bf16) {
        return x;
    } else if constexpr (A == Act::fp8_static) {
        return rounded_as_floats<A>(x, carry, static_scale);
    } else {
        using E = Element<A>;
        const uint32_t largest = largest_of_block(x);
        const int scale = static_cast<int>((largest + carry) >> 23) - E::EMAX;
        constexpr int LEAST = 16, MOST = 230;  // between them, nothing here overflows or has bits that bf16 lacks
        if (!__all_sync(0xffffffffu, largest == 0 || (scale >= LEAST && scale <= MOST))) return rounded_rarely<A>(x, carry);
        const uint32_t in_range = static_cast<uint32_t>(larger(scale, LEAST));
        const uint32_t normal = (in_range + E::EMIN) * 0x00800080u;
        const Bf16x2 most = (in_range + E::EMAX) * 0x00800080u + E::LARGEST * 0x00010001u;
        Words out;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const uint32_t exponents = __vmaxu2(x.v[p] & 0x7f807f80u, normal);
            const Bf16x2 step = exponents + (7 - E::FRACTION) * 0x00800080u + 0x00400040u;  // 1.5 x 2^..., of either sign
            out.v[p] = clamp_bf16(minus_bf16(plus_bf16(x.v[p], step), step), most);
        }
        return out;
    }
}

/// Which pieces of x, of eight values, a thread quantizes: from piece j of row i on, by steps. Known before x is.
template <Weight W>
struct Pieces {
    int count, base, i, j, step_i, step_j;

    DEVICE explicit Pieces(const Share& s)
        : count(s.block_tiles * Tile<W>::K / 8), base(s.block_first * Tile<W>::K), i(1 << 30), j(0), step_i(0), step_j(0) {
        if (count == 0) return;
        i = quotient(thread_index(), count), j = thread_index() - i * count;
        step_i = quotient(s.threads, count), step_j = s.threads - step_i * count;
    }
};

/// All threads: `x.keep(eight bf16, row, piece, ...)` for what the block multiplies of all rows. A thread has BATCH loads under
/// way, and does `meanwhile()` then.
template <Act A, int BATCH, typename X, Weight W, bool Grouped, typename Meanwhile>
DEVICE void stage_rows(X& x, const DecodeArgs& a, const Pieces<W>& pieces, const Rows<Grouped>& rows, Meanwhile meanwhile) {
    const float static_scale = A == Act::fp8_static ? *a.x_scale : 1.0f;
    int i = pieces.i, j = pieces.j;
#pragma unroll 1
    while (__any_sync(0xffffffffu, i < rows.count)) {
        Words eight[BATCH];
        int is[BATCH], js[BATCH];
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            is[u] = i, js[u] = j;
            eight[u] = {};
            if (i < rows.count && pieces.base + 8 * j < a.k)
                eight[u] = load_words(a.x + rows.in(i) * a.x_stride + pieces.base + 8 * j);
            i += pieces.step_i, j += pieces.step_j;
            if (j >= pieces.count) j -= pieces.count, i++;
        }
        meanwhile();
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const bool wanted = is[u] < rows.count;
            if (u == 0 || __any_sync(0xffffffffu, wanted)) x.keep(eight[u], is[u], js[u], wanted, a.carry, static_scale);
        }
    }
}
