/* Global memory and scratch: addresses of the four vector address spaces, scalar loads, atomics, loads to LDS. */
#include "formats.h"
#include "machine.h"
#include "rows.h"

/* ---- one access ---- */

INLINE void set_bits(u8 *map, u64 first, u32 count) { /* count <= 16 */
  u32 word, whole = 0xFFFF;
  if (first % 8 == 0 && count == 16) { /* what lanes beside this one have just stored is not waited for */
    memcpy(map + (first >> 3), &whole, 2);
    return;
  }
  memcpy(&word, map + (first >> 3), 4);
  word |= ((1u << count) - 1) << (first & 7);
  memcpy(map + (first >> 3), &word, 4);
}

INLINE int all_bits(const u8 *map, u64 first, u32 count) {
  u32 word, wanted = (1u << count) - 1;
  memcpy(&word, map + (first >> 3), 4);
  return (word >> (first & 7) & wanted) == wanted;
}

INLINE Buffer *buffer_at(Machine *m, u64 address) {
  u64 slot = address >> SLOT_BITS;
  return slot < m->buffer_count && m->buffers[slot].size ? &m->buffers[slot] : NULL;
}

INLINE void note(Wave *w, const Instr *i, Buffer *b, u64 lane, u64 offset, u32 bytes, int store) {
  if (store) {
    b->stored_bytes += bytes;
    if (b->stored) set_bits(b->stored, offset, bytes);
    if (b->initialised) set_bits(b->initialised, offset, bytes);
    return;
  }
  b->loaded_bytes += bytes;
  if (b->loaded) set_bits(b->loaded, offset, bytes);
  if (b->initialised && w->machine->checks & CHECK_UNINITIALISED && !all_bits(b->initialised, offset, bytes)) {
    Finding *f = report(w, i, UNINITIALISED);
    if (f) {
      f->lane = (u32)lane;
      f->address = b->base + offset;
      f->bytes = bytes;
      f->other = (i32)(b - w->machine->buffers);
    }
  }
}

/* Host address of `bytes` bytes of device memory, NULL if they lie outside every buffer. */
INLINE u8 *touch_memory(Wave *w, const Instr *i, u64 lane, u64 address, u32 bytes, int store) {
  Machine *m = w->machine;
  Buffer *b = buffer_at(m, address);
  if (b && address - b->base <= b->size && bytes <= b->size - (address - b->base)) {
    note(w, i, b, lane, address - b->base, bytes, store);
    return b->host + (address - b->base);
  }
  Finding *f = m->checks & CHECK_BOUNDS ? report(w, i, OUT_OF_BOUNDS) : NULL;
  if (f) {
    f->lane = (u32)lane;
    f->address = address;
    f->bytes = bytes;
    f->other = b ? (i32)(b - m->buffers) : 0;
  }
  return NULL;
}

/* ---- addresses of a vector access ---- */

typedef struct {
  u64 lanes;            /* active */
  u64 address[LANES];
  u64 suppressed;       /* by the range check of a buffer resource: loads give 0, stores do nothing */
  u64 shared, private;  /* lanes of a FLAT access that go to LDS, to scratch */
} Addresses;

INLINE u64 sgpr_pair(const Wave *w, const Operand *op) { return join(w->s[op->index], w->s[op->index + 1]); }
INLINE u32 scalar(const Wave *w, const Operand *op) { return op->kind == KIND_SGPR ? w->s[op->index] : (u32)op->value; }

/* src[0]: vaddr, src[1]: saddr or resource, src[2]: soffset. */
static void buffer_addresses(Wave *w, const Instr *i, u32 bytes, Addresses *a) {
  const u32 *resource = &w->s[i->src[1].index];
  u64 base = join(resource[0], resource[1] & 0xFFFF);
  u32 stride = resource[1] >> 16 & 0x3FFF, records = resource[2], soffset = scalar(w, &i->src[2]);
  FOR_LANES(a->lanes, l) {
    u32 row = 0, index = i->idxen ? w->v[i->src[0].index + row++][l] : 0;
    u64 offset = (u64)(i->offen ? w->v[i->src[0].index + row][l] : 0) + (u32)i->offset;
    int inside = stride && i->idxen ? index < records && offset + bytes <= stride : offset + soffset + bytes <= records;
    if (!inside) a->suppressed |= 1ull << l;
    a->address[l] = base + soffset + offset + (u64)index * stride;
  }
}

static void scratch_addresses(Wave *w, const Instr *i, u32 bytes, Addresses *a) {
  Machine *m = w->machine;
  u32 base = (i->src[1].kind == KIND_SGPR ? w->s[i->src[1].index] : 0) + (u32)i->offset;
  FOR_LANES(a->lanes, l) {
    u32 at = base + (i->src[0].kind == KIND_VGPR ? w->v[i->src[0].index][l] : 0);
    a->address[l] = at;
    if ((u64)at + bytes <= m->scratch_bytes) continue;
    a->suppressed |= 1ull << l;
    Finding *f = m->checks & CHECK_BOUNDS ? report(w, i, OUT_OF_BOUNDS) : NULL;
    if (f) {
      f->lane = (u32)l;
      f->address = at;
      f->bytes = bytes;
      f->other = -2;
    }
  }
}

static void addresses(Wave *w, const Instr *i, u32 bytes, Addresses *a) {
  a->lanes = exec_mask(w);
  a->suppressed = a->shared = a->private = 0;
  if (i->space == SPACE_BUFFER) return buffer_addresses(w, i, bytes, a);
  if (i->space == SPACE_SCRATCH) return scratch_addresses(w, i, bytes, a);
  u64 base = (u64)(i64)i->offset;
  const u32 *low = w->v[i->src[0].index];
  if (i->src[1].kind == KIND_SGPR) {
    base += sgpr_pair(w, &i->src[1]);
    for (u32 l = 0; l < LANES; l++) a->address[l] = base + low[l];
  } else {
    for (u32 l = 0; l < LANES; l++) a->address[l] = base + join(low[l], low[l + LANES]);
  }
  if (i->space == SPACE_FLAT)
    FOR_LANES(a->lanes, l) {
      u32 aperture = (u32)(a->address[l] >> 32);
      a->shared |= (u64)(aperture == SHARED_APERTURE) << l;
      a->private |= (u64)(aperture == PRIVATE_APERTURE) << l;
    }
}

static u8 *flat_to_lds(Wave *w, const Instr *i, u64 lane, u32 at, u32 bytes, int store) {
  Machine *m = w->machine;
  if ((u64)at + bytes > m->lds_bytes) return NULL;
  if (m->checks & (CHECK_BARRIERS | CHECK_UNINITIALISED)) {
    u32 address[LANES];
    address[lane] = at;
    check_lds(w, i, 1ull << lane, address, bytes, store ? LDS_WRITE : LDS_READ, ~0ull);
  }
  return m->lds + at;
}

INLINE u8 *host_address(Wave *w, const Instr *i, const Addresses *a, u64 l, u32 bytes, int store) {
  if (a->suppressed >> l & 1) return NULL;
  if (i->space == SPACE_SCRATCH) return w->scratch + l * w->machine->scratch_bytes + a->address[l];
  if (a->shared >> l & 1) return flat_to_lds(w, i, l, (u32)a->address[l], bytes, store);
  if (a->private >> l & 1) {
    u32 at = (u32)a->address[l];
    return (u64)at + bytes <= w->machine->scratch_bytes ? w->scratch + l * w->machine->scratch_bytes + at : NULL;
  }
  return touch_memory(w, i, l, a->address[l], bytes, store);
}

static void count_transfer(Wave *w, const Instr *i, int store, LdsUse use, u64 lanes, const u32 *lds_address) {
  int flat_gfx9 = i->space == SPACE_FLAT && w->machine->gfx < 1000;
  int counter = store && w->machine->gfx >= 1100 ? COUNT_STORE : COUNT_LOAD;
  Ordering ordering = flat_gfx9 ? ANY_ORDER : IN_ORDER;
  track(w, i, counter, ordering, use, lanes, lds_address, NULL);
  if (i->space == SPACE_FLAT) track(w, i, COUNT_LDS, ordering, LDS_NONE, lanes, NULL, NULL);
}

/* Where the lanes of a load read: NOTHING where they may not. */
static void sources(Wave *w, const Instr *i, const Addresses *a, u32 bytes, const u8 **from) {
  static const u8 NOTHING[16];
  u64 others = a->lanes, plain = a->lanes & ~(a->suppressed | a->shared | a->private);
  Buffer *b = plain && i->space != SPACE_SCRATCH ? buffer_at(w->machine, a->address[__builtin_ctzll(plain)]) : NULL;
  if (b && !b->initialised && b->size >= bytes) { /* the usual case: lanes that read one buffer, with nothing to report */
    const u64 base = b->base, last = b->size - bytes;
    const u8 *host = b->host;
    u8 *map = b->loaded;
    others &= ~plain;
    FOR_LANES(plain, l) {
      u64 offset = a->address[l] - base;
      if (offset > last) {
        others |= 1ull << l;
        continue;
      }
      from[l] = host + offset;
      if (map) set_bits(map, offset, bytes);
    }
    b->loaded_bytes += (u64)__builtin_popcountll(a->lanes & ~others) * bytes;
  }
  FOR_LANES(others, l) {
    const u8 *there = host_address(w, i, a, l, bytes, 0);
    from[l] = there ? there : NOTHING;
  }
}

/* ---- the instructions ---- */

/* The value of `bytes` (1 or 2) bytes as a load leaves it in its register. */
INLINE u32 widen(const Instr *i, u32 x, u32 old) {
  if (i->is_signed) x = i->bytes == 1 ? (u32)(i32)(i8)x : (u32)(i32)(i16)x;
  return i->half == 1 ? (old & 0xFFFF0000u) | (x & 0xFFFF) : i->half == 2 ? (old & 0xFFFF) | x << 16 : x;
}

void load_memory(Wave *w, const Instr *i) {
  Addresses a;
  u32 bytes = i->bytes, (*d)[LANES] = &w->v[i->dst.index];
  addresses(w, i, bytes, &a);
  const u8 *from[LANES];
  sources(w, i, &a, bytes, from);
  if (bytes >= 4) rows_from_lanes(d, from, a.lanes, bytes);
  else FOR_LANES(a.lanes, l) d[0][l] = widen(i, bytes == 2 ? from[l][0] | from[l][1] << 8 : from[l][0], d[0][l]);
  count_transfer(w, i, 0, LDS_NONE, a.lanes, NULL);
}

void store_memory(Wave *w, const Instr *i) {
  Addresses a;
  u32 bytes = i->bytes, (*data)[LANES] = &w->v[i->src[3].index];
  addresses(w, i, bytes, &a);
  FOR_LANES(a.lanes, l) {
    u32 value[4];
    for (u32 k = 0; k < (bytes + 3) / 4; k++) value[k] = data[k][l];
    if (i->half == 2) value[0] >>= 16;
    u8 *to = host_address(w, i, &a, l, bytes, 1);
    if (to) move(to, value, bytes);
  }
  count_transfer(w, i, 1, LDS_NONE, a.lanes, NULL);
}

/* Lane l's data go to LDS at M0 + offset + l x max(bytes, 4); CDNA3 ISA, "Memory Buffer Load to LDS". */
void load_to_lds(Wave *w, const Instr *i) {
  Machine *m = w->machine;
  Addresses a;
  u32 bytes = i->bytes, room = bytes < 4 ? 4 : bytes, at[LANES];
  u64 inside = 0;
  addresses(w, i, bytes, &a);
  for (u32 l = 0; l < LANES; l++) {
    at[l] = w->s[REG_M0] + (u32)i->offset + l * room;
    inside |= (u64)((u64)at[l] + room <= m->lds_bytes) << l;
  }
  if (a.lanes & ~inside && m->checks & CHECK_BOUNDS) {
    Finding *f = report(w, i, OUT_OF_BOUNDS);
    if (f) {
      f->lane = (u32)__builtin_ctzll(a.lanes & ~inside);
      f->address = at[f->lane];
      f->bytes = room;
      f->other = -1;
    }
  }
  u64 lanes = a.lanes & inside;
  if (m->checks & ~CHECK_BOUNDS) check_lds(w, i, lanes, at, room, LDS_DMA, ~0ull);
  FOR_LANES(lanes, l) {
    u32 value[4] = {0};
    const u8 *from = host_address(w, i, &a, l, bytes, 0);
    if (from) move(value, from, bytes);
    if (bytes < 4) value[0] = widen(i, value[0], 0);
    move(m->lds + at[l], value, room);
  }
  m->lds_stored += (u64)__builtin_popcountll(lanes) * room;
  count_transfer(w, i, 0, LDS_DMA, lanes, at);
}

/* src[3]: data (then the comparand). Lanes act one after another, lowest first. */
void atomic_memory(Wave *w, const Instr *i) {
  Addresses a;
  u32 bytes = i->bytes, words = bytes / 4, (*data)[LANES] = &w->v[i->src[3].index];
  addresses(w, i, bytes, &a);
  FOR_LANES(a.lanes, l) {
    u64 old = 0, x = words == 2 ? join(data[0][l], data[1][l]) : data[0][l];
    u64 compare = !i->flag ? 0 : words == 2 ? join(data[2][l], data[3][l]) : data[1][l]; /* flag: compare-and-swap */
    u8 *at = host_address(w, i, &a, l, bytes, 0);
    if (at) {
      memcpy(&old, at, bytes);
      u64 result = ATOMICS[i->atomic](old, x, compare);
      host_address(w, i, &a, l, bytes, 1);
      memcpy(at, &result, bytes);
    }
    if (i->returns)
      for (u32 k = 0; k < words; k++) w->v[i->dst.index + k][l] = (u32)(old >> 32 * k);
  }
  count_transfer(w, i, !i->returns, LDS_NONE, a.lanes, NULL);
}

/* s_load: src[0] base pair, src[1] offset register if any. s_buffer_load: src[0] is a resource (flag set). */
void load_scalar(Wave *w, const Instr *i) {
  u64 offset = (u64)(i64)i->offset + (i->src[1].kind == KIND_SGPR ? w->s[i->src[1].index] : 0);
  const u32 *from = &w->s[i->src[0].index];
  u64 base = i->flag ? join(from[0], from[1] & 0xFFFF) : sgpr_pair(w, &i->src[0]) & ~3ull;
  u32 records = i->flag ? from[2] : 0, value[16] = {0};
  for (u32 k = 0; k < i->bytes; k += 4) { /* by the dword: what touch_memory records is at most 16 bytes */
    if (i->flag && offset + k + 4 > records) continue;
    const u8 *at = touch_memory(w, i, 0, base + (offset & ~3ull) + k, 4, 0);
    if (at) memcpy(&value[k / 4], at, 4);
  }
  memcpy(&w->s[i->dst.index], value, i->bytes);
  track(w, i, COUNT_LDS, ANY_ORDER, LDS_NONE, 1, NULL, NULL);
}
