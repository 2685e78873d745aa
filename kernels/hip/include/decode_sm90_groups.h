// Many rows of x and int4 weights, by wgmma.
//
// As with other weights, four waves multiply together and weights are the operand in registers; here as codes less their zero points,
// which bf16 and halves hold exactly. Scales are floats and would not be: the matrix unit adds up a group's products by themselves, and
// its sum is scaled as it is added to others.
#pragma once

/// x is bf16 or fp16 as it came; sums of the groups of short tiles want to know where K ends.
template <Weight W, Act A, int M>
struct Activations<W, A, M, Way::GROUPS> : Activations<W, A, M, Way::MANY> {
    int blocks;  // MX blocks from the block's first to the end of K

    DEVICE Activations(const DecodeArgs& a, const Share& s, uint8_t* lds)
        : Activations<W, A, M, Way::MANY>(a, s, lds), blocks(a.k / MX_BLOCK - s.block_first * Tile<W>::BLOCKS) {}

    DEVICE int left(int block) const { return blocks - block; }
};

/// Eight codes of a group as q - z, in their order and exact: 0x4300 | q is 128 + q as a bf16.
struct Int4GroupBf16 {
    Bf16x2 offset;  // 128 + z, twice
    DEVICE explicit Int4GroupBf16(uint32_t word) : offset(two_halves(static_cast<uint16_t>((word & 15) | 0x4300))) {}
    DEVICE void pairs(uint32_t codes, Bf16x2* v) const {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = minus_bf16((codes >> 4 * i & 0x000f000fu) | 0x43004300u, offset);
    }
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
///
/// Decoded and multiplied together are 64 of K, which are two groups, one, or half of one, while what was begun before is multiplied.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::GROUPS> {
    static constexpr int GROUPS = group_of(W) < 64 ? 2 : 1, TURNS = Tile<W>::K / 64;  // groups in 64 of K; of those in a tile
    static constexpr bool OVERLAP = GROUPS == 1 || M < 32;  // whether registers suffice to decode meanwhile

    float sum[M / 8][4], part[GROUPS][M / 8][4];  // part: of a group's products
    float scale[GROUPS][2];                       // of that group in rows g and g + 8
    bool begun = false;

    DEVICE Totals() {
#pragma unroll
        for (int i = 0; i < M / 2; i++) sum[i / 4][i % 4] = 0;
    }

    template <typename Tiles>
    DEVICE void look(const Tiles&, int) {}

    /// Starts adding tile `t` of what `stream` has at hand; `block` is its first MX block in the activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        uint32_t words[GROUPS][2];  // of rows g and g + 8
#pragma unroll
        for (int i = 0; i < GROUPS * 2; i++) words[i / 2][i % 2] = group_word(stream, t, i / 2, i % 2, x, block + i / 2);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            uint32_t fragments[4][4];  // for each step of 16 along K: rows g and g + 8 by turns, lower K first
            if (TURNS > 1 && begun) warpgroup_wait<1>();
            if (!OVERLAP && begun) keep();
            load(stream.codes(t) + turn * 512, words, fragments);
            if (turn == 0) {
                if (OVERLAP && begun) keep();
#pragma unroll
                for (int i = 0; i < GROUPS * 2; i++) scale[i / 2][i % 2] = Int4Group(words[i / 2][i % 2]).scale;
            }
            warpgroup_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) {
                const bool more = GROUPS == 2 ? step % 2 > 0 : turn + step > 0;
                if constexpr (A == Act::bf16)
                    warpgroup_matrix_bf16(fragments[step], x.at(block + 2 * turn, step), part[step / 2 % GROUPS], more);
                else
                    warpgroup_matrix_half(fragments[step], x.at(block + 2 * turn, step), part[step / 2 % GROUPS], more);
            }
            warpgroup_commit();
        }
        begun = true;
    }

    /// If none may be under way any more: waits, and keeps what was. `add` does for others.
    template <int Pending>
    DEVICE void settle(Number<Pending>) {
        if (Pending == 0) keep(), begun = false;
    }

    template <typename X>
    DEVICE void join(const X&) {}

    static constexpr int TOGETHER = 4;  // columns that `each` hands on

    template <typename Store>
    DEVICE void each(int columns, Store store) const {
        each_by_fours(sum, columns, store);
    }

   private:
    /// Waits for all products, and adds them up under their scales.
    DEVICE void keep() {
        warpgroup_wait<0>();
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int i = 0; i < M / 2; i++) {
                float& products = part[group][i / 4][i % 4];
                asm volatile("" : "+f"(products));  // not before the wait
                sum[i / 4][i % 4] = fmaf(products, scale[group][i % 4 / 2], sum[i / 4][i % 4]);
            }
    }

    /// The word of group `group` of tile `t` in row g or g + 8; it begins with MX block `block`.
    template <typename Tiles, typename Columns>
    DEVICE static uint32_t group_word(const Tiles& stream, int t, int group, int row, const Columns& x, int block) {
        const uint32_t word = stream.scale_words(t)[group * TILE_ROWS + 8 * row + lane_index() / 4];
        return Tile<W>::SHORT && group > 0 && x.left(block) <= 0 ? 0 : word;  // behind K there is whatever was there before
    }

    /// This lane's part of the left operand, of 64 of K.
    DEVICE static void load(const uint8_t* codes, const uint32_t (&words)[GROUPS][2], uint32_t (&fragments)[4][4]) {
        const Words eights = load_words(codes + lane_index() * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int b = i / 2, row = i % 2;
            uint32_t pairs[4];
            if constexpr (A == Act::bf16)
                Int4GroupBf16(words[b % GROUPS][row]).pairs(eights.v[i], pairs);
            else
                Int4Group(words[b % GROUPS][row]).halves(eights.v[i], pairs);
#pragma unroll
            for (int p = 0; p < 4; p++) fragments[2 * b + p / 2][row + p % 2 * 2] = pairs[p];
        }
    }
};
