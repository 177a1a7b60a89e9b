// Products by fused multiply-adds of floats, half precision widened as it is packed; see linear.h.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace diffit {
namespace {

template <class Element>
struct VectorProduct {
    using T = Element;
    using Packed = float;
    static constexpr int N = linear_block, vectors = N / W;
    static constexpr int step_size = N * N;  // (k, columns), and of x (rows, k)
    static constexpr bool packs_x = true;
    static constexpr int packed_size = 4;
    // Of a panel of the weight what is about as large as the first-level cache, and sums that stay in
    // the second-level one.
    static constexpr int64_t most_k = 288, most_so_far = 1 << 19;
    static constexpr bool by_panels = true;
    static constexpr const char* name = "vectors";

    // Rows of x in registers at once, with two vectors of columns: 24 rows by tiles of `many`, the last
    // 8 by tiles of `few`. Sums fill most registers.
    static constexpr int many = W == 16 ? 12 : 6, few = W == 16 ? 8 : 4;
    static constexpr int tiles = N / (2 * W) * (24 / many + 8 / few);

    // Inlined, or it would be transposed by any number of rows and columns.
    __attribute__((flatten)) static void pack_step(const Weight& w, int64_t panel, int64_t k,
                                                   float* out) {
        const int64_t n = panel * N;
        const T* data = static_cast<const T*>(w.data) + (w.transposed ? k * w.n + n : n * w.k + k);
        if (w.transposed) {
            for (int r = 0; r < N; ++r)
                for (int v = 0; v < vectors; ++v)
                    store(out + r * N + v * W, load(data + r * w.n + v * W));
        } else {
            transpose([&](int r, int c) { return load(data + r * w.k + c); }, out, N, N, N);
        }
    }

    static void put(float* step, int row, const vf (&x)[vectors]) { store_row(step + row * N, x); }
    template <class Y>
    static void store_row(Y* y, const vf (&x)[vectors]) {
        for (int v = 0; v < vectors; ++v) store(y + v * W, x[v]);
    }

    struct Rows {
        const float* data;
    };
    static Rows packed_rows(const float* step) { return {step}; }

    template <int rows>
    static void tile(int64_t steps, const float* a, const float* b, float* sums,
                     const float*& next) {
        vf sum[rows][2] = {};
        for (int64_t step = 0; step < steps; ++step, a += step_size, b += step_size) {
            for (int line = 0; line < 12 / tiles; ++line, next += 16) __builtin_prefetch(next, 0, 2);
            for (int k = 0; k < N; ++k) {
                const vf x = load(b + k * N), y = load(b + k * N + W);
                for (int r = 0; r < rows; ++r) {
                    const vf factor = splat(a[r * N + k]);
                    sum[r][0] += factor * x;
                    sum[r][1] += factor * y;
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < 2; ++v) store(sums + r * N + v * W, sum[r][v]);
    }

    // b: a panel. Calls between(0), between(1), ... first, and fetches what follows `next` on the way.
    template <class Between>
    static void product(int64_t steps, const Rows& x, const float* b, float* sums,
                        const Between& between, const float* next) {
        for (int64_t step = 0; step < steps; ++step) between(static_cast<int>(step));
        for (int column = 0; column < N; column += 2 * W) {
            const auto run = [&](auto rows, int row) {
                tile<rows>(steps, x.data + row * N, b + column, sums + row * N + column, next);
            };
            for (int row = 0; row < 24; row += many) run(Number<many>{}, row);
            for (int row = 24; row < N; row += few) run(Number<few>{}, row);
        }
    }
};

}  // namespace
}  // namespace diffit
