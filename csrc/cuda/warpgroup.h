// The products of a warpgroup (four warps) on compute capability 9.0: they run in the background, and
// read their second operand from shared memory. Has a twin in tests/cuda_emulator, as warp.h.
#pragma once

#include "warp.h"

#if !defined(__CUDACC__)
#include "emulated_warpgroup.h"
#else

#include <type_traits>

namespace diffit::cuda {

// A second operand in shared memory: matrices of 8 rows of 16 bytes, one row after the other. Offsets
// are in elements: from a matrix to the next one along k (`along_k`) and along n (`along_n`).
struct Operand {
    Shared<uint16_t> at;
    int along_k, along_n;
};

// What this thread has written to shared memory is there for products, after the next barrier.
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

#define DIFFIT_SUMS(N) "+f"(c[N][0]), "+f"(c[N][1]), "+f"(c[N][2]), "+f"(c[N][3])
#define DIFFIT_SUMS_64                                                                         \
    DIFFIT_SUMS(0), DIFFIT_SUMS(1), DIFFIT_SUMS(2), DIFFIT_SUMS(3), DIFFIT_SUMS(4),            \
        DIFFIT_SUMS(5), DIFFIT_SUMS(6), DIFFIT_SUMS(7)
#define DIFFIT_SUMS_72 DIFFIT_SUMS_64, DIFFIT_SUMS(8)
#define DIFFIT_NAMES_64                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DIFFIT_NAMES_72 DIFFIT_NAMES_64 ", %32, %33, %34, %35"
// A, B, TRANSPOSED: the names of operands behind the sums.
#define DIFFIT_WGMMA(TYPE, WIDTH, A, B, TRANSPOSED)                                            \
    asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE           \
                 " {" DIFFIT_NAMES_##WIDTH "}, {" A "}, " B ", add, 1, 1, " TRANSPOSED ";\n}"  \
                 : DIFFIT_SUMS_##WIDTH                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Transposed ? 1 : 0))
#define DIFFIT_WGMMA_OF(TYPE)                                                                  \
    if constexpr (N == 8)                                                                      \
        DIFFIT_WGMMA(TYPE, 64, "%32, %33, %34, %35", "%36", "%37");                            \
    else                                                                                       \
        DIFFIT_WGMMA(TYPE, 72, "%36, %37, %38, %39", "%40", "%41")

// c (64, 8 N) += a (64, 16) b (16, 8 N); a in the layout of mma, 16 rows to a warp. b is (8 N, 16) in rows
// of k, or Transposed (16, 8 N).
template <class T, bool Transposed, int N>
DEVICE void multiply_async(float (&c)[N][4], const uint32_t (&a)[4], const Operand& operand) {
    static_assert(N == 8 || N == 9);
    const auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes / 16 & 0x3fff); };
    // Leading and stride offset of the PTX manual: along k and n, in transposed matrices as well.
    const uint64_t b = field(shared_address(operand.at)) | field(2 * operand.along_k) << 16 |
                       field(2 * operand.along_n) << 32;
    if constexpr (std::is_same_v<T, BFloat16>) {
        DIFFIT_WGMMA_OF("bf16");
    } else {
        DIFFIT_WGMMA_OF("f16");
    }
}

#undef DIFFIT_WGMMA_OF
#undef DIFFIT_WGMMA
#undef DIFFIT_NAMES_72
#undef DIFFIT_NAMES_64
#undef DIFFIT_SUMS_72
#undef DIFFIT_SUMS_64
#undef DIFFIT_SUMS

}  // namespace diffit::cuda

#endif
