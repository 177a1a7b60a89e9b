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
    static constexpr int panel = Product<E>::block;  // keys of a panel of K^T
    using A = typename E::A;
    using B = typename E::B;
    // With E::ahead the logits of a block are computed a block ahead, while the probabilities of the
    // block before it are on their way to the cache.
    static constexpr int buffers = E::ahead ? 2 : 1;
    // Between these sums no term that counts has underflowed, and products with v do not overflow.
    static constexpr float least_sum = 0x1p-32f, largest_sum = 0x1p32f;
    Arena arena;
    Sizes<E> s;
    int NQ, blocks;  // queries of a block, blocks of a head
    Layout layout;
    Rows<A> queries;
    Rows<B> keys_t, values_b;  // of keys_t the rows are panels
    A* probabilities;
    float *q_row, *v_row, *logits[buffers], *result;
    float *top, *sums, *partial_sums;  // of rows: what is subtracted, sums, their parts by lane

    // A block of queries of a head of the group, and its place in the order of both.
    struct Block {
        int index, head, first, count;

        Block(const Forward& f, int index)
            : index(index), head(index / f.blocks), first((index - head * f.blocks) * f.NQ),
              count(std::min(f.NQ, f.s.M - first)) {}
        int rows() const { return round_up(count, E::m_align); }
    };

    // Wider blocks than panels pay where tiles are waited for, and logits stay in the first-level
    // cache.
    Forward(const WindowAttention& p, char* scratch)
        : arena(scratch), s(p), NQ(E::ahead && panel < s.M && s.M <= 128 ? E::queries : panel),
          blocks((s.M + NQ - 1) / NQ), layout(arena, p), queries(arena, p.group, s.m_pad, s.d_pad),
          keys_t(arena, p.group, (s.M + panel - 1) / panel, panel_size(s)),
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

    // Inlined, or sizes and pointers would be read again after every store.
    [[gnu::always_inline]] void run(const WindowAttention& p, const Group& group) const {
        pack(p, group);
        Ahead next_rows(static_cast<int>(p.group));
        const int count = static_cast<int>(p.group) * blocks;
        if (E::ahead) score({*this, 0}).run();
        for (int i = 0; i < count; ++i) {
            const Block block(*this, i);
            if (!E::ahead) score(block).run();
            softmax(p, group, block, next_rows);
            if (E::ahead && i + 1 < count) score({*this, i + 1}).run();
            weigh(block).run();
            store_result(p, group, block);
        }
    }

    // Rows of the group as the products take them, queries in base 2. Memory is read in its own order,
    // all heads of a few tokens together: the hardware follows that, and by heads it would come at half
    // the speed. The rows of a K^T in one piece would share few sets of the cache.
    void pack(const WindowAttention& p, const Group& group) const {
        const int64_t row = group.sample * p.row_stride_batch + group.column;
        load_row<T>(q_row, p.q_row, row, p.group * s.d);
        load_row<T>(v_row, p.v_row, row, p.group * s.d);
        const float scale = static_cast<float>(p.scale * log2_e);
        const T *q = group.of<T>(p.qkv, p.qkv_stride_batch, p.qkv_stride_token), *rows[W];
        static constexpr T zeros[128] = {};
        for (int first = 0; first < s.M; first += W) {
            const int count = std::min(W, s.M - first);
            for (int r = 0; r < count; ++r)
                rows[r] = q + layout.token[first + r] * p.qkv_stride_token;
            for (int64_t h = 0; h < p.group; ++h) {
                const auto row_of = [&](int part, int r) {
                    return r < count ? rows[r] + part * p.dim() + h * s.d : zeros;
                };
                E::rows_to_a(count, [&](int r) { return row_of(0, r); }, q_row + h * s.d, scale, s.d,
                             queries.head(h) + first * s.d_pad, s.d_pad);
                B* columns = keys_t.head(h) + first / panel * panel_size(s) + first % panel;
                transpose([&](int r, int c) { return E::words(row_of(1, r), c, s.d); }, columns,
                          panel, W, round_up(s.d_k / E::pair, W));
                for (int r = 0; r < count; r += E::pair) {
                    const T* pair[E::pair];
                    for (int i = 0; i < E::pair; ++i) pair[i] = row_of(2, r + i);
                    E::rows_to_b(pair, s.d, values_b.head(h) + (first + r) / E::pair * s.d_pad);
                }
            }
        }
    }

    static int panel_size(const Sizes<E>& s) {
        return round_up(s.d_pad, W * E::pair) / E::pair * panel;
    }

    // S = Q K^T
    Product<E> score(const Block& block) const {
        return {block.rows(), round_up(s.M, W), s.d_k,
                queries.head(block.head) + block.first * s.d_pad, s.d_pad,
                keys_t.head(block.head), panel, panel_size(s),
                logits[block.index % buffers], s.m_pad};
    }

    // P V
    Product<E> weigh(const Block& block) const {
        return {block.rows(), round_up(s.d, W), s.m_k,
                probabilities, s.m_pad,
                values_b.head(block.head), s.d_pad, panel,
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
        const bool shifted = !add_partial_sums(block);
        if (shifted) {
            for (int r = 0; r < block.count; ++r) top[r] = largest_logit(block, r, bias);
            for (int r = 0; r < block.count; ++r) exponentials<true>(block, r, bias);
            add_partial_sums(block);
        }
        const int64_t first = (group.sample * p.heads + group.head + block.head) * p.tokens() +
                              group.token;
        for (int r = 0; r < block.count; r += W) {
            const vf sum = load(sums + r);
            store(sums + r, reciprocal(sum));
            if (!p.lse) continue;
            vf of_rows = log(sum);
            if (shifted)
                of_rows = __builtin_convertvector(
                    __builtin_convertvector(load(top + r), vd) * (1 / log2_e) +
                        __builtin_convertvector(of_rows, vd),
                    vf);
            float lanes[W];
            store(lanes, of_rows);
            for (int i = 0; i < W && r + i < block.count; ++i)
                p.lse[first + tokens[block.first + r + i]] = lanes[i];
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

    // Returns whether all sums are in range.
    bool add_partial_sums(const Block& block) const {
        for (int r = block.count; r % W; ++r) store(partial_sums + r * W, splat(1));
        vi in_range = vi{} - 1;
        for (int first = 0; first < block.count; first += W) {
            vf x[W];
            for (int i = 0; i < W; ++i) x[i] = load(partial_sums + (first + i) * W);
            const vf sum = across_lanes(x, [](vf a, vf b) { return a + b; });
            in_range &= (sum >= least_sum) & (sum <= largest_sum);
            store(sums + first, sum);
        }
        return all(in_range);
    }

    // P V with the factors, and v_row.
    void store_result(const WindowAttention& p, const Group& group, const Block& block) const {
        const int64_t* tokens = layout.token + block.first;
        T* out = result_of(p, group, block);
        const auto row = [&](int r) { return out + tokens[r] * p.dim(); };
        E::store_rows(block.count, row, result, s.d_pad, sums, v_row + block.head * s.d, s.d);
    }

    // That of the window's first token.
    T* result_of(const WindowAttention& p, const Group& group, const Block& block) const {
        return static_cast<T*>(p.out) + (group.sample * p.tokens() + group.token) * p.dim() +
               (group.head + block.head) * s.d;
    }
};

}  // namespace
}  // namespace diffit
