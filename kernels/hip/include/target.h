// What a kernel is being compiled for, and the words it is written in. Everything else here includes this.
//
// One source, two compilers: clang for gfx950, gfx942 and gfx11xx (device only, no HIP headers, so no ROCm), nvcc for
// sm_90. Exactly one TARGET_* below is 1, and WAVE is the number of lanes that run in step.
//
//   TARGET_GFX950   CDNA4, wave 64: MX matrix unit, e2m1 and OCP e4m3 conversions, 16-byte copies into LDS
//   TARGET_GFX942   CDNA3, wave 64: fp8 matrix unit, whose e4m3 is the FNUZ one
//   TARGET_GFX11    RDNA3 and 3.5, wave 32: WMMA, no fp8
//   TARGET_SM90     Hopper, wave 32: mma.sync
#pragma once

#define TARGET_GFX950 0
#define TARGET_GFX942 0
#define TARGET_GFX11 0
#define TARGET_SM90 0

#if defined(__gfx950__)
#undef TARGET_GFX950
#define TARGET_GFX950 1
#elif defined(__gfx942__)
#undef TARGET_GFX942
#define TARGET_GFX942 1
#elif defined(__GFX11__)
#undef TARGET_GFX11
#define TARGET_GFX11 1
#elif defined(__CUDACC__)
#undef TARGET_SM90
#define TARGET_SM90 1
#else
#error "no such target: compile for gfx950, gfx942, gfx11xx or sm_90"
#endif

#define TARGET_GFX9 (TARGET_GFX950 || TARGET_GFX942)
#define TARGET_AMD (!TARGET_SM90)

// Heads an entry point: `KERNEL(512, 2) name(parameters) { body }`. Blocks have at most `max_threads`, and on sm_90 `min_blocks`
// such blocks must find registers on a multiprocessor; for AMD, clang settles that by itself.
#if TARGET_AMD
typedef __SIZE_TYPE__ size_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define DEVICE __attribute__((device, always_inline)) inline
#define KERNEL(max_threads, min_blocks) \
    extern "C" __attribute__((global, visibility("protected"), amdgpu_flat_work_group_size(1, max_threads))) void
#else
#include <stddef.h>
#include <stdint.h>
#define DEVICE __device__ __forceinline__
#define KERNEL(max_threads, min_blocks) extern "C" __global__ void __launch_bounds__(max_threads, min_blocks)
#endif

constexpr int WAVE = TARGET_GFX9 ? 64 : 32;
constexpr int MX_BLOCK = 32;  // elements along K that share one e8m0 scale (OCP MX v1.0, section 5.1)

/// 16 bytes as four words: the widest load and store there is, so the unit in which memory is moved.
struct alignas(16) Words {
    uint32_t v[4];
};

/// The bits of `from`, read as a `To` of the same size.
template <typename To, typename From>
DEVICE To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bits() changes the type, never the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(To));
    return to;
}

template <typename T>
DEVICE T smaller(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
DEVICE T larger(T a, T b) {
    return a > b ? a : b;
}

constexpr DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
