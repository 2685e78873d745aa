// Row groups of blocks that stream x: one a block, or two blocks, a pair, that have four row tiles in common. Multiprocessors for which three
// and a half times 64 rows are an even share of the weights would else have three or four.
#pragma once

/// One row group a block. Groups beyond the last, which fill up clusters, read that again.
struct Alone {
    DEVICE Alone(const DecodeArgs&, Share& s) { s.first_group = smaller(s.first_group, s.row_groups - 1); }
    /// Whether this wave leaves stage `stage` of x to others.
    DEVICE bool skips(int) const { return false; }
};

/// Of two blocks, a cluster, the last waves of the first and the first ones of the second have the same row tiles, and take chunks of K by
/// turns. Each block finishes half of these rows.
struct Pair {
    static constexpr int COMMON = 4, ROWS = COMMON / 2 * TILE_ROWS;  // row tiles; rows of them that a block finishes

    const int rank = cluster_rank();
    const bool in_common;  // whether this wave's row tile is one of those

    DEVICE Pair(const DecodeArgs& a, Share& s) : in_common(rank == 0 ? s.wave_n >= a.waves_n - COMMON : s.wave_n < COMMON) {
        s.waves_n -= COMMON / 2, s.wave_n -= rank * (COMMON / 2);  // counted from the first row that the block finishes
        s.row_groups = s.groups;  // a block beyond the last row has its part of those in common
        if (in_common) s.wave_first = rank * a.chunk, s.wave_step = 2 * a.chunk;
    }
    DEVICE bool skips(int stage) const { return in_common && (stage & 1) != rank; }
};

/// Sums of a block of a pair: waves have all of K, but of the rows in common, of which the other block's half is sent there.
template <int Room>
class PairSums : public MetSums<Room> {
    using Base = MetSums<Room>;
    using Base::barrier, Base::of_waves, Base::partial, Base::place;

   public:
    using Base::COLUMNS, Base::owned;

    DEVICE PairSums(const DecodeArgs& a, const Share& s, uint8_t* lds, uint64_t* barrier, float* of_waves) : Base(a, s, lds, barrier, of_waves) {
        if (thread_index() == 0) barrier_init(barrier), barriers_are_ready();
    }

    DEVICE void ready() const { cluster_arrive(); }
    DEVICE void meet() const { cluster_wait(); }

    /// All threads: sums up, and tells every thread of the block what was loaded ahead.
    template <typename T>
    DEVICE void hand_over(const T& totals, int columns) {
        if (thread_index() == 0) barrier_expect(barrier, Pair::ROWS * Room * 4);
        block_barrier();
        float* mine = of_waves + wave_index() * TILE_ROWS * Room;
        totals.each_pair(columns, [&](int row, int column, const auto& values) { store_floats(mine + place(row, column), values); });
        Base::publish();
        show_to_async();
        block_barrier();
        if (wave_index() == 0 && elected()) {
            const float* theirs = of_waves + (rank == 0 ? owned : 0) * Room;  // the last rows that were multiplied here, or the first
            bulk_send(address_in(partial, 1 - rank), theirs, Pair::ROWS * Room * 4, address_in(barrier, 1 - rank));
        }
        barrier_wait(barrier, 0);
        cluster_arrive();
    }

    /// The finished sums of an owned row, columns `column` ... , in an order that never changes.
    DEVICE void sum(int row, int column, float (&total)[COLUMNS]) const {
        const int at = place(row, column), common = row - (rank == 0 ? owned - Pair::ROWS : 0);  // all of these begin at multiples of eight
        const float *own = of_waves + rank * Pair::ROWS * Room + at, *others = partial + (common - row) * Room + at;
        Base::sum_up(0 <= common && common < Pair::ROWS ? 2 : 1, [&](int i) { return i == 0 ? own : others; }, row, total);
    }

    /// All threads, at the end: what this block has sent must have arrived before it goes.
    DEVICE void leave() const { cluster_wait(); }

   private:
    const int rank = cluster_rank();
};
