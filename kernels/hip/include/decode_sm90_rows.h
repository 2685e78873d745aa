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

    uint8_t *values, *exponents;  // the latter of the MX blocks of a row, row after row
    int* largest;                 // exponent of a row ...
    const float* factors = nullptr;  // ... or of all rows, what a launch in front has found
    int blocks, carry;            // blocks of a row
    float static_scale = 1;
    Pieces<W> pieces;

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds) : carry(a.carry), pieces(s) {
        const int tiles = s.most_tiles(a);
        values = matrix_aligned(lds), blocks = tiles * Tile<W>::BLOCKS;
        largest = reinterpret_cast<int*>(values + tiles * XTile<W, M>::BYTES);
        exponents = reinterpret_cast<uint8_t*>(largest + M);
        if (thread_index() < M) largest[thread_index()] = 0;
        expect_prepared();
    }
    DEVICE static int bytes(const DecodeArgs& a, const Share& s) {
        return 1024 + s.most_tiles(a) * (XTile<W, M>::BYTES + M * Tile<W>::BLOCKS) + M * 4;
    }

    /// All threads: quantizes the block's part of x. Visible to the block's matrix instructions after its next barrier.
    template <bool Grouped, typename Meanwhile>
    DEVICE void stage(const DecodeArgs& a, const Share& s, const Rows<Grouped>& rows, Meanwhile meanwhile) {
        if (a.workspace != nullptr) {
            factors = a.workspace + prepared_bytes<W>(a.m, a.k, M) / 4 + rows.first;
            return fetch_prepared<W, M>(a, s, rows.first, values);
        }
        if (A == Act::fp8_static) static_scale = *a.x_scale;
        stage_rows<A == Act::fp8_static ? 2 : 4>(*this, a, pieces, rows, meanwhile);
        if (A != Act::fp8_static) {
            block_barrier();
            for (int i = pieces.i, j = pieces.j; i < rows.count;) {
                const int octaves = largest[i] - exponents[i * blocks + j / 4];
                Codes* codes = reinterpret_cast<Codes*>(at_piece(i, j));
                if (octaves > 0) *codes = shifted_e4m3(*codes, octaves);
                i += pieces.step_i, j += pieces.step_j;
                if (j >= pieces.count) j -= pieces.count, i++;
            }
        }
        show_to_matrix_unit();
    }

    /// What step `step` of 32 of the tile that begins with MX block `block` multiplies.
    DEVICE uint32_t at(int block, int step) const {
        return matrix_in_lds(values) + block / 2 * (XTile<W, M>::BYTES / 16) + step * 2;
    }

    /// What sums of row `i` are to be multiplied by.
    DEVICE float factor(int i) const {
        return factors != nullptr ? factors[i] : A == Act::fp8_static ? 1.0f : float_from_e8m0(largest[i]);
    }

    /// Eight values, piece `j` along K, of row `i`.
    DEVICE void keep(const Words& x, int i, int j, bool wanted) {
        const int exponent = A == Act::fp8_static ? 0 : exponent_of<A>(largest_of_block(x), carry);
        if (!wanted) return;
        *reinterpret_cast<Codes*>(at_piece(i, j)) = codes_of_activations<A>(x, exponent, static_scale);
        if (A == Act::fp8_static || j % 4 != 0) return;
        exponents[i * blocks + j / 4] = static_cast<uint8_t>(exponent);
        atomicMax(largest + i, exponent);
    }

   private:
    DEVICE uint8_t* at_piece(int i, int j) const { return values + j / 8 * XTile<W, M>::BYTES + XTile<W, M>::place(i, j % 8); }
};

/// e4m3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6, times 2^(step - 5), of 0 <= step < 12.
struct MagnitudesE4m3 {
    uint32_t low, high;
    DEVICE explicit MagnitudesE4m3(uint32_t step) : low(step * 0x08080800u + 0x14100800u), high(step * 0x08080808u + 0x24201c18u) {}
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::ROWS> {
    float sum[M / 8][4], part[M / 8][4];  // part: what the matrix unit has added up, of a few tiles
    bool begun = false;

    DEVICE Totals() {
#pragma unroll
        for (int i = 0; i < M / 2; i++) sum[i / 4][i % 4] = 0;
    }

    /// Starts adding tile `t` of what `stream` has at hand; `block` is its first MX block in the activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        uint32_t fragments[2][4];  // of two MX blocks: rows g and g + 8 by turns, lower K first
        load(stream, t, fragments);
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
#pragma unroll
        for (int i = 0; i < M / 8; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float factor = x.factor(8 * i + lane_index() % 4 * 2 + c);
                sum[i][c] *= factor, sum[i][c + 2] *= factor;
            }
    }

    static constexpr int TOGETHER = 4;  // columns that `each` hands on

    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        each_by_fours(sum, columns, store);
    }

   private:
    template <typename Tiles>
    DEVICE static void load(const Tiles& stream, int t, uint32_t (&fragments)[2][4]) {
        const uint8_t* codes = stream.codes(t) + lane_index() * 16;
        if constexpr (W == Weight::row_e4m3) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const Words words = load_words(codes + b * (TILE_ROWS * MX_BLOCK));
#pragma unroll
                for (int i = 0; i < 4; i++) fragments[b][i] = words.v[i];
            }
        } else {  // a word has four codes of either block: their magnitudes in its lower and upper half, signs where they fit
            const uint32_t steps = stream.scale_words(t)[lane_index() / 4];
            const Words words = load_words(codes);
#pragma unroll
            for (int row = 0; row < 2; row++) {
                const MagnitudesE4m3 first(steps >> 16 * row & 0xff), second(row ? steps >> 24 : steps >> 8 & 0xff);
#pragma unroll
                for (int i = row; i < 4; i += 2) {
                    const uint32_t word = words.v[i];
                    uint32_t magnitudes;  // of all eight by one instruction, which the compiler would make two of
                    asm("and.b32 %0, %1, 0x77777777;" : "=r"(magnitudes) : "r"(word));
                    fragments[0][i] = __byte_perm(first.low, first.high, magnitudes) | (word & 0x80808080u);
                    fragments[1][i] = __byte_perm(second.low, second.high, magnitudes >> 16) | (word << 4 & 0x80808080u);
                }
            }
        }
    }
};
