// e2m1 codes as the matrix unit takes them: bf16 without their scales, or e4m3 with them.
#pragma once
#include "memory.h"

/// Eight e2m1 codes in the bit order of `hopper_bf16` as four pairs of bf16, times 2^-126. Of each 16 bits, the magnitude of the
/// first code is at bit 6, where a bf16 reads it so; of the others at 3, 0 and 10; the signs are at 15, 13, 9 and 14.
DEVICE void bf16_from_spread_e2m1(uint32_t word, Bf16x2 (&v)[4]) {
    v[0] = word & 0x81c081c0u;
    v[1] = (word << 3 & 0x01c001c0u) | (word << 2 & 0x80008000u);
    v[2] = word << 6 & 0x81c081c0u;
    v[3] = (word >> 4 & 0x01c001c0u) | (word << 1 & 0x80008000u);
}

/// A lane's part of a tile of e2m1 codes as the matrix unit's left operand: `each(step, part, bf16)` for every step of 16 along K
/// and its four words, rows g and g + 8 by turns, lower K first; bf16 are 2^-126 times the values.
template <typename Each>
DEVICE void each_e2m1_fragment(const uint8_t* codes, Each each) {
    const Words words = load_words(codes + lane_index() * 16);
#pragma unroll
    for (int part = 0; part < 4; part++) {  // a word has one part of all four steps, two of each MX block
        Bf16x2 steps[4];
        bf16_from_spread_e2m1(words.v[part], steps);
#pragma unroll
        for (int step = 0; step < 4; step++) each(step, part, steps[step]);
    }
}

/// Bytes of two words by the four nibbles in the lower half of `selector`, each below 8. As __byte_perm, which would make sure of that
/// by one more instruction.
DEVICE uint32_t look_up(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

/// A shift would do, but shares a unit with `look_up`; the multipliers are idle.
DEVICE uint32_t upper_half(uint32_t word) {
    uint32_t half;
    asm("dp2a.lo.u32.u32 %0, %1, 256, 0;" : "=r"(half) : "r"(word));
    return half;
}

/// e4m3 of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6, times 2^(step - 5), 0 <= step < 12.
struct MagnitudesE4m3 {
    uint32_t low, high;
    DEVICE explicit MagnitudesE4m3(uint32_t step) : low(step * 0x08080800u + 0x14100800u), high(step * 0x08080808u + 0x24201c18u) {}
};

/// The steps of this lane's block of a tile: of row g in the lower four bits of a byte, of row g + 8 in the upper.
DEVICE uint32_t steps_of_lane(const uint32_t* of_tile) { return reinterpret_cast<const uint8_t*>(of_tile)[lane_index() / 2]; }

/// A lane's part of a tile of e2m1 codes, which is of one MX block, as the matrix unit's left operand: of two steps, rows g and g + 8 by
/// turns, lower K first. A word has four codes of either step: their magnitudes in its lower and upper half, signs where they fit.
/// `steps`: as `steps_of_lane` gives them.
DEVICE void e4m3_from_e2m1(const Words& codes, uint32_t steps, uint32_t (&fragments)[2][4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const MagnitudesE4m3 table(row == 0 ? steps & 15 : steps >> 4);
#pragma unroll
        for (int i = row; i < 4; i += 2) {
            const uint32_t word = codes.v[i], magnitudes = word & 0x77777777u;
            fragments[0][i] = look_up(table.low, table.high, magnitudes) | (word & 0x80808080u);
            fragments[1][i] = look_up(table.low, table.high, upper_half(magnitudes)) | (word << 4 & 0x80808080u);
        }
    }
}
