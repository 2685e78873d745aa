// The decode kernels' products on gfx942: e4m3 with e4m3 in the fp8 matrix unit, all else as halves.
//
// Layouts `cdna3_e2m1` and `cdna3_e4m3`: lane l of a tile has, of row l % 16, eight codes of every MX block, k = 8 (l / 16)
// ... + 7, so that a block's products end up in one sum and its scale can be applied to that. e4m3 codes are FNUZ codes
// (MxTensor.to_fnuz).
#pragma once
#include "decode_scaled_sums.h"

template <Weight W, Act A, int M>
struct Totals<W, A, M, false> : ScaledSums<W, A, M> {
    using X = Activations<W, A, M>;

    /// Adds a tile; `block` is its first MX block in the block's activations.
    DEVICE void add(const Stream<W, M>&, const LaneTile<W>& tile, const X& x, int block) {
        this->tile_scales(tile.scales[0]);
#pragma unroll
        for (int set = 0; set < X::SETS; set++) {
            Words codes[2];  // of x, blocks 0 and 1, and 2 and 3
            if constexpr (X::CODES)
#pragma unroll
                for (int p = 0; p < 2; p++) codes[p] = load_words(x.values_of[set] + block * MX_BLOCK + 64 * p + 16 * lane_group());
#pragma unroll
            for (int b = 0; b < Tile<W>::BLOCKS; b++) {
                Accumulator part = {};
                if constexpr (X::CODES) {
                    const Words &v = codes[b / 2], &w = tile.codes[b / 2];
                    part = matrix_e4m3({v.v[b % 2 * 2], v.v[b % 2 * 2 + 1]}, {w.v[b % 2 * 2], w.v[b % 2 * 2 + 1]}, part);
                } else {
                    const Words v = load_words(x.values_of[set] + (block + b) * 64 + 16 * lane_group());
                    Half2 h[4];
                    halves(tile, b, h);
                    part = matrix_half({v.v[0], v.v[1]}, {h[0], h[1]}, part);
                    part = matrix_half({v.v[2], v.v[3]}, {h[2], h[3]}, part);
                }
                this->add_block(set, part, scale_of_byte(tile.scales[0], b), x, block + b);
            }
        }
    }

   private:
    DEVICE static void halves(const LaneTile<W>& tile, int b, Half2 (&h)[4]) {
        if constexpr (W == Weight::e2m1) {
            halves_from_e2m1(tile.codes[0].v[b], h);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t codes = tile.codes[b / 2].v[b % 2 * 2 + i];
                h[2 * i] = half2_from_floats(bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, false)));
                h[2 * i + 1] = half2_from_floats(bits<Float2>(__builtin_amdgcn_cvt_pk_f32_fp8(codes, true)));
            }
        }
    }
};
