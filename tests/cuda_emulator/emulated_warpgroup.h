// The twin of csrc/cuda/warpgroup.h for a C++ compiler. Products are done when they are waited for, warp by
// warp, from what registers and shared memory have then. Layouts follow the PTX manual, section "wgmma".
#pragma once

#include <array>

#include "emulated_warp.h"

#define GRID_CONSTANT

namespace diffit::cuda {

struct TensorMap {
    const uint16_t* data;
    int64_t strides[3];  // of x, y and samples
    int box[3];          // columns, x, y
};

using CopyBarrier = Shared<uint64_t>;

inline void initialize(CopyBarrier barrier) { emulator::initialize_barrier(barrier.data); }
inline void expect_bytes(CopyBarrier barrier, int bytes) {
    emulator::begin_phase(barrier.data, static_cast<size_t>(bytes));
}
inline void wait_for_phase(CopyBarrier barrier, int phase) {
    emulator::wait_for_phase(barrier.data, phase);
}

// The place in shared memory of a row of 128 bytes: of address bits 4 to 6, what bits 7 to 9 say is flipped.
inline uint16_t* swizzled(uint16_t* at) {
    const size_t offset = reinterpret_cast<char*>(at) - emulator::shared_memory();
    return reinterpret_cast<uint16_t*>(emulator::shared_memory() + (offset ^ (offset >> 7 & 7) << 4));
}

inline void copy_box(Shared<uint16_t> to, const TensorMap& map, int column, int x, int y, int sample,
                     CopyBarrier barrier) {
    const auto* from =
        map.data + column + x * map.strides[0] + y * map.strides[1] + sample * map.strides[2];
    const bool is_swizzled = map.box[0] == 64;
    if ((reinterpret_cast<char*>(to.data) - emulator::shared_memory()) % (is_swizzled ? 1024 : 128))
        throw std::runtime_error("copy_box: the target is not aligned");
    for (int dy = 0; dy < map.box[2]; ++dy)
        for (int dx = 0; dx < map.box[1]; ++dx)
            for (int c = 0; c < map.box[0]; c += 8) {
                uint16_t* place = to.data + (dy * map.box[1] + dx) * map.box[0] + c;
                emulator::copy_in_phase(barrier.data, is_swizzled ? swizzled(place) : place,
                                        from + dx * map.strides[0] + dy * map.strides[1] + c, 16);
            }
}

inline void show_to_products() { emulator::show_to_products(); }
inline void begin_products() {}
inline void commit_products() { emulator::commit_products(); }
inline void wait_for_products() { emulator::wait_for_products(); }

template <class X>
void settled(X&) {}

// An element of a second operand, by the row and the column of its matrix in memory.
struct Matrices {
    Shared<uint16_t> at;
    int along_k, along_n;
    const uint16_t* element(int k, int n, bool transposed) const {
        const int row = transposed ? k % 8 : n % 8, column = transposed ? n % 8 : k % 8;
        return at.data + k / 8 * along_k + n / 8 * along_n + 8 * row + column;
    }
};
struct SwizzledRows {
    Shared<uint16_t> at;
    const uint16_t* element(int k, int n, bool transposed) const {
        return swizzled(at.data + (transposed ? k * 64 + n : n * 64 + k));
    }
};

template <class T, bool Transposed, int N, class Operand>
void multiply_async(float (&c)[N][4], const uint32_t (&a)[4], const Operand& b) {
    struct Argument {
        float (*c)[4];
        const uint32_t* a;
        Operand b;
    } argument{c, a, b};
    emulator::collective("wgmma", &argument, [](void* const* arguments) {
        std::array<Argument, emulator::lanes> lanes;
        for (int lane = 0; lane < emulator::lanes; ++lane)
            lanes[lane] = *static_cast<Argument*>(arguments[lane]);
        emulator::issue_product([lanes] {
            static float b[16][8 * N];
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8 * N; ++n) {
                    const uint16_t* at = lanes[0].b.element(k, n, Transposed);
                    if ((Transposed ? n : k) % 8 == 0) emulator::check_product(at, 16);
                    b[k][n] = T::to_float(*at);
                }
            for (int lane = 0; lane < emulator::lanes; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    float a[16];
                    for (int k = 0; k < 16; ++k) {
                        const uint32_t* own = lanes[lane / 4 * 4 + k % 8 / 2].a;
                        const uint32_t pair = own[i / 2 + (k >= 8 ? 2 : 0)];
                        a[k] = T::to_float(pair >> (16 * (k % 2)) & 0xffff);
                    }
                    for (int n = 0; n < N; ++n)
                        for (int k = 0; k < 16; ++k)
                            lanes[lane].c[n][i] += a[k] * b[k][8 * n + lane % 4 * 2 + i % 2];
                }
            }
        });
    });
}

}  // namespace diffit::cuda
