// The instructions of a warp that the kernels are made of. Compiled by a C++ compiler, this file is
// replaced by its twin, which tests/cuda_emulator runs on the CPU.
#pragma once

#if !defined(__CUDACC__)
#include "emulated_warp.h"
#else

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ __forceinline__

namespace diffit::cuda {

// 16 bytes, what a thread moves at once.
struct alignas(16) Chunk {
    uint32_t words[4];
};

// A place in shared memory. It is read and written by load, store, copy_async and ldmatrix only,
// so that the emulator sees every access.
template <class T>
struct Shared {
    T* data;
    DEVICE Shared operator+(int n) const { return {data + n}; }
    template <class U>
    DEVICE Shared<U> as() const {
        return {reinterpret_cast<U*>(data)};
    }
};

template <class T>
DEVICE T load(Shared<T> from) {
    return *from.data;
}

template <class T>
DEVICE void store(Shared<T> to, T value) {
    *to.data = value;
}

// Declared once for all kernels: the memory that the launch asked for, aligned for swizzled tiles.
extern __shared__ __align__(1024) char dynamic_shared_memory[];

template <class T>
DEVICE Shared<T> shared_memory() {
    return {reinterpret_cast<T*>(dynamic_shared_memory)};
}

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int threads_of_block() { return static_cast<int>(blockDim.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

DEVICE float shuffle_xor(float value, int lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}

DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }

template <class T>
DEVICE uint32_t shared_address(Shared<T> p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p.data));
}

// *to += value, which nobody waits for.
DEVICE void add_async(float* to, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                 "f"(value)
                 : "memory");
}

// Copies 16 bytes in the background, or writes zeros where `live` is false and reads nothing.
DEVICE void copy_async(Shared<uint16_t> to, const uint16_t* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(live ? 16 : 0)
                 : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `Groups` of this thread's latest groups of copies are under way.
template <int Groups>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. It gets elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix.
DEVICE void ldmatrix(uint32_t (&x)[4], Shared<uint16_t> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices.
DEVICE void ldmatrix_transposed(uint32_t (&x)[4], Shared<uint16_t> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define DIFFIT_MMA(TYPE)                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                     \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// A type of 16 bits: pairs of it in 32 bits, the first in the lower half, and
// c (16 x 8) += a (16 x 16) b (16 x 8).
struct BFloat16 {
    DEVICE static uint32_t pack(float first, float second) {
        uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
        return pair;
    }
    DEVICE static void unpack(uint32_t pair, float& first, float& second) {
        first = __uint_as_float(pair << 16);
        second = __uint_as_float(pair & 0xffff0000u);
    }
    DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
        DIFFIT_MMA("bf16");
    }
};

struct Float16 {
    DEVICE static uint32_t pack(float first, float second) {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
        return pair;
    }
    DEVICE static void unpack(uint32_t pair, float& first, float& second) {
        asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
            : "=f"(first), "=f"(second)
            : "r"(pair));
    }
    DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
        DIFFIT_MMA("f16");
    }
};

#undef DIFFIT_MMA

// x, of which the compiler knows nothing: it cannot compute ahead of a loop what depends on it.
DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace diffit::cuda

#endif
