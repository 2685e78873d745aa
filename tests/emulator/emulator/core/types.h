/* Integer names, and floats read from and written to register bits. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;
typedef u32 b32; /* bits without a number type */
typedef u64 b64;

#define INLINE static inline __attribute__((always_inline))

INLINE f32 as_f32(u32 bits) { f32 x; memcpy(&x, &bits, 4); return x; }
INLINE u32 as_u32(f32 x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
INLINE f64 as_f64(u64 bits) { f64 x; memcpy(&x, &bits, 8); return x; }
INLINE u64 as_u64(f64 x) { u64 bits; memcpy(&bits, &x, 8); return bits; }
INLINE u64 join(u32 low, u32 high) { return (u64)high << 32 | low; }
