// s = x + y and n = (s - mean) / sqrt(var + eps) of a row, and the gradient, over a chunk of rows; y, s
// and grad_s may be null. The mean of a row far from zero is rounded to units of its size; the mean of
// the deviations, which is what that leaves, is taken off too.
#pragma once

#include <algorithm>
#include <cmath>

#include "problem.h"
#include "vec.h"

namespace diffit {
namespace {

// X: dtype of x, s and their gradient. Y: dtype of y, n and its gradient.
template <class X, class Y>
struct AddLayerNormKernel {
    // Calls each(column, lanes, sums) for the vectors of a row; returns N sums over the row, each made
    // of short sums, which keeps rounding errors small.
    template <int N, class Each>
    static void sum(int64_t features, float (&out)[N], const Each& each) {
        constexpr int64_t block = 8 * W;
        vf total[N] = {};
        for (int64_t first = 0; first < features; first += block) {
            vf part[N] = {};
            const int64_t end = first + block < features ? first + block : features;
            int64_t c = first;
            for (; c + W <= end; c += W) each(c, W, part);
            if (c < end) each(c, static_cast<int>(end - c), part);
            for (int i = 0; i < N; ++i) total[i] += part[i];
        }
        for (int i = 0; i < N; ++i) out[i] = sum_of_lanes(total[i]);
    }

    // The lanes of a vector that are in the row; lanes past it must not count as deviations.
    static vf valid(vf x, int n) {
        if (n == W) return x;
        float lanes[W];
        store(lanes, x);
        for (int i = n; i < W; ++i) lanes[i] = 0;
        return load(lanes);
    }

    // The row of a tensor, or null where there is no tensor.
    template <class T, class Memory>
    static T* row_of(Memory* tensor, int64_t offset) {
        return tensor ? static_cast<T*>(tensor) + offset : nullptr;
    }

    // Step by step for some short rows in half precision, since what follows a sum waits for it. In
    // float32 all wait for memory, which serves rows one by one better.
    static void forward(const AddLayerNorm& p, int64_t item, char* scratch) {
        const int64_t features = p.features, end = std::min(p.rows, (item + 1) * p.chunk);
        const int64_t at_once =
            sizeof(Y) == 2 ? std::clamp<int64_t>(1024 / features, 1, norm_rows) : 1;
        const float count = static_cast<float>(features);
        for (int64_t first = item * p.chunk; first < end; first += at_once) {
            const int64_t rows = std::min(at_once, end - first);
            float *row = reinterpret_cast<float*>(scratch), mean[norm_rows], rest[norm_rows],
                  rstd[norm_rows];
            for (int64_t r = 0; r < rows; ++r, row += features) {
                const int64_t at = (first + r) * features;
                const X* x = static_cast<const X*>(p.x) + at;
                const Y* y = row_of<const Y>(p.y, at);
                X* s = row_of<X>(p.s, at);
                float total[1];
                sum(features, total, [&](int64_t c, int lanes, vf(&t)[1]) {
                    vf v = load(x + c, lanes);
                    if (y) v += load(y + c, lanes);
                    store(row + c, v, lanes);
                    if (s) store(s + c, v, lanes);
                    t[0] += v;
                });
                mean[r] = total[0] / count;
            }
            row = reinterpret_cast<float*>(scratch);
            for (int64_t r = 0; r < rows; ++r, row += features) {
                float moments[2];
                sum(features, moments, [&](int64_t c, int lanes, vf(&t)[2]) {
                    const vf d = valid(load(row + c, lanes) - mean[r], lanes);
                    t[0] += d;
                    t[1] += d * d;
                });
                rest[r] = moments[0] / count;
                rstd[r] = 1 / std::sqrt(moments[1] / count - rest[r] * rest[r] + p.eps);
            }
            row = reinterpret_cast<float*>(scratch);
            for (int64_t r = 0; r < rows; ++r, row += features) {
                Y* n = static_cast<Y*>(p.n) + (first + r) * features;
                over(features, [&](int64_t c, int lanes) {
                    store(n + c, (load(row + c, lanes) - mean[r] - rest[r]) * rstd[r], lanes);
                });
            }
        }
    }

    // grad = grad_s + rstd (grad_n - mean(grad_n) - n mean(grad_n n))
    static void backward(const AddLayerNorm& p, int64_t item, char*) {
        const float count = static_cast<float>(p.features);
        for (int64_t r = item * p.chunk; r < p.rows && r < (item + 1) * p.chunk; ++r) {
            const X* s = static_cast<const X*>(p.s) + r * p.features;
            const X* grad_s = row_of<const X>(p.grad_s, r * p.features);
            const Y* grad_n = static_cast<const Y*>(p.grad_n) + r * p.features;
            X* grad = static_cast<X*>(p.grad) + r * p.features;
            float total[1], moments[4];
            sum(p.features, total,
                [&](int64_t c, int lanes, vf(&t)[1]) { t[0] += load(s + c, lanes); });
            const float mean = total[0] / count;
            sum(p.features, moments, [&](int64_t c, int lanes, vf(&t)[4]) {
                const vf d = valid(load(s + c, lanes) - mean, lanes), g = load(grad_n + c, lanes);
                t[0] += d;
                t[1] += d * d;
                t[2] += g;
                t[3] += g * d;
            });
            const float rest = moments[0] / count, grad_mean = moments[2] / count;
            const float rstd = 1 / std::sqrt(moments[1] / count - rest * rest + p.eps);
            const float along_n = (moments[3] / count - rest * grad_mean) * rstd;
            over(p.features, [&](int64_t c, int lanes) {
                const vf normed = (load(s + c, lanes) - mean - rest) * rstd;
                vf g = rstd * (load(grad_n + c, lanes) - grad_mean - normed * along_n);
                if (grad_s) g += load(grad_s + c, lanes);
                store(grad + c, g, lanes);
            });
        }
    }
};

}  // namespace
}  // namespace diffit
