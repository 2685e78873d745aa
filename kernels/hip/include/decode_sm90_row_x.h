// Activations that become rows of e4m3 under one power of two each: quantized by all waves of a block together, or a row by a wave.
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

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : Activations(a, s, lds, {0, s.threads}) {}
    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds, const Crew& crew)
        : values(matrix_aligned(lds)), carry(a.carry), crew(crew), pieces(s), arriving(a, s) {
        largest = reinterpret_cast<uint32_t*>(values + s.most_tiles(a) * XTile<W, M>::BYTES);
        factors = reinterpret_cast<float*>(largest + M);
        if (crew.first == 0 && thread_index() < M) largest[thread_index()] = 0;
        if (crew.first == 0 || arriving.expected) block_barrier();
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) { return 1024 + s.most_tiles(a) * XTile<W, M>::BYTES + M * 8; }

    /// All threads of the block: quantizes its part of x, or fetches it. Visible to the block's matrix instructions after its next barrier.
    /// Of what a thread takes, so many pieces are loaded once; others twice.
    template <int HELD = A == Act::fp8_static ? 2 : M == 8 ? 2 : 4, bool Grouped, typename Meanwhile>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows, Meanwhile meanwhile) {
        if (arriving.expected) {
            ask_for_prepared(a, rows.first);
            meanwhile();
            return arriving.wait();
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
            block_barrier();
        } else {
            static_scale = *a.x_scale;
        }
        if (const int row = thread_index(); row < M)
            factors[row] = A == Act::fp8_static ? static_scale : float_from_e8m0(exponent_of<A>(largest[row], carry));
        each_piece(held, rows, take);
#pragma unroll 1
        while (pieces.any(rows)) each_piece(pieces.template next<1>(a, rows), rows, take);
        show_to_async();
    }

    /// All threads of the crew: the same, a wave TOGETHER rows at once. Nobody waits for others, and all that a wave does is few
    /// instructions without branches: each is fetched, and waited for, but once.
    template <int TOGETHER>
    DEVICE void stage_by_rows(const DecodeArgs& a, const Share& s, const Rows<false>& rows) {
        if (arriving.expected) return fetch_prepared(a, rows);
        constexpr int HELD = 4, AT_ONCE = HELD * WAVE;  // pieces of a row that a lane, and a wave, holds
        const int lane = lane_index(), waves = crew.threads / WAVE, base = s.block_first * Tile<W>::K;
        const int all = s.block_tiles * (Tile<W>::K / 8), known = smaller(all, (a.k - base) / 8);  // pieces of a row; zeros behind K
        if constexpr (A == Act::fp8_static) static_scale = *a.x_scale;
#pragma unroll 1
        for (int row = wave_index() - crew.first / WAVE; row < rows.count; row += TOGETHER * waves) {
            Words held[TOGETHER * HELD];
            const auto load = [&](int first) {
#pragma unroll
                for (int r = 0; r < TOGETHER; r++) {
                    const int of = row + r * waves, piece = first + lane, end = of < rows.count ? known : 0;
                    const uint16_t* from = a.x + rows.in(of) * a.x_stride + base + piece * 8;
#pragma unroll
                    for (int u = 0; u < HELD; u++)
                        held[r * HELD + u] = load_words_if(piece + u * WAVE < end, from + u * (WAVE * 8));
                }
            };
            load(0);
            uint32_t most[TOGETHER] = {};
            const auto look = [&] {
#pragma unroll
                for (int i = 0; i < TOGETHER * HELD; i++) most[i / HELD] = larger(most[i / HELD], largest_of(held[i]));
            };
            if constexpr (A != Act::fp8_static) {
                look();
#pragma unroll 1
                for (int first = AT_ONCE; first < all; first += AT_ONCE) load(first), look();
            }
            int exponents[TOGETHER];
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
                exponents[r] = A == Act::fp8_static ? 0 : exponent_of<A>(largest_in_wave(most[r]), carry);
                const float factor = A == Act::fp8_static ? static_scale : float_from_e8m0(exponents[r]);
                if (const int of = row + r * waves; lane == 0 && of < rows.count) factors[of] = factor;
            }
#pragma unroll 1
            for (int first = 0; first < all; first += AT_ONCE) {
                if (all > AT_ONCE) load(first);
                saturate<A>(held, carry);
#pragma unroll
                for (int i = 0; i < TOGETHER * HELD; i++) {
                    const int of = row + i / HELD * waves, u = i % HELD;
                    const Codes codes = row_codes<A>(held[i], exponents[i / HELD], carry, static_scale);
                    uint8_t* tile = values + ((first + lane) / 8 + u * (WAVE / 8)) * XTile<W, M>::BYTES;
                    if (of < rows.count && first + u * WAVE + lane < all) XTile<W, M>::keep(tile, of, lane % 8, codes);
                }
            }
        }
        show_to_async();
    }

    /// All threads of the crew: gets those that a launch in front has prepared.
    DEVICE void fetch_prepared(const DecodeArgs& a, const Rows<false>& rows) {
        ask_for_prepared(a, rows.first);
        arriving.wait();
    }

    /// What step `step` of 32 of the tile that begins with MX block `block` multiplies.
    DEVICE uint32_t at(int block, int step) const {
        return matrix_in_lds(values) + block / 2 * (XTile<W, M>::BYTES / 16) + step * 2;
    }

    /// What sums of row `i` are to be multiplied by.
    DEVICE float factor(int i) const { return factors[i]; }

   private:
    /// All threads of the crew.
    DEVICE void ask_for_prepared(const DecodeArgs& a, int first_row) {
        arriving.template fetch<W>(a, crew, first_row, values);
        if (const int lane = crew.thread(); lane < smaller(M, WAVE))
#pragma unroll
            for (int i = 0; i < M; i += WAVE) factors[i + lane] = prepared_factors<W>(a, a.workspace, M)[first_row + i + lane];
    }

    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted) {
        Words eight[1] = {x};
        saturate<A>(eight, carry);
        const Codes codes = row_codes<A>(eight[0], wanted ? exponent_of<A>(largest[i], carry) : 0, carry, static_scale);
        if (wanted) XTile<W, M>::keep(values + j / 8 * XTile<W, M>::BYTES, i, j % 8, codes);
    }
};
