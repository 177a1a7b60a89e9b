// Forward of windowed attention with a relative position bias, for a group of heads of a chunk of
// windows, and what the backward pass shares with it.
//
// Everything is computed transposed: logits S^T (keys, queries), a block of queries in the lanes
// of a vector, so that softmax and delta need no horizontal sums. Logits are in base 2: log2(e) is
// folded into q and into the bias.
//
// The bias is expanded once per call so that a row of S^T reads it contiguously. For one column
// xj of keys, with dy = yi - yj,
//     bias[xj][(dy + wh - 1) ww + xi] = table[(dy + wh - 1)(2 ww - 1) + xi - xj + ww - 1]
// and the row of key (yj, xj) is bias[xj] + (wh - 1 - yj) ww, for queries 0 .. M - 1 in order. The
// gradient of the table is summed in the same layout, with vectors, and folded once per item: no
// scatter, no atomics.
#pragma once

#include <cmath>

#include "window_operands.h"

namespace diffit {
namespace {

constexpr float ln_2 = 0.693147181f;

// logits += bias; returns their maximum over the keys.
template <class E, int NV>
inline void add_bias(const Sizes<E>& s, float* logits, const float* bias, const int32_t* row,
                     vf (&top)[NV]) {
    constexpr int NQ = block_of<E>;
    for (int v = 0; v < NV; ++v) top[v] = splat(-INFINITY);
    for (int j = 0; j < s.M; ++j) {
        for (int v = 0; v < NV; ++v) {
            const vf x = load(logits + j * NQ + v * W) + load(bias + row[j] + v * W);
            store(logits + j * NQ + v * W, x);
            top[v] = max(top[v], x);
        }
    }
}

template <int n>
struct Number {
    constexpr operator int() const { return n; }
};

// f(Number<n>), n <= N known at run time.
template <int N, class F>
inline void with_vectors(int n, const F& f) {
    if constexpr (N > 1) {
        if (n < N) return with_vectors<N - 1>(n, f);
    }
    f(Number<N>{});
}

// Keys whose terms are summed on their own before they join a sum: keeps rounding errors small.
constexpr int sum_block = 32;

// p = exp2(logits + bias - top) as B, with the maximum and the sum over the keys. Calls
// prefetch(0), prefetch(1), ... on the way: the next block's rows lie far apart, no hardware
// prefetcher follows them, and here they arrive behind the arithmetic.
template <class E, int NV, class Prefetch>
inline void softmax(const Sizes<E>& s, float* logits, const float* bias, const int32_t* row,
                    typename E::B* p, vf* top, vf* sum, const Prefetch& prefetch) {
    constexpr int NQ = block_of<E>;
    vf m[NV], l[NV] = {}, x[NV], y[NV];
    add_bias<E, NV>(s, logits, bias, row, m);
    for (int first = 0; first < s.M; first += sum_block) {
        vf part[NV] = {};
        for (int j = first; j < s.M && j < first + sum_block; j += 2) {
            const bool last = j + 1 == s.M;
            for (int v = 0; v < NV; ++v) {
                x[v] = exp2<E::brief>(load(logits + j * NQ + v * W) - m[v]);
                y[v] = last ? vf{} : exp2<E::brief>(load(logits + (j + 1) * NQ + v * W) - m[v]);
                part[v] += x[v] + y[v];
            }
            E::put_b(p, NQ, j, x, y);
            prefetch(j);
            prefetch(j + 1);
        }
        for (int v = 0; v < NV; ++v) l[v] += part[v];
    }
    for (int v = 0; v < NV; ++v) {
        top[v] = m[v];
        sum[v] = l[v];
    }
}

template <class E, class T>
struct Forward {
    static constexpr int NQ = block_of<E>;
    // With E::ahead the logits of a block are computed a block ahead, while the probabilities of the
    // block before it are on their way to the cache.
    static constexpr int buffers = E::ahead ? 2 : 1;
    Arena arena;
    Sizes<E> s;
    Operands<E> o;
    typename E::A* values_t[buffers];
    typename E::B *queries_t[buffers], *probabilities;
    float *logits[buffers], *v_row;

    // A block of queries of a head of the group, and its place in the order of both.
    struct Block {
        int64_t index, head;
        int first, count, lanes;

        Block(const Sizes<E>& s, int64_t index) : index(index) {
            const int64_t blocks = (s.M + NQ - 1) / NQ;
            head = index / blocks;
            first = static_cast<int>(index % blocks) * NQ;
            count = s.M - first < NQ ? s.M - first : NQ;
            lanes = round_up(count, W);
        }
    };

    Forward(const WindowAttention& p, char* scratch) : arena(scratch), s(p), o(arena, p, s) {
        for (int i = 0; i < buffers; ++i) {
            values_t[i] = arena.take<typename E::A>(int64_t(s.d_pad) * s.m_pad);
            queries_t[i] = i ? arena.take<typename E::B>(o.queries_t_size(s)) : o.queries_t;
            logits[i] = i ? arena.take<float>(int64_t(s.m_pad) * NQ) : o.logits;
        }
        probabilities = arena.take<typename E::B>(int64_t(s.m_pad) * NQ);
        v_row = arena.take<float>(p.group * s.d + W);
    }

    static size_t scratch(const WindowAttention& p) { return Forward(p, nullptr).arena.used; }

    static void run(const WindowAttention& p, int64_t item, char* scratch) {
        Forward f(p, scratch);
        f.o.layout.fill(p);
        for_each_window(p, item, [&](const Group& group) { f.run(p, group); });
    }

    void run(const WindowAttention& p, const Group& group) {
        o.template pack<T>(p, s, group);
        load_row<T>(v_row, p.v_row, group.sample * p.row_stride_batch + group.column, p.group * s.d);
        const int64_t per_head = (s.M + NQ - 1) / NQ, blocks = p.group * per_head;
        Ahead next_rows(static_cast<int>(p.group), static_cast<int>(per_head));
        if (E::ahead) {
            transpose_operands({s, 0});
            score({s, 0});
            if (blocks > 1) transpose_operands({s, 1});
        }
        for (int64_t i = 0; i < blocks; ++i) {
            const Block block(s, i);
            if (!E::ahead) {
                transpose_operands(block);
                score(block);
            }
            vf top[E::vectors], sum[E::vectors];
            probabilities_of(p, group, block, next_rows, top, sum);
            if (E::ahead && i + 1 < blocks) score({s, i + 1});
            E::template gemm<false>(s.d_rows, block.lanes, s.m_k, values_t[block.head % buffers],
                                    s.m_pad, probabilities, NQ, o.result, NQ);
            if (E::ahead && i + 2 < blocks) transpose_operands({s, i + 2});
            store_result(p, group, block, top, sum);
        }
    }

    void transpose_operands(const Block& block) const {
        columns_as_b<E>(o.queries.head(block.head) + block.first * s.d_pad, s.d_pad, block.lanes,
                        s.d_k, queries_t[block.index % buffers], NQ);
        if (block.first == 0)
            columns_as_a<E>(o.values.head(block.head), s.d_pad, s.m_pad, s.d_pad,
                            values_t[block.head % buffers], s.m_pad, o.spare);
    }

    // S^T = K Q^T
    void score(const Block& block) const {
        E::template gemm<false>(s.m_rows, block.lanes, s.d_k, o.keys.head(block.head), s.d_pad,
                                queries_t[block.index % buffers], NQ,
                                logits[block.index % buffers], NQ);
    }

    void probabilities_of(const WindowAttention& p, const Group& group, const Block& block,
                          Ahead& next_rows, vf* top, vf* sum) const {
        const int64_t head = group.head + block.head, *tokens = o.layout.token;
        const T* next = group.next(p).template of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token);
        const T* out = result_of(p, group, block);
        const float* bias = p.bias + head * p.bias_stride + (p.table ? block.first : 0);
        const auto prefetch = [&](int r) {
            next_rows.step([&](int token, int head) {
                const T* row = next + tokens[token] * p.qkv_stride_token + head * s.d;
                for (int part = 0; part < 3; ++part) prefetch_row(row + part * p.dim(), s.d);
            });
            if (r < block.count)
                prefetch_row<1>(out + tokens[block.first + r] * p.dim(), s.d);
        };
        with_vectors<E::vectors>(block.lanes / W, [&](auto n) {
            softmax<E, n>(s, logits[block.index % buffers], bias, o.layout.bias, probabilities, top,
                          sum, prefetch);
        });
    }

    void store_result(const WindowAttention& p, const Group& group, const Block& block,
                      const vf* top, const vf* sum) const {
        const int64_t* tokens = o.layout.token + block.first;
        T* out = result_of(p, group, block);
        float* lse = p.lse + (group.sample * p.heads + group.head + block.head) * p.tokens() +
                     group.token;
        for (int v = 0; v < block.lanes / W; ++v) {
            float lanes_of[W];
            store(lanes_of, (top[v] + log2(sum[v])) * ln_2);
            for (int i = 0; i < W && v * W + i < block.count; ++i)
                lse[tokens[v * W + i]] = lanes_of[i];
            const vf inverse = reciprocal(sum[v]);
            for (int c = 0; c < s.d; ++c) {
                float* x = o.result + c * NQ + v * W;
                store(x, load(x) * inverse);
            }
        }
        transpose(o.result, NQ, o.transposed, s.d_pad, round_up(s.d, W), block.lanes);
        for (int r = 0; r < block.count; ++r)
            convert_row(out + tokens[r] * p.dim(), o.transposed + r * s.d_pad,
                        v_row + block.head * s.d, 1.0f, s.d);
    }

    // That of the window's first token.
    T* result_of(const WindowAttention& p, const Group& group, const Block& block) const {
        return static_cast<T*>(p.out) + (group.sample * p.tokens() + group.token) * p.dim() +
               (group.head + block.head) * s.d;
    }
};

}  // namespace
}  // namespace diffit
