// Who am I, and what do the other lanes of my wave and the other waves of my block hold.
#pragma once
#include "target.h"

/// Index of this thread in its block, and of its block in the grid. Grids and blocks here have one dimension; sizes are
/// passed as arguments, so that no hidden kernel arguments are needed.
DEVICE int thread_index() {
#if TARGET_AMD
    return __builtin_amdgcn_workitem_id_x();
#else
    return threadIdx.x;
#endif
}

DEVICE int block_index() {
#if TARGET_AMD
    return __builtin_amdgcn_workgroup_id_x();
#else
    return blockIdx.x;
#endif
}

/// Lane in its wave, 0..WAVE-1.
DEVICE int lane_index() { return thread_index() % WAVE; }

/// Wave in its block. The same in all lanes of a wave, and the compiler is told so: addresses derived from it stay scalar.
DEVICE int wave_index() {
#if TARGET_AMD
    return __builtin_amdgcn_readfirstlane(thread_index() / WAVE);
#else
    return __shfl_sync(0xffffffffu, threadIdx.x / WAVE, 0);
#endif
}

/// `value` as lane `lane_index() ^ mask` holds it. All lanes take part; `mask` < WAVE.
template <typename T>
DEVICE T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) == 4, "lanes exchange 32-bit values");
#if TARGET_AMD
    const int source = (lane_index() ^ mask) * 4;  // ds_bpermute addresses lanes in bytes
    return bits<T>(__builtin_amdgcn_ds_bpermute(source, bits<int>(value)));
#else
    return __shfl_xor_sync(0xffffffffu, value, mask);
#endif
}

/// `value` as lane `source` holds it. All lanes take part.
template <typename T>
DEVICE T shuffle(T value, int source) {
    static_assert(sizeof(T) == 4, "lanes exchange 32-bit values");
#if TARGET_AMD
    return bits<T>(__builtin_amdgcn_ds_bpermute(source * 4, bits<int>(value)));
#else
    return __shfl_sync(0xffffffffu, value, source);
#endif
}

/// The sum of `value` over each group of `Group` neighbouring lanes (a power of two), in all of them.
template <int Group = WAVE, typename T>
DEVICE T sum_lanes(T value) {
#pragma unroll
    for (int mask = Group / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

/// The largest `value` in each group of `Group` neighbouring lanes (a power of two), in all of them.
template <int Group = WAVE, typename T>
DEVICE T max_lanes(T value) {
#pragma unroll
    for (int mask = Group / 2; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    return value;
}

/// In how many lanes of the wave `condition` holds. All lanes take part.
DEVICE int count_lanes(bool condition) {
#if TARGET_GFX9
    return __builtin_popcountll(__builtin_amdgcn_ballot_w64(condition));
#elif TARGET_AMD
    return __builtin_popcount(__builtin_amdgcn_ballot_w32(condition));
#else
    return __popc(__ballot_sync(0xffffffffu, condition));
#endif
}

/// All threads of the block arrive before any leaves, and see what the others wrote to LDS before.
DEVICE void block_barrier() {
#if TARGET_AMD
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
#else
    __syncthreads();
#endif
}
