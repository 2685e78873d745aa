/* Vector instructions: operands are gathered into rows of 64 lanes, one generated body computes the whole row, and the
 * result is merged under EXEC. A body never looks at EXEC, modifiers or register numbers. */
#include "formats.h"
#include "machine.h"

void expand_mask(u64 mask, u32 *lanes, u32 set) {
  for (u32 l = 0; l < LANES; l++) lanes[l] = (u32)(mask >> l & 1) * set;
}

static u64 pack_mask(const u32 *lanes) {
  u8 bytes[LANES];
  u64 mask = 0;
  for (u32 l = 0; l < LANES; l++) bytes[l] = lanes[l] != 0;
  for (u32 l = 0; l < LANES; l += 8) {
    u64 eight;
    memcpy(&eight, bytes + l, 8);
    mask |= (eight * 0x0102040810204080ull >> 56) << l; /* gathers the low bits of eight bytes */
  }
  return mask;
}

/* Lane that lane `l` reads under a DPP control, -1 if none. The numbers are those of the DPP_CTRL field; the two kinds
 * without one there have been given numbers above it by decode.py. */
enum { DPP_ROW_SHL = 0x100, DPP_ROW_SHR = 0x110, DPP_ROW_ROR = 0x120, DPP_WAVE_SHL = 0x130, DPP_WAVE_ROL = 0x134,
       DPP_WAVE_SHR = 0x138, DPP_WAVE_ROR = 0x13C, DPP_ROW_MIRROR = 0x140, DPP_ROW_HALF_MIRROR = 0x141,
       DPP_ROW_BCAST15 = 0x142, DPP_ROW_BCAST31 = 0x143, DPP_ROW_SHARE = 0x150, DPP_ROW_XMASK = 0x160, DPP8 = 1 << 24 };
static int dpp_source(const Instr *i, int l, int lanes) {
  u32 control = i->dpp_ctrl;
  int row = l & ~15, in_row = l & 15, n = control & 15;
  if (control & DPP8) return (l & ~7) | (control >> 3 * (l & 7) & 7);
  if (control < 0x100) return (l & ~3) | (control >> 2 * (l & 3) & 3); /* quad_perm */
  switch (control & ~15u) {
    case DPP_ROW_SHL: return in_row + n < 16 ? l + n : -1;
    case DPP_ROW_SHR: return in_row - n >= 0 ? l - n : -1;
    case DPP_ROW_ROR: return row + ((in_row - n) & 15);
    case DPP_ROW_SHARE: return row + n;
    case DPP_ROW_XMASK: return row + (in_row ^ n);
  }
  switch (control) {
    case DPP_WAVE_SHL: return l + 1 < lanes ? l + 1 : -1;
    case DPP_WAVE_ROL: return (l + 1) % lanes;
    case DPP_WAVE_SHR: return l - 1;
    case DPP_WAVE_ROR: return (l + lanes - 1) % lanes;
    case DPP_ROW_MIRROR: return row + 15 - in_row;
    case DPP_ROW_HALF_MIRROR: return (l & ~7) + 7 - (l & 7);
    case DPP_ROW_BCAST15: return row - 1;
    case DPP_ROW_BCAST31: return l < 32 ? -1 : 31;
  }
  return l;
}

/* Lanes whose result DPP suppresses are removed from `valid`. */
static void apply_dpp(const Wave *w, const Instr *i, const u32 *from, u32 *to, u32 rows, u64 *valid) {
  u64 readable = i->fetch_inactive ? all_lanes(w) : exec_mask(w);
  for (int l = 0; l < (int)w->lanes; l++) {
    int source = dpp_source(i, l, w->lanes);
    int present = source >= 0 && (readable >> source & 1);
    int enabled = (i->row_mask >> (l >> 4) & 1) && (i->bank_mask >> (l >> 2 & 3) & 1);
    if (!enabled || (!present && !i->bound_ctrl)) *valid &= ~(1ull << l);
    for (u32 r = 0; r < rows; r++) to[r * LANES + l] = present ? from[r * LANES + source] : 0;
  }
}

INLINE u32 select_part(u32 x, u32 select, u32 sign_extend) {
  u32 shift = select >= SELECT_WORD_0 ? 16 * (select - SELECT_WORD_0) : select ? 8 * (select - SELECT_BYTE_0) : 0;
  u32 bits = select >= SELECT_WORD_0 ? 16 : select ? 8 : 32;
  x = x >> shift << (32 - bits);
  return sign_extend ? (u32)((i32)x >> (32 - bits)) : x >> (32 - bits);
}

/* The operand as rows of lanes (two for 64-bit types), either in place or in `room`. */
const u32 *fetch(Wave *w, const Instr *i, const Operand *op, u32 *room, u64 *valid) {
  u32 rows = op->width == WIDTH_B64 ? 2 : 1;
  const u32 *row = room;
  switch (op->kind) {
    case KIND_VGPR: row = w->v[op->index]; break;
    case KIND_MASK: expand_mask(read_mask(w, op->index), room, 1); return room;
    case KIND_SGPR:
      for (u32 r = 0; r < rows; r++)
        for (u32 l = 0; l < LANES; l++) room[r * LANES + l] = w->s[op->index + r];
      break;
    default:
      for (u32 r = 0; r < rows; r++)
        for (u32 l = 0; l < LANES; l++) room[r * LANES + l] = (u32)(op->value >> 32 * r);
  }
  if (i->dpp && op == &i->src[0]) {
    u32 moved[2 * LANES];
    apply_dpp(w, i, row, moved, rows, valid);
    memcpy(room, moved, rows * LANES * 4);
    row = room;
  }
  if (!op->modified) return row;
  u32 sign = op->width == WIDTH_B16 ? 0x8000u : 0x80000000u, top = rows - 1;
  if (rows == 2) memmove(room, row, LANES * 4);
  for (u32 l = 0; l < LANES; l++) {
    u32 x = row[top * LANES + l];
    if (op->select) x = select_part(x, op->select, op->sign_extend);
    else if (op->sign_extend) x = op->width == WIDTH_B16 ? (u32)(i32)(i16)x : x;
    if (op->absolute) x &= ~sign;
    if (op->negate) x ^= sign;
    room[top * LANES + l] = x;
  }
  return room;
}

static const u32 *exec_lanes(Wave *w, u64 mask) {
  if (w->mask_key != mask) {
    expand_mask(mask, w->mask_lanes, 0xFFFFFFFFu);
    w->mask_key = mask;
  }
  return w->mask_lanes;
}

/* Writes row `values` to register `first` of dst for the given lanes, honouring which part dst selects. */
void write_rows(Wave *w, const Operand *dst, u32 first, const u32 *values, u64 lanes) {
  const u32 *on = exec_lanes(w, lanes);
  u32 *to = w->v[dst->index + first];
  if (!dst->select) {
    for (u32 l = 0; l < LANES; l++) to[l] = (values[l] & on[l]) | (to[l] & ~on[l]);
    return;
  }
  u32 shift = dst->select >= SELECT_WORD_0 ? 16 * (dst->select - SELECT_WORD_0) : 8 * (dst->select - SELECT_BYTE_0);
  u32 part = (dst->select >= SELECT_WORD_0 ? 0xFFFFu : 0xFFu) << shift;
  for (u32 l = 0; l < LANES; l++) {
    u32 rest = dst->preserve ? to[l] & ~part : 0, merged = rest | (values[l] << shift & part);
    to[l] = (merged & on[l]) | (to[l] & ~on[l]);
  }
}

/* Output modifiers of floating-point results: multiply by 2, 4 or 1/2, then clamp to [0, 1] (NaN to 0). */
INLINE f64 modify_result(const Instr *i, f64 x) {
  static const f64 SCALE[4] = {1, 2, 4, 0.5};
  x *= SCALE[i->omod & 3];
  return i->clamp ? (x > 0 ? (x < 1 ? x : 1) : 0) : x;
}

static void modify_rows(const Instr *i, u32 *d) {
  for (u32 l = 0; l < LANES; l++) {
    if (i->dst.width == WIDTH_B16) {
      d[l] = f32_to_f16((f32)modify_result(i, f16_to_f32(d[l] & 0xFFFF)));
    } else if (i->dst.width == WIDTH_B32) {
      d[l] = as_u32((f32)modify_result(i, as_f32(d[l])));
    } else {
      u64 bits = as_u64(modify_result(i, as_f64(join(d[l], d[l + LANES]))));
      d[l] = (u32)bits;
      d[l + LANES] = (u32)(bits >> 32);
    }
  }
}

static void compute(Wave *w, const Instr *i, u32 *d, u32 *carry, u64 *valid) {
  u32 room[SOURCES][2 * LANES];
  const u32 *s[SOURCES];
  for (u32 k = 0; k < SOURCES; k++)
    s[k] = i->src[k].kind == KIND_NONE ? NULL : fetch(w, i, &i->src[k], room[k], valid);
  SEMANTICS[i->op].body(d, carry, s, i, w);
}

static void write_result(Wave *w, const Instr *i, u32 *d, u64 lanes) {
  if (i->dst.kind == KIND_MASK || i->flag) { /* flag: v_cmpx, which also (on gfx11 only) sets EXEC */
    u64 mask = pack_mask(d) & lanes;
    if (i->dst.kind == KIND_MASK) write_mask(w, i->dst.index, mask);
    if (i->flag) write_mask(w, REG_EXEC, mask);
    return;
  }
  if (i->dst.kind != KIND_VGPR) return;
  if (i->omod || i->clamp) modify_rows(i, d);
  for (u32 r = 0; r <= (i->dst.width == WIDTH_B64); r++) write_rows(w, &i->dst, r, d + r * LANES, lanes);
}

void execute_vector(Wave *w, const Instr *i) {
  u64 valid = ~0ull, exec = exec_mask(w);
  u32 d[2 * LANES], carry[LANES];
  int plain = i->dst.kind == KIND_VGPR && !i->dst.select && !i->omod && !i->clamp && !i->dpp && !i->dual;
  if (plain && exec == all_lanes(w)) {
    compute(w, i, w->v[i->dst.index], carry, &valid); /* bodies read a lane before they write it */
  } else {
    compute(w, i, d, carry, &valid);
    if (i->dual) { /* VOPD: both halves read before either writes */
      const Instr *other = i + 1;
      u32 d_other[2 * LANES];
      compute(w, other, d_other, carry, &valid);
      write_result(w, other, d_other, exec);
      w->pc++;
    }
    write_result(w, i, d, exec & valid);
  }
  if (i->dst2.kind == KIND_MASK) write_mask(w, i->dst2.index, pack_mask(carry) & exec & valid);
}

/* VOP3P: the body runs once for the low and once for the high halves; op_sel and op_sel_hi say which half of each source
 * that is, neg_lo and neg_hi flip its sign. Halves are 16 bits of a register, or whole registers of a pair. */
void execute_packed(Wave *w, const Instr *i) {
  u32 room[SOURCES][2 * LANES], half_of[SOURCES][LANES], d[2][LANES];
  const u32 *s[SOURCES], *halves[SOURCES];
  u64 valid = ~0ull, exec = exec_mask(w);
  int wide = i->dst.width == WIDTH_B64;
  for (u32 k = 0; k < SOURCES; k++)
    s[k] = i->src[k].kind == KIND_NONE ? NULL : fetch(w, i, &i->src[k], room[k], &valid);
  for (u32 half = 0; half < 2; half++) {
    u32 select = half ? i->op_sel_hi : i->op_sel, negate = half ? i->neg_hi : i->neg_lo;
    for (u32 k = 0; k < SOURCES; k++) {
      halves[k] = s[k] ? half_of[k] : NULL;
      if (!s[k]) continue;
      u32 upper = select >> k & 1, flip = negate >> k & 1;
      for (u32 l = 0; l < LANES; l++)
        half_of[k][l] = wide ? s[k][upper * LANES + l] ^ flip << 31
                             : (s[k][l] >> 16 * upper & 0xFFFF) ^ flip << 15;
    }
    SEMANTICS[i->op].body(d[half], NULL, halves, i, w);
  }
  if (!wide)
    for (u32 l = 0; l < LANES; l++) d[0][l] = (d[0][l] & 0xFFFF) | d[1][l] << 16;
  write_rows(w, &i->dst, 0, d[0], exec);
  if (wide) write_rows(w, &i->dst, 1, d[1], exec);
}
