/* Number formats narrower than fp32: to and from fp32, round to nearest even.
 *
 * f16, bf16: IEEE 754 binary16; the upper half of binary32.
 * e4m3 "fn", e5m2, e2m3, e3m2, e2m1: OCP Microscaling Formats v1.0, section 5.3. "fnuz" (gfx942's fp8): exponent bias
 * one larger, no infinities, no negative zero, 0x80 is NaN.
 * The branch-free forms of f16 and bf16 are there so that the compiler can vectorise over lanes. */
#pragma once
#include "types.h"

INLINE f32 bf16_to_f32(u32 x) { return as_f32(x << 16); }

INLINE u32 f32_to_bf16(f32 x) {
  u32 bits = as_u32(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded;
}

INLINE f32 f16_to_f32(u32 x) {
  u32 sign = (x & 0x8000) << 16, rest = x & 0x7FFF;
  f32 finite = as_f32(rest << 13) * 0x1p112f; /* exact: rebias 15 -> 127, subnormals included */
  u32 special = rest << 13 | 0x7F800000;
  return as_f32(sign | (rest >= 0x7C00 ? special : as_u32(finite)));
}

INLINE u32 f32_to_f16(f32 x) {
  u32 bits = as_u32(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  u32 normal = (rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13;
  u32 subnormal = as_u32(as_f32(rest) + 0.5f) - 0x3F000000; /* the sum rounds to multiples of 2^-24 */
  u32 result = rest < 0x38800000 ? subnormal : normal;
  result = rest >= 0x477FF000 ? 0x7C00 : result; /* 65520 and above round to infinity */
  result = rest > 0x7F800000 ? 0x7E00 | (rest >> 13 & 0x3FF) : result;
  return sign | result;
}

/* Towards zero, as v_cvt_pkrtz_f16_f32 does. */
INLINE u32 f32_to_f16_rtz(f32 x) {
  u32 half = f32_to_f16(x);
  return isfinite(x) && fabsf(f16_to_f32(half)) > fabsf(x) ? half - 1 : half;
}

/* A float of `exponent` and `mantissa` bits below a sign bit. `top` is the code of the largest finite magnitude. */
typedef struct {
  int exponent, mantissa, bias;
  u32 top, infinity, nan; /* codes; infinity == 0 where the format has none, nan == 0 likewise */
  u32 unsigned_zero;       /* fnuz: no negative zero */
} Format;

static const Format E4M3 = {4, 3, 7, 0x7E, 0, 0x7F, 0};
static const Format E5M2 = {5, 2, 15, 0x7B, 0x7C, 0x7F, 0};
static const Format E4M3_FNUZ = {4, 3, 8, 0x7F, 0, 0x80, 1};
static const Format E5M2_FNUZ = {5, 2, 16, 0x7F, 0, 0x80, 1};
static const Format E2M3 = {2, 3, 1, 0x1F, 0, 0, 0};
static const Format E3M2 = {3, 2, 3, 0x1F, 0, 0, 0};
static const Format E2M1 = {2, 1, 1, 0x07, 0, 0, 0};

/* For the compiler to vectorise: no branches, not even those that it would make of `?:` around the subtraction. Nor are
 * there fp32 subnormals on the way, which some processors are slow at: a subnormal is taken as the fraction of a number
 * one binade up, less that number's leading one. */
INLINE f32 small_to_f32(const Format *f, u32 code) {
  const u32 bits = (u32)(f->exponent + f->mantissa), one = (u32)(128 - f->bias) << 23;
  u32 magnitude = code & ((1u << bits) - 1), sign = (code >> bits & 1) << 31, wide = magnitude << (23 - f->mantissa);
  u32 subnormal = as_u32(as_f32(wide + one) - as_f32(one)), normal = wide + one - (1u << 23);
  u32 is_normal = -(u32)(magnitude >> f->mantissa != 0), beyond = -(u32)(magnitude > f->top);
  u32 infinite = beyond & -(u32)(magnitude == f->infinity), negative_zero = -(u32)((sign | magnitude) == 1u << 31);
  u32 is_nan = (beyond & ~infinite) | (negative_zero & -f->unsigned_zero);
  u32 finite = sign | (normal & is_normal) | (subnormal & ~is_normal);
  u32 number = (finite & ~infinite) | ((sign | 0x7F800000) & infinite);
  return as_f32((number & ~is_nan) | (0x7FC00000 & is_nan));
}

/* `saturate`: finite values beyond the largest go to the largest, as do infinities (mode bit FP16_OVFL, or a format
 * that has neither infinity nor NaN); without it they become infinity, or NaN where the format has no infinity. */
static inline u32 f32_to_small(const Format *f, f32 x, int saturate) {
  int bits = f->exponent + f->mantissa;
  u32 sign = (as_u32(x) >> 31) << bits;
  if (isnan(x)) return f->nan ? (f->unsigned_zero ? f->nan : sign | f->nan) : f->top; /* fp4, fp6: the largest */
  f32 magnitude = fabsf(x);
  int exponent = 0;
  frexpf(magnitude, &exponent);
  int quantum = exponent - 1 < 1 - f->bias ? 1 - f->bias : exponent - 1;
  quantum -= f->mantissa;
  u32 code = 0;
  if (isfinite(x) && magnitude != 0) {
    u32 units = (u32)nearbyintf(ldexpf(magnitude, -quantum)); /* at most 2^(mantissa + 1): exact but for the rounding */
    code = units + ((u32)(quantum + f->mantissa + f->bias - 1) << f->mantissa);
  }
  if (isinf(x) || code > f->top) {
    if (saturate || !f->nan) code = f->top;
    else if (f->infinity) code = f->infinity;
    else return f->unsigned_zero ? f->nan : sign | f->nan;
  }
  return f->unsigned_zero && code == 0 ? 0 : sign | code;
}

/* E8M0: 2^(code - 127), 255 is NaN. */
INLINE f32 e8m0_to_f32(u32 code) { return as_f32(code == 255 ? 0x7FC00000 : code ? code << 23 : 1u << 22); }
