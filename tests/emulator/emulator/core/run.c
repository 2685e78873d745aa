/* Runs the blocks of a launch one after another, and the waves of a block in turns from barrier to barrier. */
#include "machine.h"

/* s_waitcnt in its forms: 255 in a field means that the instruction does not wait for that counter. */
void wait_counters(Wave *w, const Instr *i) {
  wait_until(w, COUNT_LOAD, i->wait_load);
  wait_until(w, COUNT_LDS, i->wait_lds);
  wait_until(w, COUNT_STORE, i->wait_store);
}

/* s_setreg_imm32_b32 on MODE.FP16_OVFL, the one mode bit that is modelled (decode.py refuses the others). */
void set_mode(Wave *w, const Instr *i) { w->fp16_ovfl = i->imm; }

static u64 next_random(u64 *state) { /* splitmix64 */
  u64 z = *state += 0x9E3779B97F4A7C15ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}

static void order_of(Machine *m, u64 *order, u64 n) {
  for (u64 k = 0; k < n; k++) order[k] = m->order == ORDER_REVERSED ? n - 1 - k : k;
  for (u64 k = n; m->order == ORDER_RANDOM && k > 1; k--) {
    u64 other = next_random(&m->seed) % k, x = order[k - 1];
    order[k - 1] = order[other];
    order[other] = x;
  }
}

/* What a register holds before anything wrote it: a NaN in fp32, and as a pair of bf16 or f16. */
#define POISON 0xFFC1FFC1u

static void start_wave(Machine *m, Wave *w, u32 id) {
  w->machine = m;
  w->id = id;
  w->lanes = m->wave_size;
  w->pc = m->entry;
  w->state = RUNNING;
  w->fp16_ovfl = w->loading = 0;
  w->scratch = m->scratch + (u64)id * m->wave_size * m->scratch_bytes;
  w->mask_key = 0;
  memset(w->mask_lanes, 0, sizeof w->mask_lanes);
  for (int c = 0; c < COUNTERS; c++) {
    w->counter[c].pending = 0;
    memset(w->counter[c].registers, 0, sizeof w->counter[c].registers);
  }
  for (u32 k = 0; k < SGPRS; k++) w->s[k] = POISON;
  w->s[REG_SCC] = 0;
  memcpy(w->s, m->user_sgpr, m->user_sgprs * sizeof(u32));
  u32 next = m->user_sgprs;
  for (u32 axis = 0; axis < 3; axis++)
    if (m->workgroup_id_mask >> axis & 1) w->s[next++] = m->block[axis];
  u32 threads = m->block_size[0] * m->block_size[1] * m->block_size[2], first = id * m->wave_size;
  u32 active = threads - first < m->wave_size ? threads - first : m->wave_size;
  write_mask(w, REG_EXEC, active == 64 ? ~0ull : (1ull << active) - 1);
  if (m->wave_size == 32) w->s[REG_EXEC + 1] = 0;
  for (u32 r = 0; r < m->vgprs; r++)
    for (u32 l = 0; l < LANES; l++) w->v[r][l] = POISON;
  for (u32 l = 0; l < active; l++) { /* v0: work-item id, x | y << 10 | z << 20 */
    u32 t = first + l, x = m->block_size[0], y = m->block_size[1];
    w->v[0][l] = t % x | t / x % y << 10 | t / (x * y) << 20;
  }
}

/* Until the wave waits at a barrier, ends, or has executed `quantum` instructions. */
static void run_wave(Machine *m, Wave *w, u64 quantum) {
  int waits = m->checks & CHECK_WAITS;
  u64 executed = 0;
  while (w->state == RUNNING && executed < quantum) {
    const Instr *i = &m->program[w->pc];
    if (waits && w->loading) check_registers(w, i);
    m->executed[w->pc++]++;
    executed++;
    SEMANTICS[i->op].execute(w, i);
  }
  m->wave_instructions += executed;
}

static void release_barrier(Machine *m) {
  m->epoch++;
  for (u32 k = 0; k < m->wave_count; k++) {
    Wave *w = &m->waves[k];
    if (w->state == AT_BARRIER) w->state = RUNNING;
    if (m->checks & CHECK_BARRIERS) carry_over_barrier(w);
  }
}

enum { DONE, LIMIT_REACHED, STOPPED_EARLY };

static int run_block(Machine *m) {
  u64 order[32], spent = 0;
  memset(m->lds, 0xA5, m->lds_bytes);
  m->first_epoch = ++m->epoch;
  for (u32 k = 0; k < m->wave_count; k++) start_wave(m, &m->waves[k], k);
  for (;;) {
    u32 running = 0, waiting = 0;
    order_of(m, order, m->wave_count);
    for (u32 k = 0; k < m->wave_count; k++) {
      Wave *w = &m->waves[order[k]];
      u64 before = m->wave_instructions;
      u64 quantum = m->order == ORDER_RANDOM ? 1 + next_random(&m->seed) % 64 : m->limit - spent + 1;
      if (w->state == RUNNING) run_wave(m, w, quantum);
      spent += m->wave_instructions - before;
      running += w->state == RUNNING;
      waiting += w->state == AT_BARRIER;
      if (m->stop) return STOPPED_EARLY;
    }
    if (spent > m->limit) return LIMIT_REACHED;
    if (running) continue;
    if (!waiting) return DONE;
    release_barrier(m);
  }
}

int run_grid(Machine *m) {
  u64 blocks = (u64)m->grid[0] * m->grid[1] * m->grid[2];
  u64 step = 1, start = 0;
  if (m->order == ORDER_RANDOM && blocks > 1) { /* an affine walk visits every block once, without a list of them */
    start = next_random(&m->seed) % blocks;
    do step = 1 + next_random(&m->seed) % (blocks - 1);
    while (({ u64 a = step, b = blocks; while (b) { u64 t = a % b; a = b; b = t; } a != 1; }));
  }
  for (u64 k = 0; k < blocks; k++) {
    u64 n = m->order == ORDER_REVERSED ? blocks - 1 - k : (u64)(((__uint128_t)k * step + start) % blocks);
    m->block[0] = (u32)(n % m->grid[0]);
    m->block[1] = (u32)(n / m->grid[0] % m->grid[1]);
    m->block[2] = (u32)(n / m->grid[0] / m->grid[1]);
    int status = run_block(m);
    if (status != DONE) return status;
  }
  return DONE;
}

u64 machine_size(void) { return sizeof(Machine); }
u64 instruction_size(void) { return sizeof(Instr); }
u64 wave_bytes(void) { return sizeof(Wave); }

/* Number of set bits: how many different bytes a bit map recorded. */
u64 count_bits(const u8 *map, u64 bytes) {
  u64 total = 0, k = 0, word;
  for (; k + 8 <= bytes; k += 8) {
    memcpy(&word, map + k, 8);
    total += (u64)__builtin_popcountll(word);
  }
  for (; k < bytes; k++) total += (u64)__builtin_popcount(map[k]);
  return total;
}
