// What all ways of wgmma share: how activations lie in shared memory, how a block gets those that a launch in front has prepared, and
// how its waves hand on what they have summed up.
#pragma once

/// 64 of K of M rows of activations, as the matrix unit reads them (`matrix_in_lds`): bf16 or fp16, or with `is_row` weights e4m3.
template <Weight W, int M>
struct XTile {
    static constexpr int ROW_BYTES = is_row(W) ? 64 : 128, BYTES = M * ROW_BYTES;
    static constexpr int TILE_BYTES = Tile<W>::K / 64 * BYTES;  // of all that a tile of weights multiplies

    /// Keeps eight codes of e4m3, the piece `j` of 64 of K, of one row.
    DEVICE static void keep(uint8_t* tile, int row, int j, const Codes& codes) {
        uint8_t* to = tile + row * ROW_BYTES;
        const int turn = row / 2 % 4;
        if constexpr (W == Weight::row_e4m3) {
            *reinterpret_cast<Codes*>(to + (j / 2 ^ turn) * 16 + j % 2 * 8) = codes;
        } else {  // lane q multiplies k = 16 q ... 16 q + 15, four of them in each half of two steps
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<uint32_t*>(to + ((j % 2 * 2 + half) ^ turn) * 16 + j / 2 * 4) = codes.v[half];
        }
    }

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

/// A block's part of an x that a launch in front has prepared, on its way into shared memory: 64 rows by several copies.
template <int M>
class Arriving {
   public:
    /// All threads, before a barrier of the block.
    DEVICE Arriving(const DecodeArgs& a, const Share& s) : expected(a.workspace != nullptr), s(s), shift(0) {
        if constexpr (PIECES > 1)
            while (PIECES << shift < s.block_tiles) shift++;
        if (thread_index() == 0) {
#pragma unroll
            for (int i = 0; i < PIECES; i++) barrier_init(barrier_of(i));
            barriers_are_ready();
        }
    }

    /// All threads of a crew: asks for all of it. `first_row`: of the block.
    template <Weight W>
    DEVICE void fetch(const DecodeArgs& a, const Crew& crew, int first_row, uint8_t* to) const {
        if (crew.thread() != 0) return;
        auto from = reinterpret_cast<const uint8_t*>(a.workspace) +
                    (static_cast<int64_t>(first_row / M) * s.tiles + s.block_first) * XTile<W, M>::TILE_BYTES;
        const int together = PIECES > 1 ? 1 << shift : s.block_tiles;
#pragma unroll 1
        for (int first = 0, piece = 0; first < s.block_tiles; first += together, piece++) {
            const int bytes = smaller(together, s.block_tiles - first) * XTile<W, M>::TILE_BYTES;
            barrier_expect(barrier_of(piece), bytes);
            bulk_copy(to, from, bytes, barrier_of(piece));
            if (PIECES == 1) break;
            to += bytes, from += bytes;
        }
    }

    /// All threads of the crew, before the block's next barrier: until all is there.
    DEVICE void wait() const {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            if (PIECES == 1 || i << shift < s.block_tiles) barrier_wait(barrier_of(i), 0);
    }

    const bool expected;  // else there is nothing to wait for

   private:
    static constexpr int PIECES = M < 64 ? 1 : X_PIECES;
    DEVICE static uint64_t* barrier_of(int piece) { return own_barriers() + 1 + piece; }

    const Share& s;
    int shift;  // a piece is 1 << shift tiles
};

/// The row of sixteen of which a lane hands on sums by fours.
DEVICE int row_by_fours() { return lane_index() / 4 + lane_index() % 2 * 8; }

/// `store(row, column, values of four columns)` for all that this lane has of a sum of wgmma: rows g and g + 8 (g = l / 4), columns
/// 2 q and 2 q + 1 of every eight, up to the four that column `columns` is of. Neighbours trade rows for columns.
template <int Sets, typename Store>
DEVICE void each_by_fours(const float (&sum)[Sets][4], int columns, Store store) {
    const int lane = anew(lane_index()), q = lane % 4;
    const bool odd = q % 2;
    const int row = row_by_fours();
#pragma unroll
    for (int set = 0; set < Sets; set++) {
        if (8 * set >= columns) break;
        const float(&mine)[4] = sum[set];
        const float theirs[2] = {shuffle_xor(odd ? mine[0] : mine[2], 1), shuffle_xor(odd ? mine[1] : mine[3], 1)};
        if (8 * set + q / 2 * 4 >= columns) continue;
        store(row, 8 * set + q / 2 * 4,
              Floats<4>{odd ? theirs[0] : mine[0], odd ? theirs[1] : mine[1], odd ? mine[2] : theirs[0], odd ? mine[3] : theirs[1]});
    }
}

/// Sums of wgmma for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
template <int M>
struct WideSums {
    static constexpr int TOGETHER = 4;  // columns that `each` hands on, if any of them is wanted

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

    /// `store(row, column, values of two columns)`, as they are.
    template <typename Store>
    DEVICE void each_pair(int columns, Store store) const {
        const int lane = anew(lane_index()), g = lane / 4, q = lane % 4;
#pragma unroll
        for (int set = 0; set < M / 8; set++) {
            if (8 * set >= columns) break;
            store(g, 8 * set + 2 * q, Floats<2>{sum[set][0], sum[set][1]});
            store(g + 8, 8 * set + 2 * q, Floats<2>{sum[set][2], sum[set][3]});
        }
    }
};
