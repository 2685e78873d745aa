// Many rows of x, by wgmma: four waves, a row tile each, multiply 64 rows of w together.
//
// Weights are wgmma's left operand, which lies in registers: a wave decodes its own row tile once, however many rows x has.
// Activations are the right one, which the matrix unit reads from shared memory by itself. Both are bf16, weights with their scales
// applied, so all products are exact; with e4m3 weights for scales of 2^-64 ... 2^67: smaller ones lose bits of codes that are
// subnormal then, larger ones give infinity.
#pragma once

/// The block's activations in shared memory, tile by tile.
template <Weight W, Act A, int M>
struct Activations<W, A, M, Way::MANY> {
    static constexpr int ROOM = M, TILES = 1;
    // e4m3 codes are read as bf16 2^-120 too small, and their scales applied 2^-60 too small, to fit (`scale_as_bf16`).
    static constexpr float UNLIFT = W == Weight::e4m3 ? 0x1p60f : 1.0f;

    uint8_t* values;
    Crew crew;
    Pieces<W> pieces;
    Arriving<M> arriving;

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds)
        : values(matrix_aligned(lds)), crew{0, s.threads}, pieces(s), arriving(a, s) {
        block_barrier();
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) { return 1024 + s.most_tiles(a) * XTile<W, M>::TILE_BYTES; }

    /// All threads: brings in the block's part of x. Visible to the block's matrix instructions after its next barrier.
    template <bool Grouped, typename Meanwhile>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows, Meanwhile meanwhile) {
        if (arriving.expected) {
            arriving.template fetch<W>(a, crew, rows.first, values);
            meanwhile();
            return arriving.wait();
        }
        stage_rows<M <= 16 ? 4 : 8>(*this, a, pieces, rows, meanwhile);
        show_to_async();
    }

    /// What step `step` of 16 of the 64 of K that begin with MX block `block` multiplies.
    DEVICE uint32_t at(int block, int step) const {
        return matrix_in_lds(values) + block / 2 * (XTile<W, M>::BYTES / 16) + step * 2;
    }

    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted) {
        if (wanted) XTile<W, M>::keep(values + j / 8 * XTile<W, M>::BYTES, i, j % 8, x);
    }
};

/// Two codes of e4m3, in the upper bytes of either half, as bf16 times 2^-120: the same bits further down.
DEVICE Bf16x2 bf16_from_upper_e4m3(uint32_t codes) { return (codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u); }

/// Byte `i` of a word of e8m0 codes, twice: a pair of bf16, 2^60 times the scale; infinity from 2^68 on and for NaN (`has_nan`).
DEVICE Bf16x2 scale_as_bf16(uint32_t word, int i) {
    const uint32_t twice = __byte_perm(word, 0, 0x4040 | 0x101 * i);
    return __vminu2(twice + 0x003c003cu, 0x00ff00ffu) << 7;
}

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::MANY> : WideSums<M> {
    using WideSums<M>::sum;

    template <typename Tiles>
    DEVICE void look(const Tiles&, int) {}

    /// Starts adding tile `t` of what `stream` has at hand; `block` is its first MX block in the activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        uint32_t fragments[4][4];  // for each step of 16 along K: rows g and g + 8 by turns, lower K first
        load(stream.codes(t), stream.scale_words(t)[lane_index() / 4], fragments);
        warpgroup_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) warpgroup_matrix_bf16(fragments[step], x.at(block, step), sum, true);
        warpgroup_commit();
    }

    /// Waits until at most `Pending` tiles are under way. The compiler cannot look through this when none is left: it must not think
    /// of moving sums, or taking them for integers, before, or ptxas would let every matrix instruction wait for the one in front.
    template <int Pending>
    DEVICE void settle(Number<Pending>) {
        warpgroup_wait<Pending>();
        if constexpr (Pending == 0) {
#pragma unroll
            for (int i = 0; i < M / 2; i++) asm volatile("" : "+f"(sum[i / 4][i % 4]));
        }
    }

   private:
    DEVICE static void load(const uint8_t* codes, uint32_t scales, uint32_t (&fragments)[4][4]) {
        if constexpr (W == Weight::e4m3) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Words words = load_words(codes + row * 512 + lane_index() * 16);
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    const Bf16x2 scale = scale_as_bf16(scales, 2 * row + step / 2);
                    const uint32_t word = words.v[step], low = __byte_perm(word, 0, 0x1404), high = __byte_perm(word, 0, 0x3424);
                    fragments[step][row] = times_bf16(bf16_from_upper_e4m3(low), scale);
                    fragments[step][row + 2] = times_bf16(bf16_from_upper_e4m3(high), scale);
                }
            }
        } else {
            each_e2m1_fragment(codes, [&](int step, int part, Bf16x2 pair) {
                const uint32_t twice = __byte_perm(scales, 0, 0x4040 | 0x101 * (2 * (part % 2) + step / 2));
                fragments[step][part] = times_bf16(pair, twice << 7);
            });
        }
    }
};
