// y = f(x w^T + bias) + residual, f the identity or GELU.
//
// A product gives 32 x 32 sums, a block, of a panel of the weight, and is made in steps of 32 of k. What
// then remains to be done for the block, f and all that is added, is done during the product of the next.
//
// P multiplies: TileProduct or VectorProduct. These are its own:
//   T                      what x, the weight and bias are made of
//   Packed, step_size      what a step of 32 rows or columns is packed as, and how many of those it has
//   packs_x, packed_size   whether x is packed too, or read as it lies; bytes of a packed number
//   most_k                 how much of k is multiplied at once, at most; 0: all
//   most_so_far            bytes of sums that may wait for the next block of k, a panel's at least;
//                          0: any
//   by_panels              whether a panel always goes through all rows before the next one, or only
//                          where the panels are larger than the second-level cache
//   pack_step, put         pack a step of columns of the weight; a row of a step of x
//   Rows, packed_rows, plain_rows   rows of x for a product, packed or as they lie
//   product, store_row     sums = A B over some steps; a row of a block of y
#pragma once

#include <algorithm>

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "tile_product.h"
#include "vector_product.h"

namespace diffit {
namespace {

template <class P>
struct LinearKernel : P {
    using typename P::Packed;
    using typename P::Rows;
    using typename P::T;
    using P::by_panels;
    using P::most_k;
    using P::most_so_far;
    using P::pack_step;
    using P::packed_size;
    using P::packs_x;
    using P::product;
    using P::put;
    using P::step_size;
    using P::store_row;
    static constexpr int N = linear_block, vectors = N / W;
    static constexpr int64_t block_bytes = N * N * sizeof(float);

    // Bytes of the norm of so many rows of x, and of what it takes.
    static size_t norm_scratch(const Linear& p, int64_t rows) {
        return p.norm_eps == 0 ? 0 : (rows * sizeof(T) + norm_rows * sizeof(float)) * p.k;
    }

    // Of an item of so many rows or fewer: two blocks of sums, the norm of x, and where x is packed a
    // block of k of it and the sums of the blocks before.
    static size_t scratch(const Linear& p, int64_t rows) {
        size_t bytes = 2 * block_bytes + norm_scratch(p, rows);
        if (!packs_x) return bytes;
        const int64_t blocks = (rows + N - 1) / N, k = most_k ? std::min(p.k, most_k) : p.k;
        if (!p.x_packed) bytes += blocks * N * k * packed_size;
        if (p.k > k) bytes += most_blocks_so_far(blocks, p.n / N) * block_bytes;
        return bytes;
    }

    // An item of fewer rows may take more panels at once.
    static int64_t most_blocks_so_far(int64_t blocks, int64_t panels) {
        if (!most_so_far) return blocks * panels;
        return std::max(blocks, std::min(blocks * panels, most_so_far / block_bytes));
    }

    // Of so many, those whose sums may wait for the next block of k.
    static int64_t panels_at_once(const Linear& p, int64_t blocks, int64_t panels) {
        if (!most_so_far || p.k <= most_k) return panels;
        return std::clamp<int64_t>(most_so_far / (blocks * block_bytes), 1, panels);
    }

    // Columns N panel and on as B.
    static void pack(const Weight& w, int64_t panel) {
        Packed* out = static_cast<Packed*>(w.packed) + panel * (w.k / N) * step_size;
        for (int64_t k = 0; k < w.k; k += N, out += step_size) pack_step(w, panel, k, out);
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
        vf bias[vectors] = {};
        if (p.bias) {
            for (int v = 0; v < vectors; ++v)
                bias[v] = load(static_cast<const T*>(p.bias) + block.column + v * W);
        }
        for (int r = first; r < last; ++r) {
            const int64_t at = (block.row + r) * p.n + block.column;
            vf y[vectors];
            for (int v = 0; v < vectors; ++v) {
                vf x = load(block.sums + r * N + v * W);
                if (most_k && block.so_far) {
                    float* so_far = block.so_far + r * N + v * W;
                    if (!block.first) x = x + load(so_far);
                    if (!block.last) {
                        store(so_far, x);
                        continue;
                    }
                }
                if (p.product) store(static_cast<T*>(p.product) + at + v * W, x);
                x = x + bias[v];
                if (activate) x = gelu<T>(x);
                if (p.residual) x = x + load(static_cast<const Y*>(p.residual) + at + v * W);
                y[v] = x;
            }
            if (most_k && !block.last) continue;
            if constexpr (packs_x && activate) {
                put(static_cast<Packed*>(p.y) +
                        (block.index * (p.n / N) + block.column / N) * step_size,
                    r, y);
            } else {
                store_row(static_cast<Y*>(p.y) + at, y);
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
    static void pack_rows(const Linear& p, const T* x, int64_t first_step, int64_t steps,
                          Packed* out) {
        for (int64_t block = 0; block * N < p.rows; ++block, out += steps * step_size) {
            for (int r = 0; r < N; ++r) {
                const T* row = x + (row_of(p, block) + r) * p.k;
                for (int64_t step = 0; step < steps; ++step) {
                    vf numbers[vectors];
                    for (int v = 0; v < vectors; ++v)
                        numbers[v] = load(row + (first_step + step) * N + v * W);
                    put(out + step * step_size, r, numbers);
                }
            }
        }
    }

    // All rows of some panels.
    template <bool activate, class Y>
    static void run(const Linear& p, int64_t first_panel, int64_t end_panel, char* scratch) {
        const int64_t blocks = (p.rows + N - 1) / N;
        const int64_t most_panels = panels_at_once(p, blocks, end_panel - first_panel);
        const int64_t groups = (end_panel - first_panel + most_panels - 1) / most_panels;
        const int64_t all_steps = p.k / N;
        const int64_t k_blocks = most_k ? (p.k + most_k - 1) / most_k : 1;
        const void* x = p.x;
        if (p.norm_eps != 0) {
            x = normed(p, scratch);
            scratch += norm_scratch(p, p.rows);
        }
        float* sums = reinterpret_cast<float*>(scratch);
        float* so_far = sums + 2 * N * N;
        Packed* packed_x =
            reinterpret_cast<Packed*>(so_far + (k_blocks > 1 ? blocks * most_panels * N * N : 0));
        Block before{};
        int64_t count = 0;
        for (int64_t pass = 0; pass < groups * k_blocks; ++pass) {
            const int64_t group_panel = first_panel + pass / k_blocks * most_panels;
            const int64_t panels = std::min(most_panels, end_panel - group_panel);
            const int64_t k_block = pass % k_blocks, first_step = all_steps * k_block / k_blocks;
            const int64_t steps = all_steps * (k_block + 1) / k_blocks - first_step;
            const int rows_of_step = static_cast<int>((N + steps - 1) / steps);
            const bool by_rows = !by_panels && panels * steps * N * N * packed_size <= resident;
            if constexpr (packs_x)
                if (!p.x_packed) pack_rows(p, static_cast<const T*>(x), first_step, steps, packed_x);
            for (int64_t i = 0; i < blocks * panels; ++i, ++count) {
                const int64_t m = by_rows ? i / panels : i % blocks;
                const int64_t panel = by_rows ? i % panels : i / blocks;
                const Block block{sums + count % 2 * N * N,
                                  k_blocks > 1 ? so_far + (m * panels + panel) * N * N : nullptr,
                                  k_block == 0,
                                  k_block + 1 == k_blocks,
                                  m,
                                  row_of(p, m),
                                  (group_panel + panel) * N};
                const auto between = [&](int step) {
                    const int first = step * rows_of_step, last = std::min(first + rows_of_step, N);
                    for (int r = first; r < last && (!most_k || block.last); ++r) {
                        const int64_t at = (block.row + r) * p.n + block.column;
                        // The hidden layer of an MLP is near.
                        if (!activate) prefetch_row<1>(static_cast<Y*>(p.y) + at, N);
                        if (p.product) prefetch_row<1>(static_cast<T*>(p.product) + at, N);
                    }
                    if (before.sums) finish<activate, Y>(p, before, first, last);
                };
                Rows rows;
                if constexpr (!packs_x)
                    rows = P::plain_rows(static_cast<const T*>(x) + block.row * p.k, p.k);
                else
                    rows = P::packed_rows(p.x_packed ? static_cast<const Packed*>(x) +
                                                        (m * all_steps + first_step) * step_size
                                                  : packed_x + m * steps * step_size);
                const Packed* b = static_cast<const Packed*>(p.packed) +
                                    ((group_panel + panel) * all_steps + first_step) * step_size;
                // The next panel arrives while all rows are multiplied by this one.
                const Packed* next = b + (all_steps + m * steps / blocks) * step_size;
                product(steps, rows, b, block.sums, between, next);
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
        const int64_t first = first_row(block);
        return diffit::rows_of(p, first, first_row(block + 1) - first, packed_size);
    }

    static void run(const Linear& p, int64_t item, char* scratch) {
        const int64_t panels = p.n / N, part = item % p.column_blocks;
        run(rows_of(p, item / p.column_blocks), panels * part / p.column_blocks,
            panels * (part + 1) / p.column_blocks, scratch);
    }

    // A block of rows through both layers; the hidden one lies in scratch.
    static void mlp(const Linear& fc1, const Linear& fc2, int64_t item, char* memory) {
        Linear p1 = rows_of(fc1, item), p2 = rows_of(fc2, item);
        char* hidden = memory + std::max(scratch(p1, p1.rows), scratch(p2, p2.rows));
        p1.y = hidden;
        run(p1, 0, p1.n / N, memory);
        p2.x = hidden;
        run(p2, 0, p2.n / N, memory);
    }
};

}  // namespace
}  // namespace diffit
