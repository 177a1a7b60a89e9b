// The gradients of the weight and the bias of a linear layer, grad_y^T x and the sum of grad_y's rows,
// on the tile registers of AMX. An item is a rectangle of the weight; of grad_y and x a chunk of rows at
// a time is packed for the product of linear.h, in which grad_y^T stands for x and x for the weight.
#pragma once

#include "linear.h"

#if defined(__AMX_BF16__)

namespace diffit {
namespace {

template <class T>
struct WeightGradientKernel : LinearKernel<TileProduct<T>> {
    using Base = LinearKernel<TileProduct<T>>;
    using Base::N;
    using Base::packed_size;
    using Base::parts;
    using Base::split;
    using Base::step_size;
    using Base::tile;

    // Some columns of grad_y as A, whose k are its rows. Adds them up in sums, if not null.
    static void pack_transposed(const Weight& grad_y, int64_t columns, uint16_t* out, double* sums) {
        const int64_t rows = grad_y.k;
        for (int64_t step = 0; step < rows / N; ++step) {
            for (int64_t block = 0; block < columns / N; ++block) {
                alignas(64) uint16_t b[step_size];
                Base::pack_step(grad_y, block, step * N, b);
                // Tile by tile A is the transpose of B, if pairs of k are taken as words.
                for (int i = 0; i < 2 * parts; ++i) {
                    uint16_t* a = split ? out + (block * (rows / N) + step) * step_size + i * tile
                                        : out + (block * N + i * W) * rows + step * N;
                    Base::transpose_tile(b + i * tile, W, a, split ? W : rows / 2);
                }
                if (!sums) continue;
                const T* x = static_cast<const T*>(grad_y.data) + step * N * grad_y.n + block * N;
                for (int half = 0; half < 2; ++half)
                    add_rows(x + half * W, grad_y.n, sums + block * N + half * W);
            }
        }
    }

    // sums += N rows of W numbers, the rows added up in four chains.
    static void add_rows(const T* x, int64_t stride, double* sums) {
        vf sum[4] = {};
        for (int r = 0; r < N; ++r) sum[r % 4] += load(x + r * stride);
        vd total;
        std::memcpy(&total, sums, sizeof total);
        total += __builtin_convertvector((sum[0] + sum[1]) + (sum[2] + sum[3]), vd);
        std::memcpy(sums, &total, sizeof total);
    }

    static size_t scratch(const WeightGradient& p) {
        const auto most = [](int64_t size, int64_t parts) { return size / parts + N; };
        const int64_t packed = (most(p.n, p.n_parts) + most(p.k, p.k_parts)) * p.chunk;
        return 2 * N * N * sizeof(float) + packed * packed_size;
    }

    static void run(const WeightGradient& p, int64_t item, char* scratch) {
        const auto first = [](int64_t size, int64_t parts, int64_t part) {
            return size / N * part / parts * N;
        };
        const int64_t k_part = item % p.k_parts, n_part = item / p.k_parts % p.n_parts;
        const int64_t row_part = item / p.k_parts / p.n_parts;
        const int64_t n = first(p.n, p.n_parts, n_part);
        const int64_t k = first(p.k, p.k_parts, k_part), end_k = first(p.k, p.k_parts, k_part + 1);
        const int64_t end_row = first(p.rows, p.row_parts, row_part + 1);
        Linear product{};
        product.rows = first(p.n, p.n_parts, n_part + 1) - n;
        product.n = p.k;
        product.dtype = p.dtype;
        product.x_packed = split;
        product.y_dtype = p.sum_dtype;
        product.y =
            static_cast<char*>(p.sums) + (row_part * p.n + n) * p.k * size_of(p.sum_dtype);
        uint16_t* a = reinterpret_cast<uint16_t*>(scratch + 2 * N * N * sizeof(float));
        uint16_t* b = a + product.rows * p.chunk * parts;
        double* bias_sums = p.grad_bias && k == 0 ? p.bias_sums + row_part * p.n + n : nullptr;
        if (bias_sums) std::memset(bias_sums, 0, product.rows * sizeof(double));
        for (int64_t row = first(p.rows, p.row_parts, row_part); row < end_row; row += p.chunk) {
            const int64_t rows = std::min(p.chunk, end_row - row), steps = rows / N;
            const T* grad_y = static_cast<const T*>(p.grad_y) + row * p.n + n;
            pack_transposed({p.n, rows, grad_y, true, nullptr}, product.rows, a, bias_sums);
            const Weight x{p.k, rows, static_cast<const T*>(p.x) + row * p.k, true, nullptr};
            for (int64_t step = 0; step < steps; ++step)
                for (int64_t panel = k / N; panel < end_k / N; ++panel)
                    Base::pack_step(x, panel, step * N,
                                    b + ((panel - k / N) * steps + step) * step_size);
            product.k = rows;
            product.x = a;
            product.packed = b - k / N * steps * step_size;
            Base::run(product, k / N, end_k / N, scratch);
            product.residual = product.y;
        }
    }

    // A row of the gradient, the sum of its parts.
    static void sum_parts(const WeightGradient& p, int64_t row) {
        const float* sums = static_cast<const float*>(p.sums) + row * p.k;
        over(p.k, [&](int64_t c, int lanes) {
            vf sum = load(sums + c, lanes);
            for (int64_t part = 1; part < p.row_parts; ++part)
                sum += load(sums + part * p.n * p.k + c, lanes);
            const int64_t at = row * p.k + c;
            if (p.grad_dtype == DType::float32)
                store(static_cast<float*>(p.grad_weight) + at, sum, lanes);
            else
                store(static_cast<T*>(p.grad_weight) + at, sum, lanes);
        });
    }
};

}  // namespace
}  // namespace diffit

#endif  // __AMX_BF16__
