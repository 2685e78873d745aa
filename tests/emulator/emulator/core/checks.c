/* Missing waits, which the emulator has to look for because it completes every access at once.
 *
 * Hardware counts outstanding memory operations (vmcnt, lgkmcnt, on gfx11 also vscnt); s_waitcnt names how many
 * may remain. Each wave keeps the list of operations it has not waited for. Which of p pending operations a wait for n
 * guarantees complete follows from the ISA's ordering rule: one kind of operation completes in order, scalar loads
 * (and FLAT on gfx9) in any order. In the worst case all u unordered ones complete first, so p - n - u of the ordered
 * ones are certain, oldest first, and an unordered one only if n == 0. */
#include <stddef.h>

#include "machine.h"

Finding *report(Wave *w, const Instr *i, FindingKind kind) {
  Machine *m = w->machine;
  u32 instruction = (u32)(i - m->program);
  for (u32 n = 0; n < m->finding_count; n++)
    if (m->finding[n].kind == kind && m->finding[n].instruction == instruction) {
      m->finding[n].count++;
      return NULL; /* only the first lane, wave and block of each is kept */
    }
  if (m->finding_count == MAX_FINDINGS) {
    m->stop = 1;
    return NULL;
  }
  Finding *f = &m->finding[m->finding_count++];
  *f = (Finding){.kind = kind, .instruction = instruction, .wave = w->id, .count = 1, .other = -1};
  memcpy(f->block, m->block, sizeof f->block);
  return f;
}

/* ---- waits ---- */

static void find_missing_wait(Wave *w, const Instr *i, u64 used, u32 word) {
  u32 bit = word * 64 + (u32)__builtin_ctzll(used);
  for (int c = 0; c < COUNTERS; c++)
    for (u32 n = 0; n < w->counter[c].pending; n++) {
      const Instr *load = w->counter[c].transfer[n].instruction;
      if (!(load->fills[bit / 64] >> bit % 64 & 1)) continue;
      Finding *f = report(w, i, MISSING_WAIT);
      if (f) {
        f->address = bit;
        f->other = (i32)(load - w->machine->program);
      }
      return;
    }
}

void check_registers(Wave *w, const Instr *i) {
  for (u32 n = 0; n < REGISTER_WORDS; n++) {
    u64 pending = 0;
    for (int c = 0; c < COUNTERS; c++) pending |= w->counter[c].registers[n];
    if (pending & i->touches[n]) {
      find_missing_wait(w, i, pending & i->touches[n], n);
      return;
    }
  }
}

/* Registers that the end of this operation fills, as far as counter `c` tells: a FLAT load raises two counters, and
 * its data from global memory are there when vmcnt says so. */
static const u64 *fills(int c, const Instr *i) {
  static const u64 NONE[REGISTER_WORDS];
  return c == COUNT_LDS && i->space == SPACE_FLAT ? NONE : i->fills;
}

static void recount(Wave *w) {
  u64 any = 0;
  for (int c = 0; c < COUNTERS; c++) {
    Counter *counter = &w->counter[c];
    memset(counter->registers, 0, sizeof counter->registers);
    for (u32 n = 0; n < counter->pending; n++)
      for (u32 k = 0; k < REGISTER_WORDS; k++) any |= counter->registers[k] |= fills(c, counter->transfer[n].instruction)[k];
  }
  w->loading = any != 0;
}

/* Removes the `certain` oldest operations (of all kinds if `unordered`, else only of those that complete in order). */
static void complete(Wave *w, Counter *counter, i64 certain, int unordered) {
  u32 kept = 0;
  for (u32 n = 0; n < counter->pending; n++) {
    const Transfer *t = &counter->transfer[n];
    if (certain > 0 && (unordered || t->ordering == IN_ORDER)) {
      if (t->lds_use == LDS_DMA) arrive(w, t);
      certain--;
    } else {
      if (kept != n) memcpy(&counter->transfer[kept], t, offsetof(Transfer, address) + t->parts * sizeof t->address[0]);
      kept++;
    }
  }
  counter->pending = kept;
  recount(w);
}

void wait_until(Wave *w, int c, u32 allowed) {
  Counter *counter = &w->counter[c];
  if (counter->pending <= allowed) return;
  u32 unordered = 0;
  for (u32 n = 0; n < counter->pending; n++) unordered += counter->transfer[n].ordering == ANY_ORDER;
  if (allowed == 0) complete(w, counter, MAX_TRANSFERS, 1);
  else complete(w, counter, (i64)counter->pending - allowed - unordered, 0);
}

/* One more operation of `w` is under way. `address`, `address2`: where in LDS, NULL if nowhere. */
void track(Wave *w, const Instr *i, int c, Ordering ordering, LdsUse use, u64 lanes, const u32 *address,
           const u32 *address2) {
  if (!(w->machine->checks & (CHECK_WAITS | CHECK_BARRIERS))) return;
  Counter *counter = &w->counter[c];
  if (counter->pending == MAX_TRANSFERS) complete(w, counter, 1, 1); /* the hardware stalls when it is full */
  Transfer *t = &counter->transfer[counter->pending++];
  t->instruction = i;
  t->ordering = (u8)ordering;
  t->lds_use = (u8)use;
  t->lanes = lanes;
  t->parts = 0;
  if (address) memcpy(t->address[t->parts++], address, sizeof t->address[0]);
  if (address2) memcpy(t->address[t->parts++], address2, sizeof t->address[0]);
  for (u32 k = 0; k < REGISTER_WORDS; k++) {
    counter->registers[k] |= fills(c, i)[k];
    w->loading |= fills(c, i)[k] != 0;
  }
}
