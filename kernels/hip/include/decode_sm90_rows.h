// Rows of e4m3 under one power of two each, weights (layout `hopper_e4m3`) and activations alike, for any number of rows of x.
//
// As with many rows of bf16, four waves multiply together by wgmma and weights are the operand in registers, or in shared memory if they were
// brought into its order before x was there (`Stream::DECODED`). e2m1 codes become e4m3 with their block's scale by a look into a table of
// eight, four codes an instruction, one table for all that a lane has of a row's tile; e4m3 codes are multiplied as they lie. The matrix
// unit adds e4m3 products with fewer bits than a float has (13 below the largest), so after every few tiles its sums are added to others by
// float additions.
#pragma once

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::ROWS> : WideSums<M> {
    using WideSums<M>::sum;
    float part[M / 8][4];  // part: what the matrix unit has added up, of a few tiles
    bool begun = false;
    Words ahead;  // e2m1: codes and scales of the tile that is next
    uint32_t steps_ahead;

    /// e2m1: loads tile `t` of what `stream` has at hand.
    template <typename Tiles>
    DEVICE void look(const Tiles& stream, int t) {
        if constexpr (W == Weight::row_e2m1) {
            ahead = load_words(stream.codes(t) + lane_index() * 16);
            steps_ahead = steps_of_lane(stream.scale_words(t));
        }
    }

    /// Starts adding tile `t`, which of e2m1 `look` has loaded; loads the next, or what lies behind the last. `block` is its first MX
    /// block in the activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        uint32_t fragments[2][4];  // of two steps: rows g and g + 8 by turns, lower K first
        if constexpr (W == Weight::row_e2m1) {
            e4m3_from_e2m1(ahead, steps_ahead, fragments);
            look(stream, t + 1);
        } else {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const Words words = load_words(stream.codes(t) + b * (TILE_ROWS * MX_BLOCK) + lane_index() * 16);
#pragma unroll
                for (int i = 0; i < 4; i++) fragments[b][i] = words.v[i];
            }
        }
        warpgroup_fence();
        warpgroup_matrix_e4m3(fragments[0], x.at(block, 0), part, begun);
        warpgroup_matrix_e4m3(fragments[1], x.at(block, 1), part, true);
        warpgroup_commit();
        begun = true;
    }

    static constexpr int MOST = 12;  // tiles that the matrix unit adds up

    /// Adds `count` tiles that lie in shared memory as the matrix unit reads them, `stride` bytes apart, times `x` (`at`) from the first on; of
    /// many rows of x MOST at most, as registers do not hold other sums. The unit takes both addresses from registers of a slow kind: they
    /// are added to, and nothing else. `asked()`: of many rows, when the unit has been asked for all of it.
    template <typename Asked>
    DEVICE void add_all(LeftMatrix tiles, int stride, int count, uint32_t x, Asked asked) {
#pragma unroll 1
        for (int first = 0; first < count; first += MOST) {
            const auto second_half = [&] {
                warpgroup_matrix_e4m3<true>(tiles.low + (2 * LeftMatrix::CORE >> 4), tiles.high, x + 2, part);
                tiles.low += stride >> 4, x += XTile<W, M>::BYTES >> 4;
            };
            warpgroup_fence();
            warpgroup_matrix_e4m3<false>(tiles.low, tiles.high, x, part), second_half();
#pragma unroll 4
            for (int t = smaller(MOST, count - first) - 1; t > 0; t--) warpgroup_matrix_e4m3<true>(tiles.low, tiles.high, x, part), second_half();
            warpgroup_commit();
            if constexpr (M >= EARLY_PREPARED) return asked(), take();
            settle(Number<0>{});
        }
    }

    /// Waits for all that is under way, of tiles that nothing else has been added to: MOST at most.
    DEVICE void take() {
        warpgroup_wait<0>();
#pragma unroll
        for (int i = 0; i < M / 2; i++) {
            asm volatile("" : "+f"(part[i / 4][i % 4]));  // not before the wait
            sum[i / 4][i % 4] = part[i / 4][i % 4];
        }
    }

    /// Waits until at most `Pending` tiles are under way; if none is, keeps what they have added up.
    template <int Pending>
    DEVICE void settle(Number<Pending>) {
        warpgroup_wait<Pending>();
        if constexpr (Pending == 0) {
#pragma unroll
            for (int i = 0; i < M / 2; i++) {
                asm volatile("" : "+f"(part[i / 4][i % 4]));  // not before the wait
                sum[i / 4][i % 4] += part[i / 4][i % 4];
            }
            begun = false;
        }
    }

    /// Applies the scales of the rows of x.
    template <typename X>
    DEVICE void join(const X& x) {
        const int column = anew(lane_index()) % 4 * 2;
#pragma unroll
        for (int i = 0; i < M / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float factor = x.factor(8 * i + column + c);
                sum[i][c] *= factor, sum[i][c + 2] *= factor;
            }
    }
};
