// y = x w^T for few rows of x, where time is what reading the weights takes: MXFP8 and MXFP4 weights times bf16, MXFP8, MXFP4
// or static fp8 activations, dense or grouped by expert.
//
// A block of threads is waves_k x waves_n waves. It quantizes its part of x into LDS once; then each wave takes a row tile
// (16 rows of w), adds up its part of K, and the block sums over its waves_k, over the `split` blocks that share K, applies
// bias, activation, routing weight and residual, and stores. Weights are on their way before anything else happens, several
// tiles a wave at any time, and never loaded twice. The order of every sum is fixed: same input, same bits.
#include "decode.h"
#if TARGET_SM90
#include "decode_sm90.h"
#endif

template <Weight W, Act A, int M, bool Grouped>
DEVICE void decode_gemm(const DecodeArgs& a) {
    using X = Activations<W, A, M>;
    allow_next_launch();
    const Share s(a, Tile<W>::K, share_rank(a));
    uint8_t* lds = dynamic_lds();
    uint64_t* barriers = reinterpret_cast<uint64_t*>(lds);  // one of the sums, then `depth` a wave
    lds += ceil_div(8 + a.waves_k * a.waves_n * a.depth * 8, 128) * 128;
    // Routing is a launch before this one: what it wrote may be read only after the wait. Weights may be fetched before.
    if (Grouped) wait_for_previous_launch();
    const auto rows = Rows<Grouped>::template of<M>(a);
    if (rows.expert < 0 || rows.count == 0) return;
    Stream<W> stream(a, s, rows.expert, lds + wave_index() * Stream<W>::bytes(a), barriers + 1 + wave_index() * a.depth);
    lds += a.waves_k * a.waves_n * Stream<W>::bytes(a);
    X x(a, s, lds);
    lds += X::bytes(a, s);
    Sums<X::ROOM> sums(a, s, lds, barriers);
    if (!Grouped) wait_for_previous_launch();
    x.stage(a, s, rows);
    block_barrier();

    for (int group = s.first_group; group < s.row_groups; group += a.groups) {
        // The rows that this block finishes, and, loaded before it is needed, what one of them is multiplied by and added to.
        const int first = group * a.waves_n * TILE_ROWS + s.rank * sums.owned, mine = first + thread_index();
        float times = 1, plus = 0;
        if (thread_index() < sums.owned && mine < a.n) {
            times = row_factor<W, A, M>(a, s, rows.expert, mine);
            if (a.bias != nullptr) plus = float_from_bf16(a.bias[static_cast<int64_t>(rows.expert) * a.n + mine]);
        }
        Totals<W, A, M> totals;
        if (group * a.waves_n + s.wave_n < s.row_tiles)
            for (int tile = s.wave_first; tile < s.wave_end; tile += a.chunk) {
                const int count = smaller(a.chunk, s.wave_end - tile);
                stream.wait();
#pragma unroll(W == Weight::e2m1 && M != 8 ? 2 : 1)
                for (int t = 0; t < count; t++) totals.add(stream, t, x, (tile + t - s.block_first) * Tile<W>::BLOCKS);
                stream.release();
            }
        totals.join();
        sums.hand_over(totals, rows.count, group == s.first_group, times, plus);

        // Kernels multiply by infinity where a scale is NaN, so that only sums that are not finite need to ask.
        const auto finished = [&](int at, int column) {
            const float sum = sums.sum(at, column);
            const bool finite = __builtin_fabsf(sum) < __builtin_inff();
            return !finite && has_nan<W>(a, s, rows.expert, first + at) ? bits<float>(0x7fc00000u) : sum;
        };
        // With an activation behind them, row tiles alternate 8 gates and 8 ups.
        const int outputs = a.activation == NO_ACTIVATION ? sums.owned : sums.owned / 2;
        for (int j = thread_index(); j < rows.count * outputs; j += s.threads) {
            const int at = j % outputs, column = j / outputs;
            if (a.activation == NO_ACTIVATION) {
                if (first + at < a.n) store_result(a, rows.out(column), first + at, finished(at, column));
            } else {
                const int gate = at / 8 * TILE_ROWS + at % 8;
                if (first + gate < a.n)
                    store_result(a, rows.out(column), first / 2 + at, activated(finished(gate, column), finished(gate + 8, column), a));
            }
        }
        if (group + a.groups < s.row_groups) sums.done();
    }
}

// Threads of a block, by the registers that they leave a thread.
constexpr int MANY = 512;
template <Weight W>
constexpr int FEW = TARGET_AMD ? 512 : W == Weight::e4m3 ? 320 : 384;

#define DECODE(NAME, W, A, M, THREADS, BLOCKS, GROUPED)                                                                             \
    KERNEL(THREADS, BLOCKS)                                                                                                   \
    NAME(const uint16_t* x, const uint8_t* w, const uint8_t* scales, const float* factors, const uint16_t* bias, const float* x_scale, \
         const uint16_t* residual, void* y, const int* row_ids, const int* block_experts, const float* row_weights,         \
         float* workspace, int64_t x_stride, int64_t y_stride, int m, int n, int k, int top_k, int split, int waves_k,      \
         int waves_n, int groups, int depth, int chunk, int carry, int out, int activation, float alpha, float limit) {     \
        decode_gemm<W, A, M, GROUPED>(DecodeArgs{x, w, scales, factors, bias, x_scale, residual, y, row_ids, block_experts,          \
                                                 row_weights, workspace, x_stride, y_stride, m, n, k, top_k, split,         \
                                                 waves_k, waves_n, groups, depth, chunk, carry, out, activation, alpha,     \
                                                 limit});                                                                   \
    }
#define SCHEME(NAME, W, A)                            \
    DECODE(decode_##NAME##_m2, W, A, 2, FEW<W>, 2, false)     \
    DECODE(decode_##NAME##_m4, W, A, 4, FEW<W>, 2, false)     \
    DECODE(decode_##NAME##_m8, W, A, 8, FEW<W>, 2, false)     \
    DECODE(decode_##NAME##_m16, W, A, 16, MANY, 1, false)   \
    DECODE(decode_##NAME##_m32, W, A, 32, FEW<W>, 1, false)   \
    DECODE(moe_decode_##NAME##_m4, W, A, 4, FEW<W>, 2, true)  \
    DECODE(moe_decode_##NAME##_m8, W, A, 8, FEW<W>, 2, true)  \
    DECODE(moe_decode_##NAME##_m16, W, A, 16, MANY, 1, true)

// One code object a scheme: they compile in parallel, and a server loads the one that it uses.
#if defined(DECODE_MXFP8)
SCHEME(mxfp8, Weight::e4m3, Act::e4m3)
#elif defined(DECODE_W4A8)
SCHEME(w4a8, Weight::e2m1, Act::e4m3)
#elif defined(DECODE_W4A16)
SCHEME(w4a16, Weight::e2m1, Act::bf16)
#elif defined(DECODE_MXFP4)
SCHEME(mxfp4, Weight::e2m1, Act::e2m1)
#elif defined(DECODE_W4A8_STATIC)
SCHEME(w4a8_static, Weight::e2m1, Act::fp8_static)
#elif defined(DECODE_MXFP8_STATIC)
SCHEME(mxfp8_static, Weight::e4m3, Act::fp8_static)
#elif defined(DECODE_W8A16)
SCHEME(w8a16, Weight::e4m3, Act::bf16)
#else
#error "define which scheme to compile, see kernels/hip/manifest.py"
#endif
