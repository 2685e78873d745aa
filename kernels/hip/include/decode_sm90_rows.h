// Rows of e4m3 under one power of two each, weights (layout `hopper_e4m3`) and activations alike, for any number of rows of x.
//
// As with many rows of bf16, four waves multiply together by wgmma and weights are the operand in registers. e2m1 codes become
// e4m3 with their block's scale by a look into a table of eight, four codes an instruction; e4m3 codes are multiplied as they lie.
// The matrix unit adds e4m3 products with fewer bits than a float has (13 below the largest), so after every few tiles its sums are
// added to others by float additions.
#pragma once

/// The block's activations in shared memory, tile by tile, every row under the largest scale of its blocks in this block's part of K.
template <Weight W, Act A, int M>
struct Activations<W, A, M, Way::ROWS> {
    static constexpr int ROOM = M, TILES = 1;
    static constexpr float UNLIFT = 1.0f;

    uint8_t* values;
    uint32_t* largest;  // magnitude in a row, as a float's bits
    float* factors;     // of rows' sums
    int carry;
    float static_scale = 1;
    Crew crew;
    Pieces<W> pieces;
    Arriving<M> arriving;

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : Activations(a, s, lds, everybody(s)) {}
    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds, const Crew& crew)
        : values(matrix_aligned(lds)), carry(a.carry), crew(crew), pieces(s, crew), arriving(a, s) {
        largest = reinterpret_cast<uint32_t*>(values + s.most_tiles(a) * XTile<W, M>::BYTES);
        factors = reinterpret_cast<float*>(largest + M);
        if (thread_index() < M) largest[thread_index()] = 0;
        block_barrier();
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) { return 1024 + s.most_tiles(a) * XTile<W, M>::BYTES + M * 8; }

    /// All threads of the crew: quantizes the block's part of x. Visible to the block's matrix instructions after its next barrier, and
    /// `arriving`'s.
    /// Of what a thread takes, so many pieces are loaded once; others twice.
    template <int HELD = A == Act::fp8_static ? 2 : M == 8 ? 2 : 4, bool Grouped, typename Meanwhile>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows, Meanwhile meanwhile) {
        if (arriving.expected) {
            arriving.template fetch<W>(a, crew, rows.first, values);
            if (const int lane = crew.thread(); lane < smaller(M, WAVE))
#pragma unroll
                for (int i = 0; i < M; i += WAVE) factors[i + lane] = prepared_factors<W>(a, a.workspace, M)[rows.first + i + lane];
            meanwhile();
            return arriving.wait_for_whole();
        }
        const auto look_at = [&](const Words& eight, int i, int, bool wanted) {
            const uint32_t of_lane = largest_of(eight), of_all = pieces.whole ? largest_in_wave(of_lane) : max_lanes<4>(of_lane);
            if (wanted && (lane_index() & (pieces.whole ? WAVE - 1 : 3)) == 0) atomicMax(largest + i, of_all);
        };
        const auto take = [&](const Words& eight, int i, int j, bool wanted) { keep(eight, i, j, wanted); };
        const auto held = pieces.template next<HELD>(a, rows);
        meanwhile();
        if constexpr (A != Act::fp8_static) {
            each_piece(held, rows, look_at);
            for (Pieces<W> rest = pieces; rest.any(rows);) each_piece(rest.template next<1>(a, rows), rows, look_at);
            crew.barrier();
        } else {
            static_scale = *a.x_scale;
        }
        if (const int row = crew.thread(); row < M)
            factors[row] = A == Act::fp8_static ? static_scale : float_from_e8m0(exponent_of<A>(largest[row], carry));
        each_piece(held, rows, take);
#pragma unroll 1
        while (pieces.any(rows)) each_piece(pieces.template next<1>(a, rows), rows, take);
        show_to_async();
    }

    /// What step `step` of 32 of the tile that begins with MX block `block` multiplies.
    DEVICE uint32_t at(int block, int step) const {
        return matrix_in_lds(values) + block / 2 * (XTile<W, M>::BYTES / 16) + step * 2;
    }

    /// What sums of row `i` are to be multiplied by.
    DEVICE float factor(int i) const { return factors[i]; }

   private:
    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted) {
        const Codes codes = row_codes<A>(x, wanted ? exponent_of<A>(largest[i], carry) : 0, carry, static_scale);
        if (wanted) *reinterpret_cast<Codes*>(values + j / 8 * XTile<W, M>::BYTES + XTile<W, M>::place(i, j % 8)) = codes;
    }
};

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
            steps_ahead = stream.scale_words(t)[lane_index() / 4];
        }
    }

    /// Starts adding tile `t`, which of e2m1 `look` has loaded; loads the next, or what lies behind the last. `block` is its first MX
    /// block in the activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        uint32_t fragments[2][4];  // of two MX blocks: rows g and g + 8 by turns, lower K first
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
