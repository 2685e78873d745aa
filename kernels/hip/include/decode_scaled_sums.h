// Products of codes, with scales applied to the sums of an MX block, or of a group of int4: what gfx942 and gfx11 do, and
// gfx950 with int4.
#pragma once
#include "decode_amd.h"

/// Byte `i` of a word of e8m0 codes as a float; 255 becomes infinity (see `ScaledSums::tile_scales`).
DEVICE float scale_of_byte(uint32_t word, int i) {
    const uint32_t exponent = (i < 3 ? word << (23 - 8 * i) : word >> 1) & 0x7f800000u;
    return bits<float>(larger(exponent, 0x00400000u));
}

template <Weight W, Act A, int M>
struct ScaledSums {
    using X = Activations<W, A, M>;
    float sums[X::SETS][X::SUMS] = {};
    uint32_t nan = 0;  // nonzero once a scale was NaN

    /// To be called once a tile.
    DEVICE void tile_scales(uint32_t word) {
        nan |= (0xfefefefeu - word) & word & 0x80808080u;  // nonzero if a byte of ~word is zero
    }

    /// Adds the products of an MX block, or of a group, times its scale in this lane's row of weights and its factors in x.
    DEVICE void add_block(int set, const Accumulator& part, float scale, const X& x, int block) {
#pragma unroll
        for (int i = 0; i < X::SUMS; i++) {
            const float factor = X::FACTORS ? x.factors[set * x.set_stride + block / X::FACTOR_BLOCKS * X::SUMS + i] : 1.0f;
            sums[set][i] = __builtin_fmaf(part.v[i] * scale, factor, sums[set][i]);
        }
    }

    template <typename X>
    DEVICE void join(const X&) {}

    /// `store(column, sum)` for the rows of x that exist: this lane's row of weights times each.
    template <typename Store>
    DEVICE void each(int columns, Store store) const {
#pragma unroll
        for (int set = 0; set < X::SETS; set++)
#pragma unroll
            for (int i = 0; i < X::SUMS; i++) {
                const int column = 16 * set + sum_row(lane_group(), i);
                if (column < columns) store(column, nan ? bits<float>(0x7fc00000u) : sums[set][i]);
            }
    }
};
