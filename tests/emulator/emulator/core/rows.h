/* Between registers, which are rows of lanes, and memory, where a lane's words lie together: the latter is the transpose of
 * the former, and four lanes by four words are transposed in vectors. */
#pragma once
#include "types.h"

typedef u32 Quad __attribute__((vector_size(16)));
#if __has_builtin(__builtin_shufflevector) /* clang, gcc 12 */
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Quad){__VA_ARGS__})
#endif

INLINE void transpose(Quad q[4]) {
  Quad a = SHUFFLE(q[0], q[1], 0, 4, 1, 5), b = SHUFFLE(q[0], q[1], 2, 6, 3, 7);
  Quad c = SHUFFLE(q[2], q[3], 0, 4, 1, 5), d = SHUFFLE(q[2], q[3], 2, 6, 3, 7);
  q[0] = SHUFFLE(a, c, 0, 1, 4, 5), q[1] = SHUFFLE(a, c, 2, 3, 6, 7);
  q[2] = SHUFFLE(b, d, 0, 1, 4, 5), q[3] = SHUFFLE(b, d, 2, 3, 6, 7);
}

/* memcpy of what one lane moves, in an instruction or two. */
INLINE void move(void *to, const void *from, u32 bytes) {
  if (bytes == 16) { /* the usual number, which a jump table would make an indirect jump of */
    memcpy(to, from, 16);
    return;
  }
  switch (bytes) {
    case 12: memcpy(to, from, 12); break;
    case 8: memcpy(to, from, 8); break;
    case 4: memcpy(to, from, 4); break;
    case 2: memcpy(to, from, 2); break;
    default: memcpy(to, from, bytes);
  }
}

INLINE int differ(const void *a, const void *b, u32 bytes) {
  u32 x, y;
  u64 p[2], q[2];
  switch (bytes) {
    case 16:
      memcpy(p, a, 16), memcpy(q, b, 16);
      return ((p[0] ^ q[0]) | (p[1] ^ q[1])) != 0;
    case 4:
      memcpy(&x, a, 4), memcpy(&y, b, 4);
      return x != y;
    case 1: return *(const u8 *)a != *(const u8 *)b;
    default: return memcmp(a, b, bytes) != 0;
  }
}

/* Rows of the given lanes from `bytes` (a multiple of 4) bytes where each lane points. */
INLINE void rows_from_lanes(u32 (*row)[LANES], const u8 *const *from, u64 lanes, u32 bytes) {
  for (u32 l = 0; l < LANES; l += 4, lanes >>= 4) {
    if (bytes == 16 && (lanes & 15) == 15) {
      Quad q[4];
      for (u32 k = 0; k < 4; k++) memcpy(&q[k], from[l + k], 16);
      transpose(q);
      for (u32 k = 0; k < 4; k++) memcpy(&row[k][l], &q[k], 16);
      continue;
    }
    for (u32 j = l; j < l + 4; j++) {
      u32 value[4];
      if (!(lanes >> (j - l) & 1)) continue;
      move(value, from[j], bytes);
      for (u32 k = 0; k < bytes / 4; k++) row[k][j] = value[k];
    }
  }
}

/* Each lane's words together, all lanes: the other way round. */
INLINE void lanes_from_rows(u32 (*lane)[4], const u32 (*row)[LANES], u32 words) {
  if (words < 3) {
    for (u32 k = 0; k < words; k++)
      for (u32 l = 0; l < LANES; l++) lane[l][k] = row[k][l];
    return;
  }
  for (u32 l = 0; l < LANES; l += 4) {
    Quad q[4] = {0};
    for (u32 k = 0; k < words; k++) memcpy(&q[k], &row[k][l], 16);
    transpose(q);
    memcpy(lane[l], q, sizeof q);
  }
}
