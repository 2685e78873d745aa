// The decode kernels' target-specific half for sm_90: bulk copies into rings, mma.sync, clusters.
//
// Weights lie in tiles of 16 rows x 64 of K, in which lane l = 4 g + q finds what the matrix unit wants of it of rows g and
// g + 8 together. e4m3 (layout `mma_tile`, sglang_amd_quant/layouts/mma_tile.py): k = 8 q ... 8 q + 7 of every MX block. Which k
// an mma calls its own does not matter as long as B agrees, so activations are held with that order in mind. e2m1 (layout
// `hopper_bf16`, kernels/triton/hopper_pack.py, shared with the prefill kernels): k as in PTX's fragments, times four.
//
// Scales are applied to a block's sum (`AFTER`), where codes are multiplied as they are, or, for e2m1 and M > 8, to the
// weights before: bf16 holds any code times any scale. That costs instructions a weight and saves them a sum, so it wins as M
// grows. Either way all products are exact.
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

/// A wave's weights, chunk by chunk, through a ring in shared memory.
template <Weight W>
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

    /// `each(t, number along K)` for all tiles of the next row group; t is the tile's place in its chunk.
    template <int Unroll, typename Each>
    DEVICE void each_tile(Each each) {
        for (int first = s.wave_first; first < s.wave_end; first += a.chunk) {
            const int count = smaller(a.chunk, s.wave_end - first);
            wait();
#pragma unroll(Unroll)
            for (int t = 0; t < count; t++) each(t, first + t);
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
        const int row_tile = group * a.waves_n + s.wave_n;
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

/// The block's activations in shared memory.
///
/// For e4m3 weights as halves in the order of K. For e2m1 weights as bf16, permuted within MX blocks so that lane q finds what
/// two steps of 16 want of it as 16 bytes, its chunk; chunks are swizzled so that stores, too, meet no bank twice. With AFTER,
/// elements of the format with a factor for every MX block; otherwise scales applied, but a static one, which waits for the end.
template <Weight W, Act A, int M>
struct Activations {
    static constexpr bool AFTER = W == Weight::e4m3 || M <= 8;
    // Codes of e2m1 are subnormal bf16 (2^-126): activations go as far up, so that sums stay normal floats.
    static constexpr float LIFT = W == Weight::e2m1 && AFTER ? 0x1p48f : 1.0f;
    // Up to four rows leave columns of the matrix unit free: they are given to the other MX block of a tile, so
    // that the sums of both come out of one accumulator, each in columns of its own, and scales are applied once.
    static constexpr int GROUP = M < 8 ? 2 : 1;
    static constexpr int ROOM = 8 / GROUP > M ? 8 / GROUP : M;
    static constexpr int SETS = ROOM > 8 ? ROOM / 8 : 1;  // of eight columns

    uint16_t *zeros, *values;  // [ROOM][row]
    float* factors;            // [MX block][ROOM], with AFTER
    int row;                   // 16-bit values; 64 bytes beyond a multiple of 128, so that two rows share no bank

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) {
        const int most = ceil_div(s.tiles, a.split);
        row = most * Tile<W>::K + 32;
        zeros = reinterpret_cast<uint16_t*>(lds);
        values = zeros + 8;
        factors = reinterpret_cast<float*>(values + ROOM * row);
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        const int most = ceil_div(s.tiles, a.split);
        return 16 + ROOM * ((most * Tile<W>::K + 32) * 2 + (AFTER ? most * Tile<W>::BLOCKS * 4 : 0));
    }

    /// All threads: quantizes the block's part of x. Visible to the block after its next barrier.
    template <bool Grouped>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows) {
        if (thread_index() < 4) reinterpret_cast<uint32_t*>(zeros)[thread_index()] = 0;
        const float static_scale = A == Act::fp8_static ? *a.x_scale : 1.0f;
        constexpr int BATCH = M <= 4 ? 2 : 4;  // loads of a thread that are under way together
        const int pieces = s.block_tiles * Tile<W>::K / 8, base = s.block_first * Tile<W>::K;
        if (pieces == 0) return;
        const int step_i = s.threads / pieces, step_j = s.threads % pieces;
        int i = thread_index() / pieces, j = thread_index() % pieces;
#pragma unroll 1
        while (__any_sync(0xffffffffu, i < rows.count)) {
            Words eight[BATCH];
            int is[BATCH], js[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; u++) {
                is[u] = i, js[u] = j;
                eight[u] = {};
                if (i < rows.count && base + 8 * j < a.k) eight[u] = load_words(a.x + rows.in(i) * a.x_stride + base + 8 * j);
                i += step_i, j += step_j;
                if (j >= pieces) j -= pieces, i++;
            }
#pragma unroll
            for (int u = 0; u < BATCH; u++) keep(eight[u], is[u], js[u], is[u] < rows.count, a.carry, static_scale);
        }
    }

    /// Column `m`'s 16-bit values of MX block `block` that lane q multiplies: for W = e2m1, of two steps of 16.
    DEVICE const uint16_t* at(int m, int block, int q) const {
        return values + m * row + block * MX_BLOCK + 8 * (W == Weight::e2m1 ? q ^ (block >> 1 & 3) : q);
    }

   private:
    DEVICE void keep(const Words& x, int i, int j, bool wanted, int carry, float static_scale) {
        const int block = j >> 2, quarter = j & 3;
        float factor = 1, v[8];
        Words out = x;
        if constexpr (AFTER || A != Act::bf16) quantize_activations<A>(x, carry, static_scale, v, factor);
        if (!wanted) return;
        if constexpr (AFTER)
            if (quarter == 0) factors[block * ROOM + i] = factor / LIFT;
        if constexpr (W == Weight::e4m3) {
#pragma unroll
            for (int p = 0; p < 4; p++) out.v[p] = half2_from_floats({v[2 * p], v[2 * p + 1]});
            store_words(values + i * row + 8 * j, out);
        } else {
            const float scale = AFTER ? LIFT : A == Act::fp8_static ? 1.0f : factor;
#pragma unroll
            for (int q = 0; q < 4; q++) {
                if constexpr (AFTER || A != Act::bf16) out.v[q] = bf16x2_from_floats({v[2 * q] * scale, v[2 * q + 1] * scale});
                *reinterpret_cast<uint32_t*>(values + i * row + block * MX_BLOCK + 8 * (q ^ (block >> 1 & 3)) + 2 * quarter) = out.v[q];
            }
        }
    }
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every set.
template <Weight W, Act A, int M>
struct Totals {
    using X = Activations<W, A, M>;
    float sum[X::SETS][4] = {};

    /// Adds tile `t` of the stream's chunk; `block` is its first MX block in the activations.
    DEVICE void add(const Stream<W>& stream, int t, const X& x, int block) {
        const int g = lane_index() / 4, q = lane_index() % 4;
        const uint32_t scales = stream.scale_words(t)[g];  // bytes: row g, blocks 0 and 1; row g + 8
        uint32_t fragments[4][4];                          // of A, for each step of 16 along K
        load(stream.codes(t), scales, fragments);
        Accumulator part[2][X::SETS] = {};
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int set = 0; set < X::SETS; set++) {
                const uint16_t* at = x.at(8 * set + g % X::ROOM, block + b, q);
                const Words v = load_words(X::GROUP == 1 || g / X::ROOM == b ? at : x.zeros);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const uint32_t(&f)[4] = fragments[2 * b + half];
                    const Packed<2> column = {v.v[2 * half], v.v[2 * half + 1]};
                    if constexpr (W == Weight::e4m3)
                        part[b][set] = matrix_half({f[0], f[1], f[2], f[3]}, column, part[b][set]);
                    else
                        part[b][set] = matrix_bf16({f[0], f[1], f[2], f[3]}, column, part[b][set]);
                }
            }
        const float* factors = x.factors + block * X::ROOM + 2 * q;
        const uint32_t mine = scales >> 8 * (2 * q / X::ROOM);  // this lane's columns belong to that block of a group
#pragma unroll
        for (int b = 0; b < 2; b += X::GROUP)
#pragma unroll
            for (int set = 0; set < X::SETS; set++) {
                Accumulator p = part[b][set];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (X::GROUP == 2) p.v[i] += part[1][set].v[i];
                    if constexpr (!X::AFTER) sum[set][i] += p.v[i];
                }
                if constexpr (X::AFTER) {
                    const float up = scale_of_byte(mine, b), down = scale_of_byte(mine, 2 + b);
                    const float2 factor = *reinterpret_cast<const float2*>(factors + b * X::ROOM + set * 8);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        sum[set][i] = fmaf(p.v[i] * (i < 2 ? up : down), i % 2 ? factor.y : factor.x, sum[set][i]);
                }
            }
    }

    /// Adds up what belongs to the same row of activations.
    DEVICE void join() {
#pragma unroll
        for (int mask = X::ROOM / 2; mask < 4; mask *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[0][i] += shuffle_xor(sum[0][i], mask);
    }

    /// `store(row, column, value of it, value of the next column)` for all that this lane has to hand on.
    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        const int g = lane_index() / 4, q = lane_index() % 4;
#pragma unroll
        for (int set = 0; set < X::SETS; set++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (8 * set + 2 * q < smaller(columns, X::ROOM))
                    store(g + 8 * half, 8 * set + 2 * q, sum[set][2 * half], sum[set][2 * half + 1]);
    }

   private:
    /// This lane's part of A of a tile: of each step of 16 along K, rows g and g + 8 by turns, lower K first.
    DEVICE static void load(const uint8_t* codes, uint32_t scales, uint32_t (&fragments)[4][4]) {
        const int lane = lane_index();
        if constexpr (W == Weight::e4m3) {
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const Words words = load_words(codes + row * 512 + lane * 16);
#pragma unroll
                for (int step = 0; step < 4; step++)
                    halves_from_e4m3(words.v[step], fragments[step][row], fragments[step][row + 2]);
            }
        } else {
            const Words words = load_words(codes + lane * 16);
#pragma unroll
            for (int part = 0; part < 4; part++) {  // a word has one part of all four steps, two of each MX block
                Bf16x2 steps[4];
                bf16_from_spread_e2m1(words.v[part], steps);
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    const uint32_t scale = scales >> (16 * (part % 2) + 8 * (step / 2)) & 0xff;
                    fragments[step][part] = X::AFTER ? steps[step] : times_bf16(steps[step], scale * 0x00800080u);
                }
            }
        }
    }
};

/// What the sums of weight row `row` are multiplied by.
template <Weight W, Act A, int M>
DEVICE float row_factor(const DecodeArgs& a, const Share& s, int expert, int row) {
    if constexpr (W == Weight::e4m3) return 1.0f;
    const float factor = a.factors[static_cast<int64_t>(expert) * s.row_tiles * TILE_ROWS + row];
    return A == Act::fp8_static && !Activations<W, A, M>::AFTER ? factor * *a.x_scale : factor;
}

/// Partial sums of a row group on their way to the block that finishes their rows: [rank][wave_k][owned row][column].
///
/// Blocks that share K are a cluster, and each owns rows / split rows. Sums travel by st.async into the owner's shared memory
/// and announce themselves to its barrier, so that no fence is needed.
template <int Room>
class Sums {
   public:
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
                barrier_expect(barrier, a.split * a.waves_k * owned * ceil_div(smaller(columns, Room), 2) * 8);
        } else if (!first_group) {
            block_barrier();
        }
        float* slot = partial + (s.rank * a.waves_k + s.wave_k) * owned * Room;
        totals.each(columns, [&](int row, int column, float first, float second) {
            row += s.wave_n * TILE_ROWS;
            float* to = slot + row % owned * Room + column;
            if (a.split > 1)
                cluster_store(address_in(to, row / owned), first, second, address_in(barrier, row / owned));
            else
                *reinterpret_cast<float2*>(to) = {first, second};
        });
        if (thread_index() < owned) times[thread_index()] = my_times, plus[thread_index()] = my_plus;
        block_barrier();
        if (a.split > 1) barrier_wait(barrier, parity), parity ^= 1;
    }

    /// The finished sum of an owned row, in an order that never changes.
    DEVICE float sum(int row, int column) const {
        float total = 0;
#pragma unroll 4
        for (int i = 0; i < a.split * a.waves_k; i++) total += partial[(i * owned + row) * Room + column];
        return total * times[row] + plus[row];
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

/// A finished sum. Kernels multiply by infinity where a scale is NaN, so that only sums that are not finite need to ask.
template <Weight W, Act A>
DEVICE float finish(const DecodeArgs& a, const Share& s, int expert, int row, float sum) {
    const bool finite = __builtin_fabsf(sum) < __builtin_inff();
    return !finite && has_nan<W>(a, s, expert, row) ? bits<float>(0x7fc00000u) : sum;
}

DEVICE const DecodeArgs& late(const DecodeArgs& a) { return a; }

DEVICE int share_rank(const DecodeArgs& a) { return a.split > 1 ? cluster_rank() : 0; }
