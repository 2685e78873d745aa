// The decode kernels' target-specific half for sm_90: bulk copies into rings, tensor cores, clusters.
//
// Weights lie in tiles of 16 rows x 64 of K, in which lane l = 4 g + q finds what the matrix unit wants of it of rows g and
// g + 8 together. Rows of e4m3 under one power of two (layout `hopper_e4m3`, kernels/triton/hopper_pack.py, shared with the prefill
// kernels), e2m1 (`hopper_bf16`, likewise) and int4 (layout `mma_int4` + `tile_group`): k as in PTX's fragments. e4m3 (layout `mma_tile`,
// sglang_amd_quant/layouts/mma_tile.py): k = 8 q ... 8 q + 7 of every MX block; e2m1 that becomes e4m3 (`hopper_e4m3`): k = 16 q ... 16 q + 15,
// so that a lane has codes of one block; which k a step of the matrix unit calls its own does not matter as long as B agrees, so
// activations are held with that order in mind.
//
// Ways to multiply them: quantized activations by wgmma in e4m3 (decode_sm90_row_x.h, decode_sm90_rows.h); bf16 and fp16 ones, if few
// rows, by mma.sync (decode_sm90_few.h), from 16 on by wgmma (decode_sm90_many.h, of int4 decode_sm90_groups.h). For wgmma another
// launch may have prepared x (decode_sm90_prepared.h), and weights may all be there, and e4m3, before x is (`Stream`, `decode_early`).
// How sums of blocks that share K meet: decode_sm90_sums.h, decode_sm90_half_sums.h, decode_sm90_pair.h; what becomes of those that a wave has
// by itself: decode_sm90_own_rows.h.
#pragma once
#include "decode.h"
#include "matrix.h"
#include "hopper.h"
#include "int4.h"
#include "decode_sm90_stream.h"

/// A block's activations, and what a wave sums up; for few rows and for many.
enum class Way { FEW, MANY, GROUPS, ROWS };
constexpr DEVICE Way way_of(Weight w, int rows) {
    return is_row(w) ? Way::ROWS : rows < 16 ? Way::FEW : is_int4(w) ? Way::GROUPS : Way::MANY;
}
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Activations;
template <Weight W, Act A, int M, Way = way_of(W, M)>
struct Totals;

#include "decode_sm90_quantize.h"
#include "decode_sm90_few.h"
#include "decode_sm90_wide.h"
#include "decode_sm90_many.h"
#include "decode_sm90_groups.h"
#include "decode_sm90_row_x.h"
#include "decode_sm90_rows.h"
#include "decode_sm90_sums.h"
#include "decode_sm90_half_sums.h"

/// Whether weight row `row`, or beyond all one of the last tile, has a scale that is NaN. The factors of e2m1 know, so nobody asks; those of
/// int4 are NaN themselves.
template <Weight W>
DEVICE bool has_nan(const DecodeArgs& a, const Share& s, int expert, int row) {
    if constexpr (W != Weight::e4m3) return false;
    const int64_t row_tile = static_cast<int64_t>(expert) * s.row_tiles + smaller(row / TILE_ROWS, s.row_tiles - 1);
    const uint8_t* from = a.scales + row_tile * s.tiles * Tile<W>::SCALES + (row % 8 * 2 + row % TILE_ROWS / 8) * 2;
    for (int block = 0; block < a.k / MX_BLOCK; block++)
        if (from[block / 2 * Tile<W>::SCALES + block % 2] == 255) return true;
    return false;
}

/// Finished sums of a weight row. Kernels multiply by infinity where a scale is NaN, so that only sums that are not finite need to ask.
template <Weight W, Act A, int Columns>
DEVICE void finish(const DecodeArgs& a, const Share& s, int expert, int row, float (&sums)[Columns]) {
    bool finite = true;
#pragma unroll
    for (int c = 0; c < Columns; c++) finite &= __builtin_fabsf(sums[c]) < __builtin_inff();
    if (finite || !has_nan<W>(a, s, expert, row)) return;
#pragma unroll
    for (int c = 0; c < Columns; c++) sums[c] = bits<float>(0x7fc00000u);
}

#include "decode_sm90_own_rows.h"
#include "decode_sm90_pair.h"
#include "decode_sm90_prepared.h"

DEVICE const DecodeArgs& late(const DecodeArgs& a) { return a; }

DEVICE int share_rank(const DecodeArgs& a) { return a.split > 1 ? cluster_rank() : 0; }
