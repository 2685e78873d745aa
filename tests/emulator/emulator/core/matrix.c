/* Matrix units: MFMA of CDNA3 and CDNA4, WMMA of RDNA3.
 *
 * D = A B + C, with A[i][k], B[k][j] and C[i][j], D[i][j]; 0 <= i, j < M.
 *
 * MFMA (wave64). An instruction holds `blocks` independent products. With G = 64 / (M blocks) groups of lanes along K,
 * lane l serves row i (of A; column j of B) = l mod M, block l / M mod blocks, and group g = l / (M blocks). It holds
 * E = K / G elements, packed in rising order into its registers, element e being
 *     k = g E + e                                          in general,
 *     k = 16 g + e mod 16 + 16 G (e / 16)                  for 8-bit elements with E = 32 (f8f6f4): two runs of 16,
 * which makes A and B of different element types meet at the same k.
 * D: lane l holds column j = l mod M; register r holds
 *     M = 32: i = 8 (r mod 16 / 4) + 4 (l / 32) + r mod 4,  block r / 16
 *     M = 16: i = 4 (l / 16) + r mod 4,                     block r / 4
 *     M = 4:  i = r,                                        block l / 4
 * (f64, M = 16: i = 4 r + l / 16.)
 * Scales (v_mfma_scale): byte `op_sel` of lane i + M s of the scale register is the E8M0 scale of row i, k = 32 s .. 32 s + 31.
 *
 * WMMA (wave32), M = K = 16. Lane l holds row i = l mod 16 of A (column of B), elements k = 0..15 in rising order; lanes
 * 16..31 repeat lanes 0..15. D: lane l, register r: i = 2 r + l / 16, j = l mod 16.
 *
 * The products are summed in fp64 and rounded once to D's type: the hardware's internal order and width are not public.
 * Source: AMD "CDNA3" and "RDNA3" ISA documents, chapters on matrix arithmetic; the CDNA4 layouts are confirmed by
 * Triton-compiled kernels (see the tests). */
#include "formats.h"
#include "machine.h"

#define MAX_M 32
#define MAX_ELEMENTS 2048 /* M x K of the largest operand */
#ifdef __AVX512F__ /* as wide as a vector register: gcc takes wider ones apart, badly */
#define COLUMNS 8
#else
#define COLUMNS 4
#endif
#define ROWS 4

static const u8 BITS[] = {[ELEMENT_F64] = 64, [ELEMENT_F32] = 32, [ELEMENT_F16] = 16, [ELEMENT_BF16] = 16,
                          [ELEMENT_FP8] = 8,  [ELEMENT_BF8] = 8,  [ELEMENT_FP6] = 6,  [ELEMENT_BF6] = 6,
                          [ELEMENT_FP4] = 4,  [ELEMENT_I8] = 8,   [ELEMENT_U8] = 8,   [ELEMENT_I4] = 4,
                          [ELEMENT_U4] = 4};

/* Where element e of a lane begins: words from the first register on, with the bits from `shift` on. */
INLINE void codes(const u32 *first, u32 lanes, u32 bits, u32 e, u32 *code) {
  const u32 shift = e * bits % 32, *low = first + e * bits / 32 * LANES;
  for (u32 l = 0; l < lanes; l++) code[l] = low[l] >> shift;
  if (shift + bits > 32) /* 6-bit elements straddle registers */
    for (u32 l = 0; l < lanes; l++) code[l] |= low[LANES + l] << (32 - shift);
}
#define EACH(bits, value)                                                          \
  for (u32 e = from; e < to; e++, x += lanes) {                                    \
    codes(first, lanes, bits, e, code);                                            \
    for (u32 l = 0; l < lanes; l++) x[l] = (f64)(value) * scale[l];                \
  }                                                                                \
  break

/* Elements from .. to - 1 of `lanes` lanes whose first register is `first`, times their lanes' scales, as x[element][lane].
 * Formats are constants, and so is `lanes` where this is expanded: loops that the compiler can vectorise. */
INLINE void unpack_lanes(const u32 *first, u32 type, int fnuz, u32 lanes, u32 from, u32 to, const f64 *scale, f64 *restrict x) {
  u32 code[LANES];
  switch (type) {
    case ELEMENT_F64: /* one element a lane, in two registers */
      for (u32 l = 0; l < lanes; l++) x[l] = as_f64(join(first[l], first[LANES + l]));
      break;
    case ELEMENT_F32: EACH(32, as_f32(code[l]));
    case ELEMENT_F16: EACH(16, f16_to_f32(code[l] & 0xFFFF));
    case ELEMENT_BF16: EACH(16, bf16_to_f32(code[l] & 0xFFFF));
    case ELEMENT_FP8: if (fnuz) { EACH(8, small_to_f32(&E4M3_FNUZ, code[l])); } else { EACH(8, small_to_f32(&E4M3, code[l])); }
    case ELEMENT_BF8: if (fnuz) { EACH(8, small_to_f32(&E5M2_FNUZ, code[l])); } else { EACH(8, small_to_f32(&E5M2, code[l])); }
    case ELEMENT_FP6: EACH(6, small_to_f32(&E2M3, code[l]));
    case ELEMENT_BF6: EACH(6, small_to_f32(&E3M2, code[l]));
    case ELEMENT_FP4: EACH(4, small_to_f32(&E2M1, code[l]));
    case ELEMENT_I8: EACH(8, (i8)code[l]);
    case ELEMENT_U8: EACH(8, (i32)(code[l] & 255));
    case ELEMENT_I4: EACH(4, (i32)(code[l] << 28) >> 28);
    case ELEMENT_U4: EACH(4, (i32)(code[l] & 15));
  }
}

static void unpack(const Wave *w, const Operand *op, u32 type, u32 lane, u32 lanes, u32 from, u32 to, const f64 *scale, f64 *x) {
  const u32 *first = w->v[op->index] + lane;
  const int fnuz = w->machine->gfx == 942;
  if (lanes == 16) unpack_lanes(first, type, fnuz, 16, from, to, scale, x);
  else unpack_lanes(first, type, fnuz, lanes, from, to, scale, x);
}

/* d[i][j] = sum_k a[k][i] b[k][j], by tiles of 4 rows and two vectors of columns, so that sums wait neither for each other
 * nor for memory. (gcc's vectors work on any processor.) For m = 4 the columns from 4 on are not looked at. */
typedef f64 Columns __attribute__((vector_size(COLUMNS * sizeof(f64)), aligned(sizeof(f64))));
static void multiply(u32 m, u32 depth, const f64 *a, const f64 *b, f64 (*d)[MAX_M]) {
  for (u32 i = 0; i < m; i += ROWS)
    for (u32 j = 0; j < m; j += 2 * COLUMNS) {
      Columns left[ROWS] = {0}, right[ROWS] = {0};
      for (u32 k = 0; k < depth; k++) {
        const Columns x = *(const Columns *)&b[k * m + j], y = *(const Columns *)&b[k * m + j + COLUMNS];
        for (u32 r = 0; r < ROWS; r++) left[r] += a[k * m + i + r] * x, right[r] += a[k * m + i + r] * y;
      }
      for (u32 r = 0; r < ROWS; r++) {
        *(Columns *)&d[i + r][j] = left[r];
        *(Columns *)&d[i + r][j + COLUMNS] = right[r];
      }
    }
}

static f64 scale_of(const Wave *w, const Instr *i, u32 which, u32 lane) {
  const Operand *op = &i->src[3 + which];
  u32 word = op->kind == KIND_VGPR ? w->v[op->index][lane] : op->kind == KIND_SGPR ? w->s[op->index] : (u32)op->value;
  u32 byte = (i->op_sel >> which & 1) | (i->op_sel_hi >> which & 1) << 1;
  return e8m0_to_f32(word >> 8 * byte & 255);
}

/* One block of operand A (which = 0) or B (which = 1) as to[k][row], rows of m elements. */
static void load_operand(const Wave *w, const Instr *i, u32 which, u32 block, f64 *to) {
  const u32 type = which ? i->b_type : i->a_type, m = i->m, groups = LANES / (m * i->blocks), held = i->k / groups;
  const u32 run = held == 32 && BITS[type] == 8 ? 16 : held;
  for (u32 g = 0; g < groups; g++)
    for (u32 e0 = 0; e0 < held; e0 += run) {
      u32 k0 = run < held ? 16 * g + groups * e0 : g * held;
      f64 scale[MAX_M];
      for (u32 row = 0; row < m; row++) scale[row] = i->scaled ? scale_of(w, i, which, row + m * (k0 / 32)) : 1;
      unpack(w, &i->src[which], type, m * (block + i->blocks * g), m, e0, e0 + run, scale, to + k0 * m);
    }
}

static u64 accumulator(const Wave *w, const Operand *c, u32 r, u32 words, u32 l) {
  if (c->kind != KIND_VGPR) return c->value;
  return words == 2 ? join(w->v[c->index + 2 * r][l], w->v[c->index + 2 * r + 1][l]) : w->v[c->index + r][l];
}

static u64 rounded(u32 type, f64 product, u64 c) {
  if (type == ELEMENT_I32) return (u32)((u32)(i64)product + (u32)c);
  if (type == ELEMENT_F64) return as_u64(product + as_f64(c));
  return as_u32((f32)(product + as_f32((u32)c)));
}

/* Row and block of D that register r holds in lanes m n .. m n + m - 1. */
static void place(u32 m, u32 words, u32 r, u32 n, u32 *row, u32 *block) {
  *block = m == 4 ? n : words == 2 ? 0 : m == 16 ? r / 4 : r / 16;
  *row = m == 4 ? r : words == 2 ? 4 * r + n : m == 16 ? 4 * n + r % 4 : 8 * (r % 16 / 4) + 4 * n + r % 4;
}

void mfma(Wave *w, const Instr *i) {
  static __thread f64 a[MAX_ELEMENTS], b[MAX_ELEMENTS + 2 * COLUMNS], d[16][MAX_M][MAX_M];
  static __thread u32 result[2 * MAX_M][LANES];
  const Operand *c = &i->src[2];
  const u32 m = i->m;
  for (u32 block = 0; block < i->blocks; block++) {
    load_operand(w, i, 0, block, a);
    load_operand(w, i, 1, block, b);
    multiply(m, i->k, a, b, d[block]);
  }
  u32 words = i->d_type == ELEMENT_F64 ? 2 : 1, registers = m * m * i->blocks / LANES;
  for (u32 r = 0; r < registers; r++)
    for (u32 n = 0; n < LANES / m; n++) {
      u32 row, block;
      place(m, words, r, n, &row, &block);
      const f64 *product = d[block][row];
      if (i->d_type == ELEMENT_F32 && c->kind == KIND_VGPR) { /* the usual case, for the compiler to vectorise */
        const u32 *sum = w->v[c->index + r] + m * n;
        for (u32 j = 0; j < m; j++) result[r][m * n + j] = as_u32((f32)(product[j] + as_f32(sum[j])));
        continue;
      }
      for (u32 j = 0, l = m * n; j < m; j++, l++) {
        u64 x = rounded(i->d_type, product[j], accumulator(w, c, r, words, l));
        for (u32 k = 0; k < words; k++) result[r * words + k][l] = (u32)(x >> 32 * k);
      }
    }
  memcpy(w->v[i->dst.index], result, registers * words * sizeof result[0]);
}

/* Registers of a WMMA operand must hold the same in lanes l and l + 16. */
static void check_replicated(Wave *w, const Instr *i, u32 which, u32 type) {
  const Operand *op = &i->src[which];
  for (u32 r = 0; op->kind == KIND_VGPR && r < 16u * BITS[type] / 32; r++)
    for (u32 l = 0; l < 16; l++) {
      if (w->v[op->index + r][l] == w->v[op->index + r][l + 16]) continue;
      Finding *f = report(w, i, NOT_REPLICATED);
      if (f) f->lane = l + 16, f->address = op->index + r;
      return;
    }
}

/* f16 and bf16 results fill one half of their registers, the upper if op_sel[2]; C is read from the same half. */
void wmma(Wave *w, const Instr *i) {
  static const f64 ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  static __thread f64 a[256], b[256], d[MAX_M][MAX_M];
  u32 result[8][LANES];
  u32 shift = i->op_sel >> 2 & 1 ? 16 : 0, keep = shift ? 0xFFFFu : 0xFFFF0000u;
  for (u32 which = 0; which < 2; which++) {
    u32 type = which ? i->b_type : i->a_type;
    if (i->neg_lo >> which & 1) { /* integers: neg_lo marks a signed operand */
      if (type == ELEMENT_U8) type = ELEMENT_I8;
      if (type == ELEMENT_U4) type = ELEMENT_I4;
    }
    if (w->machine->checks & CHECK_OPERANDS) check_replicated(w, i, which, type);
    unpack(w, &i->src[which], type, 0, 16, 0, 16, ONES, which ? b : a);
  }
  multiply(16, 16, a, b, d);
  for (u32 r = 0; r < 8; r++)
    for (u32 l = 0; l < 32; l++) {
      f64 product = d[2 * r + l / 16][l % 16];
      u32 c = (u32)accumulator(w, &i->src[2], r, 1, l), half = c >> shift & 0xFFFF;
      if (i->src[2].kind != KIND_VGPR) half = c & 0xFFFF;
      if (i->d_type == ELEMENT_F16) half = f32_to_f16((f32)(product + f16_to_f32(half)));
      if (i->d_type == ELEMENT_BF16) half = f32_to_bf16((f32)(product + bf16_to_f32(half)));
      int narrow = i->d_type == ELEMENT_F16 || i->d_type == ELEMENT_BF16;
      result[r][l] = narrow ? (w->v[i->dst.index + r][l] & keep) | half << shift : (u32)rounded(i->d_type, product, c);
    }
  for (u32 r = 0; r < 8; r++) memcpy(w->v[i->dst.index + r], result[r], 32 * sizeof(u32));
}
