// What becomes of activations on sm_90: bf16 is brought into the range of halves or left as it is, the rest becomes e4m3 codes.
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

/// A block of 32 bf16 activations, of which four neighbouring lanes have eight each, brought up to 2^14..2^15 for halves; `factor`
/// undoes that. A bf16 has 8 significant bits, so what lies within 2^-28 of the largest is exact.
DEVICE void lift_activations(const Words& x, float (&v)[8], float& factor) {
    floats_from_words(x, v);
    const int biased = smaller(larger(static_cast<int>(largest_of_block(x) >> 23), 15), 254);
    factor = times_power_of_two(1.0f, biased - 127 - 14);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= bits<float>(static_cast<uint32_t>(268 - biased) << 23);
}

/// Eight e4m3 codes.
struct Codes {
    uint32_t v[2];
};

/// The e8m0 exponent of a block of 32 activations, or of a row, by its largest magnitude as a float's bits; 255 for NaN.
template <Act A>
DEVICE int exponent_of(uint32_t largest, int carry) {
    constexpr int EMAX = A == Act::e2m1 ? 2 : 8;
    return largest > 0x7f800000u ? 255 : larger(static_cast<int>((largest + carry) >> 23) - EMAX, 0);
}

/// Eight activations as codes under their block's scale 2^(exponent - 127), static ones under `static_scale`; elements of e2m1 are
/// written as e4m3.
template <Act A>
DEVICE Codes codes_of_activations(const Words& x, int exponent, float static_scale) {
    float v[8];
    floats_from_words(x, v);
    const float up = exponent >= 254 ? 0x1p-127f : bits<float>(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = A == Act::fp8_static ? v[i] / static_scale : v[i] * up;
    if constexpr (A == Act::e2m1) {
        float rounded[8];
        floats_from_e2m1(e2m1_from_floats(v), rounded);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = rounded[i];
    }
    return {e4m3_from_floats({v[0], v[1], v[2], v[3]}), e4m3_from_floats({v[4], v[5], v[6], v[7]})};
}

/// Codes times 2^-octaves, to nearest, ties to even; octaves >= 0.
DEVICE Codes shifted_e4m3(const Codes& codes, int octaves) {
    const uint32_t half = octaves <= 14 ? (15 - octaves) << 10 : octaves <= 24 ? 1u << (24 - octaves) : 0;  // 2^-octaves
    Codes out;
#pragma unroll
    for (int i = 0; i < 2; i++)
        asm("{.reg .b16 l, h;\n\t.reg .b32 x, y;\n\tmov.b32 {l, h}, %1;\n\t"
            "cvt.rn.f16x2.e4m3x2 x, l;\n\tcvt.rn.f16x2.e4m3x2 y, h;\n\tmul.rn.f16x2 x, x, %2;\n\tmul.rn.f16x2 y, y, %2;\n\t"
            "cvt.rn.satfinite.e4m3x2.f16x2 l, x;\n\tcvt.rn.satfinite.e4m3x2.f16x2 h, y;\n\tmov.b32 %0, {l, h};}"
            : "=r"(out.v[i])
            : "r"(codes.v[i]), "r"(half * 0x10001u));
    return out;
}

/// `codes_of_activations` whose block has exponent `own`, under the exponent `of_row`.
template <Act A>
DEVICE Codes row_codes(const Words& x, int own, int of_row, float static_scale) {
    const Codes codes = codes_of_activations<A>(x, own, static_scale);
    return A != Act::fp8_static && own < of_row ? shifted_e4m3(codes, of_row - own) : codes;
}

/// Pieces of x, of eight values: which rows of the block they are of, and where along K.
template <int COUNT>
struct Batch {
    Words eight[COUNT];
    int i[COUNT], j[COUNT];
};

/// Which pieces of what a block multiplies of all rows a thread takes: from piece j of row i on, by steps. Known before x is.
template <Weight W>
struct Pieces {
    int count, base, i, j, step_i, step_j;

    DEVICE explicit Pieces(const Share& s)
        : count(s.block_tiles * Tile<W>::K / 8), base(s.block_first * Tile<W>::K), i(1 << 30), j(0), step_i(0), step_j(0) {
        if (count == 0) return;
        i = quotient(thread_index(), count), j = thread_index() - i * count;
        step_i = quotient(s.threads, count), step_j = s.threads - step_i * count;
    }

    /// Whether a lane of the wave has any left.
    template <bool Grouped>
    DEVICE bool any(const Rows<Grouped>& rows) const { return __any_sync(0xffffffffu, i < rows.count); }

    /// Asks for the next; zeros where there is none.
    template <int COUNT, bool Grouped>
    DEVICE Batch<COUNT> next(const DecodeArgs& a, const Rows<Grouped>& rows) {
        Batch<COUNT> batch;
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            batch.i[u] = i, batch.j[u] = j, batch.eight[u] = {};
            if (i < rows.count && base + 8 * j < a.k) batch.eight[u] = load_words(a.x + rows.in(i) * a.x_stride + base + 8 * j);
            i += step_i, j += step_j;
            if (j >= count) j -= count, i++;
        }
        return batch;
    }
};

/// All lanes of a wave: `each(eight, row, piece, whether there is one)` for pieces of which any lane has one.
template <int COUNT, bool Grouped, typename Each>
DEVICE void each_piece(const Batch<COUNT>& batch, const Rows<Grouped>& rows, Each each) {
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
        const bool wanted = batch.i[u] < rows.count;
        if (u == 0 || __any_sync(0xffffffffu, wanted)) each(batch.eight[u], batch.i[u], batch.j[u], wanted);
    }
}

/// All threads: `x.keep` as `each_piece` does, for all rows. A thread has BATCH loads under way, and does `meanwhile()` then.
template <int BATCH, typename X, Weight W, bool Grouped, typename Meanwhile>
DEVICE void stage_rows(X& x, const DecodeArgs& a, Pieces<W> pieces, const Rows<Grouped>& rows, Meanwhile meanwhile) {
#pragma unroll 1
    while (pieces.any(rows)) {
        const auto batch = pieces.template next<BATCH>(a, rows);
        meanwhile();
        each_piece(batch, rows, [&](const Words& eight, int i, int j, bool wanted) { x.keep(eight, i, j, wanted); });
    }
}
