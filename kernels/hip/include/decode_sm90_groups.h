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

/// (word & 0x000f000f) | 0x43004300. In one instruction, where a register is free: of two constants, ptxas would make two.
template <bool One>
DEVICE Bf16x2 bf16_from_nibbles(uint32_t word) {
    if (!One) return (word & 0x000f000fu) | 0x43004300u;
    Bf16x2 pair;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(pair) : "r"(word));
    return pair;
}

/// Eight codes of a group as q - z, in their order and exact: 0x4300 | q is 128 + q as a bf16.
struct Int4GroupBf16 {
    Bf16x2 offset;  // 128 + z, twice
    DEVICE explicit Int4GroupBf16(uint32_t word) : offset(two_halves(static_cast<uint16_t>((word & 15) | 0x4300))) {}
    template <bool One>
    DEVICE void pairs(uint32_t codes, Bf16x2* v) const {
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = minus_bf16(bf16_from_nibbles<One>(codes >> 4 * i), offset);
    }
};

/// What a wave sums up for one row tile: rows g and g + 8 (g = l / 4) times the columns 2 q and 2 q + 1 of every eight.
///
/// Decoded and multiplied together are 64 of K, which are two groups, one, or half of one. While they are multiplied, the next are
/// decoded: those of the next tile before a branch (`by_turns`), or ptxas would move that behind the wait for the products.
template <Weight W, Act A, int M>
struct Totals<W, A, M, Way::GROUPS> : WideSums<M> {
    using WideSums<M>::sum;
    static constexpr int GROUPS = group_of(W) < 64 ? 2 : 1, TURNS = Tile<W>::K / 64;  // groups in 64 of K; of those in a tile
    static constexpr bool AHEAD = WAITS<W, M> == Waits::AHEAD;  // whether registers suffice to decode meanwhile,
    static constexpr int PARTS = M * GROUPS > 64 ? 1 : GROUPS;    // and to multiply two groups at a time

    float part[PARTS][M / 8][4];  // part: of a group's products
    float scale[PARTS][2];                       // of that group in rows g and g + 8
    bool begun = false;
    uint32_t words[GROUPS][2], ahead[4][4];  // of the tile that is next: of groups; what is multiplied first, see `load`

    /// Decodes the first 64 of K of tile `t` of what `stream` has at hand, or of what lies behind the last.
    template <typename Tiles>
    DEVICE void look(const Tiles& stream, int t) {
        if (AHEAD) decode(stream, t);
    }

    template <typename Tiles>
    DEVICE void decode(const Tiles& stream, int t) {
#pragma unroll
        for (int i = 0; i < GROUPS * 2; i++)
            words[i / 2][i % 2] = stream.scale_words(t)[i / 2 * TILE_ROWS + 8 * (i % 2) + lane_index() / 4];
        load(stream.codes(t));
    }

    /// Starts adding tile `t`, which `look` has begun to decode, and looks at the next; `block` is its first MX block in the
    /// activations `x`.
    template <typename Tiles, typename Columns>
    DEVICE void add(const Tiles& stream, int t, const Columns& x, int block, Number<1>) {
        if (begun) keep();
        if (!AHEAD) decode(stream, t);
        const bool ended = Tile<W>::SHORT && x.left(block + 1) <= 0;  // K has: of the second group there is whatever was there before
#pragma unroll
        for (int p = 0; p < PARTS; p++) begin(p, p, ended);
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            warpgroup_fence();
#pragma unroll
            for (int step = 0; step < 4; step++) {
                if (PARTS < GROUPS && step == 2) warpgroup_commit(), keep(), begin(0, 1, ended), warpgroup_fence();
                const bool more = GROUPS == 2 ? step % 2 > 0 : turn + step > 0;
                if constexpr (A == Act::bf16)
                    warpgroup_matrix_bf16(ahead[step], x.at(block + 2 * turn, step), part[step / 2 % PARTS], more);
                else
                    warpgroup_matrix_half(ahead[step], x.at(block + 2 * turn, step), part[step / 2 % PARTS], more);
            }
            warpgroup_commit();
            if (turn + 1 < TURNS) {
                if (!AHEAD) warpgroup_wait<0>();
                load(stream.codes(t) + (turn + 1) * 512);
            } else {
                if (TURNS > 1) warpgroup_wait<1>();  // registers of the turn before are free again
                look(stream, t + 1);
            }
        }
        begun = AHEAD;
        if (!AHEAD) keep();
    }

    /// If none may be under way any more: waits, and keeps what was. `add` does for others.
    template <int Pending>
    DEVICE void settle(Number<Pending>) {
        if (Pending == 0 && AHEAD) keep(), begun = false;
    }

   private:
    /// Before products of group `group` of a tile: `part[p]` will have them.
    DEVICE void begin(int p, int group, bool ended) {
#pragma unroll
        for (int row = 0; row < 2; row++) scale[p][row] = group > 0 && ended ? 0 : Int4Group(words[group][row]).scale;
    }

    /// Waits for all products, and adds them up under their scales.
    DEVICE void keep() {
        warpgroup_wait<0>();
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
            for (int i = 0; i < M / 2; i++) {
                float& products = part[p][i / 4][i % 4];
                asm volatile("" : "+f"(products));  // not before the wait
                sum[i / 4][i % 4] = fmaf(products, scale[p][i % 4 / 2], sum[i / 4][i % 4]);
            }
    }

    /// This lane's part of 64 of K as the left operand: for each step of 16, rows g and g + 8 by turns, lower K first.
    DEVICE void load(const uint8_t* codes) {
        const Words eights = load_words(codes + lane_index() * 16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int b = i / 2, row = i % 2;
            uint32_t pairs[4];
            if constexpr (A == Act::bf16)
                Int4GroupBf16(words[b % GROUPS][row]).template pairs<AHEAD>(eights.v[i], pairs);
            else
                Int4Group(words[b % GROUPS][row]).halves(eights.v[i], pairs);
#pragma unroll
            for (int p = 0; p < 4; p++) {
                if (AHEAD) asm volatile("" : "+r"(pairs[p]));  // here, not where it is multiplied
                ahead[2 * b + p / 2][row + p % 2 * 2] = pairs[p];
            }
        }
    }
};
