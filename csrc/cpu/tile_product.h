// Products on the tile registers of AMX; see linear.h.
//
// They multiply bfloat16. A float is the sum of three of those, and the product of two floats that of
// six pairs of their parts; the other three pairs are smaller than its rounding, of either sign.
// Infinity becomes NaN, and a part below 2^-126 counts as zero.
//
// A block of 32 x 32 sums stays in four tile registers while the product runs over k.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "problem.h"

#if defined(__AMX_BF16__)

namespace diffit {
namespace {

template <class Element>
struct TileProduct {
    using T = Element;
    using Packed = uint16_t;
    using E = Bfloat16Engine;
    static constexpr bool split = std::is_same<T, float>::value;
    static constexpr int parts = split ? 3 : 1;
    static constexpr int N = linear_block, tile = W * N;
    static constexpr int step_size = 2 * parts * tile;
    static constexpr bool packs_x = split;
    static constexpr int packed_size = 2 * parts;
    static constexpr int64_t most_k = split ? 576 : 0, most_so_far = 0;
    static constexpr bool by_panels = false;
    static constexpr const char* name = "tiles";

    // The parts of x have no more bits than bfloat16. Rounding the first could make it infinite;
    // truncating the second would give the products left out the sign of those kept.
    static void split_up(vf x, vf (&part)[3]) {
        const vu upper = vu{} + 0xffff0000u;
        part[0] = (vf)((vu)x & upper);
        const vf rest = x - part[0];
        part[1] = (vf)(((vu)rest + 0x8000u) & upper);
        part[2] = rest - part[1];
    }

    // A step: for every part two tiles of (16 pairs of k, 16 columns).
    static void pack_step(const Weight& w, int64_t panel, int64_t k, uint16_t* out) {
        for (int half = 0; half < 2; ++half) {
            const int64_t n = panel * N + half * W;
            const int64_t first = w.transposed ? k * w.n + n : n * w.k + k;
            pack_tile(static_cast<const T*>(w.data) + first, w,
                      reinterpret_cast<uint32_t*>(out + half * tile));
        }
    }

    // Inlined, or it would be compiled for any number of rows and columns.
    __attribute__((flatten)) static void transpose_tile(const void* data, int64_t stride, void* out,
                                                        int64_t out_stride = W) {
        transpose(data, stride, out, out_stride, W, W);
    }

    static void pack_tile(const bf16* data, const Weight& w, uint32_t* out) {
        if (!w.transposed) return transpose_tile(data, w.k / 2, out);
        for (int pair = 0; pair < W; ++pair)
            E::interleave(&data->bits + 2 * pair * w.n, w.n, out + pair * W);
    }

    static void pack_tile(const float* data, const Weight& w, uint32_t* out) {
        float columns[N * W];
        int64_t stride = w.n;
        if (!w.transposed) {
            transpose_tile(data, w.k, columns);
            transpose_tile(data + W, w.k, columns + W * W);
            data = columns;
            stride = W;
        }
        for (int pair = 0; pair < W; ++pair) {
            vf even[3], odd[3];
            split_up(load(data + 2 * pair * stride), even);
            split_up(load(data + (2 * pair + 1) * stride), odd);
            for (int i = 0; i < 3; ++i) {
                const vu both = ((vu)even[i] >> 16) | ((vu)odd[i] & 0xffff0000u);
                store(reinterpret_cast<float*>(out + i * tile + pair * W), (vf)both);
            }
        }
    }

    // A row of a step as A: for every part two tiles of (16 rows, 32 of k).
    static void put(uint16_t* step, int row, const vf (&numbers)[2]) {
        vf x[3], y[3];
        split_up(numbers[0], x);
        split_up(numbers[1], y);
        uint16_t* out = step + row / W * tile + row % W * N;
        for (int i = 0; i < 3; ++i) {
            const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y[i], (__m512)x[i]);
            std::memcpy(out + 2 * i * tile, &both, sizeof both);
        }
    }

    // Rows of x as A.
    struct Rows {
        const uint16_t* data;
        int64_t half, step;  // from tile to tile
        int64_t bytes;       // from row to row
    };
    static Rows packed_rows(const uint16_t* step) { return {step, tile, step_size, 64}; }
    static Rows plain_rows(const T* x, int64_t k) {
        return {reinterpret_cast<const uint16_t*>(x), W * k, N, k * 2};
    }

    static void load_a(const Rows& rows, const uint16_t* a) {
        _tile_loadd(4, a, rows.bytes);
        _tile_loadd(5, a + rows.half, rows.bytes);
    }
    static void load_b(const uint16_t* b) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + tile, 64);
    }

    // Multiplies what is loaded, and loads a or b for the next time into registers as they get free.
    static void multiply_load_a(const Rows& rows, const uint16_t* a) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, a, rows.bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(5, a + rows.half, rows.bytes);
    }
    static void multiply_load_b(const uint16_t* b) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, b + tile, 64);
    }

    // One step. Of the six pairs of parts small ones come first, and from each to the next one part
    // stays.
    static void multiply_floats(const Rows& rows, const uint16_t* a, const uint16_t* b) {
        constexpr int part = 2 * tile;
        load_a(rows, a + 2 * part);
        load_b(b);
        multiply_load_a(rows, a + part);
        multiply_load_b(b + part);
        multiply_load_a(rows, a);
        multiply_load_b(b + 2 * part);
        multiply_load_b(b);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }

    static void multiply_halves(const Rows& rows, const uint16_t* a, const uint16_t* b) {
        _tile_loadd(4, a, rows.bytes);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + rows.half, rows.bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    // b: a panel. Calls between(0), between(1), ... on the way.
    template <class Between>
    static void product(int64_t steps, const Rows& rows, const uint16_t* b, float* sums,
                        const Between& between, const uint16_t*) {
        asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
        const uint16_t* a = rows.data;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; ++step, a += rows.step, b += step_size) {
            split ? multiply_floats(rows, a, b) : multiply_halves(rows, a, b);
            between(static_cast<int>(step));
        }
        _tile_stored(0, sums, N * 4);
        _tile_stored(1, sums + W, N * 4);
        _tile_stored(2, sums + W * N, N * 4);
        _tile_stored(3, sums + W * N + W, N * 4);
        asm volatile("" ::: "memory");
    }

    static void store_row(bf16* y, const vf (&x)[2]) {
        const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
        std::memcpy(y, &both, sizeof both);
    }
    static void store_row(float* y, const vf (&x)[2]) {
        store(y, x[0]);
        store(y + W, x[1]);
    }
};

}  // namespace
}  // namespace diffit

#endif  // __AMX_BF16__
