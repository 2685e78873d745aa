// What becomes of activations on sm_90: bf16 is brought into the range of halves or left as it is, the rest becomes e4m3 codes.
#pragma once

/// Magnitude, as a float's bits, of the largest of eight values, ...
DEVICE uint32_t largest_of(const Words& x) {
    uint32_t pair = 0;  // magnitudes of bf16 order as integers do
#pragma unroll
    for (int i = 0; i < 4; i++) pair = __vmaxu2(pair, x.v[i] & 0x7fff7fffu);
    return larger(pair << 16, pair & 0xffff0000u);
}

/// ... of 32, of which four neighbouring lanes have eight each, ...
DEVICE uint32_t largest_of_block(const Words& x) { return max_lanes<4>(largest_of(x)); }

/// ... and of what the lanes of a wave have.
DEVICE uint32_t largest_in_wave(uint32_t largest) { return __reduce_max_sync(0xffffffffu, largest); }

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

/// v / scale to nearest, for what becomes e4m3: a quotient that is off, and what it is off by. Beyond 512 all is one.
DEVICE float divided(float v, float scale) {
    const float per = __frcp_rn(scale), about = v * per;
    const float rest = __fmaf_rn(-about, scale, v);
    return __builtin_fabsf(about) < 512.0f ? __fmaf_rn(rest, per, about) : about;
}

/// Eight activations as codes under their block's scale 2^(exponent - 127), static ones under `static_scale`; elements of e2m1 are
/// written as e4m3.
template <Act A>
DEVICE Codes codes_of_activations(const Words& x, int exponent, float static_scale) {
    float v[8];
    floats_from_words(x, v);
    const float up = exponent >= 254 ? 0x1p-127f : bits<float>(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = A == Act::fp8_static ? divided(v[i], static_scale) : v[i] * up;
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

/// Two bf16 of 2^exponent, -127 <= exponent < 128.
DEVICE Bf16x2 power_bf16x2(int exponent) { return (exponent < -126 ? 0x40u : static_cast<uint32_t>(exponent + 127) << 7) * 0x10001u; }

/// `carry` from which on no element of a block is beyond e4m3's largest (formats/mx.py: ScaleMode.RCEIL).
constexpr int NONE_BEYOND = 0x1fffff;

/// Activations of which four neighbouring lanes have a block, none of them beyond 448 times its scale any more, which is what e4m3 saturates
/// to under the block's scale, but not under its row's.
template <Act A, int COUNT>
DEVICE void saturate(Words (&x)[COUNT], int carry) {
    if (A != Act::e4m3 || carry >= NONE_BEYOND) return;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
        const Bf16x2 most = times_bf16(power_bf16x2(exponent_of<A>(largest_of_block(x[u]), carry) - 127), 0x43e043e0u);
#pragma unroll
        for (int i = 0; i < 4; i++) x[u].v[i] = clamp_bf16(x[u].v[i], most);
    }
}

/// Eight activations, saturated, under the exponent of their row, which is no less than their block's.
///
/// e4m3 is rounded once: an element keeps as many bits under either scale, but for those below 2^-6 of the row's.
template <Act A>
DEVICE Codes row_codes(const Words& x, int of_row, int carry, float static_scale) {
    if constexpr (A == Act::e4m3) {
        Words v;
        const Bf16x2 up = power_bf16x2(127 - of_row);
        float scaled[8];
#pragma unroll
        for (int i = 0; i < 4; i++) v.v[i] = times_bf16(x.v[i], up);
        floats_from_words(v, scaled);
        return {e4m3_from_floats({scaled[0], scaled[1], scaled[2], scaled[3]}),
                e4m3_from_floats({scaled[4], scaled[5], scaled[6], scaled[7]})};
    } else if constexpr (A == Act::e2m1) {
        const int own = exponent_of<A>(largest_of_block(x), carry);
        return shifted_e4m3(codes_of_activations<A>(x, own, static_scale), larger(of_row - own, 0));
    } else {
        return codes_of_activations<A>(x, of_row, static_scale);
    }
}

/// Pieces of x, of eight values: which rows of the block they are of, and where along K.
template <int COUNT>
struct Batch {
    Words eight[COUNT];
    int i[COUNT], j[COUNT];
};

/// Who brings x into a block's shared memory: all its threads, or those of waves of their own, so many from `first` on.
struct Crew {
    int first, threads;
    DEVICE int thread() const { return thread_index() - first; }
};

/// Which pieces of what a block multiplies of all rows a thread takes: from piece j of row i on, by steps. Known before x is.
template <Weight W>
struct Pieces {
    int count, base, i, j, step_i, step_j;
    bool whole;  // a wave's pieces are of one row

    DEVICE explicit Pieces(const Share& s)
        : count(s.block_tiles * Tile<W>::K / 8), base(s.block_first * Tile<W>::K), i(1 << 30), j(0), step_i(0), step_j(0),
          whole(count % WAVE == 0) {
        if (count == 0) return;
        i = anew(quotient(thread_index(), count)), j = thread_index() - i * count;
        step_i = anew(quotient(s.threads, count)), step_j = s.threads - step_i * count;
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

/// All threads: `x.keep` as `each_piece` does, for all rows. A thread has BATCH loads under way, and with the first of them does
/// `meanwhile()`.
template <int BATCH, typename X, Weight W, bool Grouped, typename Meanwhile>
DEVICE void stage_rows(X& x, const DecodeArgs& a, Pieces<W> pieces, const Rows<Grouped>& rows, Meanwhile meanwhile) {
    const auto keep = [&](const Words& eight, int i, int j, bool wanted) { x.keep(eight, i, j, wanted); };
    const auto first = pieces.template next<BATCH>(a, rows);
    meanwhile();
    each_piece(first, rows, keep);
#pragma unroll 1
    while (pieces.any(rows)) each_piece(pieces.template next<BATCH>(a, rows), rows, keep);
}
