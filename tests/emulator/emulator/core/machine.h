/* The state of a launch. `Machine`, `Buffer` and `Finding` are mirrored in native.py. */
#pragma once
#include "instruction.h"

typedef struct Wave Wave;
typedef struct Machine Machine;

/* Device memory. Buffer number n occupies addresses from (n << SLOT_BITS) + SLOT_START: the number is found by a shift,
 * a stray access of less than 4 GiB cannot land in a neighbour, and every buffer crosses a 4 GiB line after its first
 * 4 KiB, so that address arithmetic which loses a carry shows. */
#define SLOT_BITS 36
#define SLOT_START 0xFFFFF000u
typedef struct {
  u8 *host;
  u64 base, size;
  u8 *initialised, *loaded, *stored; /* bit maps, one bit a byte; NULL: all initialised, not recorded */
  u64 loaded_bytes, stored_bytes;
} Buffer;

/* Apertures of flat addressing: the upper half of an address into LDS and into scratch. */
#define SHARED_APERTURE 0x00010000u
#define PRIVATE_APERTURE 0x00020000u

enum { CHECK_BOUNDS = 1, CHECK_UNINITIALISED = 2, CHECK_WAITS = 4, CHECK_BARRIERS = 8, CHECK_OPERANDS = 16 };
enum { ORDER_FORWARD, ORDER_REVERSED, ORDER_RANDOM };

typedef enum {
  OUT_OF_BOUNDS,       /* other: number of the nearest buffer, -1 for LDS, -2 for scratch */
  UNINITIALISED,       /* other: as above */
  MISSING_WAIT,        /* other: instruction that started the transfer; address: register or LDS address */
  LDS_RACE,            /* other: the earlier access; other_wave: who made it */
  DMA_NOT_WAITED,      /* other: the load to LDS */
  NOT_REPLICATED,      /* WMMA operand whose upper 16 lanes differ from the lower 16 */
} FindingKind;

typedef struct {
  u32 kind, instruction, lane, wave, block[3], bytes;
  i32 other;
  u32 other_wave;
  u64 address, count;
} Finding;
#define MAX_FINDINGS 64

/* A memory operation whose wave has not yet waited for it. */
typedef enum { IN_ORDER, ANY_ORDER } Ordering;
typedef enum { LDS_NONE, LDS_READ, LDS_WRITE, LDS_ATOMIC, LDS_DMA } LdsUse;
typedef struct {
  const Instr *instruction;
  u8 ordering, lds_use, parts;
  u64 lanes;
  u32 address[2][LANES]; /* in LDS, of each of the `parts` */
} Transfer;

enum { COUNT_LOAD, COUNT_LDS, COUNT_STORE, COUNTERS }; /* vmcnt, lgkmcnt, vscnt */
#define MAX_TRANSFERS 64
typedef struct {
  u32 pending;
  u64 registers[REGISTER_WORDS]; /* to be filled */
  Transfer transfer[MAX_TRANSFERS];
} Counter;

enum { RUNNING, AT_BARRIER, ENDED, STOPPED };
struct Wave {
  u32 s[SGPRS];
  u32 pc, state, id, lanes;
  u32 fp16_ovfl;  /* MODE bit 23: fp8 and f16 conversions saturate */
  u32 loading;    /* some register is still to be filled */
  Machine *machine;
  u8 *scratch;    /* lanes x scratch_bytes */
  u64 mask_key;   /* mask_lanes[l] is -1 where bit l of mask_key is set, else 0 */
  u32 mask_lanes[LANES];
  Counter counter[COUNTERS];
  u32 v[VGPRS][LANES];
};

/* Who last wrote and read each word, or byte, of LDS. */
typedef struct {
  u64 *written, *read;
  u32 *reader;
} Records;

struct Machine {
  /* the program */
  const Instr *program;
  u64 *executed; /* per instruction */
  u32 instructions, entry, gfx, wave_size;
  u64 code_base;
  /* memory */
  Buffer *buffers;
  u32 buffer_count, lds_bytes, scratch_bytes, lds_banks, vgprs;
  u8 *lds;
  Records words, bytes; /* of LDS; bytes.written is NULL where the kernel accesses whole words only: races.c */
  u8 *scratch;
  Wave *waves;
  /* the launch */
  u32 grid[3], block_size[3], wave_count, user_sgprs, user_sgpr[32], workgroup_id_mask;
  u32 checks, order, record, stop; /* record: bit maps and bank conflicts */
  u64 seed, limit;
  /* where it is */
  u32 block[3], epoch, first_epoch;
  u64 wave_instructions;
  /* what it found */
  u64 lds_loaded, lds_stored, bank_conflicts, lds_accesses;
  u32 finding_count;
  Finding finding[MAX_FINDINGS];
};

INLINE u64 exec_mask(const Wave *w) { return w->lanes == 32 ? w->s[REG_EXEC] : join(w->s[REG_EXEC], w->s[REG_EXEC + 1]); }
INLINE u64 all_lanes(const Wave *w) { return w->lanes == 32 ? 0xFFFFFFFFull : ~0ull; }
INLINE u64 read_mask(const Wave *w, u32 sgpr) { return w->lanes == 32 ? w->s[sgpr] : join(w->s[sgpr], w->s[sgpr + 1]); }
INLINE void write_mask(Wave *w, u32 sgpr, u64 mask) {
  w->s[sgpr] = (u32)mask;
  if (w->lanes == 64) w->s[sgpr + 1] = (u32)(mask >> 32);
}
#define FOR_LANES(mask, l) for (u64 _m = (mask), l; _m && (l = (u64)__builtin_ctzll(_m), 1); _m &= _m - 1)

/* vector.c */
void execute_vector(Wave *w, const Instr *i);
void execute_packed(Wave *w, const Instr *i);
const u32 *fetch(Wave *w, const Instr *i, const Operand *op, u32 *room, u64 *valid);
void expand_mask(u64 mask, u32 *lanes, u32 set);
void write_rows(Wave *w, const Operand *dst, u32 first, const u32 *values, u64 lanes);

/* checks.c */
Finding *report(Wave *w, const Instr *i, FindingKind kind);
void check_registers(Wave *w, const Instr *i);
void track(Wave *w, const Instr *i, int counter, Ordering ordering, LdsUse use, u64 lanes, const u32 *address,
           const u32 *address2);
void wait_until(Wave *w, int counter, u32 allowed);

/* races.c */
void check_lds(Wave *w, const Instr *i, u64 lanes, const u32 *address, u32 bytes, LdsUse use, u64 changed);
void arrive(Wave *w, const Transfer *t);
void carry_over_barrier(Wave *w);
void count_bank_conflicts(Machine *m, u64 lanes, const u32 *address, u32 bytes);

/* run.c */
typedef void (*Execute)(Wave *, const Instr *);
/* One lane-wise operation on whole rows: d and carry are written, s[0..3] are the sources, s[4] is the old d. */
typedef void (*Body)(u32 *d, u32 *carry, const u32 *const s[SOURCES], const Instr *i, const Wave *w);
typedef struct {
  const char *name;
  Execute execute;
  Body body;
} Semantics;
extern const Semantics SEMANTICS[];
extern u64 (*const ATOMICS[])(u64 memory, u64 data, u64 compare);
