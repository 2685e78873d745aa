// The decode kernels' target-specific half for sm_90: bulk copies into rings, tensor cores, clusters.
//
// Weights lie in tiles of 16 rows x 64 of K, in which lane l = 4 g + q finds what the matrix unit wants of it of rows g and
// g + 8 together. Rows of e4m3 under one power of two (layout `hopper_e4m3`, kernels/triton/hopper_pack.py, shared with the prefill
// kernels), e2m1 (`hopper_bf16`, likewise) and int4 (layout `mma_int4` + `tile_group`): k as in PTX's fragments. e4m3 (layout `mma_tile`,
// sglang_amd_quant/layouts/mma_tile.py): k = 8 q ... 8 q + 7 of every MX block; which k a step of the matrix unit calls its own does
// not matter as long as B agrees, so activations are held with that order in mind.
//
// Ways to multiply them: quantized activations by wgmma in e4m3 (decode_sm90_rows.h); bf16 and fp16 ones, if few rows, by mma.sync
// (decode_sm90_few.h), from 16 on by wgmma (decode_sm90_many.h, of int4 decode_sm90_groups.h). For wgmma another launch may have
// prepared x (decode_sm90_prepared.h), and e2m1 weights may be e4m3 by the time x is there (`Stream`, `decode_early`).
#pragma once
#include "decode.h"
#include "matrix.h"
#include "hopper.h"
#include "int4.h"
#include "decode_sm90_stream.h"

/// A block's activations, and what a wave sums up; for few rows and for many.
enum class Way { FEW, MANY, GROUPS, ROWS };
constexpr DEVICE Way way_of(Weight w, int rows) {
    return is_row(w) ? Way::ROWS : rows < 16 ? Way::FEW : is_int4(w) ? Way::GROUPS : Way::MANY;
}
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Activations;
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Totals;

#include "decode_sm90_quantize.h"
#include "decode_sm90_few.h"
#include "decode_sm90_wide.h"
#include "decode_sm90_many.h"
#include "decode_sm90_groups.h"
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
