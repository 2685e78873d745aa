// The decode kernels' products on gfx11: halves in WMMA, whose operands both halves of a wave must hold.
//
// Layout `preshuffle`: in a part of a tile (512 bytes), lanes 0-15 have the first 16 bytes of their row and lanes 16-31 the
// next 16. Each byte is loaded by one lane; before a product, the half of the wave that lacks the codes gets them from the other.
#pragma once
#include "decode_scaled_sums.h"

/// Four e4m3 codes as four halves. A half with the code's bits below its sign is the value times 2^-8 (biases 7 and 15); the
/// multiplication also keeps subnormals out of the matrix unit. NaN becomes 480: the packer moved NaN to the scale.
DEVICE void halves_from_e4m3(uint32_t codes, Half2& low, Half2& high) {
    const auto widened = [](uint32_t two) {  // codes in bytes 1 and 3, else zeros
        const uint32_t half = (two >> 1 & 0x3f803f80u) | (two & 0x80008000u);
        const Half2Vector scale = {256, 256};
        return bits<Half2>(bits<Half2Vector>(half) * scale);
    };
    low = widened(permute_bytes(0, codes, 0x010c000cu));  // 12: zero
    high = widened(permute_bytes(0, codes, 0x030c020cu));
}

/// What the lane 16 further on, or back, has.
DEVICE Words swapped(const Words& own) {
    Words other;
#pragma unroll
    for (int i = 0; i < 4; i++) other.v[i] = __builtin_amdgcn_permlanex16(own.v[i], own.v[i], 0x76543210, 0xfedcba98, false, false);
    return other;
}

/// What lanes of that side had, in all lanes.
DEVICE Words chosen(const Words& own, const Words& other, int side) {
    Words words;
#pragma unroll
    for (int i = 0; i < 4; i++) words.v[i] = lane_group() == side ? own.v[i] : other.v[i];
    return words;
}

template <Weight W, Act A, int M>
struct Totals<W, A, M, false> : ScaledSums<W, A, M> {
    using X = Activations<W, A, M>;

    /// Adds a tile; `block` is its first MX block in the block's activations.
    DEVICE void add(const Stream<W, M>&, const LaneTile<W>& tile, const X& x, int block) {
        this->tile_scales(tile.scales[0]);
        if constexpr (W == Weight::e2m1) {
#pragma unroll
            for (int p = 0; p < 2; p++) {  // lanes 0-15: block 2 p, lanes 16-31: block 2 p + 1
                const Words other = swapped(tile.codes[p]);
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const Words codes = chosen(tile.codes[p], other, side);
                    Packed<8> steps[2];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        Half2 h[4];
                        halves_from_e2m1(codes.v[j], h);
#pragma unroll
                        for (int i = 0; i < 4; i++) steps[j / 2].v[j % 2 * 4 + i] = h[i];
                    }
                    multiply_block(steps, scale_of_byte(tile.scales[0], 2 * p + side), x, block + 2 * p + side);
                }
            }
        } else {
#pragma unroll
            for (int b = 0; b < Tile<W>::BLOCKS; b++) {  // lanes 0-15: k = 0-15 of block b, lanes 16-31: 16-31
                const Words other = swapped(tile.codes[b]);
                Packed<8> steps[2];
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    const Words codes = chosen(tile.codes[b], other, side);
#pragma unroll
                    for (int j = 0; j < 4; j++) halves_from_e4m3(codes.v[j], steps[side].v[2 * j], steps[side].v[2 * j + 1]);
                }
                multiply_block(steps, scale_of_byte(tile.scales[0], b), x, block + b);
            }
        }
    }

   private:
    DEVICE void multiply_block(const Packed<8> (&w)[2], float scale, const X& x, int block) {
#pragma unroll
        for (int set = 0; set < X::SETS; set++) {
            Accumulator part = {};
#pragma unroll
            for (int step = 0; step < 2; step++) {
                const uint8_t* from = x.values_of[set] + block * 64 + 32 * step;
                const Words low = load_words(from), high = load_words(from + 16);
                part = matrix_half({low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}, w[step], part);
            }
            this->add_block(set, part, scale, x, block);
        }
    }
};
