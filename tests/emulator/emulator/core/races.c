/* Missing barriers, and LDS read before it was written.
 *
 * Barriers cut time into epochs. Two accesses of one granule of LDS by different waves in one epoch race if at least one
 * is a write. An access that its wave has not waited for when it arrives at a barrier belongs to the next epoch as well.
 * Epochs only grow during a launch, so nothing is cleared between blocks. */
#include "machine.h"

/* Machine.written[g]: the last write: epoch in the upper half, then the wave, whether it is a load to LDS still in flight,
 * whether it was an atomic, and the instruction. Machine.read[g]: epoch of the last read, and a bit for each wave that
 * read in it. Machine.reader[g]: instruction of the last read. */
#define WAVE_SHIFT 27
#define IN_FLIGHT (1ull << 26)
#define ATOMIC (1ull << 25)
#define INSTRUCTION_MASK ((1u << 25) - 1)
INLINE u64 write_stamp(u32 epoch, u32 wave, u32 instruction, u64 flags) {
  return (u64)epoch << 32 | (u64)wave << WAVE_SHIFT | flags | (instruction & INSTRUCTION_MASK);
}
INLINE u32 stamp_epoch(u64 stamp) { return (u32)(stamp >> 32); }
INLINE u32 stamp_wave(u64 stamp) { return (u32)stamp >> WAVE_SHIFT; }
INLINE u32 stamp_instruction(u64 stamp) { return (u32)stamp & INSTRUCTION_MASK; }
INLINE u64 read_stamp(u64 old, u32 epoch, u32 wave) {
  return (stamp_epoch(old) == epoch ? old : (u64)epoch << 32) | 1ull << wave;
}

/* Granules of `bytes` bytes at `address`, as first granule and number. */
INLINE u32 granules(const Machine *m, u32 address, u32 bytes, u32 *first) {
  *first = address >> m->lds_granule_shift;
  return ((address + bytes - 1) >> m->lds_granule_shift) - *first + 1;
}

typedef struct {
  Machine *m;
  Wave *w;
  const Instr *i;
  u32 instruction, wave, epoch;
  LdsUse use;
} Access;

/* The usual case: nothing to report. Records the access and returns 1, or does neither. The stamps are compared as whole
 * numbers, whose upper half is the epoch, so that the compiler can do several granules at once. */
INLINE int quiet_read(const Access *a, u32 g, u32 n) {
  const u64 *written = a->m->written + g;
  u64 *read = a->m->read + g, trouble = 0;
  u32 *reader = a->m->reader + g;
  const u64 block = (u64)a->m->first_epoch << 32, now = (u64)a->epoch << 32, bit = 1ull << a->wave;
  const u64 own = (now >> WAVE_SHIFT) + a->wave;
  const u32 instruction = a->instruction;
  for (u32 k = 0; k < n; k++) {
    u64 earlier = written[k] - block < now - block, mine = written[k] >> WAVE_SHIFT == own;
    trouble |= (earlier | mine) ^ 1 | (written[k] & IN_FLIGHT);
  }
  if (trouble) return 0;
  for (u32 k = 0; k < n; k++) read[k] = (read[k] > now ? read[k] : now) | bit;
  for (u32 k = 0; k < n; k++) reader[k] = instruction;
  return 1;
}

INLINE int quiet_write(const Access *a, u32 g, u32 n) {
  u64 *written = a->m->written + g, trouble = 0;
  const u64 *read = a->m->read + g;
  const u64 now = (u64)a->epoch << 32, bit = 1ull << a->wave, own = (now >> WAVE_SHIFT) + a->wave;
  const u64 stamp = write_stamp(a->epoch, a->wave, a->instruction, 0);
  for (u32 k = 0; k < n; k++) {
    u64 by_other = (written[k] >= now) & (written[k] >> WAVE_SHIFT != own);
    trouble |= by_other | ((read[k] >= now) & (read[k] != (now | bit)));
  }
  if (trouble) return 0;
  for (u32 k = 0; k < n; k++) written[k] = stamp;
  return 1;
}

/* Gives the compiler loops of known length for the common sizes. */
#define FOR_SIZE(f, a, g, n) \
  ((n) == 16 ? f(a, g, 16) : (n) == 4 ? f(a, g, 4) : (n) == 8 ? f(a, g, 8) : (n) == 1 ? f(a, g, 1) : f(a, g, n))

static void found(const Access *a, FindingKind kind, u64 lane, u32 granule, u32 other, u32 other_wave) {
  Finding *f = report(a->w, a->i, kind);
  if (!f) return;
  f->lane = (u32)lane;
  f->address = granule << a->m->lds_granule_shift;
  f->bytes = a->i->bytes;
  f->other = (i32)other;
  f->other_wave = other_wave;
}

static void inspect(const Access *a, u64 lane, u32 g, int changed) {
  const Machine *m = a->m;
  u64 written = m->written[g], read = m->read[g], self = 1ull << a->wave;
  u32 writer = stamp_wave(written), instruction = stamp_instruction(written);
  int races = m->checks & CHECK_BARRIERS, known = stamp_epoch(written) >= m->first_epoch;
  if (a->use == LDS_READ || a->use == LDS_ATOMIC) {
    if (m->checks & CHECK_UNINITIALISED && !known) found(a, UNINITIALISED, lane, g, -1u, 0);
    if (m->checks & CHECK_WAITS && written & IN_FLIGHT && writer == a->wave && known)
      found(a, DMA_NOT_WAITED, lane, g, instruction, writer);
  }
  if (a->use == LDS_WRITE && known && !changed) return;
  int both_atomic = a->use == LDS_ATOMIC && written & ATOMIC;
  if (races && stamp_epoch(written) == a->epoch && writer != a->wave && !both_atomic)
    found(a, LDS_RACE, lane, g, instruction, writer);
  if (a->use == LDS_READ) {
    m->read[g] = read_stamp(read, a->epoch, a->wave);
    m->reader[g] = a->instruction;
    return;
  }
  u32 others = stamp_epoch(read) == a->epoch ? (u32)(read & ~self) : 0;
  if (races && others) found(a, LDS_RACE, lane, g, m->reader[g], (u32)__builtin_ctz(others));
  u64 flags = a->use == LDS_DMA ? IN_FLIGHT : a->use == LDS_ATOMIC ? ATOMIC : 0;
  m->written[g] = write_stamp(a->epoch, a->wave, a->instruction, flags);
}

/* Checks and records one access, before it happens. `changed`: lanes whose write alters what LDS holds. A write that
 * repeats the value already there, as redundant layouts do from several waves, is no race and leaves no record. */
void check_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, LdsUse use, u64 changed) {
  Machine *m = w->machine;
  Access a = {m, w, i, (u32)(i - m->program), w->id, m->epoch, use};
  FOR_LANES(lanes, l) {
    u32 g, n = granules(m, address[l], bytes, &g);
    int alters = (int)(changed >> l & 1);
    if (use == LDS_READ && FOR_SIZE(quiet_read, &a, g, n)) continue;
    if (use == LDS_WRITE && alters && FOR_SIZE(quiet_write, &a, g, n)) continue;
    for (u32 k = 0; k < n; k++) inspect(&a, l, g + k, alters);
  }
}

/* ---- accesses that last ---- */

#define FOR_TRANSFER(m, t, g)                                                                    \
  for (u32 part = 0; part < (t)->parts; part++)                                                  \
    FOR_LANES((t)->lanes, l)                                                                     \
      if ((t)->address[part][l] < (m)->lds_bytes)                                                \
        for (u32 g, n = granules(m, (t)->address[part][l], (t)->instruction->bytes, &g); n && g <= (m)->last_granule; n--, g++)

/* The data of a load to LDS are there. */
void arrive(Wave *w, const Transfer *t) {
  Machine *m = w->machine;
  u32 instruction = (u32)(t->instruction - m->program);
  FOR_TRANSFER(m, t, g) {
    u64 written = m->written[g];
    if (stamp_wave(written) == w->id && stamp_instruction(written) == instruction) m->written[g] = written & ~IN_FLIGHT;
  }
}

/* A barrier was passed: what is still in flight counts for the new epoch too. */
void carry_over_barrier(Wave *w) {
  Machine *m = w->machine;
  for (int c = 0; c < COUNTERS; c++)
    for (u32 k = 0; k < w->counter[c].pending; k++) {
      const Transfer *t = &w->counter[c].transfer[k];
      u32 instruction = (u32)(t->instruction - m->program);
      u64 flags = t->lds_use == LDS_DMA ? IN_FLIGHT : t->lds_use == LDS_ATOMIC ? ATOMIC : 0;
      FOR_TRANSFER(m, t, g) {
        if (t->lds_use == LDS_READ) {
          m->read[g] = read_stamp(m->read[g], m->epoch, w->id);
          m->reader[g] = instruction;
        } else if (stamp_epoch(m->written[g]) < m->epoch) {
          m->written[g] = write_stamp(m->epoch, w->id, instruction, flags);
        }
      }
    }
}

/* ---- bank conflicts ---- */

/* Modelled: an access of `bytes` per lane is served in groups of consecutive lanes that together could use every bank
 * once (banks x 4 bytes); a group takes as many cycles as the busiest bank has different words, and all but the first
 * of these are conflicts. */
static u32 cycles(const Machine *m, u64 lanes, const u32 *address, u32 words) {
  u32 seen[64][LANES], used[64] = {0}, busiest = 1;
  FOR_LANES(lanes, l)
    for (u32 k = 0; k < words; k++) {
      u32 word = address[l] / 4 + k, bank = word % m->lds_banks, n = 0;
      while (n < used[bank] && seen[bank][n] != word) n++;
      if (n == used[bank]) seen[bank][used[bank]++] = word;
      if (used[bank] > busiest) busiest = used[bank];
    }
  return busiest;
}

void count_bank_conflicts(Machine *m, u64 lanes, const u32 *address, u32 bytes) {
  u32 words = bytes < 4 ? 1 : bytes / 4, size = m->lds_banks / (words == 3 ? 4 : words);
  u64 group = size == 64 ? ~0ull : (1ull << size) - 1;
  m->lds_accesses++;
  for (u32 first = 0; first < LANES; first += size) {
    u64 active = lanes & group << first, banks = 0, clash = 0;
    FOR_LANES(active, l) { /* words are few and consecutive: their banks as a run of bits, wrapped around */
      u64 run = (1ull << words) - 1, bank = address[l] / 4 % m->lds_banks, mine = run << bank;
      if (bank + words > m->lds_banks) mine |= run >> (m->lds_banks - bank);
      clash |= banks & mine;
      banks |= mine;
    }
    if (clash) m->bank_conflicts += cycles(m, active, address, words) - 1;
  }
}
