// y = x w^T for few rows of x, where time is what reading the weights takes: MXFP8 and MXFP4 weights times bf16, MXFP8, MXFP4
// or static fp8 activations, int4 weights times bf16 or fp16, dense or grouped by expert.
//
// A block of threads is waves_k x waves_n waves. It quantizes its part of x into LDS once; then each wave takes a row tile
// (16 rows of w), adds up its part of K, and the block sums over its waves_k, over the `split` blocks that share K, applies
// bias, activation, routing weight and residual, and stores. Weights are on their way before anything else happens, several
// tiles a wave at any time, and never loaded twice. The order of every sum is fixed: same input, same bits.
#include "decode.h"
#if TARGET_SM90
#include <type_traits>
#include "decode_sm90.h"
#elif TARGET_GFX950
#include "decode_gfx950.h"
#elif TARGET_GFX942
#include "decode_gfx942.h"
#else
#include "decode_gfx11.h"
#endif
#if TARGET_AMD
#include "decode_int4.h"
#endif

/// What this block finishes of a row group. `plain`: where it goes, from the thread's first column on, if nothing else is to be done
/// (`plain_results`).
template <Weight W, Act A, bool Grouped, typename AllSums>
DEVICE void finish_group(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows, const AllSums& sums, const Output& output, int group,
                         uint16_t* plain) {
    constexpr int COLUMNS = AllSums::COLUMNS;
    const int first = group * s.waves_n * TILE_ROWS + sums.first;
    if (first + output.row >= a.n) return;
    if (plain != nullptr) {  // few instructions, each of which is fetched and waited for
        for (int column = output.first_column; column < rows.count; column += output.step, plain += anew(output.step) * a.y_stride) {
            float value[COLUMNS];
            sums.sum(output.row, column, value);
            finish<W, A>(a, s, rows.expert, first + output.row, value);
            uint16_t* to = plain;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++, to += a.y_stride)
                if (column + c < rows.count) *to = bf16_from_float(value[c]);
        }
        return;
    }
    for (int column = output.first_column; column < rows.count; column += output.step) {
        const auto& e = late(a);
        const bool paired = e.activation != NO_ACTIVATION;
        float gate[COLUMNS] = {}, value[COLUMNS] = {};
#pragma unroll 1
        for (int half = 0; half <= paired; half++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) gate[c] = value[c];
            sums.sum(output.row + 8 * half, column, value);
            finish<W, A>(e, s, rows.expert, first + output.row + 8 * half, value);
        }
        if (paired)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) value[c] = activated(gate[c], value[c], e);
        store_results(e, rows, column, (paired ? first / 2 : first) + output.number, value);
    }
}

/// `Alone`: the block has a multiprocessor, and its registers, for itself.
template <Weight W, Act A, int M, bool Grouped, bool Alone = M >= 16>
DEVICE void decode_gemm(const DecodeArgs& a) {
    using X = Activations<W, A, M>;
    constexpr bool AHEAD = TARGET_SM90 && M >= 16;  // registers are free for `output` while x comes
    allow_next_launch();
    const Share s(a, Tile<W>::K, share_rank(a));
    uint64_t* barriers = own_barriers();
    uint8_t* rings = dynamic_lds() + barrier_bytes(a.waves_k * a.waves_n * a.depth);
    // Routing is a launch before this one: what it wrote may be read only after the wait. Weights may be fetched before.
    if (Grouped) wait_for_previous_launch();
    const auto rows = Rows<Grouped>::template of<M>(a);
    if (rows.expert < 0 || rows.count == 0) return;
    Stream<W, M> stream(a, s, rows.expert, rings + wave_index() * Stream<W, M>::bytes(a), barriers + OWN_BARRIERS + wave_index() * a.depth);
    const int of_rings = a.waves_k * a.waves_n * Stream<W, M>::bytes(a);
    X x(a, s, rings + of_rings);
    auto sums = sums_of_block<X::ROOM>(a, s, rings, of_rings + X::bytes(a, s), barriers);
    sums.ready();
    sums.template look_ahead<W, A, M>(rows.expert, s.first_group);
    sums.meet();
    Output output;
    if (!Grouped) wait_for_previous_launch();
    if constexpr (is_wide(W, M)) {
        x.stage(a, s, rows, [&] {
            stream.begin(a.depth);
            if constexpr (AHEAD) output = sums.output().kept();
        });
        stream.begin(a.depth);
    } else {
        x.stage(a, s, rows);
    }
    block_barrier();

    for (int group = s.first_group; group < s.row_groups; group += s.groups) {
        Totals<W, A, M> totals;
        if (is_wide(W, M) || group * s.waves_n + s.wave_n < s.row_tiles)
            stream.template each_tile<X::TILES, Alone>(
                [&] {
                    if constexpr (is_wide(W, M)) totals.look(stream, 0);
                },
                [&](const auto& tile, int number, auto... tiles) {
                    totals.add(stream, tile, x, (number - s.block_first) * Tile<W>::BLOCKS, tiles...);
                },
                [&](auto pending) {
                    if constexpr (is_wide(W, M)) totals.settle(pending);
                });
        totals.join(x);
        const bool last = group + s.groups >= s.row_groups;
        sums.hand_over(totals, rows.count, group == s.first_group, last);
        if constexpr (!AHEAD) output = sums.output();
        finish_group<W, A>(a, s, rows, sums, output, group, plain_results(a, s, rows.first, sums, output, group));
        if (!last) {
            sums.ready();
            sums.template look_ahead<W, A, M>(rows.expert, group + s.groups);
        }
    }
    sums.leave();
}

#if TARGET_SM90
/// Dense, of weights of which all are in shared memory before they are multiplied, one row group a block, and in wgmma's order before x is there
/// (`Stream::DECODED`). Waves of their own fetch x: only they wait for the launch in front.
template <Weight W, Act A, int M>
DEVICE void decode_early(const DecodeArgs& a) {
    using Weights = Stream<W, M, true>;
    using X = Activations<W, A, M>;
    constexpr bool PREPARED = M >= EARLY_PREPARED;
    using AllSums = std::conditional_t<PREPARED, HalfSums<M>, Sums<M, 4>>;
    allow_next_launch();
    const Share s(a, Tile<W>::K, cluster_rank(), true);
    const int waves = a.waves_k * a.waves_n;
    uint8_t* rings = dynamic_lds() + barrier_bytes(waves * a.depth);
    // Not worked out before weights are asked for.
    const auto of_x = [&] { return rings + anew(waves) * Weights::bytes(a); };
    const auto rows = [&] { return Rows<false>::template of<M>(a, s.row_block); };
    const Crew crew{s.threads, block_threads() - s.threads};
    if (s.wave() >= waves) {  // does nothing else before: a block that starts late has x to wait for
        if (a.split > 1) cluster_arrive();
        X x(a, s, of_x(), crew);
        wait_for_previous_launch();
        if constexpr (PREPARED)
            x.fetch_prepared(a, rows());
        else
            x.template stage_by_rows<M / 8>(a, s, rows());
        return block_barrier();
    }
    uint64_t* barriers = own_barriers();
    // Scales are where sums will be: these come when all blocks have decoded.
    const auto used = [&](int waves) { return waves * Weights::bytes(a) + X::bytes(a, s); };
    uint8_t* scales = rings + AllSums::behind(a, used(waves)) + AllSums::ahead_of_partial(a) + s.wave() * Weights::scale_room(a);
    Weights weights(a, s, 0, rings + s.wave() * Weights::bytes(a), barriers + OWN_BARRIERS + s.wave() * a.depth, scales,
                    PREPARED || grid_blocks() > BESIDE);
    X x(a, s, of_x(), crew);
    AllSums sums(a, s, rings, used(anew(waves)), barriers, x.factors);
    if constexpr (!PREPARED) sums.template look_ahead<W, A, M>(0, s.first_group);
    weights.begin();  // beside the launch in front only now, when that has asked for its x
    weights.decode();
    if constexpr (PREPARED) sums.template look_ahead<W, A, M>(0, s.first_group);  // registers do not hold what it asks for meanwhile
    sums.ready();
    const Output output = sums.output().kept();
    if constexpr (PREPARED) sums.look_at(output);
    uint16_t* plain = plain_results(a, s, rows().first, sums, output, s.first_group);
    const uint32_t first_x = x.at((s.wave_first - s.block_first) * Tile<W>::BLOCKS, 0);
    const LeftMatrix decoded = weights.decoded();
    sums.meet();
    Totals<Weight::row_e4m3, A, M> totals;
    if constexpr (PREPARED) {
        asm volatile("" ::"l"(plain), "r"(first_x), "r"(decoded.low), "r"(decoded.high) : "memory");  // not later
        block_barrier();
        const bool by_fours = sums.by_fours();  // by turns: sums of the first travel while others are multiplied
        if (by_fours) after_four_in_front(s.wave() / 4);
        totals.add_all(decoded, Weights::TILE, s.wave_end - s.wave_first, first_x, [&] {
            if (by_fours) let_four_behind(s.wave() / 4, waves / 4);
        });
        sums.hand_over(totals, rows().count);
    } else {
        const auto destination = sums.destination(row_by_fours());
        asm volatile("" ::"r"(destination.to), "r"(destination.barrier), "l"(plain), "r"(first_x), "r"(decoded.low), "r"(decoded.high) : "memory");
        block_barrier();
        if constexpr (Weights::DECODED) {
            totals.add_all(decoded, Weights::TILE, s.wave_end - s.wave_first, first_x, [] {});
        } else {
            weights.template each_tile<1>(
                [] {}, [&](int tile, int number, auto) { totals.add(weights, tile, x, (number - s.block_first) * Tile<W>::BLOCKS, Number<1>{}); },
                [&](auto pending) { totals.settle(pending); });
        }
        totals.join(x);
        sums.hand_over(totals, rows().count, true, [&](int) { return destination; });
    }
    finish_group<W, A>(a, s, rows(), sums, output, s.first_group, plain);
    sums.leave();
}

/// Who finishes rows: threads of a block, when its waves' sums, and those of blocks that share K, have met; or waves, which have all of K of
/// them (decode_sm90_own_rows.h), but for rows that two blocks have in common (decode_sm90_pair.h).
enum class Ends { MET, OWN, PAIR };

/// Dense, of an x that `prepare` has brought into order (decode_sm90_prepared.h), and that streams: one row group a block.
template <Weight W, Act A, int M, Ends E>
DEVICE void decode_prepared(const DecodeArgs& a) {
    constexpr bool PAIRED = E == Ends::PAIR;
    using X = XRing<W, M, !PAIRED>;
    using Weights = Stream<W, M>;
    allow_next_launch();
    Share s(a, Tile<W>::K, cluster_rank() & (a.split - 1));
    s.take_turns(a);
    const int group = s.first_group;
    const std::conditional_t<PAIRED, Pair, Unpaired> by_rows(a, s);
    const auto rows = Rows<false>::template of<M>(a);
    uint64_t* barriers = own_barriers();
    const int waves = a.waves_k * a.waves_n, used = X::bytes(a) + waves * Weights::bytes(a);
    uint8_t* rings = dynamic_lds() + barrier_bytes((2 + waves) * a.depth);  // of x two, of what has arrived and what has been read
    uint8_t* of_wave = rings + X::bytes(a) + wave_index() * Weights::bytes(a);
    // A pair leaves the launch that prepares x no registers before the one in front has ended: weights asked for then would delay it.
    Weights stream(a, s, 0, of_wave, barriers + OWN_BARRIERS + (2 + wave_index()) * a.depth, nullptr, !PAIRED);
    X x(a, s, rings, barriers + OWN_BARRIERS);
    auto ends = [&] {
        if constexpr (E == Ends::MET) return MetSums<M>::behind(a, s, rings, used, barriers);
        if constexpr (E == Ends::OWN) return OwnTile<W, A, M>(a, s, group, rings + used);
        if constexpr (E == Ends::PAIR) return PairTile<W, A, M>(a, s, group, by_rows, rings + used, barriers);
    }();
    if constexpr (E == Ends::MET) ends.template look_ahead<W, A, M>(0, group);
    const bool in_cluster = cluster_blocks() > 1;
    if (in_cluster) cluster_arrive();
    block_barrier();
    wait_for_previous_launch();
    if (in_cluster) cluster_wait();
    x.begin(rows.first / M);
    stream.begin(a.depth);
    if constexpr (E != Ends::MET) ends.keep();

    Totals<W, A, M> totals;
    for (int i = 0, first = s.wave_first; i < x.stages; i++, first += s.wave_step) {
        if (by_rows.skips(i)) {
            x.wait(), x.refill(), first -= s.wave_step;
        } else if (first < s.wave_end) {
            stream.wait(), totals.look(stream, 0), x.wait(), x.refill();
            by_turns<THROUGHOUT<W, M, true>, WAITS<W, M>>(
                smaller(a.chunk, s.wave_end - first), [&](int t) { totals.add(stream, t, x, t * Tile<W>::BLOCKS, Number<1>{}); },
                [&](auto pending) { totals.settle(pending); });
            stream.release();
        }
        x.release();
    }
    x.wait_for_factors();
    totals.join(x);
    if constexpr (E == Ends::MET) {
        ends.hand_over(totals, rows.count);
        const Output output = ends.output();
        finish_group<W, A>(a, s, rows, ends, output, group, plain_results(a, s, rows.first, ends, output, group));
        ends.leave();
    } else if (ends.finishes(totals)) {
        ends.store(a, s, rows, totals, of_wave);
    }
}
#endif

// Threads of a block, by the registers that they leave a thread.
constexpr int MANY = 512;
template <Weight W>
constexpr int FEW = TARGET_AMD ? 512 : W == Weight::e4m3 ? 320 : 256;

#define DECODE(NAME, W, A, M, THREADS, BLOCKS, GROUPED) ENTRY(NAME, THREADS, BLOCKS, (decode_gemm<W, A, M, GROUPED>))
#define ENTRY(NAME, THREADS, BLOCKS, FUNCTION)                                                                                 \
    KERNEL(THREADS, BLOCKS)                                                                                                   \
    NAME(const uint16_t* x, const uint8_t* w, const uint8_t* scales, const float* factors, const uint16_t* bias, const float* x_scale, \
         const uint16_t* residual, void* y, const int* row_ids, const int* block_experts, const float* row_weights,         \
         float* workspace, int64_t x_stride, int64_t y_stride, int m, int n, int k, int top_k, int split, int waves_k,      \
         int waves_n, int groups, int depth, int chunk, int carry, int out, int activation, float alpha, float limit) {     \
        FUNCTION(DecodeArgs{x, w, scales, factors, bias, x_scale, residual, y, row_ids, block_experts, row_weights, workspace, \
                            x_stride, y_stride, m, n, k, top_k, split, waves_k, waves_n, groups, depth, chunk, carry, out,  \
                            activation, alpha, limit});                                                                     \
    }
#if TARGET_SM90
#define PREPARED(NAME, W, A, M)                                                              \
    ENTRY(decode_prepared_##NAME##_m##M, MANY, 1, (decode_prepared<W, A, M, Ends::MET>)) \
    ENTRY(decode_own_##NAME##_m##M, MANY, 1, (decode_prepared<W, A, M, Ends::OWN>))
#define PAIRED(NAME, W, A, M) ENTRY(decode_paired_##NAME##_m##M, MANY, 1, (decode_prepared<W, A, M, Ends::PAIR>))
#define PREPARE(NAME, W, A)                                                                                                   \
    KERNEL(256, 2)                                                                                                            \
    NAME(const uint16_t* x, const float* x_scale, uint8_t* prepared, int64_t x_stride, int m, int k, int room, int carry) {     \
        prepare<W, A>(x, x_scale, prepared, x_stride, m, k, room, carry);                                                     \
    }
#define DENSE(NAME, W, A, M, THREADS, BLOCKS) DECODE(decode_##NAME##_m##M, W, A, M, THREADS, BLOCKS, false)
#define ALONE(NAME, W, A, M) ENTRY(decode_alone_##NAME##_m##M, MANY, 1, (decode_gemm<W, A, M, false, true>))
#define EARLY(NAME, W, A, M) ENTRY(decode_early_##NAME##_m##M, MANY + 256, 1, (decode_early<W, A, M>))
#define FROM_16(NAME, W, A)                     \
    PREPARE(prepare_##NAME, W, A)               \
    PREPARED(NAME, W, A, 16)                    \
    PREPARED(NAME, W, A, 32)                    \
    PREPARED(NAME, W, A, 64)                    \
    DENSE(NAME, W, A, 16, MANY, 1)              \
    DENSE(NAME, W, A, 32, MANY, 1)
#define SCHEME(NAME, W, A)            \
    DENSE(NAME, W, A, 2, FEW<W>, 2)   \
    DENSE(NAME, W, A, 4, FEW<W>, 2)   \
    DENSE(NAME, W, A, 8, FEW<W>, 2)   \
    FROM_16(NAME, W, A)
#define QUANTIZED(NAME, W, A)                     \
    DENSE(NAME, Weight::row_##W, A, 8, MANY, 2)   \
    FROM_16(NAME, Weight::row_##W, A)             \
    EARLY(NAME, Weight::row_##W, A, 8)            \
    EARLY(NAME, Weight::row_##W, A, 16)           \
    EARLY(NAME, Weight::row_##W, A, 32)           \
    EARLY(NAME, Weight::row_##W, A, 64)
#define QUANTIZED_E2M1(NAME, A)         \
    QUANTIZED(NAME, e2m1, A)            \
    ALONE(NAME, Weight::row_e2m1, A, 8) \
    PAIRED(NAME, Weight::row_e2m1, A, 64)
#else  // a matrix unit takes sixteen rows whatever M is: fewer sizes will do
#define SCHEME(NAME, W, A)                                  \
    DECODE(decode_##NAME##_m4, W, A, 4, FEW<W>, 2, false)   \
    DECODE(decode_##NAME##_m16, W, A, 16, MANY, 1, false)   \
    DECODE(decode_##NAME##_m32, W, A, 32, FEW<W>, 1, false) \
    DECODE(moe_decode_##NAME##_m4, W, A, 4, MANY, 2, true)  \
    DECODE(moe_decode_##NAME##_m16, W, A, 16, MANY, 1, true)
#define QUANTIZED(NAME, W, A) SCHEME(NAME, Weight::W, A)
#define QUANTIZED_E2M1(NAME, A) QUANTIZED(NAME, e2m1, A)
#endif

// One code object a scheme: they compile in parallel, and a server loads the one that it uses.
#if defined(DECODE_MXFP8)
QUANTIZED(mxfp8, e4m3, Act::e4m3)
#elif defined(DECODE_W4A8)
QUANTIZED_E2M1(w4a8, Act::e4m3)
#elif defined(DECODE_W4A16)
SCHEME(w4a16, Weight::e2m1, Act::bf16)
#elif defined(DECODE_MXFP4)
QUANTIZED_E2M1(mxfp4, Act::e2m1)
#elif defined(DECODE_W4A8_STATIC)
QUANTIZED_E2M1(w4a8_static, Act::fp8_static)
#elif defined(DECODE_MXFP8_STATIC)
QUANTIZED(mxfp8_static, e4m3, Act::fp8_static)
#elif defined(DECODE_W8A16)
SCHEME(w8a16, Weight::e4m3, Act::bf16)
#elif defined(DECODE_INT4_W4A16)
SCHEME(int4_w4a16_g32, Weight::int4_g32, Act::bf16)
SCHEME(int4_w4a16_g64, Weight::int4_g64, Act::bf16)
SCHEME(int4_w4a16_g128, Weight::int4_g128, Act::bf16)
#elif defined(DECODE_INT4_W4A16_FP16)
SCHEME(int4_w4a16_fp16_g32, Weight::int4_g32, Act::fp16)
SCHEME(int4_w4a16_fp16_g64, Weight::int4_g64, Act::fp16)
SCHEME(int4_w4a16_fp16_g128, Weight::int4_g128, Act::fp16)
#else
#error "define which scheme to compile, see kernels/hip/manifest.py"
#endif
