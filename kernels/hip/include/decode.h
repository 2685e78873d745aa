// What the decode kernels of all targets agree on: formats, the arguments of a launch, who does what, and the epilogue.
#pragma once
#include "convert.h"
#include "memory.h"

enum class Weight { e4m3, e2m1, int4_g32, int4_g64, int4_g128, row_e4m3, row_e2m1 };  // int4 in groups of so many along K
enum class Act { bf16, fp16, e4m3, e2m1, fp8_static };
constexpr DEVICE bool is_int4(Weight w) { return w == Weight::int4_g32 || w == Weight::int4_g64 || w == Weight::int4_g128; }
/// Whether a row of weights is e4m3 under one power of two (sm_90): it is multiplied as that, with activations that are, too.
constexpr DEVICE bool is_row(Weight w) { return w == Weight::row_e4m3 || w == Weight::row_e2m1; }
/// Elements along K that share a scale.
constexpr DEVICE int group_of(Weight w) { return w == Weight::int4_g128 ? 128 : w == Weight::int4_g64 ? 64 : MX_BLOCK; }

/// Whether four waves multiply together, and need row tiles all of them: sm_90's wgmma.
constexpr DEVICE bool is_wide(Weight w, int rows) { return TARGET_SM90 && (rows >= 16 || is_row(w)); }

/// A block's shared memory begins with barriers: of its sums, on sm_90 of pieces of x, and then of rings.
constexpr int X_PIECES = TARGET_SM90 ? 4 : 0, OWN_BARRIERS = 1 + X_PIECES;
DEVICE uint64_t* own_barriers() { return reinterpret_cast<uint64_t*>(dynamic_lds()); }
/// So many bytes, up to the end of a line of shared memory.
constexpr DEVICE int whole_lines(int bytes) { return ceil_div(bytes, 128) * 128; }
constexpr DEVICE int barrier_bytes(int of_rings) { return whole_lines((OWN_BARRIERS + of_rings) * 8); }

constexpr int TILE_ROWS = 16;  // rows of weights that a wave takes together: one side of the matrix unit, everywhere

/// Entries of `DecodeArgs::out` and `::activation`; sglang_amd_quant/runtime/decode_gemm.py has the same numbers.
enum Out { OUT_BF16, OUT_FP16, OUT_FP32 };
enum Activation { NO_ACTIVATION, SILU, SWIGLU_OAI, ACTIVATION_KIND = 3, INTERLEAVED = 4 };  // INTERLEAVED: see `bias_index`

/// A launch. Grouped (a mixture of experts), `row_ids` and `block_experts` are those of
/// sglang_amd_quant/ops/routing.py; dense, they are null.
struct DecodeArgs {
    const uint16_t* x;             // bf16, or fp16 (Act::fp16), rows x_stride apart
    const uint8_t *w, *scales;     // layouts of the target, one expert after the other
    const float* factors;          // of weight rows, where the layout has them
    const uint16_t* bias;          // bf16 [experts][n], or null; order: see `bias_index`
    const float* x_scale;          // fp8_static: the scale of x
    const uint16_t* residual;      // bf16, added at the end, rows y_stride apart, or null
    void* y;                       // rows y_stride apart
    const int *row_ids, *block_experts;
    const float* row_weights;      // of routed rows, or null
    float* workspace;              // AMD with split > 1: counters that are zero between launches, then partial sums; sm_90: an x that
                                   // a launch in front has prepared, or null
    int64_t x_stride, y_stride;
    int m, n, k;                   // rows of y in all; rows of w; K
    int top_k;                     // rows of y that share a row of x
    int split;                     // blocks that share K
    int waves_k, waves_n;          // waves of a block along K, and along N
    int groups;                    // blocks (times split) that take the row groups round robin
    int depth, chunk;              // tiles under way: `depth` chunks of `chunk` tiles
    int carry;                     // rounds the activations' scales (formats/mx.py: Element.carry)
    int out, activation;
    float alpha, limit;            // of the activation; limit <= 0: no clamp
};

/// `value`, the same in all lanes, of which the compiler knows nothing any more. On AMD this parts arguments that are loaded
/// together, and would take up registers together for as long as one of them is wanted.
DEVICE int opaque(int value) {
#if TARGET_AMD
    value = __builtin_amdgcn_readfirstlane(value);
    asm volatile("" : "+s"(value));
#endif
    return value;
}

/// `value`, which the compiler takes for another from here on: on sm_90 what is computed of it is neither computed before this (where
/// everybody waits for something, and would wait for that too) nor, if this comes early, after.
DEVICE int anew(int value) {
#if TARGET_SM90
    asm volatile("" : "+r"(value));
#endif
    return value;
}

/// `value`, of which the compiler knows that it is not negative.
DEVICE int counted(int value) {
    __builtin_assume(value >= 0);
    return value;
}

/// a / b, of 0 <= a < 2^20 and b > 0. On sm_90 by the float unit, for a fraction of an integer division's instructions: (a + 1/2) / b
/// is at least 1 / 2b from the next integer, and comes out wrong by 2^-22 of it at most.
DEVICE int quotient(int a, int b) {
#if TARGET_SM90
    return static_cast<int>(__fdividef(a + 0.5f, b));
#else
    return a / b;
#endif
}

DEVICE int remainder_of(int a, int b) { return TARGET_SM90 ? a - quotient(a, b) * b : a % b; }

/// Divides by a number that is known long before: of(a) = a / by, 0 <= a < 512, 0 < by <= 256. On sm_90 `factor` is 2^17 / by rounded
/// up, so that a * factor is above 2^17 a / by by less than 2^17 / by.
struct Divisor {
    int by, factor;
    DEVICE explicit Divisor(int by) : by(by), factor(TARGET_SM90 ? anew(quotient((1 << 17) - 1 + by, by)) : 0) {}
    DEVICE int of(int a) const { return TARGET_SM90 ? a * factor >> 17 : a / by; }
};

/// a / b, of a >= 0; sm_90's plans share by powers of two.
DEVICE int shared_by(int a, int b) { return TARGET_SM90 ? a >> (31 - __builtin_clz(b)) : a / b; }

/// What this block and this wave have to do.
struct Share {
    int threads, wave_k, wave_n;
    int waves_n, groups;               // as in DecodeArgs
    int rank;                          // in the blocks that share K
    int tiles, row_tiles, row_groups;  // along K, along N, and of waves_n row tiles
    int first_group, row_block = 0;    // the latter of x, where `one_group`
    int block_first, block_tiles;      // K of this block in tiles ...
    int wave_first, wave_end;          // ... and of this wave,
    int wave_step;                     // which takes chunks so far apart

    /// `one_group`: every block has one row group, and `split` blocks are a cluster. In few instructions then, as each that a block begins with is
    /// fetched, and waited for, before it asks for its weights.
    DEVICE Share(const DecodeArgs& a, int tile_k, int rank, bool one_group = false) : rank(rank) {
        threads = a.waves_k * a.waves_n * WAVE;
        waves_n = opaque(a.waves_n), groups = opaque(a.groups);
        const int block = shared_by(block_index(), a.split);
        if (one_group) {
            const int wave = wave_index();
            wave_k = (wave >= waves_n) + (wave >= 2 * waves_n) + (wave >= 3 * waves_n), wave_n = wave - wave_k * waves_n;
        } else {
            wave_k = quotient(wave_index(), a.waves_n), wave_n = remainder_of(wave_index(), a.waves_n);
        }
        tiles = ceil_div(a.k, tile_k);
        row_tiles = ceil_div(a.n, TILE_ROWS), row_groups = one_group ? groups : quotient(row_tiles + a.waves_n - 1, a.waves_n);
        first_group = one_group ? block : remainder_of(block, a.groups);
#pragma unroll 1
        for (; one_group && first_group >= groups; row_block++) first_group -= groups;
        block_first = shared_by(tiles * rank, a.split);
        block_tiles = shared_by(tiles * (rank + 1), a.split) - block_first;
        wave_first = block_first + shared_by(block_tiles * wave_k, a.waves_k);
        wave_end = block_first + shared_by(block_tiles * (wave_k + 1), a.waves_k);
        wave_step = a.chunk;
    }

    DEVICE int wave() const { return counted(wave_k * waves_n + wave_n); }

    /// Tiles along K of the block that has most of those that share it.
    DEVICE int most_tiles(const DecodeArgs& a) const { return shared_by(tiles + a.split - 1, a.split); }

    /// Instead of a part of K, waves take its chunks by turns.
    DEVICE void take_turns(const DecodeArgs& a) {
        wave_first = block_first + wave_k * a.chunk, wave_end = block_first + block_tiles;
        wave_step = a.waves_k * a.chunk;
    }
};

/// Results that a block finishes of a row group, of which it owns so many rows: half as many, of a gate and an up each, with an activation
/// behind them.
DEVICE int outputs_of(const DecodeArgs& a, int owned) { return a.activation == NO_ACTIVATION ? owned : owned / 2; }

/// What a thread finishes of a row group: one result, of as many columns as there are threads to every result. Row tiles alternate 8
/// gates and 8 ups.
struct Output {
    int number, row;         // in the block's part of the group: of the result, and of the (first) packed row
    int first_column, step;  // of x

    DEVICE Output() : number(0), row(0), first_column(0), step(1) {}

    /// `columns` are finished together.
    DEVICE Output(const DecodeArgs& a, const Share& s, const Divisor& outputs, int columns) {
        const int thread = anew(thread_index()), set = outputs.of(thread), together = outputs.of(s.threads);
        number = thread - set * outputs.by;
        row = a.activation == NO_ACTIVATION ? number : number / 8 * TILE_ROWS + number % 8;
        first_column = set < together ? set * columns : 1 << 30, step = together * columns;
    }

    /// The same, which is not computed once more where it is wanted.
    DEVICE Output kept() const {
        Output o;
        o.number = anew(number), o.row = anew(row), o.first_column = anew(first_column), o.step = anew(step);
        return o;
    }
};

/// Rows of activations that this block multiplies: `count` of them, at most Room, row i of the block being row `out(i)` of y.
template <bool Grouped>
struct Rows {
    const int* ids;
    int first, count, expert, top_k;

    template <int Room>
    DEVICE static Rows of(const DecodeArgs& a) { return of<Room>(a, quotient(shared_by(block_index(), a.split), a.groups)); }
    /// Those of row block `block`.
    template <int Room>
    DEVICE static Rows of(const DecodeArgs& a, int block) {
        const int first = block * Room;
        if constexpr (Grouped) {
            const bool used = lane_index() < Room && a.row_ids[first + lane_index()] < a.m;
            const int count = count_lanes(used);  // padding comes last
            return {a.row_ids + first, first, count, a.block_experts[block], a.top_k};
        }
        return {nullptr, first, smaller(Room, a.m - first), 0, 1};
    }
    DEVICE int out(const DecodeArgs& a, int i) const { return Grouped ? a.row_ids[first + i] : first + i; }
    DEVICE int in(int i) const { return Grouped ? ids[i] / top_k : first + i; }
};

/// Eight bf16 as floats.
DEVICE void floats_from_words(const Words& x, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Float2 pair = floats_from_bf16x2(x.v[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}

/// Where the bias of packed row `row` lies. With an activation behind them, packed rows alternate 8 gates and 8 ups; biases stay
/// in the checkpoint's order: all gates first, or, INTERLEAVED, gate and up by turns.
DEVICE int bias_index(const DecodeArgs& a, int row) {
    if (a.activation == NO_ACTIVATION) return row;
    const int gate = row / TILE_ROWS * 8 + row % 8, is_up = row % TILE_ROWS / 8;
    return a.activation & INTERLEAVED ? 2 * gate + is_up : gate + is_up * (a.n / 2);
}

/// The lesser and the larger of both. On AMD NaN stays NaN. On sm_90, where that takes registers that entry points do not have, it
/// becomes the other: selection leaves clamps to kernels that keep it (`clamps` in selection/specs.py).
DEVICE float at_most(float value, float limit) {
    return TARGET_SM90 ? __builtin_fminf(value, limit) : value > limit ? limit : value;
}
DEVICE float at_least(float value, float limit) {
    return TARGET_SM90 ? __builtin_fmaxf(value, limit) : value < limit ? limit : value;
}

/// gate's function times up; `a.activation` is not NO_ACTIVATION.
DEVICE float activated(float gate, float up, const DecodeArgs& a) {
    if (a.limit > 0) gate = at_most(gate, a.limit), up = at_most(at_least(up, -a.limit), a.limit);
    const bool silu = (a.activation & ACTIVATION_KIND) == SILU;
    const float slope = silu ? 1.0f : a.alpha;
    return quotient_of(gate, 1 + exponential(-slope * gate)) * (silu ? up : up + 1);
}

DEVICE void store_result(const DecodeArgs& a, int row, int column, float value) {
    const int64_t at = row * a.y_stride + column;
    if (a.row_weights != nullptr) value *= a.row_weights[row];
    if (a.residual != nullptr) value += float_from_bf16(a.residual[at]);
    if (a.out == OUT_BF16)
        static_cast<uint16_t*>(a.y)[at] = bf16_from_float(value);
    else if (a.out == OUT_FP16)
        static_cast<uint16_t*>(a.y)[at] = static_cast<uint16_t>(half2_from_floats({value, 0}));
    else
        static_cast<float*>(a.y)[at] = value;
}

/// Results of one row of w, from column `column` of x on. The usual ones take a short way: with nothing else to do, each instruction
/// is waited for.
template <bool Grouped, int COLUMNS>
DEVICE void store_results(const DecodeArgs& a, const Rows<Grouped>& rows, int column, int at, const float (&values)[COLUMNS]) {
    const bool usual = TARGET_SM90 && a.out == OUT_BF16 && a.row_weights == nullptr && a.residual == nullptr;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        if (column + c >= rows.count) break;
        const int row = rows.out(a, column + c);
        if (usual)
            static_cast<uint16_t*>(a.y)[row * a.y_stride + at] = bf16_from_float(values[c]);
        else
            store_result(a, row, at, values[c]);
    }
}
