// The twin of csrc/cuda/warpgroup.h for a C++ compiler. Products are done when they are waited for, warp by
// warp, from what registers and shared memory have then. Layouts follow the PTX manual, section "wgmma",
// matrices without swizzling.
#pragma once

#include <array>

#include "emulated_warp.h"

namespace diffit::cuda {

struct Operand {
    Shared<uint16_t> at;
    int along_k, along_n;
};

inline void show_to_products() { emulator::show_to_products(); }
inline void begin_products() {}
inline void commit_products() { emulator::commit_products(); }
inline void wait_for_products() { emulator::wait_for_products(); }

template <class X>
void settled(X&) {}

template <class T, bool Transposed, int N>
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
            const Operand& from = lanes[0].b;
            static float b[16][8 * N];
            for (int k = 0; k < 16; ++k)
                for (int n = 0; n < 8 * N; ++n) {
                    const int row = Transposed ? k % 8 : n % 8, column = Transposed ? n % 8 : k % 8;
                    const auto at = from.at + (k / 8 * from.along_k + n / 8 * from.along_n + 8 * row);
                    if (column == 0) emulator::check_product(at.data, 16);
                    b[k][n] = T::to_float(at.data[column]);
                }
            for (int lane = 0; lane < emulator::lanes; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    const int half = i / 2;  // of the rows
                    float a[16];
                    for (int k = 0; k < 16; ++k) {
                        const uint32_t pair =
                            lanes[lane / 4 * 4 + k % 8 / 2].a[half + (k >= 8 ? 2 : 0)];
                        a[k] = T::to_float(pair >> (16 * (k % 2)) & 0xffff);
                    }
                    for (int n = 0; n < N; ++n) {
                        float& sum = lanes[lane].c[n][i];
                        for (int k = 0; k < 16; ++k) sum += a[k] * b[k][8 * n + lane % 4 * 2 + i % 2];
                    }
                }
            }
        });
    });
}

}  // namespace diffit::cuda
