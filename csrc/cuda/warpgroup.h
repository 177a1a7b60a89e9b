// What compute capability 9.0 has beside warp.h: products of a warpgroup (four warps), which run in the
// background and read their second operand from shared memory, and copies of tiles by one thread. Has a
// twin in tests/cuda_emulator, as warp.h.
#pragma once

#include "warp.h"

#if !defined(__CUDACC__)
#include "emulated_warpgroup.h"
#else

#include <cuda.h>

#include <type_traits>

namespace diffit::cuda {

// --- copies of tiles

// A tensor in memory of four dimensions and the boxes of it that are copied; see tensor_map.h.
using TensorMap = CUtensorMap;
#define GRID_CONSTANT __grid_constant__

// Counts the bytes that are copied to shared memory, in phases: of each, expect_bytes is called once,
// before its copies.
using CopyBarrier = Shared<uint64_t>;

DEVICE void initialize(CopyBarrier barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(barrier))
                 : "memory");
}

DEVICE void expect_bytes(CopyBarrier barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Until phase `phase` is over, where it or the next one is under way.
DEVICE void wait_for_phase(CopyBarrier barrier, int phase) {
    asm volatile(
        "{\n.reg .pred over;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(phase & 1)
        : "memory");
}

// Starts to copy the box at (column, x, y, sample).
DEVICE void copy_box(Shared<uint16_t> to, const TensorMap& map, int column, int x, int y, int sample,
                     CopyBarrier barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(x), "r"(y), "r"(sample)
        : "memory");
}

// --- products

// What this thread has written to shared memory is there for products and copies of tiles, after the
// next barrier.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before products that use registers which other instructions have written.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// The sums are there once they have been `settled`.
DEVICE void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from moving what computes or takes these numbers across the waits and products
// that stand before or behind.
template <int N>
DEVICE void settled(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i])::"memory");
}
template <int N>
DEVICE void settled(uint32_t (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[n][i])::"memory");
}

DEVICE uint64_t descriptor(Shared<uint16_t> at, int leading_bytes, int stride_bytes, int layout) {
    const auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes / 16 & 0x3fff); };
    return field(shared_address(at)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
           static_cast<uint64_t>(layout) << 62;
}

// Second operands of products, (n, k) in rows of k or, transposed, in rows of n.
// Matrices of 8 rows of 16 bytes, one row after the other. From a matrix to the next one along k and along
// n there are so many elements.
struct Matrices {
    Shared<uint16_t> at;
    int along_k, along_n;
    DEVICE uint64_t operator()() const { return descriptor(at, 2 * along_k, 2 * along_n, 0); }
};
// Rows of 128 bytes, in a swizzled box.
struct SwizzledRows {
    Shared<uint16_t> at;
    DEVICE uint64_t operator()() const { return descriptor(at, 16, 1024, 1); }
};

#define DIFFIT_SUMS(N) "+f"(c[N][0]), "+f"(c[N][1]), "+f"(c[N][2]), "+f"(c[N][3])
#define DIFFIT_SUMS_8 DIFFIT_SUMS(0)
#define DIFFIT_SUMS_64                                                                          \
    DIFFIT_SUMS(0), DIFFIT_SUMS(1), DIFFIT_SUMS(2), DIFFIT_SUMS(3), DIFFIT_SUMS(4),             \
        DIFFIT_SUMS(5), DIFFIT_SUMS(6), DIFFIT_SUMS(7)
#define DIFFIT_NAMES_8 "%0, %1, %2, %3"
#define DIFFIT_NAMES_64                                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "     \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// A, B, TRANSPOSED: the names of operands behind the sums.
#define DIFFIT_WGMMA(TYPE, WIDTH, A, B, TRANSPOSED)                                             \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                 \
                 "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE            \
                 " {" DIFFIT_NAMES_##WIDTH "}, {" A "}, " B ", add, 1, 1, " TRANSPOSED ";\n}"   \
                 : DIFFIT_SUMS_##WIDTH                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b()), "n"(Transposed ? 1 : 0))
#define DIFFIT_WGMMA_OF(TYPE)                                                                   \
    if constexpr (N == 8)                                                                       \
        DIFFIT_WGMMA(TYPE, 64, "%32, %33, %34, %35", "%36", "%37");                             \
    else                                                                                        \
        DIFFIT_WGMMA(TYPE, 8, "%4, %5, %6, %7", "%8", "%9")

// c (64, 8 N) += a (64, 16) b (16, 8 N), N = 1 or 8; a in the layout of mma, 16 rows to a warp.
template <class T, bool Transposed, int N, class Operand>
DEVICE void multiply_async(float (&c)[N][4], const uint32_t (&a)[4], const Operand& b) {
    static_assert(N == 1 || N == 8);
    if constexpr (std::is_same_v<T, BFloat16>) {
        DIFFIT_WGMMA_OF("bf16");
    } else {
        DIFFIT_WGMMA_OF("f16");
    }
}

#undef DIFFIT_WGMMA_OF
#undef DIFFIT_WGMMA
#undef DIFFIT_NAMES_64
#undef DIFFIT_NAMES_8
#undef DIFFIT_SUMS_64
#undef DIFFIT_SUMS_8
#undef DIFFIT_SUMS

}  // namespace diffit::cuda

#endif
