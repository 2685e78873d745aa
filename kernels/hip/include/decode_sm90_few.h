// Few rows of x, by mma.sync: a wave has a row tile for itself.
//
// Codes are multiplied as they are, all products exact; scales are applied to a block's sum. That costs instructions a sum and
// saves them a weight, so it wins while sums are few.
#pragma once

DEVICE void halves_from_e4m3(uint32_t word, Half2& low, Half2& high) {
    asm("{.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, l;\n\tcvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
}

/// Byte `i` of a word of e8m0 codes as a float; 255 becomes infinity (see `has_nan`). The relative scales of `hopper_bf16` (253
/// for 1) come out as 2^126 times what they are, as the codes need it.
DEVICE float scale_of_byte(uint32_t word, int i) {
    const uint32_t exponent = (i < 3 ? word << (23 - 8 * i) : word >> 1) & 0x7f800000u;
    return bits<float>(larger(exponent, 0x00400000u));
}

/// The block's activations in shared memory.
///
/// For e4m3 and int4 weights as halves in the order of K; fp16 as they are. For e2m1 weights as bf16, permuted within MX blocks so that lane q finds what
/// two steps of 16 want of it as 16 bytes, its chunk; chunks are swizzled so that stores, too, meet no bank twice. Elements of the
/// format, with a factor for every MX block.
template <Weight W, Act A, int M>
struct Activations<W, A, M, false> {
    static constexpr float UNLIFT = 1.0f;             // what sums are to be multiplied by ...
    static constexpr bool STATIC_SCALE_LAST = false;  // ... and whether also by the scale of static activations
    // Codes of e2m1 are subnormal bf16 (2^-126): activations go as far up, so that sums stay normal floats.
    static constexpr float LIFT = W == Weight::e2m1 ? 0x1p48f : 1.0f;
    // Up to four rows leave columns of the matrix unit free: they are given to the other MX block of a tile, so
    // that the sums of both come out of one accumulator, each in columns of its own, and scales are applied once.
    static constexpr int GROUP = M < 8 ? 2 : 1;
    static constexpr int ROOM = 8 / GROUP;
    static constexpr bool FACTORS = A != Act::fp16;

    uint16_t *zeros, *values;  // [ROOM][row]
    float* factors;            // [MX block][ROOM]
    int row;                   // 16-bit values; 64 bytes beyond a multiple of 128, so that two rows share no bank
    int blocks;                // MX blocks from the block's first to the end of K

    Pieces<W> pieces;

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : pieces(s) {
        const int most = ceil_div(s.tiles, a.split);
        row = most * Tile<W>::K + 32;
        zeros = reinterpret_cast<uint16_t*>(lds);
        values = zeros + 8;
        factors = reinterpret_cast<float*>(values + ROOM * row);
        blocks = a.k / MX_BLOCK - s.block_first * Tile<W>::BLOCKS;
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        const int most = ceil_div(s.tiles, a.split);
        return 16 + ROOM * ((most * Tile<W>::K + 32) * 2 + most * Tile<W>::BLOCKS * 4);
    }

    /// All threads: quantizes the block's part of x. Visible to the block after its next barrier.
    template <bool Grouped>
    DEVICE void stage(const DecodeArgs& a, const Share&, const Rows<Grouped>& rows) {
        if (thread_index() < 4) reinterpret_cast<uint32_t*>(zeros)[thread_index()] = 0;
        stage_rows<A, M <= 2 ? 1 : M <= 4 ? 2 : 4>(*this, a, pieces, rows, [] {});
    }

    /// Column `m`'s 16-bit values of MX block `block` that lane q multiplies: for W = e2m1, of two steps of 16.
    DEVICE const uint16_t* at(int m, int block, int q) const {
        return values + m * row + block * MX_BLOCK + 8 * (W == Weight::e2m1 ? q ^ (block >> 1 & 3) : q);
    }

    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted, int carry, float static_scale) {
        if constexpr (A == Act::fp16) {
            if (wanted) store_words(values + i * row + 8 * j, x);
            return;
        }
        const int block = j >> 2, quarter = j & 3;
        float factor, v[8];
        quantize_activations<A>(x, carry, static_scale, v, factor);
        if (!wanted) return;
        if (quarter == 0) factors[block * ROOM + i] = factor / LIFT;
        if constexpr (W != Weight::e2m1) {
            Words out;
#pragma unroll
            for (int p = 0; p < 4; p++) out.v[p] = half2_from_floats({v[2 * p], v[2 * p + 1]});
            store_words(values + i * row + 8 * j, out);
        } else {
#pragma unroll
            for (int q = 0; q < 4; q++)
                *reinterpret_cast<uint32_t*>(values + i * row + block * MX_BLOCK + 8 * (q ^ (block >> 1 & 3)) + 2 * quarter) =
                    bf16x2_from_floats({v[2 * q] * LIFT, v[2 * q + 1] * LIFT});
        }
    }
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1.
template <Weight W, Act A, int M>
struct Totals<W, A, M, false> {
    using X = Activations<W, A, M>;
    float sum[4] = {};

    /// Adds tile `t` of the stream's chunk; `block` is its first MX block in the activations.
    DEVICE void add(const Stream<W, M>& stream, int t, const X& x, int block) {
        if constexpr (is_int4(W)) {
#pragma unroll
            for (int b = 0; b < Tile<W>::BLOCKS; b += 2) add_int4(stream, t, x, block, b);
        } else {
            const int g = lane_index() / 4, q = lane_index() % 4;
            const uint32_t scales = stream.scale_words(t)[g];  // bytes: row g, blocks 0 and 1; row g + 8
            uint32_t fragments[4][4];
            load(stream.codes(t), fragments);
            const uint32_t mine = scales >> 8 * (2 * q / X::ROOM);  // this lane's columns belong to that block of a group
            multiply(fragments, x, block, [&](int b, int half) { return scale_of_byte(mine, b + 2 * half); });
        }
    }

    /// Adds up what belongs to the same row of activations.
    DEVICE void join() {
#pragma unroll
        for (int mask = X::ROOM / 2; mask < 4; mask *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += shuffle_xor(sum[i], mask);
    }

    static constexpr int TOGETHER = 2;  // columns that `each` hands on

    /// `store(row, column, values of it and of the next column)` for all that this lane has to hand on.
    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        const int g = lane_index() / 4, q = lane_index() % 4;
        if (2 * q >= smaller(columns, X::ROOM)) return;
#pragma unroll
        for (int half = 0; half < 2; half++) store(g + 8 * half, 2 * q, Floats<2>{sum[2 * half], sum[2 * half + 1]});
    }

   private:
    /// Adds blocks `first` and `first + 1` of tile `t`.
    DEVICE void add_int4(const Stream<W, M>& stream, int t, const X& x, int block, int first) {
        constexpr bool EACH = group_of(W) == MX_BLOCK;  // block has a group of its own
        const int g = lane_index() / 4, q = lane_index() % 4;
        const uint32_t* at = stream.scale_words(t) + g;
        const auto word = [&](int b, int half) {
            if (Tile<W>::SHORT && block + b >= x.blocks) return 0u;  // there is none
            return at[(EACH ? b * TILE_ROWS : 0) + 8 * half];
        };
        const Int4Group groups[2][2] = {{Int4Group(word(0, 0)), Int4Group(word(0, 1))},
                                        {Int4Group(word(1, 0)), Int4Group(word(1, 1))}};
        const Words codes = load_words(stream.codes(t) + first * (TILE_ROWS * MX_BLOCK / 2) + lane_index() * 16);
        uint32_t fragments[4][4];
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Half2 eight[4];
                groups[b][half].halves(codes.v[2 * b + half], eight);
#pragma unroll
                for (int p = 0; p < 4; p++) fragments[2 * b + p / 2][half + p % 2 * 2] = eight[p];
            }
        const bool second = X::GROUP == 2 && 2 * q >= X::ROOM;  // this lane's columns belong to that block
        multiply(fragments, x, block + first, [&](int b, int half) {
            return b == 1 || second ? groups[1][half].scale : groups[0][half].scale;
        });
    }

    /// Adds two MX blocks, of which `fragments` are A for each step of 16 along K, rows g and g + 8 by turns, lower K first;
    /// `scale(b, half)` is that of this lane's columns in row g + 8 half, of a group's first block for both.
    template <typename Scale>
    DEVICE void multiply(const uint32_t (&fragments)[4][4], const X& x, int block, Scale scale) {
        const int g = lane_index() / 4, q = lane_index() % 4;
        Accumulator part[2] = {};
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const uint16_t* at = x.at(g % X::ROOM, block + b, q);
            const Words v = load_words(X::GROUP == 1 || g / X::ROOM == b ? at : x.zeros);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t(&f)[4] = fragments[2 * b + half];
                const Packed<2> column = {v.v[2 * half], v.v[2 * half + 1]};
                if constexpr (W != Weight::e2m1)
                    part[b] = matrix_half({f[0], f[1], f[2], f[3]}, column, part[b]);
                else
                    part[b] = matrix_bf16({f[0], f[1], f[2], f[3]}, column, part[b]);
            }
        }
        const float* factors = x.factors + block * X::ROOM + 2 * q;
#pragma unroll
        for (int b = 0; b < 2; b += X::GROUP) {
            Accumulator p = part[b];
            const float up = scale(b, 0), down = scale(b, 1);
            float2 factor = {1, 1};
            if constexpr (X::FACTORS) factor = *reinterpret_cast<const float2*>(factors + b * X::ROOM);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (X::GROUP == 2) p.v[i] += part[1].v[i];
                sum[i] = fmaf(p.v[i] * (i < 2 ? up : down), i % 2 ? factor.y : factor.x, sum[i]);
            }
        }
    }

    /// This lane's part of A of a tile: of each step of 16 along K, rows g and g + 8 by turns, lower K first.
    DEVICE static void load(const uint8_t* codes, uint32_t (&fragments)[4][4]) {
        if constexpr (W == Weight::e4m3) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Words words = load_words(codes + row * 512 + lane_index() * 16);
#pragma unroll
                for (int step = 0; step < 4; step++)
                    halves_from_e4m3(words.v[step], fragments[step][row], fragments[step][row + 2]);
            }
        } else {
            each_e2m1_fragment(codes, [&](int step, int part, Bf16x2 pair) { fragments[step][part] = pair; });
        }
    }
};

