// Hopper's ways to move data without holding registers or making others wait: bulk copies announced by barriers in shared
// memory, stores into other blocks of a cluster, and launches that begin before the one in front of them has ended.
#pragma once
#include "memory.h"

#if TARGET_SM90
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// One lane: the barrier waits for one arrival and the bytes announced with it.
DEVICE void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

/// One lane, after its `barrier_init`s: copies may complete on them from here on.
DEVICE void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n\tAGAIN:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra AGAIN;\n\t}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

/// One lane: `bytes` (a multiple of 16, both addresses 16-byte aligned) into shared memory, announced to `barrier`.
DEVICE void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

/// What follows may depend on the launch before this one; what precedes must not.
DEVICE void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- clusters: blocks that run together and reach each other's shared memory

DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// All threads of all blocks of the cluster arrive before any leaves `cluster_wait`. Orders no memory accesses but a
/// thread's own: what others wrote is announced by barriers in memory (`cluster_store`).
DEVICE void cluster_arrive() {
    __syncwarp();  // `aligned` wants whole warps
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Where, in block `rank`, that lies which in this block lies at `local`.
DEVICE uint32_t address_in(const void* local, int rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(remote)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(local))), "r"(rank));
    return remote;
}

/// Two floats into another block's shared memory, 8 bytes announced to a barrier of that block. Both addresses are
/// `address_in` it; it must have started and may not have ended.
DEVICE void cluster_store(uint32_t to, float a, float b, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "r"(bits<uint32_t>(a)), "r"(bits<uint32_t>(b)), "r"(barrier)
                 : "memory");
}
#else
DEVICE void wait_for_previous_launch() {}
DEVICE void allow_next_launch() {}
#endif
