// Row groups of blocks that stream x: one a block, or two blocks, a pair, that have four row tiles in common. Multiprocessors for which three
// and a half times 64 rows are an even share of the weights would else have three or four.
#pragma once

/// One row group a block. Groups beyond the last, which fill up clusters, read that again.
struct Unpaired {
    DEVICE Unpaired(const DecodeArgs&, Share& s) { s.first_group = smaller(s.first_group, s.row_groups - 1); }
    /// Whether this wave leaves stage `stage` of x to others.
    DEVICE bool skips(int) const { return false; }
};

/// Of two blocks, a cluster, the last waves of the first and the first ones of the second have the same row tiles, and take chunks of K by
/// turns. Each block finishes half of these rows.
struct Pair {
    static constexpr int COMMON = 4, ROWS = COMMON / 2 * TILE_ROWS;  // row tiles; rows of them that a block finishes

    const int rank = cluster_rank();
    const int number;  // of this wave's row tile among those in common
    const bool in_common = 0 <= number && number < COMMON;

    DEVICE Pair(const DecodeArgs& a, Share& s) : number(s.wave_n - (rank == 0 ? a.waves_n - COMMON : 0)) {
        s.waves_n -= COMMON / 2, s.wave_n -= rank * (COMMON / 2);  // counted from the first row that the block finishes
        s.row_groups = s.groups;  // a block beyond the last row has its part of those in common
        if (in_common) s.wave_first = rank * a.chunk, s.wave_step = 2 * a.chunk;
    }
    DEVICE bool skips(int stage) const { return in_common && (stage & 1) != rank; }
};

/// A row tile of a block of a pair. Sums of rows in common go to the block that finishes them, lane by lane as the matrix unit left them.
template <Weight W, Act A, int M>
class PairTile : public OwnTile<W, A, M> {
   public:
    static constexpr int BYTES = Pair::ROWS * M * 4;

    /// All threads, before blocks meet. `lds`: BYTES for what comes from the other block, behind them what an `OwnTile` wants.
    DEVICE PairTile(const DecodeArgs& a, const Share& s, int group, const Pair& pair, uint8_t* lds, uint64_t* barrier)
        : OwnTile<W, A, M>(a, s, group, lds + BYTES), pair(pair), received(reinterpret_cast<Floats<4>*>(lds)), barrier(barrier) {
        if (thread_index() != 0) return;
        barrier_init(barrier), barriers_are_ready();
        barrier_expect(barrier, BYTES);
    }

    /// All lanes, when blocks have met: whether this wave finishes its rows; then it has the other block's part of the sums too, else it has sent
    /// its own. A block waits for all that it is sent, so the other may end before that has arrived.
    DEVICE bool finishes(WideSums<M>& totals) const {
        if (!pair.in_common) return true;
        const bool here = pair.number / (Pair::COMMON / 2) == pair.rank;
        Floats<4>* at = received + pair.number % (Pair::COMMON / 2) * (TILE_ROWS * M / 4) + lane_index();
        const uint32_t to = address_in(at, 1 - pair.rank), told = address_in(barrier, 1 - pair.rank);
        if (here) barrier_wait(barrier, 0);
#pragma unroll
        for (int i = 0; i < M / 8; i++) {
            float(&own)[4] = totals.sum[i];
            if (here) {
                const Floats<4> other = at[i * WAVE];
#pragma unroll
                for (int c = 0; c < 4; c++) own[c] += other.v[c];
            } else {
                cluster_store(to + i * WAVE * sizeof(Floats<4>), Floats<4>{own[0], own[1], own[2], own[3]}, told);
            }
        }
        return here;
    }

   private:
    const Pair& pair;
    Floats<4>* const received;  // [row tile][eight of x][lane]
    uint64_t* const barrier;
};
