/* DS instructions: reads, writes, atomics and transposing reads of LDS; cross-lane moves through the LDS crossbar. */
#include "machine.h"
#include "rows.h"

/* ---- one access ---- */

/* Lanes whose access fits; the others are reported, read 0 and write nothing. */
static u64 within(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes) {
  Machine *m = w->machine;
  u64 inside = 0;
  for (u32 l = 0; l < LANES; l++) inside |= (u64)((u64)address[l] + bytes <= m->lds_bytes) << l;
  if (lanes & ~inside && m->checks & CHECK_BOUNDS) {
    Finding *f = report(w, i, OUT_OF_BOUNDS);
    if (f) {
      f->lane = (u32)__builtin_ctzll(lanes & ~inside);
      f->address = address[f->lane];
      f->bytes = bytes;
      f->other = -1;
    }
  }
  return lanes & inside;
}

#define CHECKED(m) ((m)->checks & (CHECK_UNINITIALISED | CHECK_WAITS | CHECK_BARRIERS))

static void account(Machine *m, u64 lanes, const u32 *address, u32 bytes, u64 *total) {
  *total += (u64)__builtin_popcountll(lanes) * bytes;
  if (m->record) count_bank_conflicts(m, lanes, address, bytes);
}

/* Reads `bytes` per lane into value[word][l]; lanes outside LDS read 0. */
static void read_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, u32 value[4][LANES]) {
  Machine *m = w->machine;
  u64 inside = within(w, i, lanes, address, bytes);
  if (inside != all_lanes(w)) memset(value, 0, (bytes + 3) / 4 * sizeof value[0]);
  if (CHECKED(m)) check_lds(w, i, inside, address, bytes, LDS_READ, 0);
  if (bytes >= 4) {
    const u8 *from[LANES];
    for (u32 l = 0; l < LANES; l++) from[l] = m->lds + address[l];
    rows_from_lanes(value, from, inside, bytes);
  } else {
    FOR_LANES(inside, l) value[0][l] = bytes == 2 ? m->lds[address[l]] | m->lds[address[l] + 1] << 8 : m->lds[address[l]];
  }
  account(m, inside, address, bytes, &m->lds_loaded);
}

/* Writes the first `bytes` of the registers from `data` on, or from its upper half if that is `half` 2. */
static void write_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, const u32 (*data)[LANES]) {
  Machine *m = w->machine;
  u32 value[LANES][4], upper = i->half == 2 ? 16 : 0;
  lanes = within(w, i, lanes, address, bytes);
  lanes_from_rows(value, data, (bytes + 3) / 4);
  for (u32 l = 0; upper && l < LANES; l++) value[l][0] >>= upper;
  if (CHECKED(m)) {
    u64 changed = 0;
    FOR_LANES(lanes, l) changed |= (u64)differ(m->lds + address[l], value[l], bytes) << l;
    check_lds(w, i, lanes, address, bytes, LDS_WRITE, changed);
  }
  FOR_LANES(lanes, l) move(m->lds + address[l], value[l], bytes);
  account(m, lanes, address, bytes, &m->lds_stored);
}

static void address_lanes(const Wave *w, const Instr *i, u32 offset, u32 *address) {
  const u32 *base = w->v[i->src[0].index];
  for (u32 l = 0; l < LANES; l++) address[l] = base[l] + offset;
}

static void fill_registers(Wave *w, u32 first, u32 words, u64 lanes, u32 value[4][LANES]) {
  for (u32 k = 0; k < words; k++) {
    if (lanes == ~0ull) memcpy(w->v[first + k], value[k], sizeof value[k]);
    else FOR_LANES(lanes, l) w->v[first + k][l] = value[k][l];
  }
}

/* ---- reads and writes ---- */

void ds_read(Wave *w, const Instr *i) {
  u32 address[LANES], value[4][LANES], *d = w->v[i->dst.index];
  u64 lanes = exec_mask(w);
  address_lanes(w, i, (u32)i->offset, address);
  read_lds(w, i, lanes, address, i->bytes, value);
  track(w, i, COUNT_LDS, IN_ORDER, LDS_READ, lanes, address, NULL);
  if (i->bytes >= 4) {
    fill_registers(w, i->dst.index, i->bytes / 4, lanes, value);
    return;
  }
  FOR_LANES(lanes, l) {
    u32 x = value[0][l];
    if (i->is_signed) x = i->bytes == 1 ? (u32)(i32)(i8)x : (u32)(i32)(i16)x;
    d[l] = i->half == 1 ? (d[l] & 0xFFFF0000u) | (x & 0xFFFF) : i->half == 2 ? (d[l] & 0xFFFF) | x << 16 : x;
  }
}

void ds_write(Wave *w, const Instr *i) {
  u32 address[LANES];
  address_lanes(w, i, (u32)i->offset, address);
  write_lds(w, i, exec_mask(w), address, i->bytes, &w->v[i->src[1].index]);
  track(w, i, COUNT_LDS, IN_ORDER, LDS_WRITE, exec_mask(w), address, NULL);
}

/* Two elements per lane, at offsets counted in elements (x 64 in the st64 forms): i->stride is that unit in dwords. */
void ds_read2(Wave *w, const Instr *i) {
  u32 address[2][LANES], value[2][4][LANES], words = i->bytes / 4;
  u64 lanes = exec_mask(w);
  for (u32 n = 0; n < 2; n++) {
    address_lanes(w, i, (u32)(n ? i->offset2 : i->offset) * i->stride * 4, address[n]);
    read_lds(w, i, lanes, address[n], i->bytes, value[n]);
  }
  for (u32 n = 0; n < 2; n++) fill_registers(w, i->dst.index + n * words, words, lanes, value[n]);
  track(w, i, COUNT_LDS, IN_ORDER, LDS_READ, lanes, address[0], address[1]);
}

void ds_write2(Wave *w, const Instr *i) {
  u32 address[2][LANES];
  for (u32 n = 0; n < 2; n++) {
    address_lanes(w, i, (u32)(n ? i->offset2 : i->offset) * i->stride * 4, address[n]);
    write_lds(w, i, exec_mask(w), address[n], i->bytes, &w->v[i->src[1 + n].index]);
  }
  track(w, i, COUNT_LDS, IN_ORDER, LDS_WRITE, exec_mask(w), address[0], address[1]);
}

void ds_atomic(Wave *w, const Instr *i) {
  Machine *m = w->machine;
  u32 address[LANES], words = i->bytes / 4, (*data)[LANES] = &w->v[i->src[1].index];
  address_lanes(w, i, (u32)i->offset, address);
  u64 active = exec_mask(w), lanes = within(w, i, active, address, i->bytes);
  if (CHECKED(m)) check_lds(w, i, lanes, address, i->bytes, LDS_ATOMIC, ~0ull);
  FOR_LANES(active, l) {
    u64 old = 0, x = words == 2 ? join(data[0][l], data[1][l]) : data[0][l], compare = 0;
    if (i->flag) { /* compare-and-swap: gfx9 gives the comparand first and the new value second, gfx11 the reverse */
      const u32(*other)[LANES] = (const u32(*)[LANES]) & w->v[i->src[2].index];
      compare = words == 2 ? join(other[0][l], other[1][l]) : other[0][l];
      if (m->gfx < 1100) {
        u64 swap = x;
        x = compare;
        compare = swap;
      }
    }
    if (lanes >> l & 1) {
      memcpy(&old, m->lds + address[l], i->bytes);
      u64 result = ATOMICS[i->atomic](old, x, compare);
      memcpy(m->lds + address[l], &result, i->bytes);
    }
    if (i->returns)
      for (u32 k = 0; k < words; k++) w->v[i->dst.index + k][l] = (u32)(old >> 32 * k);
  }
  account(m, lanes, address, i->bytes, &m->lds_stored);
  track(w, i, COUNT_LDS, IN_ORDER, LDS_ATOMIC, lanes, address, NULL);
}

/* ds_read_b64_tr_b16, _b8, _b4 and ds_read_b96_tr_b6 (gfx950): 16 lanes together read a matrix of 16 columns, each lane
 * a piece of a row, and each lane keeps one column. With E elements per lane, row r is held by 16 / E consecutive lanes:
 *   element e of lane l (0 <= l < 16)  =  element l % E of what lane e x (16 / E) + l / E has read. */
void ds_read_transposed(Wave *w, const Instr *i) {
  u32 address[LANES], value[4][LANES], turned[4][LANES] = {{0}};
  u32 bits = i->flag, elements = i->bytes * 8u / bits, per_row = 16 / elements;
  u64 lanes = exec_mask(w);
  address_lanes(w, i, (u32)i->offset, address);
  read_lds(w, i, lanes, address, i->bytes, value);
  for (u32 l = 0; l < LANES; l++)
    for (u32 e = 0; e < elements; e++) {
      u32 from = (l & ~15u) + e * per_row + (l & 15) / elements, at = (l & 15) % elements * bits, to = e * bits;
      for (u32 b = 0; b < bits; b++) { /* bit by bit: 6-bit elements straddle registers */
        u32 bit = value[(at + b) / 32][from] >> (at + b) % 32 & 1;
        turned[(to + b) / 32][l] |= bit << (to + b) % 32;
      }
    }
  fill_registers(w, i->dst.index, i->bytes / 4, lanes, turned);
  track(w, i, COUNT_LDS, IN_ORDER, LDS_READ, lanes, address, NULL);
}

/* ---- cross-lane moves, which use no LDS memory ---- */

static void finish_move(Wave *w, const Instr *i, const u32 *moved) {
  write_rows(w, &i->dst, 0, moved, exec_mask(w));
  track(w, i, COUNT_LDS, IN_ORDER, LDS_NONE, 0, NULL, NULL);
}

/* Lane l reads lane (address[l] / 4) mod lanes; an inactive source lane gives 0. */
void ds_bpermute(Wave *w, const Instr *i) {
  const u32 *address = w->v[i->src[0].index], *data = w->v[i->src[1].index];
  u32 moved[LANES];
  u64 exec = exec_mask(w);
  for (u32 l = 0; l < LANES; l++) {
    u32 from = (address[l] + (u32)i->offset) / 4 % w->lanes;
    moved[l] = exec >> from & 1 ? data[from] : 0;
  }
  finish_move(w, i, moved);
}

/* Lane l writes to lane (address[l] / 4) mod lanes; the highest writer wins, unwritten lanes get 0. */
void ds_permute(Wave *w, const Instr *i) {
  const u32 *address = w->v[i->src[0].index], *data = w->v[i->src[1].index];
  u32 moved[LANES] = {0};
  FOR_LANES(exec_mask(w), l) moved[(address[l] + (u32)i->offset) / 4 % w->lanes] = data[l];
  finish_move(w, i, moved);
}

/* offset[15] set: a permutation of each 4 lanes; else within each 32 lanes, lane' = ((lane & and) | or) ^ xor. */
void ds_swizzle(Wave *w, const Instr *i) {
  const u32 *data = w->v[i->src[0].index];
  u32 moved[LANES], pattern = (u32)i->offset;
  u64 exec = exec_mask(w);
  for (u32 l = 0; l < LANES; l++) {
    u32 in_group = ((l & 31 & pattern) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31);
    u32 from = pattern & 0x8000 ? (l & ~3u) | (pattern >> 2 * (l & 3) & 3) : (l & ~31u) | in_group;
    moved[l] = exec >> from & 1 ? data[from] : 0;
  }
  finish_move(w, i, moved);
}
