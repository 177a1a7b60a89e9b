// Forward of windowed attention with a relative position bias, for a group of heads of a chunk of
// windows.
//
// Logits S (queries, keys) have a row for each query and are in base 2: log2(e) is folded into q and
// into the bias. Exponentials are taken of them as they are. Only where the sum of a row shows that
// numbers became too large or too small are they taken again, of what remains when the largest logit
// of the row is subtracted.
#pragma once

#include <cmath>

#include "window_operands.h"

namespace diffit {
namespace {

template <class E, class T>
struct Forward {
    static constexpr int NQ = block_of<E>;
    using A = typename E::A;
    using B = typename E::B;
    // With E::ahead the logits of a block are computed a block ahead, while the probabilities of the
    // block before it are on their way to the cache.
    static constexpr int buffers = E::ahead ? 2 : 1;
    // Between these sums no term that counts has underflowed, and products with v do not overflow.
    static constexpr float least_sum = 0x1p-32f, largest_sum = 0x1p32f;
    Arena arena;
    Sizes<E> s;
    Layout layout;
    Rows<A> queries;
    Rows<B> keys_t, values_b;  // of keys_t the rows are panels
    A* probabilities;
    float *q_row, *v_row, *logits[buffers], *result;
    float *top, *sums, *partial_sums;  // of rows: what is subtracted, sums, their parts by lane

    // A block of queries of a head of the group, and its place in the order of both.
    struct Block {
        int64_t index, head;
        int first, count;

        Block(const Sizes<E>& s, int64_t index) : index(index) {
            const int64_t blocks = (s.M + NQ - 1) / NQ;
            head = index / blocks;
            first = static_cast<int>(index % blocks) * NQ;
            count = s.M - first < NQ ? s.M - first : NQ;
        }
        int rows() const { return round_up(count, E::m_align); }
    };

    Forward(const WindowAttention& p, char* scratch)
        : arena(scratch), s(p), layout(arena, p),
          queries(arena, p.group, s.m_pad, s.d_pad),
          keys_t(arena, p.group, (s.M + NQ - 1) / NQ, panel_size(s)),
          values_b(arena, p.group, s.m_pad / E::pair, s.d_pad) {
        probabilities = arena.take<A>(int64_t(NQ) * s.m_pad);
        for (float*& block : logits) block = arena.take<float>(int64_t(NQ) * s.m_pad);
        result = arena.take<float>(int64_t(NQ) * s.d_pad);
        q_row = arena.take<float>(p.group * s.d + W);
        v_row = arena.take<float>(p.group * s.d + W);
        top = arena.take<float>(NQ);
        sums = arena.take<float>(NQ);
        partial_sums = arena.take<float>(NQ * W);
    }

    static size_t scratch(const WindowAttention& p) { return Forward(p, nullptr).arena.used; }

    static void run(const WindowAttention& p, int64_t item, char* scratch) {
        Forward f(p, scratch);
        f.layout.fill(p);
        for_each_window(p, item, [&](const Group& group) { f.run(p, group); });
    }

    void run(const WindowAttention& p, const Group& group) const {
        pack(p, group);
        Ahead next_rows(static_cast<int>(p.group));
        const int64_t blocks = p.group * ((s.M + NQ - 1) / NQ);
        if (E::ahead) score({s, 0}).run();
        for (int64_t i = 0; i < blocks; ++i) {
            const Block block(s, i);
            if (!E::ahead) score(block).run();
            softmax(p, group, block, next_rows);
            if (E::ahead && i + 1 < blocks) score({s, i + 1}).run();
            weigh(block).run();
            store_result(p, group, block);
        }
    }

    // Rows of the group as the products take them, queries in base 2. Memory is read in its own order,
    // all heads of a few tokens together: the hardware follows that, and by heads it would come at half
    // the speed. K^T lies in panels of NQ keys: the rows of a whole one would share few sets of the
    // cache.
    void pack(const WindowAttention& p, const Group& group) const {
        const int64_t row = group.sample * p.row_stride_batch + group.column;
        load_row<T>(q_row, p.q_row, row, p.group * s.d);
        load_row<T>(v_row, p.v_row, row, p.group * s.d);
        const float scale = static_cast<float>(p.scale * log2_e);
        const T* q = group.of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token);
        const auto row_of = [&](int part, int64_t h, int r) {
            return q + layout.token[r] * p.qkv_stride_token + part * p.dim() + h * s.d;
        };
        static constexpr T zeros[128] = {};
        for (int first = 0; first < s.M; first += W) {
            const int end = s.M - first < W ? s.M : first + W;
            for (int r = first; r < end; ++r)
                queries.convert(r, row_of(0, 0, r), q_row, scale, p.group, s.d);
            for (int64_t h = 0; h < p.group; ++h) {
                B* panel = keys_t.head(h) + first / NQ * panel_size(s) + first % NQ;
                const auto words = [&](int r, int c) {
                    return E::words(first + r < end ? row_of(1, h, first + r) : zeros, c, s.d);
                };
                transpose(words, panel, NQ, W, round_up(s.d_k / E::pair, W));
            }
            for (int r = first; r < end; r += E::pair) {
                for (int64_t h = 0; h < p.group; ++h) {
                    const T* rows[E::pair];
                    for (int i = 0; i < E::pair; ++i)
                        rows[i] = r + i < end ? row_of(2, h, r + i) : zeros;
                    E::rows_to_b(rows, s.d, values_b.head(h) + r / E::pair * s.d_pad);
                }
            }
        }
    }

    static int panel_size(const Sizes<E>& s) {
        return round_up(s.d_pad, W * E::pair) / E::pair * NQ;
    }

    // S = Q K^T
    Product<E> score(const Block& block) const {
        return {block.rows(), round_up(s.M, W), s.d_k,
                queries.head(block.head) + block.first * s.d_pad, s.d_pad,
                keys_t.head(block.head), NQ, panel_size(s),
                logits[block.index % buffers], s.m_pad};
    }

    // P V
    Product<E> weigh(const Block& block) const {
        return {block.rows(), round_up(s.d, W), s.m_k,
                probabilities, s.m_pad,
                values_b.head(block.head), s.d_pad, NQ,
                result, s.d_pad};
    }

    // P, but for factors of its rows, and these.
    void softmax(const WindowAttention& p, const Group& group, const Block& block,
                 Ahead& next_rows) const {
        const int64_t* tokens = layout.token;
        const T* next = group.next(p).template of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token);
        const T* out = result_of(p, group, block);
        // The next window's rows lie far apart, no hardware prefetcher follows them, and here they
        // arrive behind the arithmetic.
        const auto prefetch = [&](int r) {
            next_rows.step([&](int token, int head) {
                const T* row = next + tokens[token] * p.qkv_stride_token + head * s.d;
                for (int part = 0; part < 3; ++part) prefetch_row(row + part * p.dim(), s.d);
            });
            prefetch_row<1>(out + tokens[block.first + r] * p.dim(), s.d);
        };
        const float* bias = p.bias + (group.head + block.head) * p.bias_stride;
        for (int r = 0; r < block.count; ++r) {
            exponentials<false>(block, r, bias);
            prefetch(r);
        }
        add_partial_sums(block);
        bool in_range = true;
        for (int r = 0; r < block.count; ++r) {
            top[r] = 0;
            in_range &= sums[r] >= least_sum && sums[r] <= largest_sum;
        }
        if (!in_range) {
            for (int r = 0; r < block.count; ++r) top[r] = largest_logit(block, r, bias);
            for (int r = 0; r < block.count; ++r) exponentials<true>(block, r, bias);
            add_partial_sums(block);
        }
        float* lse = p.lse + (group.sample * p.heads + group.head + block.head) * p.tokens() +
                     group.token;
        for (int r = 0; r < block.count; r += W) {
            const vf sum = load(sums + r);
            float lanes[W];
            const vd lse_of = __builtin_convertvector(load(top + r), vd) * (1 / log2_e) +
                              __builtin_convertvector(log(sum), vd);
            store(lanes, __builtin_convertvector(lse_of, vf));
            for (int i = 0; i < W && r + i < block.count; ++i)
                lse[tokens[block.first + r + i]] = lanes[i];
            store(sums + r, reciprocal(sum));
        }
    }

    // Calls each(column, x) for the logits of a row with their bias, a few vectors x[n] at a time. Lanes
    // past the last key hold -infinity.
    template <class Each>
    void for_each_logit(const Block& block, int r, const float* bias, const Each& each) const {
        const float* x = logits[block.index % buffers] + r * s.m_pad;
        const float* row = bias + layout.bias[block.first + r];
        const auto at = [&](int c) { return load(x + c) + load(row + c); };
        int c = 0;
        for (; c + 4 * W <= s.M; c += 4 * W) {
            const vf y[4] = {at(c), at(c + W), at(c + 2 * W), at(c + 3 * W)};
            each(c, y);
        }
        for (; c + W <= s.M; c += W) {
            const vf y[1] = {at(c)};
            each(c, y);
        }
        if (c == s.M) return;
        float lanes[W];
        store(lanes, at(c));
        for (int i = s.M - c; i < W; ++i) lanes[i] = -INFINITY;
        const vf y[1] = {load(lanes)};
        each(c, y);
    }

    // P = exp2(S + bias - top) of a row.
    template <bool shifted>
    void exponentials(const Block& block, int r, const float* bias) const {
        const vf shift = splat(shifted ? top[r] : 0);
        vf sum[4] = {};
        for_each_logit(block, r, bias, [&](int c, const auto& x) {
            constexpr int n = sizeof x / sizeof(vf);
            vf y[n];
            for (int v = 0; v < n; ++v) {
                y[v] = E::exp2_as_a(shifted ? x[v] - shift : x[v]);
                sum[v] = sum[v] + y[v];
            }
            E::put_a(probabilities + r * s.m_pad + c, y);
        });
        store(partial_sums + r * W, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    float largest_logit(const Block& block, int r, const float* bias) const {
        vf largest = splat(-INFINITY);
        for_each_logit(block, r, bias, [&](int, const auto& x) {
            for (const vf& y : x) largest = max(y, largest);
        });
        float result = -INFINITY;
        for (int i = 0; i < W; ++i) result = largest[i] > result ? largest[i] : result;
        return result;
    }

    void add_partial_sums(const Block& block) const {
        for (int first = 0; first < block.count; first += W) {
            vf x[W];
            for (int i = 0; i < W; ++i) x[i] = load(partial_sums + (first + i) * W);
            store(sums + first, across_lanes(x, [](vf a, vf b) { return a + b; }));
        }
    }

    // P V with the factors, and v_row.
    void store_result(const WindowAttention& p, const Group& group, const Block& block) const {
        const int64_t* tokens = layout.token + block.first;
        T* out = result_of(p, group, block);
        const float* row = v_row + block.head * s.d;
        for (int r = 0; r < block.count; ++r) {
            const vf factor = splat(sums[r]);
            const float* x = result + r * s.d_pad;
            T* y = out + tokens[r] * p.dim();
            int c = 0;
            for (; c + W <= s.d; c += W) store(y + c, load(x + c) * factor + load(row + c));
            if (W > 8 && c < s.d) store(y + c, load(x + c) * factor + load(row + c), 8);
        }
    }

    // That of the window's first token.
    T* result_of(const WindowAttention& p, const Group& group, const Block& block) const {
        return static_cast<T*>(p.out) + (group.sample * p.tokens() + group.token) * p.dim() +
               (group.head + block.head) * s.d;
    }
};

}  // namespace
}  // namespace diffit
