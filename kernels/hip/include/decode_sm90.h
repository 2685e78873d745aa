// The decode kernels' target-specific half for sm_90: bulk copies into rings, tensor cores, clusters.
//
// Weights lie in tiles of 16 rows x 64 of K, in which lane l = 4 g + q finds what the matrix unit wants of it of rows g and
// g + 8 together. e4m3 (layout `mma_tile`, sglang_amd_quant/layouts/mma_tile.py): k = 8 q ... 8 q + 7 of every MX block. Which k
// a step of the matrix unit calls its own does not matter as long as B agrees, so activations are held with that order in mind.
// e2m1 (layout `hopper_bf16`, kernels/triton/hopper_pack.py, shared with the prefill kernels): k as in PTX's fragments.
//
// Two ways to multiply them: few rows of x by mma.sync (decode_sm90_few.h), from WIDE_FROM on by wgmma (decode_sm90_many.h).
#pragma once
#include "decode.h"
#include "matrix.h"
#include "hopper.h"

/// e4m3: layout `mma_tile`. e2m1: layout `hopper_bf16`, whose scales are relative to a row's largest, which `factors` keeps.
template <Weight W>
struct Tile {
    static constexpr int BLOCKS = 2;  // MX blocks of a row
    static constexpr int K = BLOCKS * MX_BLOCK;
    static constexpr int BYTES = TILE_ROWS * K / (W == Weight::e2m1 ? 2 : 1);
    static constexpr int SCALES = TILE_ROWS * BLOCKS;
};

/// Eight e2m1 codes in the bit order of `hopper_bf16` as four pairs of bf16, times 2^-126. Of each 16 bits, the magnitude of the
/// first code is at bit 6, where a bf16 reads it so; of the others at 3, 0 and 10; the signs are at 15, 13, 9 and 14.
DEVICE void bf16_from_spread_e2m1(uint32_t word, Bf16x2 (&v)[4]) {
    v[0] = word & 0x81c081c0u;
    v[1] = (word << 3 & 0x01c001c0u) | (word << 2 & 0x80008000u);
    v[2] = word << 6 & 0x81c081c0u;
    v[3] = (word >> 4 & 0x01c001c0u) | (word << 1 & 0x80008000u);
}

/// A lane's part of a tile of e2m1 codes as the matrix unit's left operand: `each(step, part, bf16)` for every step of 16 along K
/// and its four words, rows g and g + 8 by turns, lower K first; bf16 are 2^-126 times the values.
template <typename Each>
DEVICE void each_e2m1_fragment(const uint8_t* codes, Each each) {
    const Words words = load_words(codes + lane_index() * 16);
#pragma unroll
    for (int part = 0; part < 4; part++) {  // a word has one part of all four steps, two of each MX block
        Bf16x2 steps[4];
        bf16_from_spread_e2m1(words.v[part], steps);
#pragma unroll
        for (int step = 0; step < 4; step++) each(step, part, steps[step]);
    }
}

/// A wave's weights, chunk by chunk, through a ring in shared memory. From WIDE_FROM on, waves that have no row
/// tile of their own read the last one again, because the others cannot multiply without them.
template <Weight W, int M>
class Stream {
   public:
    /// `lds` is this wave's part, `bytes(a)` long. Starts fetching: weights depend on no launch before this one.
    DEVICE Stream(const DecodeArgs& a, const Share& s, int expert, uint8_t* lds, uint64_t* barriers)
        : a(a), s(s), ring(lds), barriers(barriers), group(s.first_group), tile(s.wave_first) {
        const int64_t tiles = static_cast<int64_t>(expert) * s.row_tiles * s.tiles;
        w = a.w + tiles * Tile<W>::BYTES;
        scales = a.scales + tiles * Tile<W>::SCALES;
        if (lane_index() == 0) {
            for (int i = 0; i < a.depth; i++) barrier_init(barriers + i);
            barriers_are_ready();
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < a.depth; i++) fetch();
    }

    DEVICE static int bytes(const DecodeArgs& a) { return a.depth * a.chunk * (Tile<W>::BYTES + Tile<W>::SCALES); }

    /// `each(t, number along K)` for all tiles of the next row group; t is the tile's place in its chunk. `settle()` finishes what
    /// `each` started.
    template <int Unroll, typename Each, typename Settle>
    DEVICE void each_tile(Each each, Settle settle) {
        for (int first = s.wave_first; first < s.wave_end; first += a.chunk) {
            const int count = smaller(a.chunk, s.wave_end - first);
            wait();
            if constexpr (M < WIDE_FROM) {
#pragma unroll(Unroll)
                for (int t = 0; t < count; t++) each(t, first + t);
            } else {  // two by two: while one is multiplied, the other is decoded, into other registers
                int t = 0;
#pragma unroll 1
                for (; t + 1 < count; t += 2) each(t, first + t), each(t + 1, first + t + 1), settle();
                if (t < count) each(t, first + t), settle();
            }
            release();
        }
    }

    /// Waits for the next chunk.
    DEVICE void wait() { barrier_wait(barriers + stage, parity); }
    /// Tile `t` of the chunk.
    DEVICE const uint8_t* codes(int t) const { return ring + (stage * a.chunk + t) * Tile<W>::BYTES; }
    DEVICE const uint32_t* scale_words(int t) const {
        return reinterpret_cast<const uint32_t*>(ring + a.depth * a.chunk * Tile<W>::BYTES + (stage * a.chunk + t) * Tile<W>::SCALES);
    }
    /// Gives the chunk back and fetches into its place.
    DEVICE void release() {
        __syncwarp();
        fetch();
        if (++stage == a.depth) stage = 0, parity ^= 1;
    }

   private:
    DEVICE void fetch() {
        if (group >= s.row_groups || s.wave_first >= s.wave_end) return;
        const int wanted = group * a.waves_n + s.wave_n, row_tile = M >= WIDE_FROM ? smaller(wanted, s.row_tiles - 1) : wanted;
        const int count = smaller(a.chunk, s.wave_end - tile);
        if (row_tile < s.row_tiles && lane_index() == 0) {
            const int64_t from = static_cast<int64_t>(row_tile) * s.tiles + tile;
            uint64_t* barrier = barriers + fetch_stage;
            const int at = fetch_stage * a.chunk;
            barrier_expect(barrier, count * (Tile<W>::BYTES + Tile<W>::SCALES));
            bulk_copy(ring + at * Tile<W>::BYTES, w + from * Tile<W>::BYTES, count * Tile<W>::BYTES, barrier);
            bulk_copy(ring + a.depth * a.chunk * Tile<W>::BYTES + at * Tile<W>::SCALES, scales + from * Tile<W>::SCALES,
                      count * Tile<W>::SCALES, barrier);
        }
        if (++fetch_stage == a.depth) fetch_stage = 0;
        tile += count;
        if (tile >= s.wave_end) tile = s.wave_first, group += a.groups;
    }

    const DecodeArgs& a;
    const Share& s;
    uint8_t* ring;
    uint64_t* barriers;
    const uint8_t *w, *scales;
    int group, tile, fetch_stage = 0, stage = 0;
    uint32_t parity = 0;
};

/// A block of 32 activations, of which four neighbouring lanes have eight each (`v`), quantized as `A`: on return v holds
/// codes times `factor`'s inverse, that is, elements of the format, and `factor` is the block's scale.
template <Act A>
DEVICE void quantize_activations(const Words& x, int carry, float static_scale, float (&v)[8], float& factor) {
    uint32_t pair_max = 0;  // magnitudes of bf16 order as integers do
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Float2 pair = floats_from_bf16x2(x.v[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
        pair_max = __vmaxu2(pair_max, x.v[i] & 0x7fff7fffu);
    }
    pair_max = __vmaxu2(pair_max, shuffle_xor(pair_max, 1));
    pair_max = __vmaxu2(pair_max, shuffle_xor(pair_max, 2));
    const uint32_t largest = larger(pair_max << 16, pair_max & 0xffff0000u);
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

/// Which pieces of x, of eight values, a thread quantizes: from piece j of row i on, by steps. Known before x is.
template <Weight W>
struct Pieces {
    int count, base, i, j, step_i, step_j;

    DEVICE explicit Pieces(const Share& s)
        : count(s.block_tiles * Tile<W>::K / 8), base(s.block_first * Tile<W>::K), i(1 << 30), j(0), step_i(0), step_j(0) {
        if (count == 0) return;
        i = thread_index() / count, j = thread_index() % count;
        step_i = s.threads / count, step_j = s.threads % count;
    }
};

/// All threads: `x.keep(eight bf16, row, piece, ...)` for what the block multiplies of all rows. A thread has BATCH loads under way.
template <Act A, int BATCH, typename X, Weight W, bool Grouped>
DEVICE void stage_rows(X& x, const DecodeArgs& a, const Pieces<W>& pieces, const Rows<Grouped>& rows) {
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
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const bool wanted = is[u] < rows.count;
            if (u == 0 || __any_sync(0xffffffffu, wanted)) x.keep(eight[u], is[u], js[u], wanted, a.carry, static_scale);
        }
    }
}

/// A block's activations, and what a wave sums up; for few rows and for many.
template <Weight W, Act A, int M, bool Many = (M >= WIDE_FROM)>
struct Activations;
template <Weight W, Act A, int M, bool Many = (M >= WIDE_FROM)>
struct Totals;

#include "decode_sm90_few.h"
#include "decode_sm90_many.h"

/// What the sums of weight row `row` are multiplied by.
template <Weight W, Act A, int M>
DEVICE float row_factor(const DecodeArgs& a, const Share& s, int expert, int row) {
    using X = Activations<W, A, M>;
    float factor = X::UNLIFT;
    if constexpr (W == Weight::e2m1) factor = a.factors[static_cast<int64_t>(expert) * s.row_tiles * TILE_ROWS + row];
    return A == Act::fp8_static && X::STATIC_SCALE_LAST ? factor * *a.x_scale : factor;
}

/// Partial sums of a row group on their way to the block that finishes their rows: [rank][wave_k][owned row][column].
///
/// Blocks that share K are a cluster, and each owns rows / split rows. Sums travel by st.async into the owner's shared memory
/// and announce themselves to its barrier, so that no fence is needed.
template <int Room>
class Sums {
    static constexpr int PITCH = Room < 16 ? Room : Room + 4;  // floats from row to row: stores and loads meet in few banks

   public:
    static constexpr int COLUMNS = Room < 16 ? 1 : 4;  // that one thread finishes together
    int owned, first;     // rows of a group that this block finishes, from which on
    float *times, *plus;  // of every owned row: what its sums are multiplied by, and what is added then

    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier) : a(a), s(s), barrier(barrier) {
        owned = a.waves_n * TILE_ROWS / a.split, first = s.rank * owned;
        times = reinterpret_cast<float*>(lds);
        plus = times + owned;
        partial = plus + owned;
        if (a.split == 1) return;
        if (thread_index() == 0) barrier_init(barrier), barriers_are_ready();
        cluster_arrive();
    }

    /// Loads, before they are needed, what one of the owned rows is multiplied by and what is added to it.
    template <Weight W, Act A, int M>
    DEVICE void look_ahead(int expert, int group) {
        const int row = group * a.waves_n * TILE_ROWS + first + thread_index();
        my_times = 1, my_plus = 0;
        if (thread_index() >= owned || row >= a.n) return;
        my_times = row_factor<W, A, M>(a, s, expert, row);
        if (a.bias != nullptr) my_plus = float_from_bf16(a.bias[static_cast<int64_t>(expert) * a.n + bias_index(a, row)]);
    }

    /// All threads: sums up, and tells every thread of the block what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns, bool first_group) {
        if (a.split > 1) {
            cluster_wait();  // all ranks have started, and are done with the sums of the group before
            if (thread_index() == 0)
                barrier_expect(barrier, a.split * a.waves_k * owned * ceil_div(smaller(columns, Room), T::TOGETHER) * T::TOGETHER * 4);
        } else if (!first_group) {
            block_barrier();
        }
        float* slot = partial + (s.rank * a.waves_k + s.wave_k) * owned * PITCH;
        totals.each(columns, [&](int row, int column, const auto& values) {
            row += s.wave_n * TILE_ROWS;
            float* to = slot + row % owned * PITCH + column;
            if (a.split > 1)
                cluster_store(address_in(to, row / owned), values, address_in(barrier, row / owned));
            else
                *reinterpret_cast<Floats<T::TOGETHER>*>(to) = values;
        });
        if (thread_index() < owned) times[thread_index()] = my_times, plus[thread_index()] = my_plus;
        block_barrier();
        if (a.split > 1) barrier_wait(barrier, parity), parity ^= 1;
    }

    /// The finished sums of an owned row, columns `first` ... , in an order that never changes.
    DEVICE void sum(int row, int first, float (&total)[COLUMNS]) const {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = 0;
#pragma unroll 4
        for (int i = 0; i < a.split * a.waves_k; i++) {
            const auto part = *reinterpret_cast<const Floats<COLUMNS>*>(partial + (i * owned + row) * PITCH + first);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) total[c] += part.v[c];
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) total[c] = total[c] * times[row] + plus[row];
    }

    /// After the last `sum` of a group that another follows.
    DEVICE void done() const {
        if (a.split > 1) cluster_arrive();
    }

   private:
    const DecodeArgs& a;
    const Share& s;
    uint64_t* barrier;
    float* partial;
    float my_times = 1, my_plus = 0;
    uint32_t parity = 0;
};

/// Whether weight row `row` has a scale that is NaN. The factors of e2m1 know, so nobody asks.
template <Weight W>
DEVICE bool has_nan(const DecodeArgs& a, const Share& s, int expert, int row) {
    if constexpr (W == Weight::e2m1) return false;
    const int64_t row_tile = static_cast<int64_t>(expert) * s.row_tiles + row / TILE_ROWS;
    const uint8_t* from = a.scales + row_tile * s.tiles * Tile<W>::SCALES + (row % 8 * 2 + row % TILE_ROWS / 8) * 2;
    for (int block = 0; block < a.k / MX_BLOCK; block++)
        if (from[block / 2 * Tile<W>::SCALES + block % 2] == 255) return true;
    return false;
}

/// Finished sums of a weight row. Kernels multiply by infinity where a scale is NaN, so that only sums that are not finite need to ask.
template <Weight W, Act A, int Columns>
DEVICE void finish(const DecodeArgs& a, const Share& s, int expert, int row, float (&sums)[Columns]) {
    bool finite = true;
#pragma unroll
    for (int c = 0; c < Columns; c++) finite &= __builtin_fabsf(sums[c]) < __builtin_inff();
    if (finite || !has_nan<W>(a, s, expert, row)) return;
#pragma unroll
    for (int c = 0; c < Columns; c++) sums[c] = bits<float>(0x7fc00000u);
}

DEVICE const DecodeArgs& late(const DecodeArgs& a) { return a; }

DEVICE int share_rank(const DecodeArgs& a) { return a.split > 1 ? cluster_rank() : 0; }
