/* Moves between lanes of vector registers, and between vector and scalar registers. */
#include "machine.h"

static u32 scalar_source(const Wave *w, const Operand *op) {
  return op->kind == KIND_SGPR ? w->s[op->index] : (u32)op->value;
}

static u32 lane_of(const Wave *w, const Operand *op, u32 lane) {
  return op->kind == KIND_VGPR ? w->v[op->index][lane] : scalar_source(w, op);
}

void readfirstlane(Wave *w, const Instr *i) {
  u64 exec = exec_mask(w);
  w->s[i->dst.index] = lane_of(w, &i->src[0], exec ? (u32)__builtin_ctzll(exec) : 0);
}

void readlane(Wave *w, const Instr *i) {
  w->s[i->dst.index] = lane_of(w, &i->src[0], scalar_source(w, &i->src[1]) % w->lanes);
}

void writelane(Wave *w, const Instr *i) {
  w->v[i->dst.index][scalar_source(w, &i->src[1]) % w->lanes] = scalar_source(w, &i->src[0]);
}

void swap_registers(Wave *w, const Instr *i) {
  u32 *a = w->v[i->dst.index], *b = w->v[i->src[0].index];
  FOR_LANES(exec_mask(w), l) {
    u32 x = a[l];
    a[l] = b[l];
    b[l] = x;
  }
}

/* Two 16-bit halves of registers, named by `select`, change places. */
void swap_halves(Wave *w, const Instr *i) {
  u32 *a = w->v[i->dst.index], *b = w->v[i->src[0].index];
  u32 up = i->dst.select == SELECT_WORD_1 ? 16 : 0, other = i->src[0].select == SELECT_WORD_1 ? 16 : 0;
  FOR_LANES(exec_mask(w), l) {
    u32 x = a[l] >> up & 0xFFFF, y = b[l] >> other & 0xFFFF;
    a[l] = (a[l] & ~(0xFFFFu << up)) | y << up;
    b[l] = (b[l] & ~(0xFFFFu << other)) | x << other;
  }
}

/* v_permlane32_swap, v_permlane16_swap (gfx950): the upper half of each 2 x flag lanes of dst changes places with the
 * lower half of the same lanes of src. */
void permlane_swap(Wave *w, const Instr *i) {
  u32 *d = w->v[i->dst.index], *s = w->v[i->src[0].index], half = i->flag;
  u64 exec = exec_mask(w);
  for (u32 base = 0; base < LANES; base += 2 * half)
    for (u32 l = base; l < base + half; l++) {
      if (!(exec >> l & 1) || !(exec >> (l + half) & 1)) continue;
      u32 x = s[l];
      s[l] = d[l + half];
      d[l + half] = x;
    }
}

/* v_permlane16 and v_permlanex16 (flag = 16): within each row of 16 (or from the row's partner), lane n takes the lane
 * whose number stands in bits 4n..4n+3 of src1 and src2. */
void permlane16(Wave *w, const Instr *i) {
  const u32 *from = w->v[i->src[0].index];
  u64 exec = exec_mask(w), select = join(scalar_source(w, &i->src[1]), scalar_source(w, &i->src[2]));
  u32 moved[LANES];
  u64 written = 0;
  for (u32 l = 0; l < LANES; l++) {
    u32 source = ((l & ~15u) ^ i->flag) + (u32)(select >> 4 * (l & 15) & 15);
    int readable = (exec >> source & 1) || (i->op_sel & 1); /* op_sel[0]: fetch inactive */
    moved[l] = readable ? from[source] : 0;
    written |= (u64)(readable || (i->op_sel & 2)) << l;     /* op_sel[1]: bound_ctrl */
  }
  write_rows(w, &i->dst, 0, moved, exec & written);
}
