// The decode kernels' target-specific half for sm_90: bulk copies into rings, tensor cores, clusters.
//
// Weights lie in tiles of 16 rows x 64 of K, in which lane l = 4 g + q finds what the matrix unit wants of it of rows g and
// g + 8 together. Rows of e4m3 under one power of two (layout `hopper_e4m3`, kernels/triton/hopper_pack.py, shared with the prefill
// kernels) and e2m1 (`hopper_bf16`, likewise): k as in PTX's fragments. e4m3 (layout `mma_tile`,
// sglang_amd_quant/layouts/mma_tile.py): k = 8 q ... 8 q + 7 of every MX block; which k a step of the matrix unit calls its own does
// not matter as long as B agrees, so activations are held with that order in mind. int4 (layout `mma_int4` + `tile_group`): k as for
// e4m3; for few rows of x alone.
//
// Three ways to multiply them: quantized activations by wgmma in e4m3 (decode_sm90_rows.h); bf16 ones, if few rows, by mma.sync
// (decode_sm90_few.h), from 16 on by wgmma (decode_sm90_many.h). For wgmma another launch may have prepared x
// (decode_sm90_prepared.h).
#pragma once
#include "decode.h"
#include "matrix.h"
#include "hopper.h"
#include "int4.h"

/// e4m3: layout `mma_tile`. e2m1: layout `hopper_bf16`; rows of either: `hopper_e4m3`. Both have scales relative to a row's largest,
/// which `factors` keeps; rows of e4m3 have no others. int4: layout `mma_int4`, two of whose tiles are one here if a group is as long.
template <Weight W>
struct Tile {
    static constexpr int BLOCKS = W == Weight::int4_g128 ? 4 : 2;  // of 32 elements of a row: MX blocks
    static constexpr int K = BLOCKS * MX_BLOCK;
    static constexpr int BYTES = TILE_ROWS * K / (W == Weight::e4m3 || W == Weight::row_e4m3 ? 1 : 2);
    static constexpr int SCALES = W == Weight::row_e4m3 ? 0 : is_int4(W) ? TILE_ROWS * K / group_of(W) * 4 : TILE_ROWS * BLOCKS;
    static constexpr bool SHORT = W == Weight::int4_g32;  // a row's last tile may have scales for one block only
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

/// Bytes of two words by the four nibbles in the lower half of `selector`, each below 8. As __byte_perm, which would make sure of that
/// by one more instruction.
DEVICE uint32_t look_up(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// What logic and shifts would do as well, which take turns with `look_up` on one unit; this is the multipliers' work, which are idle.
/// Byte `i` of a word.
DEVICE uint32_t byte_of(uint32_t word, int i) {
    uint32_t byte;
    asm("dp4a.u32.u32 %0, %1, %2, 0;" : "=r"(byte) : "r"(word), "r"(1 << 8 * i));
    return byte;
}

DEVICE uint32_t upper_half(uint32_t word) {
    uint32_t half;
    asm("dp2a.lo.u32.u32 %0, %1, 256, 0;" : "=r"(half) : "r"(word));
    return half;
}

/// e4m3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6, times 2^(step - 5), 0 <= step < 12 being byte `i` of a word.
struct MagnitudesE4m3 {
    uint32_t low, high;
    DEVICE MagnitudesE4m3(uint32_t steps, int i) {
        const uint32_t step = byte_of(steps, i);
        low = step * 0x08080800u + 0x14100800u, high = step * 0x08080808u + 0x24201c18u;
    }
};

/// A lane's part of a tile of e2m1 codes as the matrix unit's left operand: of both MX blocks, rows g and g + 8 by turns, lower K first.
/// A word has four codes of either block: their magnitudes in its lower and upper half, signs where they fit. `steps`: bytes of the
/// lane's four scales.
DEVICE void e4m3_from_e2m1(const Words& codes, uint32_t steps, uint32_t (&fragments)[2][4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const MagnitudesE4m3 first(steps, 2 * row), second(steps, 2 * row + 1);
#pragma unroll
        for (int i = row; i < 4; i += 2) {
            const uint32_t word = codes.v[i], magnitudes = word & 0x77777777u;
            fragments[0][i] = look_up(first.low, first.high, magnitudes) | (word & 0x80808080u);
            fragments[1][i] = look_up(second.low, second.high, upper_half(magnitudes)) | (word << 4 & 0x80808080u);
        }
    }
}

/// A number that the compiler knows.
template <int>
struct Number {};

/// `each(t)` for `count` tiles: while one is multiplied, the next is decoded, into other registers. `settle(n)` waits until at most
/// n of those that `each` started are under way. `Throughout`: always one, until the last; else by fours, which takes fewer registers.
template <bool Throughout, typename Each, typename Settle>
DEVICE void by_turns(int count, Each each, Settle settle) {
    constexpr Number<1> one{};
    constexpr Number<0> none{};
    int t = 0;
    if constexpr (Throughout) {
        each(t++);
#pragma unroll 1
        for (; t + 1 < count; t += 2) {
            each(t), settle(one);
            each(t + 1), settle(one);
        }
        if (t < count) each(t);
        settle(none);
    } else {
#pragma unroll 1
        for (; t + 3 < count; t += 4) {
            each(t), each(t + 1), settle(one);
            each(t + 2), settle(one);
            each(t + 3), settle(none);
        }
#pragma unroll 1
        for (; t + 1 < count; t += 2) each(t), each(t + 1), settle(none);
        if (t < count) each(t), settle(none);
    }
}

/// Where registers suffice to multiply throughout; streaming x takes fewer.
template <Weight W, int M, bool Streaming>
constexpr bool THROUGHOUT = is_row(W) && (M >= 16 || W == Weight::row_e4m3) && (M < 64 || Streaming);

/// A wave's weights, chunk by chunk, through a ring in shared memory. Of waves that multiply together (`is_wide`),
/// those that have no row tile of their own read the last one again, because the others cannot multiply without them.
///
/// `Early`, of row_e2m1: the ring holds all that the wave ever reads, as e4m3, into which it is decoded in place before x is there.
/// Codes arrive in the second half of the room for that.
template <Weight W, int M, bool Early = false>
class Stream {
   public:
    /// `lds` is this wave's part, `bytes(a)` long. Starts fetching: weights depend on no launch before this one.
    DEVICE Stream(const DecodeArgs& a, const Share& s, int expert, uint8_t* lds, uint64_t* barriers)
        : a(a), s(s), ring(lds), barriers(barriers), expert(expert), group(s.first_group) {
        seek();
        if (lane_index() == 0 && group < s.row_groups) {
#pragma unroll 1
            for (int i = 0; i < a.depth; i++) barrier_init(barriers + i);
            barriers_are_ready();
        }
        __syncwarp();
        begin(M >= 16 && !Early ? 1 : a.depth);
    }

    /// Makes sure that the first `chunks` have been asked for. Many rows of x are asked for behind the first chunk alone: behind
    /// all of them, they would come when memory has delivered those.
    DEVICE void begin(int chunks) {
#pragma unroll 1
        for (; begun < chunks; begun++) fetch();
    }

    DEVICE static int bytes(const DecodeArgs& a) { return a.depth * a.chunk * (ROOM + Tile<W>::SCALES); }

    /// `each(t, number along K, Number of tiles)` for all tiles of the next row group, one or `Together` at a time; t is the
    /// first one's place in its chunk. `begin()` when a chunk has come. `settle`: as in `by_turns`.
    template <int Together, typename Begin, typename Each, typename Settle>
    DEVICE void each_tile(Begin begin, Each each, Settle settle) {
        for (int first = s.wave_first; first < s.wave_end; first += s.wave_step) {
            const int count = smaller(a.chunk, s.wave_end - first);
            if constexpr (!Early) wait();
            if constexpr (!is_wide(W, M)) {
                int t = 0;
#pragma unroll(M == 4 ? 2 : 1)
                for (; t + Together <= count; t += Together) each(t, first + t, Number<Together>{});
                if (Together > 1 && t < count) each(t, first + t, Number<1>{});
            } else {
                begin();
                by_turns<THROUGHOUT<W, M, false> || (Early && M == 8)>(
                    count, [&](int t) { each(t, first + t, Number<1>{}); }, settle);
            }
            if constexpr (Early)
                stage++;
            else
                release();
        }
    }

    /// Early: decodes all, as it arrives.
    DEVICE void decode() {
        const int tiles = s.wave_end - s.wave_first;
        for (int first = 0, i = 0; first < tiles; first += a.chunk, i++) {
            barrier_wait(barriers + i, 0);
#pragma unroll 2
            for (int t = first; t < smaller(first + a.chunk, tiles); t++) {
                const Words words = load_words(arriving() + t * Tile<W>::BYTES + lane_index() * 16);
                uint32_t fragments[2][4];
                e4m3_from_e2m1(words, scales_in_ring()[t * (Tile<W>::SCALES / 4) + lane_index() / 4], fragments);
                __syncwarp();  // what is stored here may lie where this tile's codes were
#pragma unroll
                for (int b = 0; b < 2; b++) store_words(ring + t * ROOM + b * (ROOM / 2) + lane_index() * 16, Words{{fragments[b][0], fragments[b][1], fragments[b][2], fragments[b][3]}});
            }
        }
    }

    /// Waits for the next chunk.
    DEVICE void wait() { barrier_wait(barriers + stage, parity); }
    /// Tile `t` of the chunk.
    DEVICE const uint8_t* codes(int t) const { return ring + (stage * a.chunk + t) * ROOM; }
    DEVICE const uint32_t* scale_words(int t) const { return scales_in_ring() + (stage * a.chunk + t) * (Tile<W>::SCALES / 4); }
    /// Gives the chunk back and fetches into its place.
    DEVICE void release() {
        __syncwarp();
        fetch();
        if (++stage == a.depth) stage = 0, parity ^= 1;
    }

   private:
    static constexpr int ROOM = Tile<Early ? Weight::row_e4m3 : W>::BYTES;  // for a tile

    DEVICE uint8_t* arriving() const { return ring + a.depth * a.chunk * (ROOM - Tile<W>::BYTES); }
    DEVICE uint32_t* scales_in_ring() const { return reinterpret_cast<uint32_t*>(ring + a.depth * a.chunk * ROOM); }

    /// To the first tile of this wave's row tile in row group `group`, or beyond all groups if it has none.
    DEVICE void seek() {
        tile = s.wave_first;
        const int wanted = group * s.waves_n + s.wave_n;
        const int row_tile = is_wide(W, M) ? smaller(wanted, s.row_tiles - 1) : wanted;
        if (row_tile >= s.row_tiles || s.wave_first >= s.wave_end) group = s.row_groups;
        const int64_t row = static_cast<int64_t>(expert) * s.row_tiles + row_tile, from = row * s.tiles + tile;
        codes_from = a.w + from * Tile<W>::BYTES;
        scales_from = a.scales + (Tile<W>::SHORT ? row * row_scales() + tile * Tile<W>::SCALES : from * Tile<W>::SCALES);
    }

    /// Bytes of scales of a row tile, and of `count` of its tiles from `tile` on.
    DEVICE int row_scales() const { return a.k / group_of(W) * TILE_ROWS * 4; }
    DEVICE int scale_bytes(int count) const {
        if constexpr (Tile<W>::SHORT) return smaller(count * Tile<W>::SCALES, row_scales() - tile * Tile<W>::SCALES);
        return count * Tile<W>::SCALES;
    }

    DEVICE void fetch() {
        if (group < s.row_groups && lane_index() == 0) {
            const int count = smaller(a.chunk, s.wave_end - tile), at = fetch_stage * a.chunk;
            uint64_t* barrier = barriers + fetch_stage;
            barrier_expect(barrier, count * Tile<W>::BYTES + scale_bytes(count));
            bulk_copy(arriving() + at * Tile<W>::BYTES, codes_from, count * Tile<W>::BYTES, barrier);
            if (Tile<W>::SCALES > 0) bulk_copy(scales_in_ring() + at * (Tile<W>::SCALES / 4), scales_from, scale_bytes(count), barrier);
        }
        if (++fetch_stage == a.depth) fetch_stage = 0;
        tile += s.wave_step, codes_from += s.wave_step * Tile<W>::BYTES, scales_from += s.wave_step * Tile<W>::SCALES;
        if (tile >= s.wave_end) group += s.groups, seek();
    }

    const DecodeArgs& a;
    const Share& s;
    uint8_t* ring;
    uint64_t* barriers;
    const int expert;
    const uint8_t *codes_from, *scales_from;  // what is fetched next: of row group `group`, from `tile` on
    int group, tile, begun = 0, fetch_stage = 0, stage = 0;
    uint32_t parity = 0;
};

/// A block's activations, and what a wave sums up; for few rows and for many.
enum class Way { FEW, MANY, ROWS };
constexpr DEVICE Way way_of(Weight w, int rows) { return is_row(w) ? Way::ROWS : rows < 16 ? Way::FEW : Way::MANY; }
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Activations;
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Totals;

#include "decode_sm90_quantize.h"
#include "decode_sm90_few.h"
#include "decode_sm90_wide.h"
#include "decode_sm90_many.h"
#include "decode_sm90_rows.h"

/// What the sums of weight row `row` are multiplied by.
template <Weight W, Act A, int M>
DEVICE float row_factor(const DecodeArgs& a, const Share& s, int expert, int row) {
    using X = Activations<W, A, M>;
    float factor = X::UNLIFT;
    if constexpr (W == Weight::e2m1 || is_row(W)) factor = a.factors[static_cast<int64_t>(expert) * s.row_tiles * TILE_ROWS + row];
    return factor;
}

/// Rows of a group that a block finishes, and what it knows of them beforehand.
class OwnedRows {
   public:
    int owned, first;     // rows of the group, from which on
    float *times, *plus;  // of every owned row: what its sums are multiplied by, and what is added then

    DEVICE OwnedRows(const DecodeArgs& a, const Share& s, uint8_t* lds)
        : owned(shared_by(a.waves_n * TILE_ROWS, a.split)), first(s.rank * owned), times(reinterpret_cast<float*>(lds)),
          plus(times + owned), a(a), s(s), of_owner(owned), outputs(outputs_of(a, owned)) {}

    /// Loads, before they are needed, what one of the owned rows is multiplied by and what is added to it.
    template <Weight W, Act A, int M>
    DEVICE void look_ahead(int expert, int group) {
        const int row = group * a.waves_n * TILE_ROWS + first + thread_index();
        my_times = 1, my_plus = 0;
        if (thread_index() >= owned || row >= a.n) return;
        my_times = row_factor<W, A, M>(a, s, expert, row);
        if (a.bias != nullptr) my_plus = float_from_bf16(a.bias[static_cast<int64_t>(expert) * a.n + bias_index(a, row)]);
    }

   protected:
    /// Tells every thread of the block, after its next barrier, what was loaded ahead.
    DEVICE void publish() const {
        if (thread_index() < owned) times[thread_index()] = my_times, plus[thread_index()] = my_plus;
    }

    /// `count` partial sums `stride` floats apart, in their order, and what follows for owned row `row`.
    template <int Columns>
    DEVICE void sum_up(const float* parts, int count, int stride, int row, float (&total)[Columns]) const {
#pragma unroll
        for (int c = 0; c < Columns; c++) total[c] = 0;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            const auto part = *reinterpret_cast<const Floats<Columns>*>(parts + i * stride);
#pragma unroll
            for (int c = 0; c < Columns; c++) total[c] += part.v[c];
        }
#pragma unroll
        for (int c = 0; c < Columns; c++) total[c] = total[c] * times[row] + plus[row];
    }

    const DecodeArgs& a;
    const Share& s;
    const Divisor of_owner, outputs;  // rows of a group that a block finishes, and what becomes of them

   private:
    float my_times = 1, my_plus = 0;
};

/// Partial sums of a row group on their way to the block that finishes their rows: [rank][wave_k][owned row][column].
///
/// Blocks that share K are a cluster, and each owns rows / split rows. Sums travel by st.async into the owner's shared memory
/// and announce themselves to its barrier, so that no fence is needed.
template <int Room>
class Sums : public OwnedRows {
    static constexpr int PITCH = Room < 16 ? Room : Room + 4;  // floats from row to row: stores and loads meet in few banks

   public:
    static constexpr int COLUMNS = Room < 16 ? 1 : 4;  // that one thread finishes together

    DEVICE Sums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier)
        : OwnedRows(a, s, lds), barrier(barrier), place(anew(s.rank * a.waves_k + s.wave_k)) {
        partial = plus + owned;
        if (a.split == 1) return;
        if (thread_index() == 0) barrier_init(barrier), barriers_are_ready();
        cluster_arrive();
    }

    /// Waits until all blocks that share K have started.
    DEVICE void meet() const {
        if (a.split > 1) cluster_wait();
    }

    /// All threads: sums up, and tells every thread of the block what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns, bool first_group) {
        if (a.split > 1) {
            if (!first_group) cluster_wait();  // all ranks are done with the sums of the group before
            const int handed_on = ceil_div(smaller(columns, Room), T::TOGETHER) * T::TOGETHER;  // of a row
            if (thread_index() == 0) barrier_expect(barrier, (a.split - 1) * a.waves_k * owned * handed_on * 4);
        } else if (!first_group) {
            block_barrier();
        }
        float* slot = partial + place * owned * PITCH;
        totals.each(columns, [&](int row, int column, const auto& values) {
            row += s.wave_n * TILE_ROWS;
            const int owner = of_owner.of(row);
            float* to = slot + (row - owner * owned) * PITCH + column;
            if (owner == s.rank)
                *reinterpret_cast<Floats<T::TOGETHER>*>(to) = values;
            else
                cluster_store(address_in(to, owner), values, address_in(barrier, owner));
        });
        publish();
        block_barrier();
        if (a.split > 1) barrier_wait(barrier, parity), parity ^= 1;
    }

    DEVICE Output output() const { return {a, s, outputs, COLUMNS}; }

    /// The finished sums of an owned row, columns `column` ... , in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        sum_up(partial + row * PITCH + column, a.split * a.waves_k, owned * PITCH, row, total);
    }

    /// After the last `sum` of a group that another follows.
    DEVICE void done() const {
        if (a.split > 1) cluster_arrive();
    }

   private:
    uint64_t* barrier;
    const int place;  // of this wave's sums among those of their rows
    float* partial;
    uint32_t parity = 0;
};

/// Whether weight row `row` has a scale that is NaN. The factors of e2m1 know, so nobody asks; those of int4 are NaN themselves.
template <Weight W>
DEVICE bool has_nan(const DecodeArgs& a, const Share& s, int expert, int row) {
    if constexpr (W != Weight::e4m3) return false;
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

#include "decode_sm90_prepared.h"

DEVICE const DecodeArgs& late(const DecodeArgs& a) { return a; }

DEVICE int share_rank(const DecodeArgs& a) { return a.split > 1 ? cluster_rank() : 0; }
