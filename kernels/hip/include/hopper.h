// Hopper's ways to move data without holding registers or making others wait: bulk copies announced by barriers in shared
// memory, stores into other blocks of a cluster, and launches that begin before the one in front of them has ended.
#pragma once
#include "matrix.h"
#include "memory.h"

#if TARGET_SM90
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

/// Whether this is the one lane of a wave, all of whose lanes ask, that does what one has to. The compiler knows that it is one.
DEVICE bool elected() {
    uint32_t is;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(is));
    return is;
}

/// One lane: the barrier waits for so many arrivals, and the bytes announced with them.
DEVICE void barrier_init(uint64_t* barrier, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
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

/// As `bulk_copy`, from this block's shared memory into that of another block of the cluster: `to` and `barrier` are `address_in` it, which
/// must have started and may not have ended; nor may this block end before it has arrived.
DEVICE void bulk_send(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "r"(shared_address(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

/// As `bulk_copy`, into the same place of all blocks of the cluster that `blocks` has a bit for, announced to each one's barrier.
DEVICE void bulk_copy_to(int blocks, void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
        : "memory");
}

/// Threads of a block, blocks of the grid.
DEVICE int block_threads() { return blockDim.x; }
DEVICE int grid_blocks() { return gridDim.x; }

/// What follows may depend on the launch before this one; what precedes must not.
DEVICE void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- clusters: blocks that run together and reach each other's shared memory

DEVICE int cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE int cluster_blocks() {
    uint32_t blocks;
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    return blocks;
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

/// One arrival at a barrier of another block, or of this one: `address_in` it. It says that memory was read; a release for the
/// cluster, too, would wait for all copies that are under way.
DEVICE void barrier_arrive_in(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Floats into another block's shared memory, announced to a barrier of that block. Both addresses are `address_in` it; it must
/// have started and may not have ended.
DEVICE void cluster_store(uint32_t to, const Floats<2>& floats, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "f"(floats.v[0]), "f"(floats.v[1]), "r"(barrier)
                 : "memory");
}
DEVICE void cluster_store(uint32_t to, const Floats<4>& floats, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(floats.v[0]), "f"(floats.v[1]), "f"(floats.v[2]), "f"(floats.v[3]), "r"(barrier)
                 : "memory");
}
DEVICE void store_floats(uint32_t shared, const Floats<2>& floats) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared), "f"(floats.v[0]), "f"(floats.v[1]) : "memory");
}
DEVICE void store_floats(uint32_t shared, const Floats<4>& floats) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(floats.v[0]), "f"(floats.v[1]), "f"(floats.v[2]), "f"(floats.v[3])
                 : "memory");
}

/// Eight bytes of shared memory.
DEVICE Floats<2> load_shared(uint32_t from) {
    Floats<2> floats;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(floats.v[0]), "=f"(floats.v[1]) : "r"(from) : "memory");
    return floats;
}

// ---- wgmma: the four waves of a warpgroup, of consecutive indices from a multiple of four, multiply together

/// 64 of K of a matrix in shared memory as wgmma's right operand, in bf16 or halves (SWIZZLED_128: rows of 128 bytes) or e4m3
/// (SWIZZLED_64: rows of 64). Of eight rows, which the unit reads together, no two have the same sixteen bytes in the same banks: those at
/// `i` lie at `i ^ row % 8`, or `i ^ row / 2 % 4` (PTX ISA, "Shared memory matrix layout"). `at` is aligned to eight rows; a step along
/// K, of 16 bf16 or 32 e4m3, is 32 bytes. The unit takes 64 bits, of which only the lower half differs from one matrix to the next: that
/// is returned, in units of 16 bytes, and added to with 32 bits.
DEVICE uint32_t matrix_in_lds(const void* at) { return (shared_address(at) & 0x3ffff) >> 4 | 1u << 16; }
constexpr uint32_t SWIZZLED_128 = 8 * 128 >> 4 | 1u << 30, SWIZZLED_64 = 8 * 64 >> 4 | 2u << 30;  // the upper halves: eight rows

/// The first address from `p` on that a matrix may have; up to 1023 bytes on.
DEVICE uint8_t* matrix_aligned(uint8_t* p) { return p + (-shared_address(p) & 1023); }

/// All lanes of a wave: four matrices of 8 x 8 of 16 bits, of each of which a lane has two neighbours of row lane / 4: row i of matrix j goes
/// to the sixteen bytes that lane 8 j + i points `to` at.
DEVICE void store_rows(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/// All lanes of a wave: four cores (`LeftMatrix`) that lie together from `to` on, of each of which a lane has four bytes of row lane / 4.
DEVICE void store_cores(uint8_t* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    store_rows(shared_address(to) + lane_index() * 16, a, b, c, d);
}

/// All lanes of a wave: four matrices of 8 x 8 of 16 bits, of each of which a lane has two neighbours of row lane / 4, turned over: column i of
/// matrix j goes to the sixteen bytes that lane 8 j + i points `to` at.
DEVICE void store_turned(const void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/// All threads that wrote shared memory, before a barrier: makes it visible to matrix instructions and bulk copies behind that.
DEVICE void show_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Before the first `warpgroup_matrix` after registers that it reads or adds to have been written.
DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Until at most `Pending` committed groups are under way; only then may registers that they use be touched.
template <int Pending>
DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// sum = A B, or sum += A B if `add`: A of 64 x 16 in bf16 or halves, or 64 x 32 in e4m3, and B as many x N, N being 8 times `sum`'s
/// first dimension. Wave w of the warpgroup holds rows 16 w ... 16 w + 15 of A and of the sum, of bf16 and halves as `matrix_bf16` does
/// (matrix.h), of e4m3 four neighbours along K where that has two; B is a `matrix_in_lds`.
#define WARPGROUP_MATRIX(NAME, SETS, SHAPE, LAST, UPPER, SUMS, A0, A1, A2, A3, LOW, HIGH, ADD)                                  \
    DEVICE void NAME(const uint32_t (&a)[4], uint32_t b, float (&sum)[SETS][4], bool add) {                                    \
        asm volatile("{\n\t.reg .b64 b;\n\t.reg .pred p;\n\tmov.b64 b, {%" #LOW ", %" #HIGH "};\n\tsetp.ne.b32 p, %" #ADD      \
                     ", 0;\n\twgmma.mma_async.sync.aligned." SHAPE " {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3          \
                     "}, b, p, 1, 1" LAST ";\n\t}"                                                                             \
                     : SUMMED_##SETS(0)                                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(UPPER), "r"(static_cast<int>(add)));             \
    }
#define SUMMED_1(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define SUMMED_2(i) SUMMED_1(i), SUMMED_1(i + 1)
#define SUMMED_4(i) SUMMED_2(i), SUMMED_2(i + 2)
#define SUMMED_8(i) SUMMED_4(i), SUMMED_4(i + 4)
#define REGISTERS_1 "%0, %1, %2, %3"
#define REGISTERS_2 REGISTERS_1 ", %4, %5, %6, %7"
#define REGISTERS_4 REGISTERS_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_8 REGISTERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WARPGROUP_MATRICES(NAME, K, TYPES, LAST, UPPER)                                                              \
    WARPGROUP_MATRIX(NAME, 1, "m64n8" K TYPES, LAST, UPPER, REGISTERS_1, 4, 5, 6, 7, 8, 9, 10)                       \
    WARPGROUP_MATRIX(NAME, 2, "m64n16" K TYPES, LAST, UPPER, REGISTERS_2, 8, 9, 10, 11, 12, 13, 14)                  \
    WARPGROUP_MATRIX(NAME, 4, "m64n32" K TYPES, LAST, UPPER, REGISTERS_4, 16, 17, 18, 19, 20, 21, 22)                \
    WARPGROUP_MATRIX(NAME, 8, "m64n64" K TYPES, LAST, UPPER, REGISTERS_8, 32, 33, 34, 35, 36, 37, 38)
WARPGROUP_MATRICES(warpgroup_matrix_bf16, "k16", ".f32.bf16.bf16", ", 0", SWIZZLED_128)
WARPGROUP_MATRICES(warpgroup_matrix_half, "k16", ".f32.f16.f16", ", 0", SWIZZLED_128)
WARPGROUP_MATRICES(warpgroup_matrix_e4m3, "k32", ".f32.e4m3.e4m3", "", SWIZZLED_64)

/// A matrix of 64 rows of e4m3 in shared memory as wgmma's left operand: eight rows of 16 bytes lie together, such cores one behind the
/// other along K, and `stride` bytes apart along rows. A step along K, of 32, is two cores.
struct LeftMatrix {
    static constexpr int CORE = 8 * 16;
    uint32_t low, high;  // `low` in units of 16 bytes, as `matrix_in_lds`
    DEVICE LeftMatrix(const void* at, int stride) : low((shared_address(at) & 0x3ffff) >> 4 | (CORE >> 4) << 16), high(stride >> 4) {}
};

/// sum = A B, or sum += A B if `Add`, of both operands in shared memory, A being that of `high` at `low`.
#define WARPGROUP_MATRIX_IN_LDS(SETS, SHAPE, SUMS, A0, A1, LOW, HIGH, ADD)                                                             \
    template <bool Add>                                                                                                               \
    DEVICE void warpgroup_matrix_e4m3(uint32_t low, uint32_t high, uint32_t b, float (&sum)[SETS][4]) {                               \
        asm volatile("{\n\t.reg .b64 a, b;\n\t.reg .pred p;\n\tmov.b64 a, {%" #A0 ", %" #A1 "};\n\tmov.b64 b, {%" #LOW ", %" #HIGH    \
                     "};\n\tsetp.ne.b32 p, %" #ADD ", 0;\n\twgmma.mma_async.sync.aligned." SHAPE "k32.f32.e4m3.e4m3 {" SUMS          \
                     "}, a, b, p, 1, 1;\n\t}"                                                                                         \
                     : SUMMED_##SETS(0)                                                                                           \
                     : "r"(low), "r"(high), "r"(b), "r"(SWIZZLED_64), "n"(Add));                                                  \
    }
WARPGROUP_MATRIX_IN_LDS(1, "m64n8", REGISTERS_1, 4, 5, 6, 7, 8)
WARPGROUP_MATRIX_IN_LDS(2, "m64n16", REGISTERS_2, 8, 9, 10, 11, 12)
WARPGROUP_MATRIX_IN_LDS(4, "m64n32", REGISTERS_4, 16, 17, 18, 19, 20)
WARPGROUP_MATRIX_IN_LDS(8, "m64n64", REGISTERS_8, 32, 33, 34, 35, 36)
#else
DEVICE void wait_for_previous_launch() {}
DEVICE void allow_next_launch() {}
#endif
