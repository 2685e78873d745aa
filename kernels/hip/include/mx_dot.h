// Dot products of MXFP4 weight blocks with a few rows of activations, a wave at a time: the inner part of every kernel
// whose M is too small to fill a matrix unit's tile from both sides.
//
// Activations come block-normalized: a block of 32 of them is held as halves times 2^exponent, its largest magnitude
// brought up to 2^14..2^15. A bf16 has 8 significant bits, so those within 2^-28 of the block's largest are exact, and the
// error of the rest, at most 2^-39 of the largest, vanishes below fp32's. Products and sums are fp32; the two exponents
// are applied to a block's sum.
#pragma once
#include "matrix.h"
#include "memory.h"

/// One wave-step: ROWS rows of weights times BLOCKS consecutive MX blocks, each lane holding CHUNKS of those blocks.
///
/// `M` (1, 2 or 4) is the number of activation rows. A lane's DOTS are products of one weight row and one activation row
/// over one block each; scaled, they are summed into its TOTALS, and over the lanes by `reduce`.
template <int M>
struct MxDot {
    static_assert(M == 1 || M == 2 || M == 4, "instantiate M = 4 for three rows");

#if TARGET_SM90
    // mma.sync, 16 weight rows x 8 columns. Four lanes, t = l % 4, share a row of A, and each holds a block of its own, with
    // its own scale; so they must not be summed. They are kept apart by the columns, of which M rows of activations need
    // few: column (m, b) of B is zero except in the lanes that hold block b. The zeros cost nothing, scales are applied to
    // the sums. With M = 1 eight blocks fit, with M = 4 two sets of columns are needed.
    static constexpr int ROWS = 16;
    static constexpr int BLOCKS = M == 1 ? 8 : 4;
    static constexpr int CHUNKS = ROWS * BLOCKS / WAVE;
    static constexpr int SETS = M * BLOCKS > 8 ? M * BLOCKS / 8 : 1;
    static constexpr int DOTS = 4 * SETS;
    static constexpr int TOTALS = 2 * SETS;
    static constexpr int SCALES = 4;

    DEVICE static int lane_row() { return lane_index() / 4; }
    DEVICE static int lane_block() { return lane_index() % 4; }
    static constexpr DEVICE int chunk_row(int chunk) { return 8 * (chunk % 2); }
    static constexpr DEVICE int chunk_block(int chunk) { return 4 * (chunk / 2); }
    DEVICE static int lane_scale_block() { return lane_index() % 4 * 2 % BLOCKS; }
    static constexpr DEVICE int scale_row(int scale) { return 8 * (scale / 2); }
    static constexpr DEVICE int scale_block(int scale) { return scale % 2; }
    static constexpr DEVICE int scale_of(int dot) { return dot % 4; }
    static constexpr DEVICE int total_of(int dot) { return dot / 2; }
    static constexpr DEVICE int total_row(int total) { return 8 * (total % 2); }
    DEVICE static int total_m(int total) { return lane_index() % 4 * 2 / BLOCKS + total / 2 * (8 / BLOCKS); }
    static constexpr int LANES_A_TOTAL = BLOCKS / 2;  // neighbouring lanes whose totals belong together
#else
    // Packed dot products: each lane has whole blocks to itself, so rows and blocks can lie as memory likes it best: WAVE/4
    // neighbouring lanes read 256 (wave 32: 128) consecutive bytes of a row. A lane holds two blocks of a row, or, where
    // reading activations from LDS would be the limit, one block of two rows.
    static constexpr int BLOCKS = M == 4 ? WAVE / 4 : WAVE / 2;
    static constexpr int CHUNKS = 2;
    static constexpr int ROWS = M == 4 ? 8 : 4;
    static constexpr int DOTS = CHUNKS * M;
    static constexpr int TOTALS = M == 4 ? CHUNKS * M : M;
    static constexpr int SCALES = CHUNKS;

    DEVICE static int lane_row() { return lane_index() / (WAVE / 4); }
    DEVICE static int lane_block() { return lane_index() % (WAVE / 4); }
    static constexpr DEVICE int chunk_row(int chunk) { return M == 4 ? 4 * chunk : 0; }
    static constexpr DEVICE int chunk_block(int chunk) { return M == 4 ? 0 : WAVE / 4 * chunk; }
    DEVICE static int lane_scale_block() { return lane_block(); }
    static constexpr DEVICE int scale_row(int scale) { return chunk_row(scale); }
    static constexpr DEVICE int scale_block(int scale) { return chunk_block(scale); }
    static constexpr DEVICE int scale_of(int dot) { return dot / M; }
    static constexpr DEVICE int total_of(int dot) { return dot % TOTALS; }
    static constexpr DEVICE int total_row(int total) { return chunk_row(total / M); }
    static constexpr DEVICE int total_m(int total) { return total % M; }
    static constexpr int LANES_A_TOTAL = WAVE / 4;
#endif

    /// Activations in LDS: word group r (8 halves, in `e2m1_half_of` order) of block b of row m lies at
    /// `values[(m * 4 + r) * blocks + b]`, so that lanes with neighbouring blocks touch neighbouring banks; the block's
    /// exponent at `exponents[m * blocks + b]`. `zeros` is 64 zero bytes (sm_90 alone reads them).
    struct Activations {
        const Words* values;
        const int* exponents;
        const Words* zeros;
        int blocks;
    };

    /// All dots of this lane for the blocks that start at `first` of the activations.
    DEVICE static void dot(const Words (&weights)[CHUNKS], const Activations& x, int first, float (&dots)[DOTS]) {
#if TARGET_SM90
        Accumulator sums[SETS] = {};
        const int column = lane_index() / 4;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            const int block = lane_block() + chunk_block(chunk);
            const Words* from[SETS];
            int stride[SETS];
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                const int m = column / BLOCKS + set * (8 / BLOCKS);
                const bool mine = column % BLOCKS == block && m < M;
                from[set] = mine ? x.values + m * 4 * x.blocks + first + block : x.zeros;
                stride[set] = mine ? x.blocks : 1;
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                Half2 top[4], bottom[4];
                halves_from_e2m1(weights[chunk].v[r], top);
                halves_from_e2m1(weights[chunk + 1].v[r], bottom);
#pragma unroll
                for (int set = 0; set < SETS; set++) {
                    const Words b = from[set][r * stride[set]];
                    sums[set] = matrix_half({top[0], bottom[0], top[1], bottom[1]}, {b.v[0], b.v[1]}, sums[set]);
                    sums[set] = matrix_half({top[2], bottom[2], top[3], bottom[3]}, {b.v[2], b.v[3]}, sums[set]);
                }
            }
        }
#pragma unroll
        for (int d = 0; d < DOTS; d++) dots[d] = sums[d / 4].v[d % 4];
#else
#pragma unroll
        for (int d = 0; d < DOTS; d++) dots[d] = 0;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            Half2 halves[CHUNKS][4];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) halves_from_e2m1(weights[chunk].v[r], halves[chunk]);
#pragma unroll
            for (int m = 0; m < M; m++) {
                const Words* from = x.values + (m * 4 + r) * x.blocks + first + lane_block();
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    const Words b = from[chunk_block(chunk)];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        dots[chunk * M + m] = dot2(halves[chunk][i], b.v[i], dots[chunk * M + m]);
                }
            }
        }
#endif
    }

    /// What a lane sums up for one tile: the scaled dots, and the largest scale byte that went into them.
    struct Totals {
        float sum[TOTALS] = {};
        uint32_t largest_scale[TOTALS] = {};
    };

    /// Adds every dot, times its weight scale and its activations' exponent.
    DEVICE static void accumulate(const float (&dots)[DOTS], const uint32_t (&scales)[SCALES], const Activations& x,
                                  int first, Totals& totals) {
#pragma unroll
        for (int d = 0; d < DOTS; d++) {
            const uint32_t scale = scales[scale_of(d)];
            const int total = total_of(d);
            const int m = smaller(total_m(total), M - 1);  // on sm_90 with M = 1 a column may belong to no row
            const int exponent = x.exponents[m * x.blocks + first + lane_scale_block() + scale_block(scale_of(d))];
            totals.sum[total] += times_power_of_two(dots[d], static_cast<int>(scale) + exponent);
            totals.largest_scale[total] = larger(totals.largest_scale[total], scale);
        }
    }

    /// Sums over the blocks and hands `store(row, m, sum)` each of the wave's ROWS x M results once. A scale of 255 is NaN.
    template <typename Store>
    DEVICE static void reduce(const Totals& totals, Store store) {
#pragma unroll
        for (int i = 0; i < TOTALS; i++) {
            const float nan = bits<float>(0x7fc00000u);
            const float sum = sum_lanes<LANES_A_TOTAL>(totals.largest_scale[i] == 255 ? nan : totals.sum[i]);
            if (lane_index() % LANES_A_TOTAL == 0 && total_m(i) < M) store(lane_row() + total_row(i), total_m(i), sum);
        }
    }

    /// The block-normalized form of 8 activations `x` (bf16) that four neighbouring lanes share a block of: `values` for the
    /// layout above, and the exponent to add to an e8m0 byte so that dot * 2^(byte + exponent) is the product.
    /// All four lanes take part.
    DEVICE static Words normalize(const Words& x, int& exponent) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            largest = larger(largest, x.v[i] & 0x7fffu);
            largest = larger(largest, x.v[i] >> 16 & 0x7fffu);
        }
        // Below 2^-112 (15 as a bf16 exponent) nothing is gained by more bits; 255, infinity and NaN, stays what it is.
        const int biased = smaller(larger(static_cast<int>(max_lanes<4>(largest) >> 7), 15), 254);
        const float factor = bits<float>(static_cast<uint32_t>(268 - biased) << 23);  // 2^(14 - (biased - 127))
        exponent = (biased - 127) - 14 + E2M1_HALF_EXPONENT - 127;
        float ordered[8];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Float2 pair = floats_from_bf16x2(x.v[i]);
            ordered[e2m1_half_of(2 * i)] = pair.x * factor;
            ordered[e2m1_half_of(2 * i + 1)] = pair.y * factor;
        }
        Words values;
#pragma unroll
        for (int i = 0; i < 4; i++) values.v[i] = half2_from_floats({ordered[2 * i], ordered[2 * i + 1]});
        return values;
    }
};
