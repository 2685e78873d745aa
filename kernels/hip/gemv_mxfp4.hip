// y[m][n] = sum over k of x[m][k] * w[n][k] * 2^(scales[n][k / 32] - 127) + bias[n], for M of 1 to 4.
//
// x bf16 [M, K], rows `x_stride` elements apart; w e2m1 [N, K/2], low nibble first, plain; scales e8m0 [N, K/32]; bias bf16
// [N] or null; y bf16 or fp32 [M, N], rows `y_stride` elements apart. K % 32 == 0; x, its rows and w are 16-byte aligned.
//
// A block of threads is waves_n x waves_k waves. A wave takes tiles of MxDot::ROWS rows, and of each the wave-steps
// (MxDot::BLOCKS MX blocks) that fall to its place among the waves_k. Weights and scales are loaded once, 16 bytes of
// weights a lane and one wave-step ahead of their use; activations are normalized into LDS once a block, `slab` blocks of K
// at a time, and read from there. `grid` blocks of threads share the tiles round robin.
#include "mx_dot.h"

/// Where the plan of a launch (sglang_amd_quant/runtime/gemv_mxfp4.py) and the kernel meet: the LDS of one block of threads.
template <int M>
struct GemvLds {
    Words* values;     // [M][4][slab]
    int* exponents;    // [M][slab]
    Words* zeros;      // 64 bytes
    float* partials;   // [2][waves_k][waves_n][ROWS][M]

    DEVICE explicit GemvLds(int slab) {
        zeros = reinterpret_cast<Words*>(dynamic_lds());
        values = zeros + 4;
        exponents = reinterpret_cast<int*>(values + M * 4 * slab);
        partials = reinterpret_cast<float*>(exponents + M * slab);
    }
};

/// The weights and scales of one wave, a wave-step at a time; what `load` fetched stays until the next `load`.
///
/// Rows from n and blocks from K/32 on are not loaded: what an earlier step left in their registers is finite, and is
/// multiplied by activations that are zero there, or ends in a row that is not stored.
template <typename Dot>
struct WeightStream {
    Words weights[Dot::CHUNKS] = {};
    uint32_t scales[Dot::SCALES] = {};

    DEVICE WeightStream(const uint8_t* w, const uint8_t* scales, int n, int blocks)
        : all_weights(w), all_scales(scales), n(n), blocks(blocks) {}

    /// Goes to the step that starts at block `first` of the tile whose first row is `row`.
    DEVICE void seek(int row, int first) {
        const int r = row + Dot::lane_row();
        rows_left = n - r;
        block = first;
        from = all_weights + (static_cast<int64_t>(r) * blocks + first + Dot::lane_block()) * 16;
        scale_from = all_scales + static_cast<int64_t>(r) * blocks + first + Dot::lane_scale_block();
    }

    DEVICE void advance(int by) {
        block += by;
        from += by * 16;
        scale_from += by;
    }

    DEVICE void load() {
#pragma unroll
        for (int c = 0; c < Dot::CHUNKS; c++)
            if (Dot::chunk_row(c) < rows_left && block + Dot::lane_block() + Dot::chunk_block(c) < blocks)
                weights[c] = stream_words(from + (static_cast<int64_t>(Dot::chunk_row(c)) * blocks + Dot::chunk_block(c)) * 16);
#pragma unroll
        for (int s = 0; s < Dot::SCALES; s++)
            if (Dot::scale_row(s) < rows_left && block + Dot::lane_scale_block() + Dot::scale_block(s) < blocks)
                scales[s] = scale_from[static_cast<int64_t>(Dot::scale_row(s)) * blocks + Dot::scale_block(s)];
    }

   private:
    const uint8_t *all_weights, *all_scales, *from, *scale_from;
    int n, blocks, rows_left, block;
};

DEVICE void store_result(uint16_t* to, float value) { *to = bf16_from_float(value); }
DEVICE void store_result(float* to, float value) { *to = value; }

template <int M, typename Out>
DEVICE void gemv_mxfp4(const uint16_t* __restrict__ x, const uint8_t* __restrict__ w, const uint8_t* __restrict__ scales,
                       const uint16_t* __restrict__ bias, Out* __restrict__ y, int64_t x_stride, int64_t y_stride, int m,
                       int n, int k, int slab, int waves_k, int waves_n, int grid) {
    using Dot = MxDot<M>;
    const GemvLds<M> lds(slab);
    const typename Dot::Activations activations = {lds.values, lds.exponents, lds.zeros, slab};
    const int threads = waves_k * waves_n * WAVE;
    const int wave_k = wave_index() % waves_k, wave_n = wave_index() / waves_k;
    const int blocks = k / MX_BLOCK;
    const int mine = wave_k * Dot::BLOCKS;    // this wave's first block of every step ...
    const int step = waves_k * Dot::BLOCKS;   // ... of all waves_k waves
    const int tile_rows = waves_n * Dot::ROWS;

    const auto stage = [&](int first) {
        constexpr int BATCH = 4;  // loads of a thread that are under way together
        const int groups = slab * 4;
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll 1
            for (int start = 0; start < groups; start += BATCH * threads) {
                Words eight[BATCH] = {};
#pragma unroll
                for (int u = 0; u < BATCH; u++) {
                    const int j = start + u * threads + thread_index();
                    if (i < m && j < groups && first + (j >> 2) < blocks)
                        eight[u] = load_words(x + i * x_stride + (first * MX_BLOCK + 8 * j));
                }
#pragma unroll
                for (int u = 0; u < BATCH; u++) {
                    if (start + u * threads >= groups) break;
                    const int j = start + u * threads + thread_index();
                    int exponent;
                    const Words values = Dot::normalize(eight[u], exponent);
                    if (j >= groups) continue;
                    lds.values[(i * 4 + (j & 3)) * slab + (j >> 2)] = values;
                    lds.exponents[i * slab + (j >> 2)] = exponent;
                }
            }
    };

    int tile_row = block_index() * tile_rows;
    if (tile_row >= n) return;
    WeightStream<Dot> stream(w, scales, n, blocks);
    stream.seek(tile_row + wave_n * Dot::ROWS, mine);
    stream.load();
    if (thread_index() < 4) lds.zeros[thread_index()] = {};
    stage(0);
    block_barrier();

    for (int tile = 0; tile_row < n; tile++, tile_row += grid * tile_rows) {
        typename Dot::Totals totals;
        for (int first = 0; first < blocks; first += slab) {
            if (blocks > slab && (tile > 0 || first > 0)) {
                block_barrier();
                stage(first);
                block_barrier();
            }
            const int end = smaller(blocks - first, slab);
            for (int at = mine; at < end + mine; at += step) {
                if (at < end) {
                    float dots[Dot::DOTS];
                    Dot::dot(stream.weights, activations, at, dots);
                    Dot::accumulate(dots, stream.scales, activations, at, totals);
                }
                if (first + at - mine + step < blocks)
                    stream.advance(step);
                else
                    stream.seek(tile_row + (grid * waves_n + wave_n) * Dot::ROWS, mine);
                stream.load();
            }
        }

        // Two sets of partial sums by turns: one barrier a tile keeps a set's readers from its next writers.
        const int sums = tile_rows * M;
        float* partials = lds.partials + tile % 2 * waves_k * sums;
        Dot::reduce(totals, [&](int r, int i, float sum) {
            partials[wave_k * sums + (wave_n * Dot::ROWS + r) * M + i] = sum;
        });
        block_barrier();
#pragma unroll 1
        for (int j = thread_index(); j < sums; j += threads) {
            const int column = tile_row + j / M, i = j % M;
            float sum = 0;
            for (int slice = 0; slice < waves_k; slice++) sum += partials[slice * sums + j];
            if (column < n && i < m) {
                if (bias != nullptr) sum += float_from_bf16(bias[column]);
                store_result(y + i * y_stride + column, sum);
            }
        }
    }
}

constexpr int MAX_THREADS = TARGET_AMD ? 512 : 384;

#define GEMV(NAME, M, OUT)                                                                                              \
    KERNEL(MAX_THREADS, 2)                                                                                              \
    NAME(const uint16_t* x, const uint8_t* w, const uint8_t* scales, const uint16_t* bias, OUT* y, int64_t x_stride,    \
         int64_t y_stride, int m, int n, int k, int slab, int waves_k, int waves_n, int grid) {                         \
        gemv_mxfp4<M>(x, w, scales, bias, y, x_stride, y_stride, m, n, k, slab, waves_k, waves_n, grid);                \
    }

GEMV(gemv_mxfp4_bf16_m1, 1, uint16_t)
GEMV(gemv_mxfp4_bf16_m2, 2, uint16_t)
GEMV(gemv_mxfp4_bf16_m4, 4, uint16_t)
GEMV(gemv_mxfp4_f32_m1, 1, float)
GEMV(gemv_mxfp4_f32_m2, 2, float)
GEMV(gemv_mxfp4_f32_m4, 4, float)
