// y = f(x w^T + bias) + residual on the tile registers of AMX, f the identity or GELU.
//
// They multiply bfloat16. A float is the sum of three of those, and the product of two floats that of
// six pairs of their parts; the other three pairs are smaller than its rounding, of either sign.
// Infinity becomes NaN, and a part below 2^-126 counts as zero.
//
// A block of 32 x 32 sums stays in four tile registers while the product runs over k. What
// then remains to be done for it, f and all that is added, is done between the steps of the next
// block's product: the vector units work while the tiles multiply.
#pragma once

#include <algorithm>
#include <type_traits>

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "gemm.h"
#include "problem.h"

#if defined(__AMX_BF16__)

namespace diffit {
namespace {

template <class T>
struct LinearKernel {
    using E = Bfloat16Engine;
    static constexpr bool split = std::is_same<T, float>::value;
    static constexpr int parts = split ? 3 : 1;
    static constexpr int N = linear_block, tile = W * N;
    static constexpr int step_size = 2 * parts * tile;  // of N rows or columns, for N of k

    // The parts of x have no more bits than bfloat16. Rounding the first could make it infinite;
    // truncating the second would give the products left out the sign of those kept.
    static void split_up(vf x, vf (&part)[3]) {
        const vu upper = vu{} + 0xffff0000u;
        part[0] = (vf)((vu)x & upper);
        const vf rest = x - part[0];
        part[1] = (vf)(((vu)rest + 0x8000u) & upper);
        part[2] = rest - part[1];
    }

    // Columns N panel and on as B.
    static void pack(const Weight& w, int64_t panel) {
        uint16_t* out = static_cast<uint16_t*>(w.packed) + panel * (w.k / N) * step_size;
        for (int64_t k = 0; k < w.k; k += N, out += step_size) pack_step(w, panel, k, out);
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
    static void put(uint16_t* step, int row, vf first, vf second) {
        vf x[3], y[3];
        split_up(first, x);
        split_up(second, y);
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
                        const Between& between) {
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

    // N x N sums, and where they belong.
    struct Block {
        float* sums;
        float* so_far;  // where k is taken in blocks: sums of those before
        bool first, last;  // of them
        int64_t index, row, column;
    };

    // What follows the product, for some rows of a block.
    template <bool activate, class Y>
    static void finish(const Linear& p, const Block& block, int first, int last) {
        vf bias[2] = {};
        if (p.bias) {
            for (int half = 0; half < 2; ++half)
                bias[half] = load(static_cast<const T*>(p.bias) + block.column + half * W);
        }
        for (int r = first; r < last; ++r) {
            vf y[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t at = (block.row + r) * p.n + block.column + half * W;
                vf x = load(block.sums + r * N + half * W);
                if (split && block.so_far) {
                    float* so_far = block.so_far + r * N + half * W;
                    if (!block.first) x = x + load(so_far);
                    if (!block.last) {
                        store(so_far, x);
                        continue;
                    }
                }
                if (p.product) store(static_cast<T*>(p.product) + at, x);
                x = x + bias[half];
                if (activate) x = gelu<T>(x);
                if (p.residual) x = x + load(static_cast<const Y*>(p.residual) + at);
                if constexpr (sizeof(Y) == 4 && !activate) store(static_cast<Y*>(p.y) + at, x);
                y[half] = x;
            }
            if constexpr (sizeof(Y) == 2) {
                const __m512bh both = _mm512_cvtne2ps_pbh((__m512)y[1], (__m512)y[0]);
                std::memcpy(static_cast<Y*>(p.y) + (block.row + r) * p.n + block.column, &both,
                            sizeof both);
            }
            if constexpr (split && activate) {
                if (block.last)
                    put(static_cast<uint16_t*>(p.y) +
                            (block.index * (p.n / N) + block.column / N) * step_size,
                        r, y[0], y[1]);
            }
        }
    }

    // Where rows are left over, the last block begins among those of the one before.
    static int64_t row_of(const Linear& p, int64_t block) { return std::min(block * N, p.rows - N); }

    // The layer norm of x, in scratch.
    static const void* normed(const Linear& p, char* scratch) {
        AddLayerNorm norm{};
        norm.rows = norm.chunk = p.rows;
        norm.features = p.k;
        norm.eps = p.norm_eps;
        norm.x = p.x;
        norm.n = scratch + norm_rows * p.k * sizeof(float);
        AddLayerNormKernel<T, T>::forward(norm, 0, scratch);
        return norm.n;
    }

    // Some steps of x as A.
    static void pack_rows(const Linear& p, const float* x, int64_t first_step, int64_t steps,
                          uint16_t* out) {
        for (int64_t block = 0; block * N < p.rows; ++block, out += steps * step_size) {
            for (int r = 0; r < N; ++r) {
                const float* row = x + (row_of(p, block) + r) * p.k;
                for (int64_t step = 0; step < steps; ++step) {
                    const float* at = row + (first_step + step) * N;
                    put(out + step * step_size, r, load(at), load(at + W));
                }
            }
        }
    }

    // All rows of some panels.
    template <bool activate, class Y>
    static void run(const Linear& p, int64_t first_panel, int64_t end_panel, char* scratch) {
        const int64_t panels = end_panel - first_panel, blocks = (p.rows + N - 1) / N;
        const int64_t all_steps = p.k / N;
        const int64_t k_blocks = split ? (p.k + linear_k_block - 1) / linear_k_block : 1;
        const void* x = p.x;
        if (p.norm_eps != 0) {
            x = normed(p, scratch);
            scratch += norm_scratch(p, p.rows);
        }
        float* sums = reinterpret_cast<float*>(scratch);
        float* so_far = sums + 2 * N * N;
        uint16_t* packed_x =
            reinterpret_cast<uint16_t*>(so_far + (k_blocks > 1 ? blocks * panels * N * N : 0));
        Block before{};
        int64_t count = 0;
        for (int64_t k_block = 0; k_block < k_blocks; ++k_block) {
            const int64_t first_step = all_steps * k_block / k_blocks;
            const int64_t steps = all_steps * (k_block + 1) / k_blocks - first_step;
            const int rows_of_step = static_cast<int>((N + steps - 1) / steps);
            // Where all panels stay in the second-level cache, rows are taken once and written in order.
            const bool by_rows = panels * steps * step_size * 2 <= resident;
            if constexpr (split)
                if (!p.x_packed) pack_rows(p, static_cast<const float*>(x), first_step, steps, packed_x);
            for (int64_t i = 0; i < blocks * panels; ++i, ++count) {
                const int64_t m = by_rows ? i / panels : i % blocks;
                const int64_t panel = by_rows ? i % panels : i / blocks;
                const Block block{sums + count % 2 * N * N,
                                  k_blocks > 1 ? so_far + (m * panels + panel) * N * N : nullptr,
                                  k_block == 0,
                                  k_block + 1 == k_blocks,
                                  m,
                                  row_of(p, m),
                                  (first_panel + panel) * N};
                const auto between = [&](int step) {
                    const int first = step * rows_of_step, last = std::min(first + rows_of_step, N);
                    for (int r = first; r < last && (!split || block.last); ++r) {
                        const int64_t at = (block.row + r) * p.n + block.column;
                        // The hidden layer of an MLP is near.
                        if (!activate) prefetch_row<1>(static_cast<Y*>(p.y) + at, N);
                        if (p.product) prefetch_row<1>(static_cast<T*>(p.product) + at, N);
                    }
                    if (before.sums) finish<activate, Y>(p, before, first, last);
                };
                const uint16_t* a = static_cast<const uint16_t*>(x);
                Rows rows{packed_x + m * steps * step_size, tile, step_size, 64};
                if (!split)
                    rows = {a + block.row * p.k, W * p.k, N, p.k * 2};
                else if (p.x_packed)
                    rows.data = a + (m * all_steps + first_step) * step_size;
                const uint16_t* b = static_cast<const uint16_t*>(p.packed) +
                                    ((first_panel + panel) * all_steps + first_step) * step_size;
                product(steps, rows, b, block.sums, between);
                before = block;
            }
        }
        finish<activate, Y>(p, before, 0, N);
    }

    static void run(const Linear& p, int64_t first_panel, int64_t end_panel, char* scratch) {
        if (p.gelu) return run<true, T>(p, first_panel, end_panel, scratch);
        if (p.y_dtype == DType::float32)
            return run<false, float>(p, first_panel, end_panel, scratch);
        run<false, T>(p, first_panel, end_panel, scratch);
    }

    // The layer for a block of rows alone.
    static Linear rows_of(const Linear& p, int64_t block) {
        const auto first_row = [&](int64_t b) {
            return b < p.row_blocks ? p.rows / N * b / p.row_blocks * N : p.rows;
        };
        const int64_t first = first_row(block), size = size_of(p.y_dtype);
        const auto moved = [](auto* start, int64_t bytes) {
            return start ? reinterpret_cast<decltype(start)>(uintptr_t(start) + bytes) : nullptr;
        };
        Linear part = p;
        part.rows = first_row(block + 1) - first;
        part.x = moved(p.x, first * p.k * (p.x_packed ? 2 * parts : sizeof(T)));
        part.product = moved(p.product, first * p.n * sizeof(T));
        part.residual = moved(p.residual, first * p.n * size);
        part.y = moved(p.y, first * p.n * (p.gelu ? 2 * parts : size));
        return part;
    }

    static void run(const Linear& p, int64_t item, char* scratch) {
        const int64_t panels = p.n / N, part = item % p.column_blocks;
        run(rows_of(p, item / p.column_blocks), panels * part / p.column_blocks,
            panels * (part + 1) / p.column_blocks, scratch);
    }

    // A block of rows through both layers; the hidden one lies in scratch.
    static void mlp(const Linear& fc1, const Linear& fc2, int64_t item, char* scratch) {
        Linear p1 = rows_of(fc1, item), p2 = rows_of(fc2, item);
        char* hidden = scratch + std::max(linear_scratch(p1, p1.rows), linear_scratch(p2, p2.rows));
        p1.y = hidden;
        run(p1, 0, p1.n / N, scratch);
        p2.x = hidden;
        run(p2, 0, p2.n / N, scratch);
    }
};

}  // namespace
}  // namespace diffit

#endif  // __AMX_BF16__
