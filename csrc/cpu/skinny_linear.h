// y = x w^T + biases for a chunk of columns, where x has few rows, as time tokens are: the weight is
// read once, as it lies, which takes longer than to multiply it.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace diffit {
namespace {

template <class T>
struct SkinnyLinearKernel {
    static constexpr int tile = 4;  // rows and columns whose sums are in registers at once

    static size_t scratch(const SkinnyLinear& p) {
        return p.rows * (round_up(p.k, W) + p.chunk) * sizeof(float);
    }

    // out[r][c] = sum of x[r] w[c] for `rows` rows of x, in floats, and `tile` columns.
    template <int rows>
    static void product(const float* x, int64_t x_stride, const T* w, int64_t k, float* out,
                        int64_t out_stride) {
        vf sums[rows][tile] = {};
        over(k, [&](int64_t at, int lanes) {
            for (int c = 0; c < tile; ++c) {
                const vf b = load(w + c * k + at, lanes);
                for (int r = 0; r < rows; ++r) sums[r][c] += load(x + r * x_stride + at) * b;
            }
        });
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < tile; ++c) out[r * out_stride + c] = sum_of_lanes(sums[r][c]);
    }

    // The chunk of columns is a multiple of the tile.
    static void run(const SkinnyLinear& p, int64_t item, char* scratch) {
        const int64_t first = item * p.chunk, x_stride = round_up(p.k, W);
        float* x = reinterpret_cast<float*>(scratch);
        float* sums = x + p.rows * x_stride;
        for (int64_t r = 0; r < p.rows; ++r)
            over(p.k, [&](int64_t c, int lanes) {
                store(x + r * x_stride + c, load(static_cast<const T*>(p.x) + r * p.k + c, lanes));
            });
        const T* w = static_cast<const T*>(p.weight) + first * p.k;
        for (int64_t c = 0; c < p.chunk; c += tile)
            for (int64_t r = 0; r < p.rows; r += tile)
                with_vectors<tile>(static_cast<int>(std::min<int64_t>(tile, p.rows - r)),
                                   [&](auto rows) {
                                       product<rows>(x + r * x_stride, x_stride, w + c * p.k, p.k,
                                                     sums + r * p.chunk + c, p.chunk);
                                   });
        for (int64_t r = 0; r < p.rows; ++r)
            over(p.chunk, [&](int64_t c, int lanes) {
                vf y = load(sums + r * p.chunk + c, lanes);
                for (const void* bias : p.biases)
                    if (bias) y += load(static_cast<const T*>(bias) + first + c, lanes);
                store(static_cast<T*>(p.y) + r * p.n + first + c, y, lanes);
            });
    }
};

}  // namespace
}  // namespace diffit
