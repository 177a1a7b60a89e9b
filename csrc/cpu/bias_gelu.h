// gelu(hidden + bias), tanh form, and its gradient, over a chunk of rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "problem.h"
#include "vec.h"

namespace diffit {
namespace {

// gelu(x) = x s(x) with s(x) = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float two_u_log2e = 2.30220819f;  // 2 sqrt(2/pi) log2(e)
constexpr float two_u = 1.59576912f;        // 2 sqrt(2/pi)
constexpr float cubic = 0.044715f;

struct Gate {
    vf open, closed;  // s(x) and 1 - s(x), each to full relative precision; both 0 where s underflows
};

template <class T>
inline Gate gate(vf x) {
    constexpr bool brief = std::is_same<T, bf16>::value;
    const vf u = x * (cubic * (x * x) + 1.0f) * -two_u_log2e;
    // The bound keeps 1 + e a normal number; NaN passes it.
    const vf limit = splat(126.0f);
    const vf e = exp2<brief>(limit < u ? limit : u);
    const vf open = limit < u ? vf{} : reciprocal<brief>(1.0f + e);
    return {open, e * open};
}

template <class T>
inline vf gelu(vf x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, bf16>::value) {
        const vf u = x * (x * x * (-two_u_log2e * cubic) - two_u_log2e);
        return x * reciprocal<true>(1.0f + exp2<true>(u));
    }
#endif
    return x * gate<T>(x).open;
}

template <class T>
struct BiasGeluKernel {
    static void forward(const BiasGelu& p, int64_t item) {
        const T* bias = static_cast<const T*>(p.bias);
        for (int64_t r = item * p.chunk; r < p.rows && r < (item + 1) * p.chunk; ++r) {
            const T* hidden = static_cast<const T*>(p.hidden) + r * p.features;
            T* activation = static_cast<T*>(p.activation) + r * p.features;
            over(p.features, [&](int64_t c, int n) {
                const vf x = load(hidden + c, n) + load(bias + c, n);
                store(activation + c, gelu<T>(x), n);
            });
        }
    }

    static void backward(const BiasGelu& p, int64_t item) {
        const T* bias = static_cast<const T*>(p.bias);
        float* grad_bias = p.grad_bias_part + item * p.features;
        std::memset(grad_bias, 0, p.features * sizeof(float));
        const int64_t end = std::min(p.rows, (item + 1) * p.chunk);
        for (int64_t first = item * p.chunk; first < end; first += 4) {
            const int rows = static_cast<int>(std::min<int64_t>(4, end - first));
            const int64_t start = first * p.features;
            const T* hidden = static_cast<const T*>(p.hidden) + start;
            T* activation = static_cast<T*>(p.activation) + start;
            T* grad = static_cast<T*>(p.grad) + start;
            over(p.features, [&](int64_t c, int n) {
                vf sum = {};  // of few rows, as a long chain of additions would lose digits
                for (int r = 0; r < rows; ++r) {
                    const int64_t at = r * p.features + c;
                    const vf x = load(hidden + at, n) + load(bias + c, n);
                    const Gate g = gate<T>(x);
                    const vf y = x * g.open;
                    // d gelu / dx = s + x s (1 - s) d(2u)/dx
                    // The bound keeps x^2 finite where s (1 - s) has long been 0.
                    const vf x2 = x * x, limit = splat(1e4f);
                    const vf slope = (3 * cubic * two_u) * (limit < x2 ? limit : x2) + two_u;
                    const vf dx = load(grad + at, n) * (g.open + y * g.closed * slope);
                    store(activation + at, y, n);
                    store(grad + at, dx, n);
                    sum += dx;
                }
                store(grad_bias + c, load(grad_bias + c, n) + sum, n);
            });
        }
    }
};

}  // namespace
}  // namespace diffit
