// Global memory and LDS (CUDA: shared memory): 16 bytes a lane, streaming loads, copies that bypass the registers.
#pragma once
#include "wave.h"

#if TARGET_AMD
typedef uint32_t WordsVector __attribute__((ext_vector_type(4)));
typedef __attribute__((address_space(1))) void GlobalVoid;
typedef __attribute__((address_space(3))) void LdsVoid;
#endif

/// The LDS that the launch asked for beyond what the kernel declares, 16-byte aligned.
DEVICE uint8_t* dynamic_lds() {
#if TARGET_AMD
    extern __attribute__((shared, aligned(16))) uint8_t lds_bytes[];
#else
    extern __shared__ __align__(16) uint8_t lds_bytes[];
#endif
    return lds_bytes;
}

/// 16 bytes that the block will want again. `from` is 16-byte aligned.
DEVICE Words load_words(const void* from) { return *static_cast<const Words*>(from); }

#if TARGET_SM90
/// The same of global memory if they are `wanted`, else zeros, without a branch: others may be asked for meanwhile.
DEVICE Words load_words_if(bool wanted, const void* from) {
    Words w;
    asm volatile(
        "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %5, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
        "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "=&r"(w.v[0]), "=&r"(w.v[1]), "=&r"(w.v[2]), "=&r"(w.v[3])
        : "l"(from), "r"(static_cast<int>(wanted))
        : "memory");
    return w;
}
#endif

/// 16 bytes that nobody reads again in this launch: weights. Passes the caches without pushing others out.
/// `from` is 16-byte aligned global memory that no one writes during the launch.
DEVICE Words stream_words(const void* from) {
#if TARGET_AMD
    return bits<Words>(__builtin_nontemporal_load(static_cast<const WordsVector*>(from)));
#else
    Words w;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
                 : "l"(from));
    return w;
#endif
}

DEVICE void store_words(void* to, const Words& words) { *static_cast<Words*>(to) = words; }

/// True where `copy_to_lds` is asynchronous; elsewhere it returns with the data in place, and the waits do nothing.
constexpr bool COPIES_ARE_ASYNC = TARGET_GFX950 || TARGET_SM90;

/// Starts copying 16 bytes a lane from global memory into LDS: lane i's `from` goes to `to + 16 * i`.
///
/// `to` is the same in all lanes of the wave (gfx950's global_load_lds_dwordx4 takes one base address and adds 16 bytes a
/// lane), and all lanes take part. The bytes are there for this wave after `wait_for_copies`, for others after a
/// `block_barrier` that follows it. gfx942 copies 4 bytes a lane at most and gfx11 none: they go through registers.
DEVICE void copy_to_lds(void* to, const void* from) {
#if TARGET_GFX950
    __builtin_amdgcn_global_load_lds((GlobalVoid*)from, (LdsVoid*)to, 16, 0, 0);
#elif TARGET_SM90
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to)) + 16 * lane_index();
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n\tcp.async.commit_group;" ::"r"(address), "l"(from) : "memory");
#else
    store_words(static_cast<uint8_t*>(to) + 16 * lane_index(), load_words(from));
#endif
}

/// Returns when at most `Pending` of this wave's copies are still under way; they finish in the order they were started.
///
/// gfx950 has one counter (vmcnt) for copies and ordinary loads: loads that the wave started later and has not used count
/// as pending too, so the wait may let through fewer copies than asked, never more.
template <int Pending = 0>
DEVICE void wait_for_copies() {
#if TARGET_GFX950
    // s_waitcnt: vmcnt in bits 3:0 and 15:14; expcnt (6:4) and lgkmcnt (11:8) at their maxima, which is "do not wait".
    constexpr int vmcnt = Pending < 63 ? Pending : 63;
    __builtin_amdgcn_s_waitcnt((vmcnt & 15) | (vmcnt >> 4) << 14 | 7 << 4 | 15 << 8);
    asm volatile("" ::: "memory");
#elif TARGET_SM90
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}
