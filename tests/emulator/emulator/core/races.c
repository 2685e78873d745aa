/* Missing barriers, and LDS read before it was written.
 *
 * Barriers cut time into epochs. Two accesses of one byte of LDS by different waves in one epoch race if at least one
 * is a write. An access that its wave has not waited for when it arrives at a barrier belongs to the next epoch as well.
 * Epochs only grow during a launch, so nothing is cleared between blocks.
 *
 * There is a record for each word, which stands for its bytes as long as they are accessed together. Where the kernel has
 * narrower accesses, the first that covers a part of a word splits it: from then on its bytes have records of their own,
 * until all four are written together again. */
#include "machine.h"

/* Records.written[g]: the last write: epoch in the upper half, then the wave, whether it is a load to LDS still in flight,
 * whether it was an atomic, and the instruction; SPLIT: see the bytes. Records.read[g]: epoch of the last read, and a bit
 * for each wave that read in it. Records.reader[g]: instruction of the last read. */
#define SPLIT (~0ull >> 1) /* looks like a write still in flight, of an epoch to come: no quiet access */
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

static void split(Machine *m, u32 word) {
  if (m->words.written[word] == SPLIT) return;
  for (u32 g = 4 * word; g < 4 * word + 4; g++) {
    m->bytes.written[g] = m->words.written[word];
    m->bytes.read[g] = m->words.read[word];
    m->bytes.reader[g] = m->words.reader[word];
  }
  m->words.written[word] = SPLIT;
}

/* The opposite, where the bytes were last written together. */
static void unite(Machine *m, u32 word) {
  const u64 *written = m->bytes.written + 4 * word, *read = m->bytes.read + 4 * word;
  if (m->words.written[word] != SPLIT || written[0] != written[1] || written[0] != written[2] || written[0] != written[3]) return;
  u32 last = 0;
  u64 readers = 0;
  for (u32 k = 1; k < 4; k++)
    if (read[k] > read[last]) last = k;
  for (u32 k = 0; k < 4; k++)
    if (stamp_epoch(read[k]) == stamp_epoch(read[last])) readers |= read[k];
  m->words.written[word] = written[0];
  m->words.read[word] = readers;
  m->words.reader[word] = m->bytes.reader[4 * word + last];
}

/* The record that tells of `address` in an access that ends before `end`: number *g of the result. *next: where the next
 * one's begin. */
static Records *record_of(Machine *m, u32 address, u32 end, u32 *g, u32 *next) {
  u32 word = address / 4, whole = address % 4 == 0 && address + 4 <= end;
  *g = word, *next = 4 * word + 4;
  if (!m->bytes.written || (whole && m->words.written[word] != SPLIT)) return &m->words;
  split(m, word);
  *g = address, *next = address + 1;
  return &m->bytes;
}
#define FOR_RECORDS(m, first, end, r, g)                                     \
  for (u32 at_ = (first), next_, g; at_ < (end); at_ = next_)                \
    for (Records *r = record_of(m, at_, (end), &g, &next_); r; r = NULL)

typedef struct {
  Machine *m;
  Wave *w;
  const Instr *i;
  u32 instruction, wave, epoch;
  LdsUse use;
  i64 block, now, own; /* as stamps: where the block's and this epoch begin; epoch and wave */
} Access;

/* The usual case: nothing to report. Records the access and returns 1, or does neither. Stamps are compared as whole
 * numbers, whose upper half is the epoch. */
static int quiet_read(const Access *a, const Records *r, u32 g, u32 n) {
  for (u32 k = g; k < g + n; k++) {
    i64 written = (i64)r->written[k];
    if (!((written >= a->block && written < a->now) || written >> WAVE_SHIFT == a->own) || written & IN_FLIGHT) return 0;
  }
  for (u32 k = g; k < g + n; k++) r->read[k] = read_stamp(r->read[k], a->epoch, a->wave), r->reader[k] = a->instruction;
  return 1;
}

static int quiet_write(const Access *a, const Records *r, u32 g, u32 n) {
  for (u32 k = g; k < g + n; k++) {
    i64 written = (i64)r->written[k], read = (i64)r->read[k];
    if ((written >= a->now && written >> WAVE_SHIFT != a->own) || (read >= a->now && read != (a->now | 1ll << a->wave))) return 0;
  }
  for (u32 k = g; k < g + n; k++) r->written[k] = write_stamp(a->epoch, a->wave, a->instruction, 0);
  return 1;
}

/* A write that changes nothing where something was written before. */
static int repeats(const Access *a, const Records *r, u32 g, u32 n) {
  for (u32 k = g; k < g + n; k++)
    if ((i64)r->written[k] < a->block || r->written[k] == SPLIT) return 0;
  return 1;
}

/* Quiet accesses to four words at once. */
typedef i64 Four __attribute__((vector_size(32), aligned(8)));
INLINE int none(Four x) { return !(x[0] | x[1] | x[2] | x[3]); }
INLINE Four all(i64 x) { return (Four){x, x, x, x}; }

INLINE int quiet_read_4(const Access *a, const Records *r, u32 g) {
  const Four written = *(const Four *)&r->written[g], read = *(const Four *)&r->read[g], now = all(a->now);
  const Four earlier = (written >= all(a->block)) & (written < now), mine = written >> WAVE_SHIFT == all(a->own);
  if (!none(~(earlier | mine) | (written & all(IN_FLIGHT)))) return 0;
  const Four known = read >= now;
  *(Four *)&r->read[g] = (read & known) | (now & ~known) | all(1ll << a->wave);
  for (u32 k = 0; k < 4; k++) r->reader[g + k] = a->instruction;
  return 1;
}

INLINE int quiet_write_4(const Access *a, const Records *r, u32 g) {
  const Four written = *(const Four *)&r->written[g], read = *(const Four *)&r->read[g], now = all(a->now);
  const Four by_other = (written >= now) & (written >> WAVE_SHIFT != all(a->own));
  if (!none(by_other | ((read >= now) & (read != all(a->now | 1ll << a->wave))))) return 0;
  *(Four *)&r->written[g] = all((i64)write_stamp(a->epoch, a->wave, a->instruction, 0));
  return 1;
}

/* Accesses of 16 bytes: the lanes that are not quiet. Access and records are copies, which no store here can change. */
static u64 loud_reads(const Access a, const Records r, u64 lanes, const u32 *address) {
  u64 loud = 0;
  FOR_LANES(lanes, l) loud |= (u64)(address[l] % 4 || !quiet_read_4(&a, &r, address[l] / 4)) << l;
  return loud;
}

static u64 loud_writes(const Access a, const Records r, u64 lanes, const u32 *address) {
  u64 loud = 0;
  FOR_LANES(lanes, l) loud |= (u64)(address[l] % 4 || !quiet_write_4(&a, &r, address[l] / 4)) << l;
  return loud;
}

/* Accesses of one record each, of words or of bytes of words that are split: the lanes that are not quiet. */
INLINE u64 loud_singles(const Access a, const Records r, const u64 *words, u64 lanes, const u32 *address, u64 changed) {
  u64 loud = 0;
  FOR_LANES(lanes, l) {
    const u32 g = words ? address[l] : address[l] / 4;
    const int single = words ? words[g / 4] == SPLIT : address[l] % 4 == 0;
    const int quiet = !single ? 0 : a.use == LDS_READ ? quiet_read(&a, &r, g, 1)
                      : changed >> l & 1 ? quiet_write(&a, &r, g, 1) : repeats(&a, &r, g, 1);
    loud |= (u64)!quiet << l;
  }
  return loud;
}

static void found(const Access *a, FindingKind kind, u64 lane, u32 address, u32 other, u32 other_wave) {
  Finding *f = report(a->w, a->i, kind);
  if (!f) return;
  f->lane = (u32)lane;
  f->address = address;
  f->bytes = a->i->bytes;
  f->other = (i32)other;
  f->other_wave = other_wave;
}

static void inspect(const Access *a, u64 lane, const Records *r, u32 g, int changed) {
  const Machine *m = a->m;
  u32 address = r == &m->words ? 4 * g : g;
  u64 written = r->written[g], read = r->read[g], self = 1ull << a->wave;
  u32 writer = stamp_wave(written), instruction = stamp_instruction(written);
  int races = m->checks & CHECK_BARRIERS, known = stamp_epoch(written) >= m->first_epoch;
  if (a->use == LDS_READ || a->use == LDS_ATOMIC) {
    if (m->checks & CHECK_UNINITIALISED && !known) found(a, UNINITIALISED, lane, address, -1u, 0);
    if (m->checks & CHECK_WAITS && written & IN_FLIGHT && writer == a->wave && known)
      found(a, DMA_NOT_WAITED, lane, address, instruction, writer);
  }
  if (a->use == LDS_WRITE && known && !changed) return;
  int both_atomic = a->use == LDS_ATOMIC && written & ATOMIC;
  if (races && stamp_epoch(written) == a->epoch && writer != a->wave && !both_atomic)
    found(a, LDS_RACE, lane, address, instruction, writer);
  if (a->use == LDS_READ) {
    r->read[g] = read_stamp(read, a->epoch, a->wave);
    r->reader[g] = a->instruction;
    return;
  }
  u32 others = stamp_epoch(read) == a->epoch ? (u32)(read & ~self) : 0;
  if (races && others) found(a, LDS_RACE, lane, address, r->reader[g], (u32)__builtin_ctz(others));
  u64 flags = a->use == LDS_DMA ? IN_FLIGHT : a->use == LDS_ATOMIC ? ATOMIC : 0;
  r->written[g] = write_stamp(a->epoch, a->wave, a->instruction, flags);
}

/* One lane's access, of any kind. */
static void check_lane(const Access *a, u64 l, u32 first, u32 bytes, int alters) {
  Machine *m = a->m;
  u32 end = first + bytes, word = first / 4, words = (end - 1) / 4 - word + 1;
  int whole = !m->bytes.written || (first | end) % 4 == 0;
  u32 g = whole ? word : first, n = whole ? words : bytes;
  const Records *r = whole ? &m->words : &m->bytes;
  for (u32 k = 0; !whole && k < words; k++) split(m, word + k);
  if (a->use == LDS_READ && quiet_read(a, r, g, n)) return;
  if (a->use == LDS_WRITE && (alters ? quiet_write(a, r, g, n) : repeats(a, r, g, n))) return;
  FOR_RECORDS(m, first, end, r, g) inspect(a, l, r, g, alters);
  for (u32 k = 0; m->bytes.written && a->use != LDS_READ && k < words; k++) unite(m, word + k);
}

/* Checks and records one access, before it happens. `changed`: lanes whose write alters what LDS holds. A write that
 * repeats the value already there, as redundant layouts do from several waves, is no race and leaves no record. */
void check_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, LdsUse use, u64 changed) {
  Machine *m = w->machine;
  i64 now = (i64)m->epoch << 32;
  const Access a = {m, w, i, (u32)(i - m->program), w->id, m->epoch, use, (i64)m->first_epoch << 32, now, (now >> WAVE_SHIFT) + w->id};
  if (use == LDS_READ || use == LDS_WRITE) {
    if (bytes == 16 && use == LDS_READ) lanes = loud_reads(a, m->words, lanes, address);
    else if (bytes == 16) lanes = (lanes & ~changed) | loud_writes(a, m->words, lanes & changed, address);
    else if (bytes == 4) lanes = loud_singles(a, m->words, NULL, lanes, address, changed);
    else if (bytes == 1 && m->bytes.written) lanes = loud_singles(a, m->bytes, m->words.written, lanes, address, changed);
  }
  FOR_LANES(lanes, l) check_lane(&a, l, address[l], bytes, (int)(changed >> l & 1));
}

/* ---- accesses that last ---- */

INLINE u32 end_of(const Machine *m, const Transfer *t, u32 address) {
  u64 end = (u64)address + t->instruction->bytes;
  return end < m->lds_bytes ? (u32)end : m->lds_bytes;
}
#define FOR_TRANSFER(m, t, r, g)                                                                              \
  for (u32 part = 0; part < (t)->parts; part++)                                                               \
    FOR_LANES((t)->lanes, l)                                                                                  \
      FOR_RECORDS(m, (t)->address[part][l], end_of(m, t, (t)->address[part][l]), r, g)

/* The data of a load to LDS are there. */
void arrive(Wave *w, const Transfer *t) {
  Machine *m = w->machine;
  u32 instruction = (u32)(t->instruction - m->program);
  FOR_TRANSFER(m, t, r, g) {
    u64 written = r->written[g];
    if (stamp_wave(written) == w->id && stamp_instruction(written) == instruction) r->written[g] = written & ~IN_FLIGHT;
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
      FOR_TRANSFER(m, t, r, g) {
        if (t->lds_use == LDS_READ) {
          r->read[g] = read_stamp(r->read[g], m->epoch, w->id);
          r->reader[g] = instruction;
        } else if (stamp_epoch(r->written[g]) < m->epoch) {
          r->written[g] = write_stamp(m->epoch, w->id, instruction, flags);
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
      u32 word = address[l] / 4 + k, bank = word & (m->lds_banks - 1), n = 0;
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
      u64 run = (1ull << words) - 1, bank = address[l] / 4 & (m->lds_banks - 1), mine = run << bank;
      if (bank + words > m->lds_banks) mine |= run >> (m->lds_banks - bank);
      clash |= banks & mine;
      banks |= mine;
    }
    if (clash) m->bank_conflicts += cycles(m, active, address, words) - 1;
  }
}
