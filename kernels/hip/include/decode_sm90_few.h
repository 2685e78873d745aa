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

/// The block's activations in shared memory, MX block by MX block, with a factor for every row of each.
///
/// For e4m3 weights as halves in the order of K. For others permuted within MX blocks, so that lane q finds what two steps of 16 want of
/// it as 16 bytes: for int4 as halves, fp16 as they are, and for e2m1 as bf16. Between blocks 16 bytes are left free, so that neither
/// loads of a block, of two rows by eight lanes together, nor stores into eight blocks meet in a bank.
template <Weight W, Act A, int M>
struct Activations<W, A, M, Way::FEW> {
    static constexpr float UNLIFT = 1.0f;  // what sums are to be multiplied by
    // Codes of e2m1 are subnormal bf16 (2^-126): activations go as far up, so that sums stay normal floats.
    static constexpr float LIFT = W == Weight::e2m1 ? 0x1p48f : 1.0f;
    // Up to four rows leave columns of the matrix unit free: they are given to other MX blocks of the tile, or of two, so
    // that the sums of all come out of one accumulator, each in columns of its own, and scales are applied once.
    static constexpr int ROOM = M, GROUP = 8 / ROOM;
    static constexpr int TILES = GROUP > Tile<W>::BLOCKS ? 2 : 1;  // that are taken together
    static constexpr int ROW_BYTES = 2 * MX_BLOCK, BLOCK_BYTES = ROOM * ROW_BYTES + 16;

    uint8_t *zeros, *values;  // [MX block][ROOM]
    float* factors;           // [MX block][ROOM], but for fp16
    int blocks;               // MX blocks from the block's first to the end of K

    Pieces<W> pieces;

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : zeros(lds), values(lds + 16), pieces(s) {
        factors = reinterpret_cast<float*>(values + s.most_tiles(a) * Tile<W>::BLOCKS * BLOCK_BYTES);
        blocks = a.k / MX_BLOCK - s.block_first * Tile<W>::BLOCKS;
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        return 16 + s.most_tiles(a) * Tile<W>::BLOCKS * (BLOCK_BYTES + ROOM * 4);
    }

    /// All threads: brings in the block's part of x. Visible to the block after its next barrier.
    template <bool Grouped>
    DEVICE void stage(const DecodeArgs& a, const Share&, const Rows<Grouped>& rows) {
        if (thread_index() < 4) reinterpret_cast<uint32_t*>(zeros)[thread_index()] = 0;
        stage_rows<M <= 2 ? 1 : M <= 4 ? 2 : 4>(*this, a, pieces, rows, [] {});
    }

    /// Where lane (g, q) finds what it multiplies of MX block `block`, of whose group that is member `i`.
    DEVICE const uint8_t* at(int block, int i, int g, int q) const {
        const uint8_t* row = values + block * BLOCK_BYTES + g % ROOM * ROW_BYTES + 16 * q;
        return GROUP == 1 || g / ROOM == i ? row : zeros;
    }

    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted) {
        const int block = j >> 2, quarter = j & 3;
        uint8_t* row = values + block * BLOCK_BYTES + i * ROW_BYTES;
        Words out = x;
        if constexpr (A != Act::fp16) {
            float factor, v[8];
            lift_activations(x, v, factor);
            if (wanted && quarter == 0) factors[block * ROOM + i] = factor / LIFT;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const Float2 pair = {v[2 * p] * LIFT, v[2 * p + 1] * LIFT};
                out.v[p] = W == Weight::e2m1 ? bf16x2_from_floats(pair) : half2_from_floats(pair);
            }
        }
        if (!wanted) return;
        if constexpr (W == Weight::e4m3) {
            store_words(row + 16 * quarter, out);
        } else {
#pragma unroll
            for (int q = 0; q < 4; q++) *reinterpret_cast<uint32_t*>(row + 16 * q + 4 * quarter) = out.v[q];
        }
    }
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::FEW> {
    using X = Activations<W, A, M>;
    float sum[4] = {};

    /// Adds tiles `t` ... of the stream's chunk; `block` is their first MX block in the activations.
    template <int Tiles>
    DEVICE void add(const Stream<W, M>& stream, int t, const X& x, int block, Number<Tiles>) {
        constexpr int BLOCKS = Tiles * Tile<W>::BLOCKS, SUMMED = X::GROUP < 2 ? 2 : X::GROUP < BLOCKS ? X::GROUP : BLOCKS;
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int first = 0; first < BLOCKS; first += SUMMED) {
            Accumulator part[2] = {};  // of even and of odd MX blocks: two chains of matrix instructions
#pragma unroll
            for (int i = first; i < first + SUMMED; i += 2) {
                uint32_t fragments[4][4];  // of A of two MX blocks, for each step of 16 along K
                load(stream, t, i, x.blocks - block, fragments);
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const Words v = load_words(x.at(block + i + b, i + b - first, g, q));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint32_t(&f)[4] = fragments[2 * b + half];
                        const Packed<2> column = {v.v[2 * half], v.v[2 * half + 1]};
                        if constexpr (W == Weight::e2m1)
                            part[b] = matrix_bf16({f[0], f[1], f[2], f[3]}, column, part[b]);
                        else
                            part[b] = matrix_half({f[0], f[1], f[2], f[3]}, column, part[b]);
                    }
                }
            }
            if constexpr (X::GROUP == 1) {
#pragma unroll
                for (int b = 0; b < 2; b++) add_scaled(part[b], stream, t, x, block, first + b);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) part[0].v[i] += part[1].v[i];
                // This lane's columns belong to one block of a group; those of blocks that a lone tile has not got are zero.
                add_scaled(part[0], stream, t, x, block, first + 2 * q / X::ROOM % SUMMED);
            }
        }
    }

    /// Adds up what belongs to the same row of activations.
    DEVICE void join(const X&) {
#pragma unroll
        for (int mask = X::ROOM / 2; mask < 4; mask *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += shuffle_xor(sum[i], mask);
    }

    static constexpr int TOGETHER = 2;  // columns that `each` hands on, if any of them is wanted

    /// `store(row, column, values of it and of the next column)` for all that this lane has to hand on.
    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        const int g = lane_index() / 4, q = lane_index() % 4;
        if (2 * q >= smaller(columns, X::ROOM)) return;
#pragma unroll
        for (int half = 0; half < 2; half++) store(g + 8 * half, 2 * q, Floats<2>{sum[2 * half], sum[2 * half + 1]});
    }

   private:
    /// Adds products of block `i` of tiles `t` ..., under its scales in rows g and g + 8 and its factors of two columns.
    DEVICE void add_scaled(const Accumulator& products, const Stream<W, M>& stream, int t, const X& x, int block, int i) {
        const float2 scale = scales(stream, t, i, x.blocks - block);
        float2 factor = {1, 1};  // of fp16
        if constexpr (A != Act::fp16)
            factor = *reinterpret_cast<const float2*>(x.factors + (block + i) * X::ROOM + 2 * (lane_index() % 4) % X::ROOM);
#pragma unroll
        for (int c = 0; c < 4; c++)
            sum[c] = fmaf(products.v[c] * (c < 2 ? scale.x : scale.y), c % 2 ? factor.y : factor.x, sum[c]);
    }

    /// Scales of block `i` of tiles `t` ... in rows g and g + 8; K has `left` blocks.
    DEVICE static float2 scales(const Stream<W, M>& stream, int t, int i, int left) {
        if constexpr (is_int4(W)) {
            return {Int4Group(group_word(stream, t, i, 0, left)).scale, Int4Group(group_word(stream, t, i, 1, left)).scale};
        } else {
            const uint32_t both = stream.scale_words(t + i / 2)[lane_index() / 4] >> 8 * (i % 2);
            return {scale_of_byte(both, 0), scale_of_byte(both, 2)};
        }
    }

    /// int4: the word of block `i` of tiles `t` ... in row g or g + 8.
    DEVICE static uint32_t group_word(const Stream<W, M>& stream, int t, int i, int half, int left) {
        if (Tile<W>::SHORT && i >= left) return 0;  // there is none
        const int group = group_of(W) == MX_BLOCK ? i % 2 : 0;
        return stream.scale_words(t + i / Tile<W>::BLOCKS)[group * TILE_ROWS + 8 * half + lane_index() / 4];
    }

    /// This lane's part of A of blocks `i` and `i + 1` of tiles `t` ...: of each step of 16 along K, rows g and g + 8 by turns,
    /// lower K first.
    DEVICE static void load(const Stream<W, M>& stream, int t, int i, int left, uint32_t (&fragments)[4][4]) {
        const uint8_t* codes = stream.codes(t + i / Tile<W>::BLOCKS);
        if constexpr (W == Weight::e4m3) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Words words = load_words(codes + row * 512 + lane_index() * 16);
#pragma unroll
                for (int step = 0; step < 4; step++)
                    halves_from_e4m3(words.v[step], fragments[step][row], fragments[step][row + 2]);
            }
        } else if constexpr (is_int4(W)) {
            const Words words = load_words(codes + i % Tile<W>::BLOCKS * (TILE_ROWS * MX_BLOCK / 2) + lane_index() * 16);
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int row = 0; row < 2; row++) {
                    Half2 eight[4];
                    Int4Group(group_word(stream, t, i + b, row, left)).halves(words.v[2 * b + row], eight);
#pragma unroll
                    for (int p = 0; p < 4; p++) fragments[2 * b + p / 2][row + p % 2 * 2] = eight[p];
                }
        } else {
            each_e2m1_fragment(codes, [&](int step, int part, Bf16x2 pair) { fragments[step][part] = pair; });
        }
    }
};

