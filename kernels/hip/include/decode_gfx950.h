// The decode kernels' products on gfx950: the matrix unit takes e4m3 and e2m1 as they are, with their scales.
//
// Layouts: e2m1 `preshuffle`, in which lane l of a tile has 32 codes of row l % 16, MX block l / 16 of the tile: what the
// unit wants of it; e4m3 `mxfp8_lane`, likewise. Scales: `tile_scale`.
#pragma once
#include "decode_amd.h"

template <Weight W, Act A, int M>
struct Totals<W, A, M, false> {
    using X = Activations<W, A, M>;
    Accumulator sums[X::SETS] = {};

    /// Adds a tile; `block` is its first MX block in the block's activations.
    DEVICE void add(const Stream<W, M>&, const LaneTile<W>& tile, const X& x, int block) {
        if constexpr (A != Act::bf16)
            add_codes(tile, x, block);
        else if constexpr (W == Weight::e2m1)
            add_e2m1_bf16(tile, x, block);
        else
            add_e4m3_bf16(tile, x, block);
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
                if (column < columns) store(column, sums[set].v[i]);
            }
    }

   private:
    /// One instruction a tile and set.
    DEVICE void add_codes(const LaneTile<W>& tile, const X& x, int block) {
        constexpr MxElement WEIGHTS = W == Weight::e4m3 ? MxElement::e4m3 : MxElement::e2m1;
        constexpr MxElement ACTIVATIONS = X::FP8 ? MxElement::e4m3 : MxElement::e2m1;
        const Packed<8> w = operand(tile.codes[0], tile.codes[Tile<W>::PARTS - 1]);
#pragma unroll
        for (int set = 0; set < X::SETS; set++) {
            const uint8_t* from = x.values_of[set] + block * (MX_BLOCK * X::BITS / 8) + 16 * lane_group();
            const Words low = load_words(from);
            const Words high = X::FP8 ? load_words(from + 64) : low;
            const uint32_t scale = X::SCALES ? x.scales_of[set][block + lane_group()] : 127;
            sums[set] = matrix_mx<ACTIVATIONS, WEIGHTS>(operand(low, high), scale, w, tile.scales[0] >> 8 * lane_group(), sums[set]);
        }
    }

    /// The order of k within a tile is free as long as both operands agree: step j takes codes 8 j ... 8 j + 7 of each lane,
    /// all of its own block, whose scale the conversion applies. bf16 holds any e2m1 times any scale.
    DEVICE void add_e2m1_bf16(const LaneTile<W>& tile, const X& x, int block) {
        const float scale = scale_of(tile, lane_group());
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t codes = tile.codes[0].v[j];
            const Packed<4> w = {bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, 0)),
                                 bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, 1)),
                                 bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, 2)),
                                 bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp4(codes, scale, 3))};
#pragma unroll
            for (int set = 0; set < X::SETS; set++) add_bf16(set, w, x.values_of[set] + (block + lane_group()) * 64 + 16 * j);
        }
    }

    /// Likewise; a lane's two parts are of blocks lane / 32 and 2 + lane / 32.
    DEVICE void add_e4m3_bf16(const LaneTile<W>& tile, const X& x, int block) {
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const float scale = scale_of(tile, 2 * p + lane_group() / 2);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t first = tile.codes[p].v[2 * j], second = tile.codes[p].v[2 * j + 1];
                const Packed<4> w = {bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(first, scale, false)),
                                     bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(first, scale, true)),
                                     bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(second, scale, false)),
                                     bits<uint32_t>(__builtin_amdgcn_cvt_scalef32_pk_bf16_fp8(second, scale, true))};
#pragma unroll
                for (int set = 0; set < X::SETS; set++)
                    add_bf16(set, w, x.values_of[set] + block * 64 + 128 * p + 32 * lane_group() + 16 * j);
            }
        }
    }

    /// A block's scale as the conversions take it: they read the exponent alone.
    DEVICE static float scale_of(const LaneTile<W>& tile, int block) { return bits<float>((tile.scales[0] >> 8 * block & 255) << 23); }

    DEVICE void add_bf16(int set, Packed<4> w, const uint8_t* from) {
        sums[set] = matrix_bf16(bits<Packed<4>>(load_words(from)), w, sums[set]);
    }

    DEVICE static Packed<8> operand(const Words& low, const Words& high) {
        return {low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]};
    }
};
