/* What the expressions of isa/ call. */
#pragma once
#include "formats.h"
#include "machine.h"

#define EXEC exec_mask(w)
#define VCC read_mask(w, REG_VCC)
#define IMM (i->imm)
#define OP_SEL ((u32)i->op_sel)

/* ---- scalar operands ---- */

INLINE u32 scalar32(const Wave *w, const Operand *op) {
  return op->kind == KIND_SGPR ? w->s[op->index] : (u32)op->value;
}
INLINE u64 scalar64(const Wave *w, const Operand *op) {
  return op->kind == KIND_SGPR ? join(w->s[op->index], w->s[op->index + 1]) : op->value;
}
INLINE void set32(Wave *w, const Operand *op, u32 x) {
  if (op->kind == KIND_SGPR) w->s[op->index] = x;
}
INLINE void set64(Wave *w, const Operand *op, u64 x) {
  if (op->kind != KIND_SGPR) return;
  w->s[op->index] = (u32)x;
  w->s[op->index + 1] = (u32)(x >> 32);
}
INLINE void set_exec(Wave *w, u64 mask) { write_mask(w, REG_EXEC, mask); }

/* ---- integers ---- */

INLINE u64 bit_field(u64 x, u32 offset, u32 width, u32 bits) {
  return width == 0 ? 0 : x >> offset & (width >= bits ? ~0ull : (1ull << width) - 1);
}
INLINE i64 signed_bit_field(i64 x, u32 offset, u32 width, u32 bits) {
  if (width == 0) return 0;
  if (width + offset > bits) width = bits - offset;
  return (i64)((u64)x << (64 - width - offset)) >> (64 - width);
}
INLINE u32 signed_field32(u32 x, u32 offset, u32 width) {
  return width == 0 ? 0 : (u32)((i32)(x >> offset << (32 - width)) >> (32 - width));
}
INLINE i32 sign24(u32 x) { return (i32)(x << 8) >> 8; }
INLINE i32 saturate_i32(i64 x) { return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (i32)x; }
INLINE i32 saturate_i16(i32 x) { return x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x; }
INLINE u32 reverse_bits(u32 x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0F0F0F0F) | (x & 0x0F0F0F0F) << 4;
  return __builtin_bswap32(x);
}
INLINE u32 sum_of_differences(u32 a, u32 b) {
  u32 sum = 0;
  for (u32 k = 0; k < 32; k += 8) sum += (u32)abs((int)(a >> k & 255) - (int)(b >> k & 255));
  return sum;
}
/* v_bitop3: bit 4a + 2b + c of `table` is the result for the bits a, b, c. */
INLINE u32 truth_table(u32 table, u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (u32 k = 0; k < 8; k++) d |= -(table >> k & 1) & (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return d;
}
/* v_perm: selector 0..7 a byte, 8..11 the sign of the 16-bit word 1, 3, 5, 7 bytes up, 12 zero, above 0xFF. */
INLINE u32 permute_bytes(u64 bytes, u32 selectors) {
  u32 d = 0;
  for (u32 k = 0; k < 32; k += 8) {
    u32 s = selectors >> k & 255;
    u32 byte = s < 8 ? (u32)(bytes >> 8 * s) & 255 : s == 12 ? 0 : s > 12 ? 255 : -(u32)(bytes >> (16 * (s - 8) + 15) & 1) & 255;
    d |= byte << k;
  }
  return d;
}
INLINE i32 dot_integers(u32 a, u32 b, u32 bits, u32 a_signed, u32 b_signed) {
  i32 sum = 0;
  for (u32 k = 0; k < 32; k += bits) {
    u32 up = 32 - bits;
    i32 x = a_signed ? (i32)(a >> k << up) >> up : (i32)(a >> k << up >> up);
    i32 y = b_signed ? (i32)(b >> k << up) >> up : (i32)(b >> k << up >> up);
    sum += x * y;
  }
  return sum;
}
/* `old` with part number `which` of `bits` bits replaced. */
INLINE u32 insert(u32 old, u32 which, u32 bits, u32 x) {
  u32 shift = which * bits & 31, part = ((1u << bits) - 1) << shift;
  return (old & ~part) | (x << shift & part);
}
INLINE u64 pair(f32 low, f32 high) { return join(as_u32(low), as_u32(high)); }

/* ---- floating point ---- */

INLINE f32 flush(f32 x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
/* IEEE maxNum and minNum: a NaN loses against a number, -0 against +0. */
INLINE f32 max_num(f32 a, f32 b) { return a > b || b != b ? a : a == b ? as_f32(as_u32(a) & as_u32(b)) : b; }
INLINE f32 min_num(f32 a, f32 b) { return a < b || b != b ? a : a == b ? as_f32(as_u32(a) | as_u32(b)) : b; }
INLINE f32 clamp1(f32 x) { return fminf(fmaxf(x, -1), 1); }
INLINE i32 f32_to_i32(f32 x) {
  return x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (i32)x;
}
INLINE u32 f32_to_u32(f32 x) { return !(x > 0) ? 0 : x >= 0x1p32f ? ~0u : (u32)x; }

/* v_cmp_class: mask bits are sNaN, qNaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf. */
INLINE u32 in_class(u64 x, u32 exponent_bits, u32 mantissa_bits, u32 mask) {
  u64 mantissa = x & ((1ull << mantissa_bits) - 1), top = (1ull << exponent_bits) - 1;
  u64 exponent = x >> mantissa_bits & top, negative = x >> (mantissa_bits + exponent_bits) & 1, kind;
  if (exponent == top && mantissa) return mask >> (mantissa >> (mantissa_bits - 1) & 1) & 1;
  if (exponent == top) kind = 3;
  else if (exponent) kind = 2;
  else kind = mantissa ? 1 : 0;
  return mask >> (negative ? 5 - kind : 6 + kind) & 1;
}

/* Scales numerator or denominator (`a` is the one of the two that this instruction is for) so that the Newton steps of a
 * division neither overflow nor lose bits; returns whether v_div_fmas must undo it. After the ISA documents' pseudocode,
 * but for a huge denominator with a tiny quotient, where scaling up as they print would overflow. */
#define DIV_SCALE(name, type, exponent_gap, tiny_exponent, shift, least_normal, ldexp_)                              \
  INLINE u32 name(type a, type denominator, type numerator, type *d) {                                               \
    int e_n = 0, e_d = 0;                                                                                            \
    type least = least_normal, reciprocal = 1 / denominator, quotient = numerator / denominator;                     \
    u32 undo = 0;                                                                                                    \
    frexp(numerator, &e_n), frexp(denominator, &e_d);                                                                \
    *d = a;                                                                                                          \
    if (numerator == 0 || denominator == 0) *d = (type)NAN;                                                          \
    else if (isnan(numerator) || isnan(denominator) || isinf(numerator) || isinf(denominator)) return 0;             \
    else if (e_n - e_d >= exponent_gap) undo = 1, *d = a == denominator ? ldexp_(a, shift) : a;                      \
    else if (fabs(denominator) < least) *d = ldexp_(a, shift);                                                       \
    else if (fabs(reciprocal) < least && fabs(quotient) < least) undo = 1, *d = a == denominator ? ldexp_(a, -shift) : a; \
    else if (fabs(reciprocal) < least) *d = ldexp_(a, -shift);                                                       \
    else if (fabs(quotient) < least) undo = 1, *d = a == numerator ? ldexp_(a, shift) : a;                           \
    else if (e_n <= tiny_exponent) *d = ldexp_(a, shift);                                                            \
    return undo;                                                                                                     \
  }
DIV_SCALE(div_scale_f32, f32, 96, 24 - 127, 64, 0x1p-126f, ldexpf)
DIV_SCALE(div_scale_f64, f64, 768, 54 - 1023, 128, 0x1p-1022, ldexp)

/* x + y rounded to odd: rounding that once more, to fewer bits, gives what one rounding of the exact sum gives. */
INLINE f64 sum_to_odd(f64 x, f64 y) {
  f64 sum = x + y, part = sum - x, error = (x - (sum - part)) + (y - part);
  if (error == 0 || !isfinite(sum) || as_u64(sum) & 1) return sum;
  return as_f64(as_u64(sum) + ((error > 0) == (sum > 0) ? 1 : -1ull));
}
/* v_div_fmas: the fma, scaled back if v_div_scale scaled, in one rounding. */
INLINE f32 div_fmas_f32(f32 a, f32 b, f32 c, u32 undo) {
  f64 sum = sum_to_odd((f64)a * b, c);
  return (f32)(!undo ? sum : fabsf(c) >= 2 ? sum * 0x1p64 : sum * 0x1p-64);
}
INLINE f64 div_fmas_f64(f64 a, f64 b, f64 c, u32 undo) {
  f64 sum = fma(a, b, c);
  return !undo ? sum : fabs(c) >= 2 ? sum * 0x1p128 : sum * 0x1p-128;
}

/* The sign and the special cases of numerator / denominator; `quotient` otherwise, whose own overflow is infinity. */
INLINE f64 div_fixup(f64 quotient, f64 denominator, f64 numerator) {
  f64 sign = signbit(denominator) != signbit(numerator) ? -1 : 1;
  if (isnan(numerator)) return numerator;
  if (isnan(denominator)) return denominator;
  if ((numerator == 0 && denominator == 0) || (isinf(numerator) && isinf(denominator))) return NAN;
  if (denominator == 0 || isinf(numerator)) return sign * INFINITY;
  if (isinf(denominator) || numerator == 0) return sign * 0.0;
  return sign * (isfinite(quotient) ? fabs(quotient) : INFINITY);
}

/* An operand of v_fma_mix: f32, or one f16 half of a register (op_sel_hi set; op_sel says which half). Its modifiers
 * arrive in neg_lo (negate) and neg_hi (absolute). */
INLINE f32 mix(const Instr *i, u32 k, u32 x) {
  f32 y = i->op_sel_hi >> k & 1 ? f16_to_f32(x >> 16 * (i->op_sel >> k & 1) & 0xFFFF) : as_f32(x);
  if (i->neg_hi >> k & 1) y = fabsf(y);
  return i->neg_lo >> k & 1 ? -y : y;
}

INLINE u32 dot2_f16_f16(u32 a, u32 b, u32 c) {
  f64 sum = (f64)f16_to_f32(a & 0xFFFF) * f16_to_f32(b & 0xFFFF) + (f64)f16_to_f32(a >> 16) * f16_to_f32(b >> 16);
  return f32_to_f16((f32)(sum + f16_to_f32(c)));
}
INLINE u32 dot2_bf16_bf16(u32 a, u32 b, u32 c) {
  f64 sum = (f64)bf16_to_f32(a & 0xFFFF) * bf16_to_f32(b & 0xFFFF) + (f64)bf16_to_f32(a >> 16) * bf16_to_f32(b >> 16);
  return f32_to_bf16((f32)(sum + bf16_to_f32(c)));
}

/* ---- fp8, bf8, fp4 ---- */

INLINE int is_fnuz(const Wave *w) { return w->machine->gfx == 942; }
static inline f32 fp8_to_f32(const Wave *w, u32 code) { return small_to_f32(is_fnuz(w) ? &E4M3_FNUZ : &E4M3, code); }
static inline f32 bf8_to_f32(const Wave *w, u32 code) { return small_to_f32(is_fnuz(w) ? &E5M2_FNUZ : &E5M2, code); }
static inline f32 fp4_to_f32(u32 code) { return small_to_f32(&E2M1, code); }
static inline u32 f32_to_fp8(const Wave *w, f32 x) {
  return f32_to_small(is_fnuz(w) ? &E4M3_FNUZ : &E4M3, x, (int)w->fp16_ovfl);
}
static inline u32 f32_to_bf8(const Wave *w, f32 x) {
  return f32_to_small(is_fnuz(w) ? &E5M2_FNUZ : &E5M2, x, (int)w->fp16_ovfl);
}
static inline u32 f32_to_fp4(f32 x) { return f32_to_small(&E2M1, x, 1); }
/* Scales of v_cvt_scalef32: the exponent field of an fp32 number, read as E8M0. */
static inline f32 scale(u32 x) { return e8m0_to_f32(x >> 23 & 255); }
/* op_sel[0] is bit 1 and op_sel[1] bit 0 of the byte that v_cvt_f32_fp8 reads. */
INLINE u32 source_byte(u32 op_sel) { return (op_sel & 1) << 1 | (op_sel >> 1 & 1); }
