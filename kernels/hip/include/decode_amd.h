// The decode kernels' target-specific half for AMD: weights in flight, activations, and the way of sums to their result.
// What a lane does with a tile of weights is in decode_gfx950.h, decode_gfx942.h and decode_gfx11.h.
//
// A tile is 16 rows x 128 of K everywhere: 1 KB of e2m1, 2 KB of e4m3. A wave keeps four of them under way in registers,
// not in LDS: memory's latency is bridged just as well, no byte passes LDS twice, and only gfx950 could copy 16 bytes a lane
// into LDS. Loads go through buffer resources, whose range check masks what lies beyond a wave's part of K without a branch:
// a load that may or may not be issued would make the compiler wait for all of them (it counts in vmcnt what may be pending).
//
// Weights are the matrix unit's columns, activations its rows: a lane then holds sums of a single row of weights, lane % 16,
// so scales that are applied to sums are one number a lane, and with few rows of x few sums to apply them to.
#pragma once
#include "decode.h"
#include "decode_quantize_amd.h"
#include "matrix.h"

DEVICE void allow_next_launch() {}
DEVICE void wait_for_previous_launch() {}
/// The launch's arguments, read again from memory: held in scalar registers all through the main loop, they would not fit.
DEVICE DecodeArgs late(const DecodeArgs&) {
    // Arguments lie there as in the struct: both are aligned naturally.
    auto arguments = (const __attribute__((address_space(4))) DecodeArgs*)__builtin_amdgcn_kernarg_segment_ptr();
    asm volatile("" : "+s"(arguments));
    DecodeArgs copy;
    __builtin_memcpy(&copy, (const DecodeArgs*)arguments, sizeof(copy));
    return copy;
}

DEVICE int share_rank(const DecodeArgs& a) { return block_index() % a.split; }

/// Row of weights in a tile that this lane sums for, and which of the groups of lanes with that row this is.
DEVICE int lane_row() { return lane_index() % TILE_ROWS; }
DEVICE int lane_group() { return lane_index() / TILE_ROWS; }
constexpr int LANE_GROUPS = WAVE / TILE_ROWS;

/// Row of activations of sum `i` of a lane. Such that few rows of activations are spread over all groups of lanes.
DEVICE int sum_row(int group, int i) { return group + LANE_GROUPS * i; }

template <Weight W>
struct Tile {
    static constexpr int BLOCKS = 4;  // of 32 elements of a row: MX blocks
    static constexpr int K = BLOCKS * MX_BLOCK;
    static constexpr int ROW_BYTES = W == Weight::e4m3 ? K : K / 2;
    static constexpr int BYTES = TILE_ROWS * ROW_BYTES;
    static constexpr int PARTS = BYTES / 16 / WAVE;  // of 16 bytes that a lane loads
    static constexpr int WORDS = is_int4(W) ? K / group_of(W) : 1;  // of scales of a row
    // From one part of a lane to the next, from one lane to the next, and what bytes of a row are padded to.
    // gfx950: layouts `preshuffle` and, for e4m3, `mxfp8_lane`; gfx942: `cdna3_e2m1`, `cdna3_e4m3`; gfx11: `preshuffle`; int4:
    // `cdna_int4`, gfx11: `rdna_int4`.
    static constexpr bool LANE_MAJOR = TARGET_GFX950 && W == Weight::e4m3;
    static constexpr int PART_STRIDE = LANE_MAJOR ? 16 : 16 * WAVE;
    static constexpr int LANE_STRIDE = LANE_MAJOR ? 32 : 16;
    static constexpr int PADDED = LANE_MAJOR ? 128 : is_int4(W) ? (TARGET_GFX11 ? 16 : 64) : TARGET_GFX942 ? 64 : 32;
};

/// What a lane holds of a tile.
template <Weight W>
struct LaneTile {
    Words codes[Tile<W>::PARTS];
    uint32_t scales[Tile<W>::WORDS];  // of its row: e8m0, a byte for each of four blocks; int4: a word a group
};

/// A stretch of global memory that loads are checked against: where it starts, and how long it is.
struct Range {
    const uint8_t* base;
    int bytes;

    DEVICE auto resource() const {
        // Raw bytes, no swizzle; on gfx11 with the format and the kind of range check (bits 28, 29) set.
        return __builtin_amdgcn_make_buffer_rsrc(const_cast<uint8_t*>(base), 0, bytes, TARGET_GFX11 ? 0x31004000 : 0x00027000);
    }
    /// Non-temporal (bit 1): nobody reads weights twice.
    DEVICE Words words(int offset) const { return bits<Words>(__builtin_amdgcn_raw_buffer_load_b128(resource(), offset, 0, 2)); }
    DEVICE uint32_t word(int offset) const { return __builtin_amdgcn_raw_buffer_load_b32(resource(), offset, 0, 0); }
};

/// A wave's weights: DEPTH tiles on their way at any time, across row groups.
///
/// A row group's tiles are taken DEPTH at a time; where they are no multiple of it, the last round's rest loads nothing.
template <Weight W, int M>
class Stream {
   public:
    static constexpr int DEPTH = 4;

    DEVICE Stream(const DecodeArgs& a, const Share& s, int expert, uint8_t*, uint64_t*)
        : a(a), s(s), expert(expert), group(s.first_group), first(s.wave_first) {
        seek();
#pragma unroll
        for (int u = 0; u < DEPTH; u++) fetch(u);
        advance();
    }

    DEVICE static int bytes(const DecodeArgs&) { return 0; }

    /// `each(tile of the wave's lanes, its number along K)` for all tiles of the next row group.
    template <int, bool, typename Begin, typename Each, typename Settle>
    DEVICE void each_tile(Begin, Each each, Settle) {
#pragma unroll 1
        for (int tile = s.wave_first; tile < s.wave_end; tile += DEPTH) {
            uint32_t scales[SCALE_WORDS];
#pragma unroll
            for (int i = 0; i < SCALE_WORDS; i++) scales[i] = coming[i];
#pragma unroll
            for (int u = 0; u < DEPTH; u++) {
                if (tile + u < s.wave_end) {
#pragma unroll
                    for (int w = 0; w < Tile<W>::WORDS; w++) {
                        const int word = u * Tile<W>::WORDS + w;
                        ring[u].scales[w] = shuffle(scales[word / LANE_GROUPS], lane_row() + TILE_ROWS * (word % LANE_GROUPS));
                    }
                    each(ring[u], tile + u);
                }
                fetch(u);
            }
            advance();
        }
    }

   private:
    // Layouts `tile_scale`, `tile_group`: of a round, a lane loads every LANE_GROUPS-th word of its row, which has four e8m0 scales
    // (a tile's) or scale and zero point of a group of int4, and lanes exchange them. Whole words, though gfx950's lanes want
    // single bytes: of bytes carried around a loop, LLVM (22) widens the registers at its end, that is, waits there for the last
    // load.
    static constexpr int SCALE_WORDS = DEPTH * Tile<W>::WORDS / LANE_GROUPS;
    static constexpr int SCALE_TILE = TILE_ROWS * 4 * Tile<W>::WORDS;

    DEVICE void seek() {
        const DecodeArgs e = late(a);
        const int row_tiles = ceil_div(e.n, TILE_ROWS), row_tile = group * e.waves_n + s.wave_n;
        const bool any = row_tile < row_tiles;  // beyond the last row group, too, there are no row tiles
        const int64_t at = any ? static_cast<int64_t>(expert) * row_tiles + row_tile : 0;
        const int row_bytes = ceil_div(W == Weight::e4m3 ? e.k : e.k / 2, Tile<W>::PADDED) * Tile<W>::PADDED;
        codes = {e.w + at * TILE_ROWS * row_bytes, any ? smaller(s.wave_end * Tile<W>::BYTES, TILE_ROWS * row_bytes) : 0};
        if constexpr (is_int4(W)) {  // K is not padded
            const int row_scales = e.k / group_of(W) * TILE_ROWS * 4;
            scales_of = {e.scales + at * row_scales, any ? smaller(s.wave_end * SCALE_TILE, row_scales) : 0};
        } else {
            scales_of = {e.scales + at * ceil_div(e.k, Tile<W>::K) * SCALE_TILE, any ? s.wave_end * SCALE_TILE : 0};
        }
    }

    DEVICE void fetch(int u) {
        const int tile = first + u;
#pragma unroll
        for (int p = 0; p < Tile<W>::PARTS; p++)
            ring[u].codes[p] = codes.words(tile * Tile<W>::BYTES + lane_index() * Tile<W>::LANE_STRIDE + p * Tile<W>::PART_STRIDE);
        if (u != 0) return;
#pragma unroll
        for (int i = 0; i < SCALE_WORDS; i++)
            coming[i] = scales_of.word((first * Tile<W>::WORDS + i * LANE_GROUPS) * TILE_ROWS * 4 + lane_index() * 4);
    }

    DEVICE void advance() {
        first += DEPTH;
        if (first < s.wave_end) return;
        first = s.wave_first, group += s.groups;
        seek();
    }

    const DecodeArgs& a;
    const Share& s;
    const int expert;
    int group, first;  // of what is fetched next
    Range codes, scales_of;
    LaneTile<W> ring[DEPTH];
    uint32_t coming[SCALE_WORDS] = {};
};

/// How the block's activations lie in LDS: as codes where the matrix unit takes them, else as halves (gfx950: bf16, but for
/// int4).
template <Weight W, Act A, int M>
struct Activations {
    static constexpr int ROOM = M, TILES = 1;
    static constexpr int SETS = (M + 15) / 16;  // of sixteen rows
    static constexpr int SUMS = ((M < 16 ? M : 16) + LANE_GROUPS - 1) / LANE_GROUPS;  // of a lane and set
    static constexpr bool FP8 = A == Act::e4m3 || A == Act::fp8_static;
    static constexpr bool CODES = TARGET_GFX950 ? A != Act::bf16 && A != Act::fp16 : TARGET_GFX942 && W == Weight::e4m3 && FP8;
    static constexpr bool COPIED = A == Act::fp16 || (TARGET_GFX950 && A == Act::bf16 && !is_int4(W));
    static constexpr int BITS = !CODES ? 16 : FP8 ? 8 : 4;
    static constexpr bool SCALES = TARGET_GFX950 && CODES && A != Act::fp8_static;  // bytes, for the matrix unit
    static constexpr bool FACTORS = !(TARGET_GFX950 && CODES) && !COPIED && A != Act::fp8_static;  // floats, for sums
    static constexpr int FACTOR_BLOCKS = is_int4(W) ? Tile<W>::BLOCKS : 1;  // MX blocks that share a factor
    static constexpr int TILE_FACTORS = Tile<W>::BLOCKS / FACTOR_BLOCKS;
    // gfx942 reads e4m3 codes as half their value.
    static constexpr float UNIT = TARGET_GFX942 && FP8 ? 2.0f : 1.0f;

    const uint8_t* values_of[SETS];  // this lane's row of each set
    const uint8_t* scales_of[SETS];
    const float* factors;            // of this lane's sums
    int set_stride;                  // of factors

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : most(s.most_tiles(a)) {
        values = lds;
        scales = values + row_at(M, most);
        all_factors = reinterpret_cast<float*>(scales + (SCALES ? ceil_div(M * scale_bytes(most), 16) * 16 : 0));
        set_stride = LANE_GROUPS * group_floats(most);
        factors = all_factors + lane_group() * group_floats(most);
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        const int most = s.most_tiles(a);
        return row_at(M, most) + (SCALES ? ceil_div(M * scale_bytes(most), 16) * 16 : 0) +
               (FACTORS ? SETS * LANE_GROUPS * group_floats(most) * 4 : 0);
    }

    /// All threads: quantizes the block's part of x. Visible to the block after its next barrier.
    template <bool Grouped>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows) {
        constexpr int BATCH = M <= 2 ? 2 : 4;  // loads of a thread that are under way together
        const float inverse = A == Act::fp8_static ? 1.0f / *a.x_scale : 1.0f;
        const int pieces = s.block_tiles * Tile<W>::K / 8, inside = a.k - s.block_first * Tile<W>::K;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(a.x + s.block_first * Tile<W>::K);
        const uint32_t stride = static_cast<uint32_t>(2 * a.x_stride);  // the launcher sees to it that it fits
        if (pieces == 0) return;
        const int step_i = s.threads / pieces, step_j = s.threads % pieces;
        int i = thread_index() / pieces, j = thread_index() % pieces;
#if TARGET_GFX950
        if constexpr (SCALES && FP8) saturate_conversions<true>();
#endif
#pragma unroll 1
        while (i < rows.count) {  // pieces are a multiple of sixteen: lanes that share a factor leave together
            Words eight[BATCH];
            int is[BATCH], js[BATCH];
#pragma unroll
            for (int u = 0; u < BATCH; u++) {
                is[u] = i, js[u] = j;
                eight[u] = {};
                if ((i < rows.count) & (8 * j < inside))
                    eight[u] = load_words(from + static_cast<uint64_t>(static_cast<uint32_t>(rows.in(i))) * stride + 16u * j);
                i += step_i, j += step_j;
                if (j >= pieces) j -= pieces, i++;
            }
#pragma unroll
            for (int u = 0; u < BATCH; u++)
                if (is[u] < rows.count) keep(eight[u], is[u], js[u], a.carry, inverse);
        }
#if TARGET_GFX950
        if constexpr (SCALES && FP8) saturate_conversions<false>();
#endif
        if constexpr (FACTORS)  // sums of rows that do not exist are computed, too, and must not read what nobody wrote
            for (int at = thread_index(); at < s.block_tiles * TILE_FACTORS * (SETS * LANE_GROUPS * SUMS); at += s.threads) {
                const int which = at / (SETS * LANE_GROUPS * SUMS), slot = at % (SETS * LANE_GROUPS * SUMS);
                const int row = slot / (LANE_GROUPS * SUMS) * 16 + slot % (LANE_GROUPS * SUMS);
                if (row >= rows.count) *factor_at(row, which) = 0;
            }
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            // Row of the matrix operand that this lane supplies, as a row of x. Those that do not exist are row 0 again.
            const int at = lane_index() % 16, row = 16 * set + (TARGET_GFX11 ? at : at / 4 + at % 4 * 4);
            const int used = row < rows.count ? row : 0;
            values_of[set] = values + row_at(used, most);
            scales_of[set] = scales + used * scale_bytes(most);
        }
    }

   private:
    // An odd number of 16 bytes (of words) from row to row: rows that are read together meet in no bank. On gfx942 eight are
    // read together, 0, 4, 8, 12, 1, 5, 9 and 13 or the other eight; those from 8 on are moved out of the way of the others.
    DEVICE static int row_at(int row, int tiles) {
        return small_product(row, tiles * Tile<W>::K * BITS / 8 + 16) + (TARGET_GFX942 ? row / 8 * 32 : 0);
    }
    DEVICE static int scale_bytes(int tiles) { return (tiles | 1) * Tile<W>::BLOCKS; }
    // Factors of one group of lanes [factor of a row][SUMS]; groups start in different banks.
    DEVICE static int group_floats(int tiles) { return ceil_div(tiles * TILE_FACTORS * SUMS, 32) * 32 + SUMS; }

    DEVICE float* factor_at(int row, int which) const {
        const int group = row % LANE_GROUPS, i = row % 16 / LANE_GROUPS;
        return all_factors + row / 16 * set_stride + group * group_floats(most) + which * SUMS + i;
    }

    /// Piece `j` (eight elements) of row `i`; neighbouring lanes have what else shares its scale or factor.
    DEVICE void keep(const Words& x, int i, int j, int carry, float inverse) {
        uint8_t* row = values + row_at(i, most);
        int exponent;
        if constexpr (COPIED) {
            store_words(row + 16 * j, x);
            return;
        }
        if constexpr (SCALES) {
#if TARGET_GFX950
            exponent = exponent_for<A>(largest_around(x), carry);
            if constexpr (FP8)
                *reinterpret_cast<uint64_t*>(row + 8 * j) = e4m3_under(x, exponent);
            else
                *reinterpret_cast<uint32_t*>(row + 4 * j) = e2m1_under(x, exponent);
#endif
            if (j % 4 == 0) scales[small_product(i, scale_bytes(most)) + j / 4] = static_cast<uint8_t>(exponent);
            return;
        }
        float v[8];
        scale_activations<A, FACTOR_BLOCKS>(x, carry, inverse, v, exponent);
        if constexpr (CODES && FP8) {
            // gfx942: the eight of two neighbouring blocks that a lane multiplies lie together
            const int at = TARGET_GFX942 ? j / 8 * 64 + j % 4 * 16 + j / 4 % 2 * 8 : 8 * j;
            *reinterpret_cast<uint64_t*>(row + at) = fp8_codes<A>(v[0], v[1], v[2], v[3]) | static_cast<uint64_t>(fp8_codes<A>(v[4], v[5], v[6], v[7])) << 32;
        } else if constexpr (CODES) {
            *reinterpret_cast<uint32_t*>(row + 4 * j) = e2m1_from_floats(v);
        } else {
            Half2 h[4];
            if constexpr (A == Act::e2m1) {
                halves_from_e2m1(e2m1_from_floats(v), h);
            } else if constexpr (A == Act::bf16) {
#pragma unroll
                for (int p = 0; p < 4; p++) h[p] = half2_from_floats({v[2 * p], v[2 * p + 1]});
            } else {
                halves_of_fp8<A>(v, h);
            }
            store_words(row + 16 * j, {h[0], h[1], h[2], h[3]});
        }
        if constexpr (FACTORS)
            if (j % (4 * FACTOR_BLOCKS) == 0) *factor_at(i, j / (4 * FACTOR_BLOCKS)) = float_from_e8m0(exponent) * UNIT;
    }

    uint8_t *values, *scales;
    float* all_factors;
    int most;  // tiles
};

/// Partial sums of a row group on their way to their result: [wave_k][column][row] in LDS. Where blocks share K, each leaves
/// its sums in `workspace` [row block][row group][rank][column][row], behind WORKSPACE_COUNTERS counters, and the last to
/// arrive adds them up, always in the order of ranks.
constexpr int WORKSPACE_COUNTERS = 4096;

template <int Room>
class Sums {
   public:
    static constexpr int COLUMNS = 1;  // that one thread finishes together
    int owned = 0;  // rows of a group that this block finishes, from `first` on
    static constexpr int first = 0;

    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barriers)
        : a(a), s(s), partial(reinterpret_cast<float*>(lds)), arrived(reinterpret_cast<int*>(barriers)) {}
    DEVICE static int bytes(const DecodeArgs& a) { return a.waves_k * Room * stride(a.waves_n) * 4; }

    template <Weight W, Act A, int M>
    DEVICE void look_ahead(int, int of) { group = of; }

    template <typename T>
    DEVICE void hand_over(const T& totals, int columns, bool, bool) {
        const DecodeArgs e = late(a);  // all below comes from it, so nothing is computed ahead and kept through the main loop
        rows = e.waves_n * TILE_ROWS, waves_k = e.waves_k, ranks = e.split;
        block_barrier();  // everybody is done with the sums of the group before
        float* to = partial + s.wave_k * Room * stride(e.waves_n) + s.wave_n * TILE_ROWS + lane_row();
        totals.each(opaque(columns), [&](int column, float sum) { to[column * stride(e.waves_n)] = sum; });
        block_barrier();
        owned = rows;
        if (ranks > 1) meet(e, columns);
    }

    /// The sum of an owned row, in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        total[0] = ranks > 1 ? sum_of_ranks(row, column) : sum_of_waves(row, column);
    }

    DEVICE Output output() const {
        const DecodeArgs e = late(a);
        Output output(e, s, Divisor(larger(outputs_of(e, owned), 1)), COLUMNS);
        if (owned == 0) output.first_column = 1 << 30;  // of the blocks that share K the last one finishes all
        return output;
    }
    DEVICE void ready() const {}
    DEVICE void meet() const {}
    DEVICE void leave() const {}

   private:
    // From column to column, an odd number of half the banks: columns do not meet.
    DEVICE static int stride(int waves_n) { return TILE_ROWS * (waves_n | 1); }

    DEVICE float sum_of_waves(int row, int column) const {
        float total = 0;
        for (int k = 0; k < waves_k; k++) total += partial[(k * Room + column) * stride(rows / TILE_ROWS) + row];
        return total;
    }

    DEVICE float sum_of_ranks(int row, int column) const {
        float total = 0;
        for (int rank = 0; rank < ranks; rank++) total += by_rank[(rank * Room + column) * rows + row];
        return total;
    }

    DEVICE void meet(const DecodeArgs& e, int columns) {
        const int place = block_index() / e.split / e.groups * ceil_div(ceil_div(e.n, TILE_ROWS), e.waves_n) + group;
        int* counter = reinterpret_cast<int*>(e.workspace) + place;
        by_rank = e.workspace + WORKSPACE_COUNTERS + static_cast<int64_t>(place) * ranks * Room * rows;
        for (int j = thread_index(); j < columns * rows; j += waves_k * e.waves_n * WAVE)
            by_rank[share_rank(e) * Room * rows + j] = sum_of_waves(j % rows, j / rows);
        __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");  // what this thread stored, before anybody counts this block
        block_barrier();
        if (thread_index() == 0) *arrived = __hip_atomic_fetch_add(counter, 1, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
        block_barrier();
        owned = *arrived == ranks - 1 ? rows : 0;
        if (owned == 0) return;
        __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
        if (thread_index() == 0) *counter = 0;  // for the next launch
    }

    const DecodeArgs& a;
    const Share& s;
    int group = 0, rows = 0, waves_k = 0, ranks = 1;
    float *partial, *by_rank = nullptr;
    int* arrived;
};

/// Those of a block, behind `used` bytes of activations.
template <int Room>
DEVICE Sums<Room> sums_of_block(const DecodeArgs& a, const Share& s, uint8_t* lds, int used, uint64_t* barriers) {
    return {a, s, lds + used, barriers};
}

/// sm_90's shorter way for most results; here there is one way for all.
template <typename... Known>
DEVICE uint16_t* plain_results(const Known&...) {
    return nullptr;
}

/// A wave's sums, and what it does with a tile; decode_int4.h has those of int4.
template <Weight W, Act A, int M, bool Int4 = is_int4(W)>
struct Totals;

/// The finished sum of weight row `row`: times the scale of static activations, plus bias.
template <Weight W, Act A>
DEVICE void finish(const DecodeArgs& a, const Share&, int expert, int row, float (&sum)[1]) {
    if (A == Act::fp8_static) sum[0] *= *a.x_scale * Activations<W, A, 16>::UNIT;
    if (a.bias != nullptr && row < a.n) sum[0] += float_from_bf16(a.bias[static_cast<int64_t>(expert) * a.n + bias_index(a, row)]);
}
