// Sum over the tokens of a sample, the gradient of a row that was added to all of them; in double
// precision, which costs nothing beside the reads.
#pragma once

#include "problem.h"
#include "vec.h"

namespace diffit {
namespace {

template <class T>
struct TokenSumKernel {
    static constexpr int N = 4;  // vectors of columns in one item of work

    static int64_t blocks(const TokenSum& t) { return (t.columns + N * W - 1) / (N * W); }
    static int64_t items(const TokenSum& t) { return t.batch * blocks(t); }

    static void run(const TokenSum& t, int64_t item) {
        const int64_t blocks = TokenSumKernel::blocks(t);
        const int64_t sample = item / blocks, first = item % blocks * N * W;
        const T* x = static_cast<const T*>(t.x) + sample * t.stride_batch + first;
        T* out = static_cast<T*>(t.out) + sample * t.columns + first;
        const int64_t rest = t.columns - first;
        if (rest >= N * W) {
            sum<N>(t, x, out, W);
        } else {
            for (int64_t c = 0; c < rest; c += W)
                sum<1>(t, x + c, out + c, rest - c < W ? static_cast<int>(rest - c) : W);
        }
    }

    template <int V>
    static void sum(const TokenSum& t, const T* x, T* out, int n) {
        vd total[V] = {};
        for (int64_t l = 0; l < t.tokens; ++l)
            for (int v = 0; v < V; ++v)
                total[v] += __builtin_convertvector(load(x + l * t.stride_token + v * W, n), vd);
        for (int v = 0; v < V; ++v)
            store(out + v * W, __builtin_convertvector(total[v], vf), n);
    }
};

}  // namespace
}  // namespace diffit
