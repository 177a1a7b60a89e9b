// Backward of windowed attention with a relative position bias, for a group of heads of a chunk of
// windows.
//
// Everything is computed transposed: logits S^T (keys, queries), in base 2, a block of queries in the
// lanes of a vector, so that softmax and delta need no horizontal sums. The gradient of the table is
// summed in the layout of the expanded bias, with vectors, and folded once per item: no scatter, no
// atomics.
#pragma once

#include <cfloat>
#include <cmath>

#include "window_operands.h"

namespace diffit {
namespace {

// logits += bias; returns their maximum over the keys.
template <int NQ, int NV>
inline void add_bias(int keys, float* logits, const float* bias, const int32_t* row,
                     vf (&top)[NV]) {
    for (int v = 0; v < NV; ++v) top[v] = splat(-INFINITY);
    for (int j = 0; j < keys; ++j) {
        for (int v = 0; v < NV; ++v) {
            const vf x = load(logits + j * NQ + v * W) + load(bias + row[j] + v * W);
            store(logits + j * NQ + v * W, x);
            top[v] = max(top[v], x);
        }
    }
}

constexpr float ln_2 = 0.693147181f;

// Keys whose terms are summed on their own before they join a sum: keeps rounding errors small.
constexpr int sum_block = 32;

// a^T as B: k over the columns of a.
template <class E>
inline void columns_as_b(const typename E::A* a, int lda, int rows, int columns,
                         typename E::B* b, int ldb) {
    transpose(a, lda / E::pair, b, ldb, rows, round_up(columns / E::pair, W));
}

// a^T as A: k over the rows of a. `spare` holds as much as a.
template <class E>
inline void columns_as_a(const typename E::A* a, int lda, int rows, int columns,
                         typename E::A* out, int ldo, typename E::B* spare) {
    const typename E::B* b = E::rows_as_b(a, lda, rows, columns, spare);
    transpose(b, lda, out, ldo / E::pair, rows / E::pair, columns);
}

// sums[c] += scale * (the sum of the rows)[c] for c < d. Only four rows at a time are added in single
// precision; to convert each of them would cost more than the sum.
template <class U>
inline void add_rows(double* sums, const U* x, int stride, int rows, double scale, int d) {
    for (int c = 0; c < d; c += W) {
        const auto row = [&](int r) { return load(x + r * stride + c); };
        vd sum = {};
        int r = 0;
        for (; r + 4 <= rows; r += 4)
            sum += __builtin_convertvector((row(r) + row(r + 1)) + (row(r + 2) + row(r + 3)), vd);
        for (; r < rows; ++r) sum += __builtin_convertvector(row(r), vd);
        for (int i = 0; i < W && c + i < d; ++i) sums[c + i] += scale * sum[i];
    }
}

// In blocks of NQ queries.
template <class E, class T, int NQ>
struct Backward {
    using A = typename E::A;
    using B = typename E::B;
    Arena arena;
    Sizes<E> s;
    Layout layout;
    Rows<A> queries, keys, values, grads;
    A *keys_t, *probabilities, *grad_logits;
    B *queries_t, *grads_t, *grads_b, *queries_b, *grad_logits_b, *spare;
    float *q_row, *logits, *grad_probabilities, *grad_queries, *grad_queries_t, *grad_keys,
        *grad_values, *grad_bias;
    double* grad_bias_total;
    int64_t bias_size;       // of a head
    int64_t bias_sums_size;  // of the group

    Backward(const WindowAttention& p, char* scratch)
        : arena(scratch), s(p), layout(arena, p), queries(arena, p.group, s.m_pad, s.d_pad),
          keys(arena, p.group, s.m_pad, s.d_pad), values(arena, p.group, s.m_pad, s.d_pad),
          grads(arena, p.group, s.m_pad, s.d_pad) {
        const int64_t window = int64_t(s.m_pad) * s.d_pad, block = round_up(NQ, E::pad) * s.d_pad;
        const int64_t block_t = round_up(s.d_pad, W * E::pair) * NQ;
        q_row = arena.take<float>(p.group * s.d + W);
        keys_t = arena.take<A>(window);
        queries_t = arena.take<B>(block_t);
        grads_t = arena.take<B>(block_t);
        spare = arena.take<B>(window);
        logits = arena.take<float>(int64_t(s.m_pad) * NQ);
        grad_queries = arena.take<float>(int64_t(s.d_pad) * NQ);
        grad_queries_t = arena.take<float>(int64_t(s.d_pad) * NQ);
        grads_b = arena.take<B>(block);
        queries_b = arena.take<B>(block);
        probabilities = arena.take<A>(int64_t(s.m_pad) * NQ);
        grad_logits = arena.take<A>(int64_t(s.m_pad) * NQ);
        grad_logits_b = arena.take<B>(int64_t(s.m_pad) * NQ);
        grad_probabilities = arena.take<float>(int64_t(s.m_pad) * NQ);
        grad_keys = arena.take<float>(window);
        grad_values = arena.take<float>(window);
        bias_size = (p.table ? s.ww * (2 * p.window_height - 1) * s.ww : s.M) + bias_slack;
        grad_bias = arena.take<float>(p.group * bias_size);
        grad_bias_total = arena.take<double>(p.group * bias_size);
        bias_sums_size = p.group * bias_size;
    }

    static size_t scratch(const WindowAttention& p) { return Backward(p, nullptr).arena.used; }

    static void run(const WindowAttention& p, int64_t item, char* scratch) {
        Backward b(p, scratch);
        b.layout.fill(p);
        const int64_t chunk = item / (p.heads / p.group);
        int64_t windows = 0;
        for_each_window(p, item, [&](const Group& group) {
            double* rows = p.grad_rows_part + (chunk + group.sample) * 2 * p.dim() + group.column;
            b.pack(p, group);
            Ahead ahead(static_cast<int>(p.group), (b.s.M + NQ - 1) / NQ);
            for (int64_t h = 0; h < p.group; ++h) b.run(p, group, h, ahead, rows + h * b.s.d);
            if (p.grad_table && ++windows % 4 == 0) b.flush_bias();
        });
        if (!p.grad_table) return;
        b.flush_bias();
        b.fold_bias(p, p.grad_table_part + chunk * p.heads * p.table_rows(),
                    item % (p.heads / p.group) * p.group);
    }

    // The group's rows; queries in base 2. Memory is read in its own order, all heads of a token
    // together: the hardware follows that, and by heads it would come at half the speed.
    void pack(const WindowAttention& p, const Group& group) const {
        const T* q = group.of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token);
        const T* grad = group.of<T>(p.grad_out, p.grad_out_stride_batch, p.grad_out_stride_token);
        const float scale = static_cast<float>(p.scale * log2_e);
        load_row<T>(q_row, p.q_row, group.sample * p.row_stride_batch + group.column, p.group * s.d);
        for (int r = 0; r < s.M; ++r) {
            const T* row = q + layout.token[r] * p.qkv_stride_token;
            queries.convert(r, row, q_row, scale, p.group, s.d);
            keys.copy(r, row + p.dim(), p.group, s.d);
            values.copy(r, row + 2 * p.dim(), p.group, s.d);
        }
        for (int r = 0; r < s.M; ++r)
            grads.copy(r, grad + layout.token[r] * p.grad_out_stride_token, p.group, s.d);
    }

    void run(const WindowAttention& p, const Group& group, int64_t h, Ahead& ahead,
             double* grad_rows) {
        const int64_t head = group.head + h, dim = p.dim(), *tokens = layout.token;
        const Group next = group.next(p);
        const T* next_q = next.of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token);
        const T* next_grad =
            next.of<T>(p.grad_out, p.grad_out_stride_batch, p.grad_out_stride_token);
        const A *head_keys = keys.head(h), *head_values = values.head(h);
        float* bias_sums = grad_bias + h * bias_size;
        T* grad_q = static_cast<T*>(p.grad_qkv) +
                    (group.sample * p.tokens() + group.token) * 3 * dim + head * s.d;
        const int columns = round_up(s.d, W);
        columns_as_a<E>(head_keys, s.d_pad, s.m_pad, s.d_pad, keys_t, s.m_pad, spare);
        std::memset(grad_keys, 0, int64_t(s.m_rows) * s.d_pad * sizeof(float));
        std::memset(grad_values, 0, int64_t(s.m_rows) * s.d_pad * sizeof(float));
        // Probabilities sum to 1, so what v_row was added to passes its gradient on as it is.
        if (p.grad_v_row)
            add_rows(grad_rows + dim, packed(grads.head(h)), s.d_pad, s.M, 1.0, s.d);

        for (int first = 0; first < s.M; first += NQ) {
            const int count = s.M - first < NQ ? s.M - first : NQ;
            const int lanes = round_up(count, W), q_k = round_up(lanes, E::k_align);
            const A* block = queries.head(h) + first * s.d_pad;
            const A* grad_out = grads.head(h) + first * s.d_pad;
            const auto prefetch = [&](int r) {
                ahead.step([&](int token, int head) {
                    const T* row = next_q + tokens[token] * p.qkv_stride_token + head * s.d;
                    for (int part = 0; part < 3; ++part) prefetch_row(row + part * dim, s.d);
                    prefetch_row(next_grad + tokens[token] * p.grad_out_stride_token + head * s.d,
                                 s.d);
                });
                if (r < count) {
                    T* row = grad_q + tokens[first + r] * 3 * dim;
                    for (int part = 0; part < 3; ++part) prefetch_row<1>(row + part * dim, s.d);
                }
            };
            columns_as_b<E>(block, s.d_pad, lanes, s.d_k, queries_t, NQ);
            columns_as_b<E>(grad_out, s.d_pad, lanes, s.d_k, grads_t, NQ);

            // S^T = K Q^T, dP^T = V dO^T
            E::template gemm<false>(s.m_rows, lanes, s.d_k, head_keys, s.d_pad, queries_t, NQ, logits,
                                    NQ);
            E::template gemm<false>(s.m_rows, lanes, s.d_k, head_values, s.d_pad, grads_t, NQ,
                                    grad_probabilities, NQ);
            const int64_t shift = p.table ? first : 0;
            const float* bias = p.bias + head * p.bias_stride + shift;
            with_vectors<NQ / W>(lanes / W, [&](auto n) {
                grad_softmax<n>(bias, bias_sums + shift, count, prefetch);
            });

            // dV += P^T dO, dK += dS^T Q
            const B* grads_rows = E::rows_as_b(grad_out, s.d_pad, q_k, columns, grads_b);
            const B* queries_rows = E::rows_as_b(block, s.d_pad, q_k, columns, queries_b);
            E::template gemm<true>(s.m_rows, columns, q_k, probabilities, NQ, grads_rows,
                                   s.d_pad, grad_values, s.d_pad);
            E::template gemm<true>(s.m_rows, columns, q_k, grad_logits, NQ, queries_rows,
                                   s.d_pad, grad_keys, s.d_pad);

            // dQ^T = K^T dS^T
            E::template gemm<false>(s.d_rows, lanes, s.m_k, keys_t, s.m_pad, grad_logits_b, NQ,
                                    grad_queries_t, NQ);
            transpose(grad_queries_t, NQ, grad_queries, s.d_pad, columns, lanes);
            if (p.grad_q_row)
                add_rows(grad_rows, grad_queries, s.d_pad, count, p.scale, s.d);
            for (int r = 0; r < count; ++r)
                convert_row(grad_q + tokens[first + r] * 3 * dim, grad_queries + r * s.d_pad,
                            nullptr, p.scale, s.d);
        }
        for (int j = 0; j < s.M; ++j) {
            T* grad = grad_q + tokens[j] * 3 * dim;
            // The packed queries hold the factors scale and log2(e).
            convert_row(grad + dim, grad_keys + j * s.d_pad, nullptr, ln_2, s.d);
            convert_row(grad + 2 * dim, grad_values + j * s.d_pad, nullptr, 1.0f, s.d);
        }
    }

    // P = softmax(S), delta = sum over keys of P dP, dS = P (dP - delta). The softmax is computed
    // again rather than from the log-sum-exp, whose rounding would scale whole rows of P.
    template <int NV, class Prefetch>
    void grad_softmax(const float* bias, float* grad_bias_row, int count,
                      const Prefetch& prefetch) const {
        const int32_t* row = layout.bias;
        vf top[NV], sum[NV] = {}, delta[NV] = {}, x[NV], y[NV];
        add_bias<NQ>(s.M, logits, bias, row, top);
        // Lanes past the last query see the bias of no query. If it is -inf all over, P must still be
        // a number there, since products multiply it by the zero rows of dO and Q.
        float least[NQ];
        for (int r = 0; r < NQ; ++r) least[r] = r < count ? -INFINITY : -FLT_MAX;
        for (int v = 0; v < NV; ++v) top[v] = max(load(least + v * W), top[v]);
        for (int first = 0; first < s.M; first += sum_block) {
            vf sum_part[NV] = {}, delta_part[NV] = {};
            for (int j = first; j < s.M && j < first + sum_block; ++j) {
                for (int v = 0; v < NV; ++v) {
                    const int i = j * NQ + v * W;
                    const vf e = exp2<E::brief>(load(logits + i) - top[v]);
                    sum_part[v] += e;
                    delta_part[v] += e * load(grad_probabilities + i);
                    store(logits + i, e);
                }
                prefetch(j);
            }
            for (int v = 0; v < NV; ++v) {
                sum[v] += sum_part[v];
                delta[v] += delta_part[v];
            }
        }
        for (int v = 0; v < NV; ++v) {
            sum[v] = 1.0f / max(splat(FLT_MIN), sum[v]);
            delta[v] *= sum[v];
        }
        const auto grad_row = [&](int j, vf(&out)[NV]) {
            vf probability[NV];
            for (int v = 0; v < NV; ++v) {
                const int i = j * NQ + v * W;
                probability[v] = load(logits + i) * sum[v];
                out[v] = probability[v] * (load(grad_probabilities + i) - delta[v]);
                float* total = grad_bias_row + row[j] + v * W;
                store(total, load(total) + out[v]);
            }
            E::put_a(probabilities + j * NQ, probability);
            E::put_a(grad_logits + j * NQ, out);
        };
        for (int j = 0; j < s.M; j += 2) {
            grad_row(j, x);
            if (j + 1 < s.M) {
                grad_row(j + 1, y);
            } else {
                for (int v = 0; v < NV; ++v) y[v] = vf{};
            }
            E::put_b(grad_logits_b, NQ, j, x, y);
        }
    }

    // Sums over a few windows go on in double precision: there may be many thousands of them.
    void flush_bias() const {
        for (int64_t i = 0; i < bias_sums_size; ++i) {
            grad_bias_total[i] += grad_bias[i];
            grad_bias[i] = 0;
        }
    }

    // Adds up the group onto its heads of (heads, table rows), and leaves the sums at 0.
    void fold_bias(const WindowAttention& p, double* tables, int64_t first_head) const {
        const int64_t ww = s.ww, rows = 2 * p.window_height - 1;
        for (int64_t h = 0; h < p.group; ++h) {
            double* table = tables + (first_head + h) * p.table_rows();
            const double* total = grad_bias_total + h * bias_size;
            std::memset(table, 0, p.table_rows() * sizeof(double));
            for (int64_t xj = 0; xj < ww; ++xj)
                for (int64_t dy = 0; dy < rows; ++dy)
                    for (int64_t xi = 0; xi < ww; ++xi)
                        table[dy * (2 * ww - 1) + xi - xj + ww - 1] +=
                            total[(xj * rows + dy) * ww + xi];
        }
        std::memset(grad_bias_total, 0, bias_sums_size * sizeof(double));
    }
};

}  // namespace
}  // namespace diffit
