// The twin of csrc/cuda/warp.h for a C++ compiler: the same names, done by the emulator. Layouts of
// fragments follow the PTX manual, sections "ldmatrix" and "mma.m16n8k16".
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "emulator.h"

#define DEVICE inline
#define BOTH inline
#define __global__
#define __launch_bounds__(...)

namespace diffit::cuda {

struct alignas(16) Chunk {
    uint32_t words[4];
};

template <class T>
struct Shared {
    T* data;
    Shared operator+(int n) const { return {data + n}; }
    template <class U>
    Shared<U> as() const {
        return {reinterpret_cast<U*>(data)};
    }
};

template <class T>
T load(Shared<T> from) {
    emulator::check_own(emulator::Access::read, from.data, sizeof(T));
    return *from.data;
}

template <class T>
void store(Shared<T> to, T value) {
    emulator::check_own(emulator::Access::write, to.data, sizeof(T));
    *to.data = value;
}

template <class T>
Shared<T> shared_memory() {
    return {reinterpret_cast<T*>(emulator::shared_memory())};
}

inline int thread_index() { return emulator::thread(); }
inline int threads_of_block() { return emulator::threads(); }
inline int block_index() { return static_cast<int>(emulator::block()); }
inline void block_barrier() { emulator::block_barrier(); }
inline void warp_barrier() { emulator::warp_barrier(); }

inline float shuffle_xor(float value, int lanes) {
    struct Argument {
        float value;
        int lanes;
        float result;
    } argument{value, lanes, 0};
    emulator::collective("a shuffle", &argument, [](void* const* arguments) {
        for (int lane = 0; lane < emulator::lanes; ++lane) {
            auto& own = *static_cast<Argument*>(arguments[lane]);
            own.result = static_cast<Argument*>(arguments[lane ^ own.lanes])->value;
        }
    });
    return argument.result;
}

inline bool any_lane(bool value) {
    struct Argument {
        bool value, result;
    } argument{value, false};
    emulator::collective("a vote", &argument, [](void* const* arguments) {
        bool any = false;
        for (int lane = 0; lane < emulator::lanes; ++lane)
            any |= static_cast<Argument*>(arguments[lane])->value;
        for (int lane = 0; lane < emulator::lanes; ++lane)
            static_cast<Argument*>(arguments[lane])->result = any;
    });
    return argument.result;
}

inline void add_async(float* to, float value) { *to += value; }

inline void copy_async(Shared<uint16_t> to, const uint16_t* from, bool live) {
    emulator::copy_async(to.data, live ? from : nullptr, 16);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int Groups>
void wait_for_copies() {
    emulator::wait_for_copies(Groups);
}

template <bool Transposed>
void emulated_ldmatrix(uint32_t (&x)[4], Shared<uint16_t> row) {
    struct Argument {
        const uint16_t* row;
        uint32_t* x;
    } argument{row.data, x};
    emulator::collective("ldmatrix", &argument, [](void* const* arguments) {
        const void* rows[emulator::lanes];
        for (int lane = 0; lane < emulator::lanes; ++lane)
            rows[lane] = static_cast<Argument*>(arguments[lane])->row;
        emulator::count_rows(emulator::Kind::ldmatrix, rows, emulator::lanes);
        const int first_thread = emulator::thread() / emulator::lanes * emulator::lanes;
        for (int lane = 0; lane < emulator::lanes; ++lane) {
            // The manual does not say which thread reads: both that of the row and that of the result.
            if (reinterpret_cast<uintptr_t>(rows[lane]) % 16)
                throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
            emulator::check(emulator::Access::read, rows[lane], 16, first_thread + lane);
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t pair[2];
                for (int i = 0; i < 2; ++i) {
                    int r = lane / 4, c = 2 * (lane % 4) + i;
                    if (Transposed) std::swap(r, c);
                    const auto* from = static_cast<const uint16_t*>(rows[8 * matrix + r]);
                    emulator::check(emulator::Access::read, from + c, 2, first_thread + lane);
                    pair[i] = from[c];
                }
                std::memcpy(static_cast<Argument*>(arguments[lane])->x + matrix, pair, 4);
            }
        }
    });
}

inline void ldmatrix(uint32_t (&x)[4], Shared<uint16_t> row) { emulated_ldmatrix<false>(x, row); }
inline void ldmatrix_transposed(uint32_t (&x)[4], Shared<uint16_t> row) {
    emulated_ldmatrix<true>(x, row);
}

// c (16 x 8) += a (16 x 16) b (16 x 8) over the registers of a warp; Type::to_float(bits).
template <class Type>
void emulated_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    struct Argument {
        float* c;
        const uint32_t *a, *b;
    } argument{c, a, b};
    emulator::collective("mma", &argument, [](void* const* arguments) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < emulator::lanes; ++lane) {
            const auto& own = *static_cast<Argument*>(arguments[lane]);
            const int group = lane / 4, in_group = lane % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = group + (i / 2 % 2 ? 8 : 0);
                const int column = in_group * 2 + i % 2 + (i >= 4 ? 8 : 0);
                a[row][column] = Type::to_float(own.a[i / 2] >> (16 * (i % 2)) & 0xffff);
            }
            for (int i = 0; i < 4; ++i) {
                const int row = in_group * 2 + i % 2 + (i >= 2 ? 8 : 0);
                b[row][group] = Type::to_float(own.b[i / 2] >> (16 * (i % 2)) & 0xffff);
            }
        }
        for (int lane = 0; lane < emulator::lanes; ++lane) {
            float* c = static_cast<Argument*>(arguments[lane])->c;
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < 16; ++k) c[i] += a[row][k] * b[k][column];
            }
        }
    });
}

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct BFloat16 {
    static float to_float(uint32_t bits) { return float_of(bits << 16); }
    // To the nearest, ties to even.
    static uint32_t to_bits(float x) {
        if (std::isnan(x)) return 0x7fff;
        const uint32_t bits = bits_of(x);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static uint32_t pack(float first, float second) { return to_bits(first) | to_bits(second) << 16; }
    static void unpack(uint32_t pair, float& first, float& second) {
        first = to_float(pair & 0xffff);
        second = to_float(pair >> 16);
    }
    static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
        emulated_mma<BFloat16>(c, a, b);
    }
};

struct Float16 {
    static float to_float(uint32_t bits) {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        float x = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                 : std::ldexp(fraction, -24);
        return bits >> 15 ? -x : x;
    }
    // To the nearest, ties to even.
    static uint32_t to_bits(float x) {
        const uint32_t sign = bits_of(x) >> 16 & 0x8000;
        if (std::isnan(x)) return 0x7fff;
        x = std::fabs(x);
        if (x >= 65520) return sign | 0x7c00;
        if (x == 0) return sign;
        const int exponent = std::max(std::ilogb(x), -14);
        const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(x, 10 - exponent)));
        // A fraction that rounds up to 2048 carries into the exponent.
        return sign | (steps < 1024 ? steps : ((exponent + 15) << 10) + (steps - 1024));
    }
    static uint32_t pack(float first, float second) { return to_bits(first) | to_bits(second) << 16; }
    static void unpack(uint32_t pair, float& first, float& second) {
        first = to_float(pair & 0xffff);
        second = to_float(pair >> 16);
    }
    static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
        emulated_mma<Float16>(c, a, b);
    }
};

inline int opaque(int x) { return x; }

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace diffit::cuda
