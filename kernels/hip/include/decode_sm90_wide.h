// What all ways of wgmma share: how activations lie in shared memory, how a block gets those that a launch in front has prepared, and
// how its waves hand on what they have summed up.
#pragma once

/// 64 of K of M rows of activations, as the matrix unit reads them (`matrix_in_lds`): bf16 or fp16, or with `is_row` weights e4m3.
template <Weight W, int M>
struct XTile {
    static constexpr int ROW_BYTES = is_row(W) ? 64 : 128, BYTES = M * ROW_BYTES;
    static constexpr int TILE_BYTES = Tile<W>::K / 64 * BYTES;  // of all that a tile of weights multiplies

    /// Where eight codes of e4m3 are, the piece `j` of 64 of K, of one row.
    DEVICE static int place(int row, int j) { return row * ROW_BYTES + (j / 2 ^ row / 2 % 4) * 16 + j % 2 * 8; }

    /// Keeps eight values, the piece `j` of 64 of K, of one row.
    DEVICE static void keep(uint8_t* tile, int row, int j, const Words& values) {
        uint8_t* to = tile + row * ROW_BYTES;
        if constexpr (W != Weight::e4m3) {
            store_words(to + (j ^ row % 8) * 16, values);
        } else {  // lane q multiplies k = 8 q ... 8 q + 7 of an MX block, two of them in each half of two steps
#pragma unroll
            for (int p = 0; p < 4; p++)
                *reinterpret_cast<uint32_t*>(to + ((j & 4 | p) ^ row % 8) * 16 + j % 4 * 4) = values.v[p];
        }
    }
};

/// Bytes of `m` rows of x in `XTile`s of `room` rows, behind which factors of rows are (decode_sm90_prepared.h).
template <Weight W>
DEVICE int64_t prepared_bytes(int m, int k, int room) {
    return static_cast<int64_t>(ceil_div(m, room)) * room * ceil_div(k, Tile<W>::K) * XTile<W, 1>::TILE_BYTES;
}

template <Weight W>
DEVICE const float* prepared_factors(const DecodeArgs& a, const void* prepared, int room) {
    return reinterpret_cast<const float*>(static_cast<const uint8_t*>(prepared) + prepared_bytes<W>(a.m, a.k, room));
}

/// All threads, before `fetch_prepared`.
DEVICE void expect_prepared() {
    if (thread_index() == 0) barrier_init(own_barriers() + 1), barriers_are_ready();
    block_barrier();
}

/// All threads of a crew: the block's part of an x that a launch in front has prepared, into shared memory. Returns when it is there, and
/// does `meanwhile()` until then.
template <Weight W, int M, typename Meanwhile>
DEVICE void fetch_prepared(const DecodeArgs& a, const Share& s, const Crew& crew, int first_row, uint8_t* to, Meanwhile meanwhile) {
    uint64_t* barrier = own_barriers() + 1;
    if (crew.thread() == 0) {
        const auto from = reinterpret_cast<const uint8_t*>(a.workspace);
        const int64_t tile = static_cast<int64_t>(first_row / M) * s.tiles + s.block_first;
        const int bytes = s.block_tiles * XTile<W, M>::TILE_BYTES;
        barrier_expect(barrier, bytes);
        bulk_copy(to, from + tile * XTile<W, M>::TILE_BYTES, bytes, barrier);
    }
    meanwhile();
    barrier_wait(barrier, 0);
}

/// `store(row, column, values of four columns)` for all that this lane has of a sum of wgmma: rows g and g + 8 (g = l / 4), columns
/// 2 q and 2 q + 1 of every eight. Neighbours trade rows for columns.
template <int Sets, typename Store>
DEVICE void each_by_fours(const float (&sum)[Sets][4], int columns, Store store) {
    const int lane = anew(lane_index()), g = lane / 4, q = lane % 4, odd = q % 2;
#pragma unroll
    for (int set = 0; set < Sets; set++) {
        const float(&mine)[4] = sum[set];
        const float theirs[2] = {shuffle_xor(odd ? mine[0] : mine[2], 1), shuffle_xor(odd ? mine[1] : mine[3], 1)};
        const int column = 8 * set + q / 2 * 4;
        if (column >= columns) continue;
        if (odd)
            store(g + 8, column, Floats<4>{theirs[0], theirs[1], mine[2], mine[3]});
        else
            store(g, column, Floats<4>{mine[0], mine[1], theirs[0], theirs[1]});
    }
}

/// Sums of wgmma for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
template <int M>
struct WideSums {
    static constexpr int TOGETHER = 4;  // columns that `each` hands on

    float sum[M / 8][4];

    DEVICE WideSums() {
#pragma unroll
        for (int i = 0; i < M / 2; i++) sum[i / 4][i % 4] = 0;
    }

    template <typename X>
    DEVICE void join(const X&) {}

    /// `store(row, column, values of four columns)` for all that this lane has to hand on.
    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        each_by_fours(sum, columns, store);
    }
};
