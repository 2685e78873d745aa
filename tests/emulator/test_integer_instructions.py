"""Integer, bit and lane-moving vector instructions, one at a time against numpy (names: wave_data.py)."""

import numpy as np
import pytest
from wave_data import ARCHES, SAME, SCALARS, U32, U64, cases, evaluate, expand, integers, is_gfx9, kind, same, text_of


def low(w):
    return w.u16


def high(w):
    return w.words.view(np.uint16)[:, 1]


def clz(x, bits=32):
    return np.array([bits - int(v).bit_length() if v else 0xFFFFFFFF for v in x], U32)


def ctz(x):
    return np.array([(int(v) & -int(v)).bit_length() - 1 if v else 0xFFFFFFFF for v in x], U32)


def popcount(x):
    return np.array([int(v).bit_count() for v in x], U32)


def bitrev(x):
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], U32)


def field(x, offset, width):
    return (x >> (offset & 31)) & ((U64(1) << (width & 31).astype(U64)) - U64(1)).astype(U32)


def signed_field(x, offset, width):
    w = (width & 31).astype(np.int64)
    raw = field(x, offset, width).astype(np.int64)
    return np.where((w > 0) & (raw >> np.maximum(w - 1, 0) & 1 == 1), raw - (1 << w), raw).astype(np.int32).view(U32)


def perm(a, b, c):
    both = (a.astype(U64) << U64(32)) | b
    out = np.zeros_like(a)
    for k in range(4):
        s = c >> 8 * k & 255
        byte = (both >> (8 * np.minimum(s, 7)).astype(U64)).astype(U32) & 255
        word = np.clip(s.astype(int) - 8, 0, 3)
        sign = ((both >> (16 * word + 15).astype(U64)).astype(U32) & 1) * 255
        byte = np.where(s < 8, byte, np.where(s < 12, sign, np.where(s == 12, 0, 255)))
        out |= byte.astype(U32) << 8 * k
    return out


def sext24(x):
    return (x << 8).view(np.int32) >> 8


def saturated(a, b, dtype, sign):
    """Sum or difference of 16-bit halves, clamped to their range."""
    x, y = (w.words.view(dtype)[:, :2].astype(int) for w in (a, b))
    limits = np.iinfo(dtype)
    return np.clip(x + sign * y, limits.min, limits.max).astype(dtype).view(U32)[:, 0]


def lanes(w):
    return np.arange(len(w.words), dtype=U32)


def mbcnt(mask, lane, first):
    below = [(1 << max(0, min(32, int(n) - first))) - 1 for n in lane]
    return popcount(mask & np.array(below, U32))


INTEGER = [
    ("v_mov_b32 D, A", SAME, "u32", lambda a, b, c, d: a.u32),
    ("v_mov_b32 D, -7", SAME, "i32", lambda a, b, c, d: np.full_like(a.i32, -7)),
    ("v_mov_b32 D, 0x12345678", SAME, "u32", lambda a, b, c, d: np.full_like(a.u32, 0x12345678)),
    ("v_mov_b64 DD, AA", None, "u64", lambda a, b, c, d: a.u64),
    ("v_add_u32 D, A, B", "v_add_nc_u32 D, A, B", "u32", lambda a, b, c, d: a.u32 + b.u32),
    ("v_sub_u32 D, A, B", "v_sub_nc_u32 D, A, B", "u32", lambda a, b, c, d: a.u32 - b.u32),
    ("v_subrev_u32 D, A, B", "v_subrev_nc_u32 D, A, B", "u32", lambda a, b, c, d: b.u32 - a.u32),
    ("v_add_u32_e64 D, A, B clamp", "v_add_nc_u32_e64 D, A, B clamp", "u32",
     lambda a, b, c, d: np.minimum(a.u32.astype(U64) + b.u32, 0xFFFFFFFF).astype(U32)),
    ("v_sub_u32_e64 D, A, B clamp", "v_sub_nc_u32_e64 D, A, B clamp", "u32",
     lambda a, b, c, d: np.where(a.u32 > b.u32, a.u32 - b.u32, 0)),
    ("v_add_i32 D, A, B clamp", "v_add_nc_i32 D, A, B clamp", "i32",
     lambda a, b, c, d: np.clip(a.i32.astype(np.int64) + b.i32, -(1 << 31), (1 << 31) - 1).astype(np.int32)),
    ("v_add3_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: a.u32 + b.u32 + c.u32),
    ("v_lshl_add_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 << (b.u32 & 31)) + c.u32),
    ("v_add_lshl_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 + b.u32) << (c.u32 & 31)),
    ("v_lshl_or_b32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 << (b.u32 & 31)) | c.u32),
    ("v_and_or_b32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 & b.u32) | c.u32),
    ("v_or3_b32 D, A, B, C", SAME, "u32", lambda a, b, c, d: a.u32 | b.u32 | c.u32),
    (None, "v_xor3_b32 D, A, B, C", "u32", lambda a, b, c, d: a.u32 ^ b.u32 ^ c.u32),
    ("v_xad_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 ^ b.u32) + c.u32),
    ("v_mul_lo_u32 D, A, B", SAME, "u32", lambda a, b, c, d: a.u32 * b.u32),
    ("v_mul_hi_u32 D, A, B", SAME, "u32", lambda a, b, c, d: (a.u32.astype(U64) * b.u32 >> U64(32)).astype(U32)),
    ("v_mul_hi_i32 D, A, B", SAME, "i32", lambda a, b, c, d: (a.i32.astype(np.int64) * b.i32 >> 32).astype(np.int32)),
    ("v_mul_u32_u24 D, A, B", SAME, "u32", lambda a, b, c, d: (a.u32 & 0xFFFFFF) * (b.u32 & 0xFFFFFF)),
    ("v_mul_i32_i24 D, A, B", SAME, "i32", lambda a, b, c, d: sext24(a.u32) * sext24(b.u32)),
    ("v_mad_u32_u24 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 & 0xFFFFFF) * (b.u32 & 0xFFFFFF) + c.u32),
    ("v_mad_i32_i24 D, A, B, C", SAME, "i32", lambda a, b, c, d: sext24(a.u32) * sext24(b.u32) + c.i32),
    ("v_mad_u64_u32 DD, vcc, A, B, CC", "v_mad_u64_u32 DD, null, A, B, CC", "u64",
     lambda a, b, c, d: a.u32.astype(U64) * b.u32 + c.u64),
    ("v_mad_i64_i32 DD, vcc, A, B, CC", "v_mad_i64_i32 DD, null, A, B, CC", "i64",
     lambda a, b, c, d: a.i32.astype(np.int64) * b.i32 + c.i64),
    ("v_lshl_add_u64 DD, AA, 3, CC", None, "u64", lambda a, b, c, d: (a.u64 << U64(3)) + c.u64),
    ("v_min_u32 D, A, B", SAME, "u32", lambda a, b, c, d: np.minimum(a.u32, b.u32)),
    ("v_max_i32 D, A, B", SAME, "i32", lambda a, b, c, d: np.maximum(a.i32, b.i32)),
    ("v_min3_i32 D, A, B, C", SAME, "i32", lambda a, b, c, d: np.minimum(np.minimum(a.i32, b.i32), c.i32)),
    ("v_max3_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: np.maximum(np.maximum(a.u32, b.u32), c.u32)),
    ("v_med3_i32 D, A, B, C", SAME, "i32", lambda a, b, c, d: np.sort(np.stack([a.i32, b.i32, c.i32]), 0)[1]),
    ("v_med3_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: np.sort(np.stack([a.u32, b.u32, c.u32]), 0)[1]),
    ("v_sad_u32 D, A, B, C", SAME, "u32",
     lambda a, b, c, d: np.maximum(a.u32, b.u32) - np.minimum(a.u32, b.u32) + c.u32),
    ("v_and_b32 D, A, B", SAME, "u32", lambda a, b, c, d: a.u32 & b.u32),
    ("v_or_b32 D, 15, B", SAME, "u32", lambda a, b, c, d: b.u32 | 15),
    ("v_xor_b32 D, P, B", SAME, "u32", lambda a, b, c, d: b.u32 ^ SCALARS["P"][0]),
    ("v_xnor_b32 D, A, B", SAME, "u32", lambda a, b, c, d: ~(a.u32 ^ b.u32)),
    ("v_not_b32 D, A", SAME, "u32", lambda a, b, c, d: ~a.u32),
    ("v_lshlrev_b32 D, A, B", SAME, "u32", lambda a, b, c, d: b.u32 << (a.u32 & 31)),
    ("v_lshrrev_b32 D, A, B", SAME, "u32", lambda a, b, c, d: b.u32 >> (a.u32 & 31)),
    ("v_ashrrev_i32 D, A, B", SAME, "i32", lambda a, b, c, d: b.i32 >> (a.i32 & 31)),
    ("v_lshlrev_b64 DD, A, BB", SAME, "u64", lambda a, b, c, d: b.u64 << (a.u64 & U64(63))),
    ("v_lshrrev_b64 DD, A, BB", SAME, "u64", lambda a, b, c, d: b.u64 >> (a.u64 & U64(63))),
    ("v_ashrrev_i64 DD, A, BB", SAME, "i64", lambda a, b, c, d: b.i64 >> (a.i64 & 63)),
    ("v_bfe_u32 D, A, B, C", SAME, "u32", lambda a, b, c, d: field(a.u32, b.u32, c.u32)),
    ("v_bfe_i32 D, A, B, C", SAME, "u32", lambda a, b, c, d: signed_field(a.u32, b.u32, c.u32)),
    ("v_bfi_b32 D, A, B, C", SAME, "u32", lambda a, b, c, d: (a.u32 & b.u32) | (~a.u32 & c.u32)),
    ("v_bfm_b32 D, A, B", SAME, "u32",
     lambda a, b, c, d: (((U64(1) << (a.u64 & U64(31))) - U64(1)).astype(U32)) << (b.u32 & 31)),
    ("v_bfrev_b32 D, A", SAME, "u32", lambda a, b, c, d: bitrev(a.u32)),
    ("v_ffbh_u32 D, A", "v_clz_i32_u32 D, A", "u32", lambda a, b, c, d: clz(a.u32)),
    ("v_ffbl_b32 D, A", "v_ctz_i32_b32 D, A", "u32", lambda a, b, c, d: ctz(a.u32)),
    ("v_bcnt_u32_b32 D, A, B", SAME, "u32", lambda a, b, c, d: popcount(a.u32) + b.u32),
    ("v_mbcnt_lo_u32_b32 D, A, B", SAME, "u32", lambda a, b, c, d: mbcnt(a.u32, lanes(a), 0) + b.u32),
    ("v_mbcnt_hi_u32_b32 D, A, B", SAME, "u32", lambda a, b, c, d: mbcnt(a.u32, lanes(a), 32) + b.u32),
    ("v_alignbit_b32 D, A, B, C", SAME, "u32",
     lambda a, b, c, d: (((a.u32.astype(U64) << U64(32)) | b.u32) >> (c.u64 & U64(31))).astype(U32)),
    ("v_alignbyte_b32 D, A, B, C", SAME, "u32",
     lambda a, b, c, d: (((a.u32.astype(U64) << U64(32)) | b.u32) >> (U64(8) * (c.u64 & U64(3)))).astype(U32)),
    ("s_mov_b32 s36, 0x0c0d0704; v_perm_b32 D, A, B, s36", SAME, "u32",
     lambda a, b, c, d: perm(a.u32, b.u32, np.full_like(c.u32, 0x0C0D0704))),
    ("s_mov_b32 s36, 0x08020905; v_perm_b32 D, A, B, s36", SAME, "u32",
     lambda a, b, c, d: perm(a.u32, b.u32, np.full_like(c.u32, 0x08020905))),
    ("v_bitop3_b32 D, A, B, C bitop3:0x96", None, "u32", lambda a, b, c, d: a.u32 ^ b.u32 ^ c.u32),
    ("v_bitop3_b32 D, A, B, C bitop3:0xd8", None, "u32", lambda a, b, c, d: (a.u32 & ~c.u32) | (b.u32 & c.u32)),
    ("v_cndmask_b32 D, A, B, PP", "v_cndmask_b32 D, A, B, P", "u32",
     lambda a, b, c, d: np.where(SCALARS["P"].view(U64)[0] >> lanes(a).astype(U64) & U64(1), b.u32, a.u32)),
    ("v_cvt_f32_ubyte2 D, A", SAME, "f32", lambda a, b, c, d: (a.u32 >> 16 & 255).astype(np.float32)),
    ("v_cvt_f32_i32 D, A", SAME, "f32", lambda a, b, c, d: a.i32.astype(np.float32)),
    ("v_cvt_f32_u32 D, A", SAME, "f32", lambda a, b, c, d: a.u32.astype(np.float32)),
    ("v_cvt_f64_i32 DD, A", SAME, "f64", lambda a, b, c, d: a.i32.astype(np.float64)),
    ("v_cvt_f64_u32 DD, A", SAME, "f64", lambda a, b, c, d: a.u32.astype(np.float64)),
    ("v_readfirstlane_b32 S, A; v_mov_b32 D, S", SAME, "u32", lambda a, b, c, d: np.full_like(a.u32, a.u32[0])),
    ("v_readlane_b32 S, A, 5; v_mov_b32 D, S", SAME, "u32", lambda a, b, c, d: np.full_like(a.u32, a.u32[5])),
    ("v_writelane_b32 D, P, 9", SAME, "u32", lambda a, b, c, d: np.where(lanes(a) == 9, SCALARS["P"][0], d.u32)),
    ("v_swap_b32 D, A", SAME, "u32", lambda a, b, c, d: a.u32),
    ("v_accvgpr_write_b32 a3, A; s_nop 3; v_accvgpr_read_b32 D, a3", None, "u32", lambda a, b, c, d: a.u32),
    ("v_permlane32_swap_b32 D, A", None, "u32", lambda a, b, c, d: np.concatenate([d.u32[:32], a.u32[:32]])),
    ("v_permlane16_swap_b32 D, A", None, "u32",
     lambda a, b, c, d: np.stack([d.u32.reshape(2, 2, 16)[:, 0], a.u32.reshape(2, 2, 16)[:, 0]], 1).ravel()),
    (None, "v_permlanex16_b32 D, A, 0, 0", "u32", lambda a, b, c, d: np.repeat(a.u32.reshape(2, 16)[::-1, 0], 16)),
    (None, "v_permlane16_b32 D, A, -1, -1", "u32", lambda a, b, c, d: np.repeat(a.u32.reshape(2, 16)[:, 15], 16)),
    # 16 bits: gfx9 clears the upper half of the result unless told otherwise, gfx11 keeps it
    ("v_add_u16 D, A, B", None, "u32", lambda a, b, c, d: (low(a) + low(b)).astype(U32)),
    ("v_mul_lo_u16 D, A, B", None, "u32", lambda a, b, c, d: (low(a) * low(b)).astype(U32)),
    ("v_mad_legacy_u16 D, A, B, C", None, "u32", lambda a, b, c, d: (low(a) * low(b) + low(c)).astype(U32)),
    ("v_mad_u16 D, A, B, C", None, "u32",
     lambda a, b, c, d: (low(a) * low(b) + low(c)).astype(U32) | (high(d).astype(U32) << 16)),
    ("v_mad_u16 D, A, B, C op_sel:[1,0,0,1]", None, "u32",
     lambda a, b, c, d: ((high(a) * low(b) + low(c)).astype(U32) << 16) | low(d)),
    ("v_lshlrev_b16 D, A, B", None, "u32", lambda a, b, c, d: (low(b) << (low(a) & 15)).astype(U32)),
    ("v_ashrrev_i16 D, A, B", None, "u32",
     lambda a, b, c, d: (low(b).view(np.int16) >> (low(a) & 15).view(np.int16)).view(np.uint16).astype(U32)),
    ("v_max_i16 D, A, B", None, "u32",
     lambda a, b, c, d: np.maximum(low(a).view(np.int16), low(b).view(np.int16)).view(np.uint16).astype(U32)),
    ("v_min_u16 D, A, B", None, "u32", lambda a, b, c, d: np.minimum(low(a), low(b)).astype(U32)),
    (None, "v_add_nc_u16 D.l, A.h, B.l", "u32",
     lambda a, b, c, d: (high(a) + low(b)).astype(U32) | (high(d).astype(U32) << 16)),
    (None, "v_mov_b16 D.h, A.l", "u32", lambda a, b, c, d: (low(a).astype(U32) << 16) | low(d)),
    (None, "v_and_b16 D.h, A.h, B.l", "u32", lambda a, b, c, d: ((high(a) & low(b)).astype(U32) << 16) | low(d)),
    (None, "v_pack_b32_f16 D, A.l, B.h", "u32", lambda a, b, c, d: low(a).astype(U32) | (high(b).astype(U32) << 16)),
    ("v_pk_add_u16 D, A, B", SAME, "u32",
     lambda a, b, c, d: (a.words.view(np.uint16)[:, :2] + b.words.view(np.uint16)[:, :2]).view(U32)[:, 0]),
    ("v_pk_mul_lo_u16 D, A, B op_sel:[1,0] op_sel_hi:[0,1]", SAME, "u32",
     lambda a, b, c, d: (high(a) * low(b)).astype(U32) | ((low(a) * high(b)).astype(U32) << 16)),
    # An inline fp constant is an fp32 number here: its upper half is what op_sel takes of it.
    ("v_pk_mul_lo_u16 D, A, 0.5 op_sel:[0,1]", SAME, "u32",
     lambda a, b, c, d: (low(a) * np.uint16(0x3F00)).astype(U32) | ((high(a) * np.uint16(0x3F00)).astype(U32) << 16)),
    ("v_pk_lshlrev_b16 D, 4, A op_sel_hi:[0,1]", SAME, "u32",
     lambda a, b, c, d: (low(a) << 4).astype(U32) | ((high(a) << 4).astype(U32) << 16)),
    ("v_pk_add_u16 D, A, B clamp", SAME, "u32", lambda a, b, c, d: saturated(a, b, np.uint16, 1)),
    ("v_pk_sub_i16 D, A, B clamp", SAME, "u32", lambda a, b, c, d: saturated(a, b, np.int16, -1)),
    ("v_sub_u16 D, A, B clamp", None, "u32", lambda a, b, c, d: saturated(a, b, np.uint16, -1) & 0xFFFF),
    ("v_cvt_pk_u16_u32 D, A, B", SAME, "u32",
     lambda a, b, c, d: np.minimum(a.u32, 0xFFFF) | np.minimum(b.u32, 0xFFFF) << 16),
    ("v_cvt_pk_i16_i32 D, A, B", SAME, "u32",
     lambda a, b, c, d: np.clip(a.i32, -32768, 32767).astype(U32) & 0xFFFF
     | np.clip(b.i32, -32768, 32767).astype(U32) << 16),
    (None, "v_mov_b32 v20, A; v_swap_b16 D.h, v20.l", "u32", lambda a, b, c, d: low(d) | low(a).astype(U32) << 16),
    (None, "v_mov_b32 v20, A; v_swap_b16 v20.h, D.l; v_mov_b32 D, v20", "u32",
     lambda a, b, c, d: low(a) | low(d).astype(U32) << 16),
    # SDWA
    ("v_add_u32_sdwa D, A, B dst_sel:DWORD src0_sel:BYTE_1 src1_sel:WORD_1", None, "u32",
     lambda a, b, c, d: (a.u32 >> 8 & 255) + (b.u32 >> 16)),
    ("v_add_u32_sdwa D, sext(A), B dst_sel:DWORD src0_sel:BYTE_3 src1_sel:DWORD", None, "u32",
     lambda a, b, c, d: (a.i32 >> 24).view(U32) + b.u32),
    ("v_or_b32_sdwa D, A, B dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0 src1_sel:WORD_1", None, "u32",
     lambda a, b, c, d: (low(a) | high(b)).astype(U32) << 16 | low(d)),
    ("v_or_b32_sdwa D, A, B dst_sel:BYTE_2 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:BYTE_0", None, "u32",
     lambda a, b, c, d: ((a.u32 | b.u32) & 255) << 16),
    # DPP
    ("v_mov_b32_dpp D, A quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", SAME, "u32",
     lambda a, b, c, d: a.u32[lanes(a) ^ 1]),
    ("v_mov_b32_dpp D, A row_ror:3 row_mask:0xf bank_mask:0xf", SAME, "u32",
     lambda a, b, c, d: a.u32[(lanes(a) | 15) - 15 + ((lanes(a) - 3) & 15)]),
    ("v_mov_b32_dpp D, A row_shl:1 row_mask:0xf bank_mask:0xf", SAME, "u32",
     lambda a, b, c, d: np.where((lanes(a) & 15) == 15, d.u32, np.roll(a.u32, -1))),
    ("v_mov_b32_dpp D, A row_shr:4 row_mask:0x3 bank_mask:0xf bound_ctrl:1", SAME, "u32",
     lambda a, b, c, d: np.where(lanes(a) >= 32, d.u32, np.where((lanes(a) & 15) < 4, 0, np.roll(a.u32, 4)))),
    ("v_mov_b32_dpp D, A row_mirror row_mask:0xf bank_mask:0x5", SAME, "u32",
     lambda a, b, c, d: np.where(lanes(a) & 4, d.u32, a.u32[lanes(a) ^ 15])),
    ("v_mov_b32_dpp D, A row_half_mirror row_mask:0xf bank_mask:0xf", SAME, "u32",
     lambda a, b, c, d: a.u32[lanes(a) ^ 7]),
    ("v_mov_b32_dpp D, A row_bcast:15 row_mask:0xa bank_mask:0xf", None, "u32",
     lambda a, b, c, d: np.where(lanes(a) & 16, a.u32[(lanes(a) & 32) + 15], d.u32)),
    ("v_mov_b32_dpp D, A row_bcast:31 row_mask:0xc bank_mask:0xf", None, "u32",
     lambda a, b, c, d: np.where(lanes(a) & 32, a.u32[31], d.u32)),
    ("v_mov_b32_dpp D, A row_newbcast:6 row_mask:0xf bank_mask:0xf", None, "u32",
     lambda a, b, c, d: a.u32[(lanes(a) | 15) - 9]),
    (None, "v_mov_b32_dpp D, A row_xmask:5 row_mask:0xf bank_mask:0xf", "u32", lambda a, b, c, d: a.u32[lanes(a) ^ 5]),
    (None, "v_mov_b32_dpp D, A dpp8:[7,6,5,4,3,2,1,0]", "u32", lambda a, b, c, d: a.u32[lanes(a) ^ 7]),
    # VOPD: both halves read before either writes
    (None, "v_dual_mov_b32 D, v1 :: v_dual_add_nc_u32 v13, A, D", "u32", lambda a, b, c, d: a.words[:, 1]),
    (None, "v_dual_mov_b32 v13, D :: v_dual_add_nc_u32 D, v1, D", "u32", lambda a, b, c, d: a.words[:, 1] + d.u32),
]  # fmt: skip
CARRY = [
    ("v_add_co_u32 D, vcc, A, B", "v_add_co_u32 D, vcc_lo, A, B", lambda a, b: a.u32.astype(U64) + b.u32 >> U64(32)),
    ("v_sub_co_u32 D, vcc, A, B", "v_sub_co_u32 D, vcc_lo, A, B", lambda a, b: b.u32 > a.u32),
    ("v_subrev_co_u32 D, vcc, A, B", "v_subrev_co_u32 D, vcc_lo, A, B", lambda a, b: a.u32 > b.u32),
]


@pytest.mark.parametrize("arch", ARCHES)
def test_integer(arch):
    rows = cases(INTEGER, arch)
    inputs, results = evaluate(arch, integers, [text_of(r, arch) for r in rows])
    for row, wave in zip(rows, results, strict=True):
        assert same(wave.view(kind(row[2])), row[3](*inputs)), text_of(row, arch)


@pytest.mark.parametrize("arch", ARCHES)
def test_carry(arch):
    column = 0 if is_gfx9(arch) else 1
    vcc = "vcc" if is_gfx9(arch) else "vcc_lo"
    move = "s_mov_b64 SS, vcc" if is_gfx9(arch) else "s_mov_b32 S, vcc_lo"
    inputs, results = evaluate(arch, integers, [f"{r[column].replace(' D,', ' v20,')}; {move}" for r in CARRY])
    for (_, _, function), wave in zip(CARRY, results, strict=True):
        mask = int(wave.words[0, 0]) | int(wave.words[0, 1]) << 32
        assert np.array_equal(expand(mask, len(inputs[0].u32)), function(inputs[0], inputs[1]).astype(bool))
    add = "v_addc_co_u32" if is_gfx9(arch) else "v_add_co_ci_u32"
    chain = f"v_add_co_u32 D, {vcc}, A, B; {add} D, {vcc}, v1, v5, {vcc}"
    (a, b, _, _), (wave,) = evaluate(arch, integers, [chain])
    assert np.array_equal(wave.u32, (a.u64 + b.u64 >> U64(32)).astype(U32))
