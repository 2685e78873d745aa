/* The checks that make races visible although the emulator completes every access at once.
 *
 * Waits. Hardware counts outstanding memory operations (vmcnt, lgkmcnt, on gfx11 also vscnt); s_waitcnt names how many
 * may remain. Each wave keeps the list of operations it has not waited for. Which of p pending operations a wait for n
 * guarantees complete follows from the ISA's ordering rule: one kind of operation completes in order, scalar loads
 * (and FLAT on gfx9) in any order. In the worst case all u unordered ones complete first, so p - n - u of the ordered
 * ones are certain, oldest first, and an unordered one only if n == 0.
 *
 * LDS. Barriers cut time into epochs. Two accesses of one byte by different waves in one epoch, at least one a write,
 * race. An access that is still in flight when its wave arrives at a barrier belongs to the next epoch as well. */
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

static void stamp(Wave *w, const Transfer *t, u32 epoch, int arrived);

static void complete(Wave *w, Counter *counter, u32 n) {
  if (counter->transfer[n].lds_use == LDS_DMA) stamp(w, &counter->transfer[n], 0, 1);
  for (u32 k = n + 1; k < counter->pending; k++) {
    const Transfer *from = &counter->transfer[k];
    memcpy(&counter->transfer[k - 1], from, offsetof(Transfer, address) + from->parts * sizeof from->address[0]);
  }
  counter->pending--;
}

void wait_until(Wave *w, int c, u32 allowed) {
  Counter *counter = &w->counter[c];
  if (counter->pending <= allowed) return;
  u32 unordered = 0;
  for (u32 n = 0; n < counter->pending; n++) unordered += counter->transfer[n].ordering == ANY_ORDER;
  i64 certain = allowed ? (i64)counter->pending - allowed - unordered : MAX_TRANSFERS;
  for (u32 n = 0; certain > 0 && n < counter->pending;) {
    if (allowed && counter->transfer[n].ordering == ANY_ORDER) {
      n++;
    } else {
      complete(w, counter, n);
      certain--;
    }
  }
  recount(w);
}

/* One more operation of `w` is under way. `address`, `address2`: where in LDS, NULL if nowhere. */
void track(Wave *w, const Instr *i, int c, Ordering ordering, LdsUse use, u64 lanes, const u32 *address,
           const u32 *address2) {
  if (!(w->machine->checks & (CHECK_WAITS | CHECK_BARRIERS))) return;
  Counter *counter = &w->counter[c];
  if (counter->pending == MAX_TRANSFERS) complete(w, counter, 0); /* the hardware stalls when it is full */
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

/* ---- LDS ---- */

#define FOR_GRANULES(m, address, bytes, g)                                               \
  for (u32 g = (address) / (m)->lds_granule; g <= ((address) + (bytes) - 1) / (m)->lds_granule && \
                                             g * (m)->lds_granule < (m)->lds_bytes; g++)

/* `arrived`: the data of a load to LDS are there. Otherwise: the access counts for `epoch` (too). */
static void stamp(Wave *w, const Transfer *t, u32 epoch, int arrived) {
  Machine *m = w->machine;
  u32 instruction = (u32)(t->instruction - m->program);
  u32 bytes = t->instruction->bytes;
  for (u32 part = 0; part < t->parts; part++)
  FOR_LANES(t->lanes, l) FOR_GRANULES(m, t->address[part][l], bytes, g) {
    Granule *granule = &m->granules[g];
    if (t->lds_use == LDS_READ) {
      if (granule->read_epoch != epoch) granule->readers = 0;
      granule->read_epoch = epoch;
      granule->readers |= 1u << w->id;
      granule->read_instruction = instruction;
    } else if (arrived) {
      if (granule->write_instruction == instruction && granule->writer == w->id) granule->in_flight = 0;
    } else if (granule->write_epoch <= epoch) {
      granule->write_epoch = epoch;
      granule->write_instruction = instruction;
      granule->writer = (u8)w->id;
      granule->in_flight = t->lds_use == LDS_DMA;
    }
  }
}

void carry_over_barrier(Wave *w) {
  for (int c = 0; c < COUNTERS; c++)
    for (u32 n = 0; n < w->counter[c].pending; n++)
      if (w->counter[c].transfer[n].lds_use) stamp(w, &w->counter[c].transfer[n], w->machine->epoch, 0);
}

static void report_lds(Wave *w, const Instr *i, FindingKind kind, u64 lane, u32 address, u32 other, u32 other_wave) {
  Finding *f = report(w, i, kind);
  if (!f) return;
  f->lane = (u32)lane;
  f->address = address;
  f->bytes = i->bytes;
  f->other = (i32)other;
  f->other_wave = other_wave;
}

/* Checks and records one access, before it happens. `changed`: lanes whose write alters what LDS holds. A write that
 * repeats the value already there, as redundant layouts do from several waves, is no race and leaves no record. */
void check_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, LdsUse use, u64 changed) {
  Machine *m = w->machine;
  u32 self = 1u << w->id, instruction = (u32)(i - m->program);
  int races = m->checks & CHECK_BARRIERS, waits = m->checks & CHECK_WAITS, fresh = m->checks & CHECK_UNINITIALISED;
  FOR_LANES(lanes, l) FOR_GRANULES(m, address[l], bytes, g) {
    Granule *granule = &m->granules[g];
    u32 at = g * m->lds_granule;
    int written_now = granule->write_epoch == m->epoch, read_now = granule->read_epoch == m->epoch;
    int known = granule->write_epoch >= m->first_epoch, reads = use == LDS_READ || use == LDS_ATOMIC;
    if (reads && fresh && !known) report_lds(w, i, UNINITIALISED, l, at, -1u, 0);
    if (reads && waits && granule->in_flight && granule->writer == w->id)
      report_lds(w, i, DMA_NOT_WAITED, l, at, granule->write_instruction, w->id);
    if (use != LDS_READ && use != LDS_DMA && known && !(changed >> l & 1)) continue;
    if (races && written_now && granule->writer != w->id && !(use == LDS_ATOMIC && granule->atomic))
      report_lds(w, i, LDS_RACE, l, at, granule->write_instruction, granule->writer);
    if (use == LDS_READ) {
      if (!read_now) granule->readers = 0;
      granule->read_epoch = m->epoch;
      granule->readers |= self;
      granule->read_instruction = instruction;
      continue;
    }
    if (races && read_now && granule->readers & ~self)
      report_lds(w, i, LDS_RACE, l, at, granule->read_instruction, (u32)__builtin_ctz(granule->readers & ~self));
    granule->write_epoch = m->epoch;
    granule->write_instruction = instruction;
    granule->writer = (u8)w->id;
    granule->in_flight = use == LDS_DMA;
    granule->atomic = use == LDS_ATOMIC;
  }
}

/* Modelled: an access of `bytes` per lane is served in groups of consecutive lanes that together could use every bank
 * once (banks x 4 bytes); a group takes as many cycles as the busiest bank has different words, and all but the first
 * of these are conflicts. */
void count_bank_conflicts(Machine *m, u64 lanes, const u32 *address, u32 bytes) {
  u32 words = bytes < 4 ? 1 : bytes / 4, group = m->lds_banks / (words == 3 ? 4 : words);
  m->lds_accesses++;
  for (u32 first = 0; first < LANES; first += group) {
    u32 seen[64][LANES], used[64] = {0}, busiest = 0;
    for (u32 l = first; l < first + group && l < LANES; l++) {
      if (!(lanes >> l & 1)) continue;
      for (u32 k = 0; k < words; k++) {
        u32 word = address[l] / 4 + k, bank = word % m->lds_banks, n = 0;
        while (n < used[bank] && seen[bank][n] != word) n++;
        if (n == used[bank]) seen[bank][used[bank]++] = word;
        if (used[bank] > busiest) busiest = used[bank];
      }
    }
    if (busiest > 1) m->bank_conflicts += busiest - 1;
  }
}
