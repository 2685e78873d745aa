// The decode kernels' target-specific half for sm_90: bulk copies into rings, mma.sync, clusters.
//
// Layout `mma_tile` of weights (sglang_amd_quant/layouts/mma_tile.py): tiles of 16 rows x 64 bytes, in which lane l finds
// its part of rows l / 4 and l / 4 + 8 as 16 bytes each, eight codes of every MX block. Its q-th lane of four (q = l % 4) has
// k = 8 q ... 8 q + 7 of a block, and so has B: which k an mma calls its own does not matter as long as both sides agree.
#pragma once
#include "decode.h"
#include "matrix.h"
#include "hopper.h"

template <Weight W>
struct Tile {
    static constexpr int BLOCKS = W == Weight::e4m3 ? 2 : 4;  // MX blocks of a row
    static constexpr int K = BLOCKS * MX_BLOCK;
    static constexpr int BYTES = TILE_ROWS * 64;
    static constexpr int SCALES = TILE_ROWS * BLOCKS;
    static constexpr float UNIT = W == Weight::e2m1 ? 16384.0f : 1.0f;  // halves from codes are values divided by this
};

/// Eight codes of e2m1 in the bit order of `mma_tile` as four pairs of halves, times 2^-14: of each 16 bits, the magnitude of
/// the first code is at bit 9, of the others at 6, 3 and 0; the signs at 15, 12, 14 and 13.
DEVICE void halves_from_spread_e2m1(uint32_t word, Half2 (&h)[4]) {
    h[0] = word & 0x8e008e00u;
    h[1] = word << 3 & 0x8e008e00u;
    h[2] = (word << 6 & 0x0e000e00u) | (word << 1 & 0x80008000u);
    h[3] = (word << 9 & 0x0e000e00u) | (word << 2 & 0x80008000u);
}

DEVICE void halves_from_e4m3(uint32_t word, Half2& low, Half2& high) {
    asm("{.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.rn.f16x2.e4m3x2 %0, l;\n\tcvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
}

/// Byte `i` of a word of e8m0 codes as a float; 255 becomes infinity (see `poisoned`).
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

/// The block's activations in shared memory as halves, and per MX block what products with them are to be multiplied by.
template <Weight W, Act A, int M>
struct Activations {
    // Up to four rows leave columns of the matrix unit free: they are given to other MX blocks, so that the sums of GROUP
    // blocks come out of one accumulator, each in columns of its own, and scales are applied once.
    static constexpr int GROUP = M >= 8 ? 1 : 8 / M < Tile<W>::BLOCKS ? 8 / M : Tile<W>::BLOCKS;
    static constexpr int ROOM = 8 / GROUP > M ? 8 / GROUP : M;
    static constexpr int SETS = ROOM > 8 ? ROOM / 8 : 1;  // of eight columns

    uint16_t *zeros, *values;  // [ROOM][row]
    float* factors;            // [MX block][ROOM]
    int row;                   // halves; 64 bytes beyond a multiple of 128, so that two rows share no bank

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) {
        const int most = ceil_div(s.tiles, a.split);
        row = most * Tile<W>::K + 32;
        zeros = reinterpret_cast<uint16_t*>(lds);
        values = zeros + 8;
        factors = reinterpret_cast<float*>(values + ROOM * row);
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        const int most = ceil_div(s.tiles, a.split);
        return 16 + ROOM * ((most * Tile<W>::K + 32) * 2 + most * Tile<W>::BLOCKS * 4);
    }

    /// All threads: quantizes the block's part of x. Visible to the block after its next barrier.
    template <bool Grouped>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows) {
        if (thread_index() < 4) reinterpret_cast<uint32_t*>(zeros)[thread_index()] = 0;
        const float static_scale = A == Act::fp8_static ? *a.x_scale : 1.0f;
        constexpr int BATCH = M <= 2 ? 2 : 4;  // loads of a thread that are under way together
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
            for (int u = 0; u < BATCH; u++) {
                float factor;
                const Words halves = quantize(eight[u], a.carry, static_scale, factor);
                if (is[u] >= rows.count) continue;
                store_words(values + is[u] * row + 8 * js[u], halves);
                if (js[u] % 4 == 0) factors[(js[u] >> 2) * ROOM + is[u]] = factor * Tile<W>::UNIT;
            }
        }
    }

   private:
    /// Eight activations, whose block's other 24 the three neighbouring lanes have, as halves of their codes.
    DEVICE static Words quantize(const Words& x, int carry, float static_scale, float& factor) {
        float v[8];
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
        float up;  // what brings the block into the format's range
        if constexpr (A == Act::fp8_static) {
            factor = static_scale;
        } else if constexpr (A == Act::bf16) {
            // Brought up to 2^14..2^15; a bf16 has 8 significant bits, so what lies within 2^-28 of the largest stays exact.
            const int biased = smaller(larger(static_cast<int>(largest >> 23), 15), 254);
            up = bits<float>(static_cast<uint32_t>(268 - biased) << 23);
            factor = times_power_of_two(1.0f, biased - 127 - 14);
        } else {
            constexpr int EMAX = A == Act::e4m3 ? 8 : 2;
            const int exponent = largest > 0x7f800000u ? 255 : larger(static_cast<int>((largest + carry) >> 23) - EMAX, 0);
            factor = float_from_e8m0(exponent);
            up = exponent >= 254 ? 0x1p-127f : bits<float>(static_cast<uint32_t>(254 - exponent) << 23);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = A == Act::fp8_static ? v[i] / static_scale : v[i] * up;
        Words halves;
        if constexpr (A == Act::e4m3 || A == Act::fp8_static) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                halves_from_e4m3(e4m3_from_floats({v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]}), halves.v[2 * i],
                                 halves.v[2 * i + 1]);
        } else {
            float rounded[8];
            if constexpr (A == Act::e2m1)
                floats_from_e2m1(e2m1_from_floats(v), rounded);
#pragma unroll
            for (int i = 0; i < 4; i++)
                halves.v[i] = half2_from_floats(A == Act::e2m1 ? Float2{rounded[2 * i], rounded[2 * i + 1]} : Float2{v[2 * i], v[2 * i + 1]});
        }
        return halves;
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
        const Words top = load_words(stream.codes(t) + lane_index() * 16);
        const Words bottom = load_words(stream.codes(t) + 512 + lane_index() * 16);
        constexpr int SCALE_WORDS = Tile<W>::BLOCKS / 2;  // of rows g and g + 8
        uint32_t scale_words[SCALE_WORDS];
#pragma unroll
        for (int i = 0; i < SCALE_WORDS; i++)  // shifted so that this lane's columns find their block of a group
            scale_words[i] = stream.scale_words(t)[g * SCALE_WORDS + i] >> 8 * (2 * q / X::ROOM);
        const uint16_t* values = x.values + g % X::ROOM * x.row + block * MX_BLOCK + 8 * q;
        const float* factors = x.factors + block * X::ROOM + 2 * q;
#pragma unroll
        for (int first = 0; first < Tile<W>::BLOCKS; first += X::GROUP) {
            constexpr int CHAINS = X::GROUP > 1 ? 2 : 1;  // with one, each product would wait for the one before
            Accumulator part[CHAINS][X::SETS] = {};
#pragma unroll
            for (int b = first; b < first + X::GROUP; b++) {
                Half2 up[4], down[4];
                if constexpr (W == Weight::e4m3) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        halves_from_e4m3(top.v[2 * b + i], up[2 * i], up[2 * i + 1]);
                        halves_from_e4m3(bottom.v[2 * b + i], down[2 * i], down[2 * i + 1]);
                    }
                } else {
                    halves_from_spread_e2m1(top.v[b], up);
                    halves_from_spread_e2m1(bottom.v[b], down);
                }
#pragma unroll
                for (int set = 0; set < X::SETS; set++) {
                    const uint16_t* at = values + set * 8 * x.row + b * MX_BLOCK;
                    const Words v = load_words(X::GROUP == 1 || g / X::ROOM == b - first ? at : x.zeros);
                    Accumulator& p = part[b % CHAINS][set];
                    p = matrix_half({up[0], down[0], up[1], down[1]}, {v.v[0], v.v[1]}, p);
                    p = matrix_half({up[2], down[2], up[3], down[3]}, {v.v[2], v.v[3]}, p);
                }
            }
            const float scale_up = scale_of_byte(scale_words[0], first);
            const float scale_down = W == Weight::e4m3 ? scale_of_byte(scale_words[0], 2 + first) : scale_of_byte(scale_words[SCALE_WORDS - 1], first);
#pragma unroll
            for (int set = 0; set < X::SETS; set++) {
                const float2 factor = *reinterpret_cast<const float2*>(factors + first * X::ROOM + set * 8);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = CHAINS == 2 ? part[0][set].v[i] + part[CHAINS - 1][set].v[i] : part[0][set].v[i];
                    sum[set][i] = fmaf(p * (i < 2 ? scale_up : scale_down), i % 2 ? factor.y : factor.x, sum[set][i]);
                }
            }
        }
    }

    /// Adds up the columns that belong to the same row of activations.
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
};

/// Partial sums of a row group on their way to the block that finishes their rows: [rank][wave_k][owned row][column].
///
/// Blocks that share K are a cluster, and each owns rows / split rows. Sums travel by st.async into the owner's shared memory
/// and announce themselves to its barrier, so that no fence is needed.
template <int Room>
class Sums {
   public:
    int owned;  // rows of a group that this block finishes, from owned * rank on

    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier) : a(a), s(s), barrier(barrier) {
        partial = reinterpret_cast<float*>(lds);
        owned = a.waves_n * TILE_ROWS / a.split;
        if (a.split == 1) return;
        if (thread_index() == 0) barrier_init(barrier), barriers_are_ready();
        cluster_arrive();
    }
    DEVICE static int bytes(const DecodeArgs& a) { return a.waves_k * a.waves_n * TILE_ROWS * Room * 4; }

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
        if (a.split > 1)
            barrier_wait(barrier, parity), parity ^= 1;
        else
            block_barrier();
    }

    /// The sum of an owned row, in an order that never changes.
    DEVICE float sum(int row, int column) const {
        float total = 0;
#pragma unroll 4
        for (int i = 0; i < a.split * a.waves_k; i++) total += partial[(i * owned + row) * Room + column];
        return total;
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
    uint32_t parity = 0;
};

/// Scale byte of weight row `row` and MX block `block`, for `poisoned`.
template <Weight W>
DEVICE int scale_byte(const DecodeArgs& a, const Share& s, int expert, int row, int block) {
    const int64_t tile = (static_cast<int64_t>(expert) * s.row_tiles + row / TILE_ROWS) * s.tiles + block / Tile<W>::BLOCKS;
    return a.scales[tile * Tile<W>::SCALES + (row % 8 * 2 + row % TILE_ROWS / 8) * Tile<W>::BLOCKS + block % Tile<W>::BLOCKS];
}

DEVICE int share_rank(const DecodeArgs& a) { return a.split > 1 ? cluster_rank() : 0; }
