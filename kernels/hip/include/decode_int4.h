// The decode kernels' products of int4 on AMD: codes less zero points as halves, and a group's scale applied to its sum.
//
// Layouts: `cdna_int4` (gfx950, gfx942), in which lane l of a tile has, of row l % 16, eight codes of every 32-block, k = 8 (l / 16)
// ... + 7; `rdna_int4` (gfx11), in which it has a whole 32-block, the parts of a tile being as those of `preshuffle`. Scales:
// `tile_group`.
#pragma once
#include "decode_scaled_sums.h"
#include "int4.h"

template <Weight W, Act A, int M>
struct Totals<W, A, M, true> : ScaledSums<W, A, M> {
    using X = Activations<W, A, M>;

    /// Adds a tile; `block` is its first 32-block in the block's activations.
    DEVICE void add(const Stream<W, M>&, const LaneTile<W>& tile, const X& x, int block) {
        constexpr int BLOCKS = Tile<W>::BLOCKS / Tile<W>::WORDS;  // of a group
#pragma unroll
        for (int g = 0; g < Tile<W>::WORDS; g++) {
            const Int4Group group(tile.scales[g]);
            Accumulator parts[X::SETS] = {};
#pragma unroll
            for (int b = g * BLOCKS; b < (g + 1) * BLOCKS; b++) {
                const auto codes = codes_of(tile, b);
                Half2 h[4 * CODES];
#pragma unroll
                for (int i = 0; i < CODES; i++) group.halves(codes.v[i], h + 4 * i);
#pragma unroll
                for (int set = 0; set < X::SETS; set++) multiply(x.values_of[set] + (block + b) * 64, h, parts[set]);
            }
#pragma unroll
            for (int set = 0; set < X::SETS; set++) this->add_block(set, parts[set], group.scale, x, block);
            // Groups one after the other: mixed, those of 32 rows of x would take more registers than sixteen waves find.
            if constexpr (TARGET_GFX11 && X::SETS > 1) __builtin_amdgcn_sched_barrier(0);
        }
    }

   private:
    static constexpr int CODES = TARGET_GFX11 ? 4 : 1;                         // words of a 32-block that a lane multiplies
    static constexpr int OPERAND = TARGET_GFX11 ? 8 : TARGET_GFX950 ? 4 : 2;  // words that the matrix unit takes of it at a time

    /// Adds a 32-block's products; `from` is that block of this lane's row of x.
    DEVICE static void multiply(const uint8_t* from, const Half2 (&w)[4 * CODES], Accumulator& part) {
        uint32_t v[4 * CODES];
#pragma unroll
        for (int i = 0; i < CODES; i++) {
            const Words eight = load_words(from + 16 * (TARGET_GFX11 ? i : lane_group()));
#pragma unroll
            for (int j = 0; j < 4; j++) v[4 * i + j] = eight.v[j];
        }
#pragma unroll
        for (int first = 0; first < 4 * CODES; first += OPERAND) {
            Packed<OPERAND> of_x, of_w;
#pragma unroll
            for (int i = 0; i < OPERAND; i++) of_x.v[i] = v[first + i], of_w.v[i] = w[first + i];
            part = matrix_half(of_x, of_w, part);
        }
    }

    /// The codes of 32-block `b` that a lane multiplies.
    DEVICE static Packed<CODES> codes_of(const LaneTile<W>& tile, int b) {
#if TARGET_GFX11
        return bits<Packed<CODES>>(chosen(tile.codes[b / 2], swapped(tile.codes[b / 2]), b % 2));
#else
        return {tile.codes[0].v[b]};
#endif
    }
};
