// y = f(x w^T + bias) + residual in bfloat16 on the tile registers of AMX, f the identity or GELU.
//
// A block of 32 x 32 sums stays in four tile registers while the product runs over all of k. What
// then remains to be done for it, f and all that is added, is done between the steps of the next
// block's product: the vector units work while the tiles multiply.
#pragma once

#include <algorithm>

#include "bias_gelu.h"
#include "gemm.h"
#include "problem.h"

#if defined(__AMX_BF16__)

namespace diffit {
namespace {

struct LinearKernel {
    using E = Bfloat16Engine;
    static constexpr int N = linear_block, tile_size = W * W;
    static constexpr int64_t resident = 1 << 20;  // bytes that stay in the second-level cache

    // Columns N panel and on as B: for every N of k two tiles of (16 pairs of k, 16 columns).
    static void pack(const Weight& w, int64_t panel) {
        const uint16_t* data = static_cast<const uint16_t*>(w.data);
        uint32_t* out = static_cast<uint32_t*>(w.packed) + panel * (w.k / 2) * N;
        for (int64_t k = 0; k < w.k; k += N) {
            for (int64_t n = panel * N; n < (panel + 1) * N; n += W, out += tile_size) {
                if (w.transposed) {
                    for (int pair = 0; pair < W; ++pair)
                        E::interleave(data + (k + 2 * pair) * w.n + n, w.n, out + pair * W);
                } else {
                    transpose(data + n * w.k + k, w.k / 2, out, W, W, W);
                }
            }
        }
    }

    // a: N rows of x. b: a panel. Calls between(0), between(1), ... on the way.
    template <class Between>
    static void product(int64_t k, const uint16_t* a, const uint16_t* b, float* sums,
                        const Between& between) {
        asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < k / N; ++step, a += N, b += 4 * tile_size) {
            _tile_loadd(4, a, k * 2);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + 2 * tile_size, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + W * k, k * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            between(static_cast<int>(step));
        }
        _tile_stored(0, sums, N * 4);
        _tile_stored(1, sums + W, N * 4);
        _tile_stored(2, sums + W * N, N * 4);
        _tile_stored(3, sums + W * N + W, N * 4);
        asm volatile("" ::: "memory");
    }

    // N x N sums, and where they lie in y.
    struct Block {
        float* sums;
        int64_t row, column;
    };

    // What follows the product, for some rows of a block.
    template <bool activate, class Y>
    static void finish(const Linear& p, const Block& block, int first, int last) {
        vf bias[2] = {};
        if (p.bias) {
            for (int half = 0; half < 2; ++half)
                bias[half] = load(static_cast<const bf16*>(p.bias) + block.column + half * W);
        }
        for (int r = first; r < last; ++r) {
            for (int half = 0; half < 2; ++half) {
                const int64_t at = (block.row + r) * p.n + block.column + half * W;
                vf x = load(block.sums + r * N + half * W);
                if (p.product) store(static_cast<bf16*>(p.product) + at, x);
                x = x + bias[half];
                if (activate) x = gelu<bf16>(x);
                if (p.residual) x = x + load(static_cast<const Y*>(p.residual) + at);
                store(static_cast<Y*>(p.y) + at, x);
            }
        }
    }

    // All rows of some panels.
    template <bool activate, class Y>
    static void run(const Linear& p, int64_t first_panel, int64_t end_panel, float* sums) {
        const int64_t panels = end_panel - first_panel, blocks = (p.rows + N - 1) / N;
        const int rows_of_step = static_cast<int>((N + p.k / N - 1) / (p.k / N));
        // Where all panels stay in the second-level cache, rows are taken once and written in order.
        const bool by_rows = panels * N * p.k * 2 <= resident;
        Block before{};
        for (int64_t i = 0; i < blocks * panels; ++i) {
            const int64_t m = by_rows ? i / panels : i % blocks;
            const int64_t panel = first_panel + (by_rows ? i % panels : i / blocks);
            // Where rows are left over, the last block begins among those of the one before.
            const Block block{sums + i % 2 * N * N, std::min(m * N, p.rows - N), panel * N};
            const auto between = [&](int step) {
                const int first = step * rows_of_step, last = std::min(first + rows_of_step, N);
                for (int r = first; r < last; ++r) {
                    const int64_t at = (block.row + r) * p.n + block.column;
                    prefetch_row<1>(static_cast<Y*>(p.y) + at, N);
                    if (p.product) prefetch_row<1>(static_cast<bf16*>(p.product) + at, N);
                }
                if (before.sums) finish<activate, Y>(p, before, first, last);
            };
            product(p.k, static_cast<const uint16_t*>(p.x) + block.row * p.k,
                    static_cast<const uint16_t*>(p.packed) + block.column * p.k, block.sums,
                    between);
            before = block;
        }
        finish<activate, Y>(p, before, 0, N);
    }

    static void run(const Linear& p, int64_t first_panel, int64_t end_panel, char* scratch) {
        float* sums = reinterpret_cast<float*>(scratch);
        if (p.gelu) return run<true, bf16>(p, first_panel, end_panel, sums);
        if (p.y_dtype == DType::float32) return run<false, float>(p, first_panel, end_panel, sums);
        run<false, bf16>(p, first_panel, end_panel, sums);
    }

    // The layer for a block of rows alone.
    static Linear rows_of(const Linear& p, int64_t block) {
        const auto first_row = [&](int64_t b) {
            return b < p.row_blocks ? p.rows / N * b / p.row_blocks * N : p.rows;
        };
        const int64_t first = first_row(block), size = p.y_dtype == DType::float32 ? 4 : 2;
        const auto moved = [](auto* start, int64_t bytes) {
            return start ? reinterpret_cast<decltype(start)>(uintptr_t(start) + bytes) : nullptr;
        };
        Linear part = p;
        part.rows = first_row(block + 1) - first;
        part.x = moved(p.x, first * p.k * 2);
        part.product = moved(p.product, first * p.n * 2);
        part.residual = moved(p.residual, first * p.n * size);
        part.y = moved(p.y, first * p.n * size);
        return part;
    }

    static void run(const Linear& p, int64_t item, char* scratch) {
        const int64_t panels = p.n / N, part = item % p.column_blocks;
        run(rows_of(p, item / p.column_blocks), panels * part / p.column_blocks,
            panels * (part + 1) / p.column_blocks, scratch);
    }

    // A block of rows through both layers; the hidden one lies in scratch.
    static void mlp(const Linear& fc1, const Linear& fc2, int64_t item, char* scratch) {
        char* hidden = scratch + linear_scratch;
        Linear p = rows_of(fc1, item);
        p.y = hidden;
        run(p, 0, p.n / N, scratch);
        p = rows_of(fc2, item);
        p.x = hidden;
        run(p, 0, p.n / N, scratch);
    }
};

}  // namespace
}  // namespace diffit

#endif  // __AMX_BF16__
