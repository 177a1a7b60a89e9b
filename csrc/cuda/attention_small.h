// Attention in windows of at most 64 tokens: whole rows of logits in registers.
//
// A block takes 64 rows of one head at a time: one window of N = 64 slots, 16 queries to a warp, or
// four of N = 16, one to a warp. It walks through some windows of one sample. The backward pass
// computes the softmax as the forward pass did, and needs neither the output nor the log-sum-exp.
#pragma once

#include "diagonals.h"
#include "logits.h"

namespace diffit::cuda {

// The part of a sample that a block works on.
template <int N>
struct SmallWork {
    static constexpr int at_once = block_rows / N;  // windows
    int head, part, sample;  // part: of all samples
    int first, end;          // windows

    DEVICE SmallWork(const WindowAttention& p, int block)
        : head(block % static_cast<int>(p.heads)),
          part(block / static_cast<int>(p.heads)),
          sample(part / static_cast<int>(p.splits)),
          first(part % static_cast<int>(p.splits) * static_cast<int>(p.steps) * at_once),
          end(first + static_cast<int>(p.steps) * at_once) {
        if (end > windows_of(p)) end = windows_of(p);
    }

    // The token of each of the 64 rows, -1 where there is none.
    DEVICE void find_tokens(Shared<int> to, const WindowAttention& p, int from) const {
        const int row = opaque(thread_index()), slot = row % N;
        if (row >= block_rows) return;
        const Window window(p, from + row / N);
        const bool live = from + row / N < end && slot < window.slots;
        store(to + row, live ? static_cast<int>(window.token(slot)) : -1);
    }
};

// Where the rows of a block are, `stride` apart; null where there is no token.
template <class X>
struct SmallRows {
    Shared<int> tokens;
    X* base;
    int64_t stride;
    DEVICE X* operator()(int row) const {
        const int token = load(tokens + row);
        return token < 0 ? nullptr : base + token * stride;
    }
};

// Blocks that a multiprocessor holds at once, at least. With four a thread has 128 registers, which is
// too few for wide heads.
template <int D>
constexpr int small_blocks = D == 32 ? 4 : 1;

template <int D>
constexpr int small_forward_shared(int height, int width) {
    return tile_size<D>(3 * block_rows + 1) * 2 +
           (block_rows + table_size(table_rows(height, width))) * 4;
}

template <class T, int D, int N>
__global__ void __launch_bounds__(threads, small_blocks<D>) small_forward(const WindowAttention p) {
    const SmallWork<N> work(p, block_index());
    const Window window(p, 0);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const int dim = dim_of(p), column = work.head * head_dim;
    const int64_t tokens = tokens_of(p);
    const auto q = shared_memory<uint16_t>(), k = q + tile_size<D>(block_rows),
               v = k + tile_size<D>(block_rows), v_row = v + tile_size<D>(block_rows);
    const auto token_of = (v_row + row_stride<D>).template as<int>();
    const auto table = (token_of + block_rows).template as<float>();
    const uint16_t* qkv = p.qkv + work.sample * p.qkv_stride_batch + column;
    const int64_t row = work.sample * p.row_stride_batch + column;

    for (int first = work.first; first < work.end; first += work.at_once) {
        work.find_tokens(token_of, p, first);
        block_barrier();
        SmallRows<const uint16_t> from{token_of, qkv, p.qkv_stride_token};
        copy_tile<D>(q, block_rows, head_dim, qkv, from);
        from.base += dim;
        copy_tile<D>(k, block_rows, head_dim, qkv, from);
        commit_copies();
        from.base += dim;
        copy_tile<D>(v, block_rows, head_dim, qkv, from);
        copy_tile<D>(v_row, 1, head_dim, qkv, [&](int) { return p.v_row ? p.v_row + row : nullptr; });
        commit_copies();
        // What else comes from memory is on its way before the first copies are waited for.
        const Chunk q_row = p.q_row ? own_unit<D>(head_dim, p.q_row + row) : Chunk{};
        if (first == work.first) load_table(table, p, opaque(work.head), window.table_rows());
        wait_for_copies<1>();
        if (p.q_row) add_row<T, D>(q, block_rows, head_dim, q_row);
        block_barrier();

        const int keys = own / N * N * row_stride<D>;  // of the window of this warp
        float s[N / 8][4], o[D / 8][4];
        product<T, N, D>(s, q + own * row_stride<D>, k + keys);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, own % N, 0);
        float m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, unused[2];
        softmax_step(s, m, total, unused);
        for (int r = 0; r < 2; ++r) total[r] = row_sum(total[r]);
        zero(o);
        wait_for_copies<0>();
        block_barrier();
        accumulate<T, N, D>(o, s, v + keys);
        const float inverse[2] = {1 / total[0], 1 / total[1]};
        scale_rows(o, inverse);
        if (p.v_row)
            add_to_rows<T, D>(o, head_dim, [&](int at) {
                return load((v_row + at).template as<uint32_t>());
            });

        store_rows<T, D>(q + own * row_stride<D>, o, head_dim,
                         SmallRows<uint16_t>{token_of + own,
                                             p.out + work.sample * tokens * dim + column, dim});
        const SmallRows<float> lse{token_of + own,
                                   p.lse + (work.sample * p.heads + work.head) * tokens, 1};
        store_lse(lse, m, total);
        block_barrier();
    }
}

// Threads that share a column of a tile to sum it, each some of the rows.
template <int D>
constexpr int column_threads = threads / D;

// A row of an accumulator: what a thread has of eight columns.
struct alignas(16) Quad {
    float x[4];
};

template <int D, int N>
constexpr int small_backward_shared(int height, int width) {
    const int tiles = (4 * tile_size<D>(block_rows) + 2 * tile_size<N>(block_rows)) * 2;
    const int used = tiles + table_size(table_rows(height, width)) * 4;
    const int pairs = warps * Diagonals<N>::size(width) * 4;  // take their place at the end
    return (used > pairs ? used : pairs) + (block_rows + 2 * threads) * 4;
}

template <class T, int D, int N>
__global__ void __launch_bounds__(threads, small_blocks<D>) small_backward(const WindowAttention p) {
    const SmallWork<N> work(p, block_index());
    const Window window(p, 0);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const int rows = window.table_rows(), dim = dim_of(p), column = work.head * head_dim;
    const auto token_of = shared_memory<int>();
    const auto q_sums = (token_of + block_rows).template as<float>(), v_sums = q_sums + threads;
    const auto q = (v_sums + threads).template as<uint16_t>(), k = q + tile_size<D>(block_rows),
               v = k + tile_size<D>(block_rows), grad = v + tile_size<D>(block_rows),
               prob = grad + tile_size<D>(block_rows), grad_s = prob + tile_size<N>(block_rows);
    const auto table = (grad_s + tile_size<N>(block_rows)).template as<float>();
    store(q_sums + thread_index(), 0.0f);
    store(v_sums + thread_index(), 0.0f);

    // The sum of dS. From step to step a warp keeps it in its rows of the tiles of P and dS: there are too
    // few registers.
    float grad_logits[N / 8][4];
    const auto kept = [&](int n) {
        const auto& tile = n < N / 16 ? prob : grad_s;
        return (tile + own * row_stride<N>).template as<Quad>() + (n % (N / 16) * 32 + lane());
    };
    zero(grad_logits);
    for (int first = work.first; first < work.end; first += work.at_once) {
        work.find_tokens(token_of, p, first);
        block_barrier();
        // Opaque: not kept in registers through the loop.
        const int64_t sample = opaque(work.sample);
        const uint16_t* qkv = p.qkv + sample * p.qkv_stride_batch + column;
        const uint16_t* grad_out = p.grad_out + sample * p.grad_out_stride_batch + column;
        SmallRows<const uint16_t> from{token_of, qkv, p.qkv_stride_token};
        copy_tile<D>(q, block_rows, head_dim, qkv, from);
        from.base += dim;
        copy_tile<D>(k, block_rows, head_dim, qkv, from);
        commit_copies();
        from.base += dim;
        copy_tile<D>(v, block_rows, head_dim, qkv, from);
        copy_tile<D>(grad, block_rows, head_dim, qkv,
                     SmallRows<const uint16_t>{token_of, grad_out, p.grad_out_stride_token});
        commit_copies();
        // What else comes from memory is on its way before the first copies are waited for.
        const int64_t row = sample * p.row_stride_batch + column;
        const Chunk q_row = p.q_row ? own_unit<D>(head_dim, p.q_row + row) : Chunk{};
        if (first == work.first) load_table(table, p, opaque(work.head), rows);
        wait_for_copies<1>();
        if (p.q_row) add_row<T, D>(q, block_rows, head_dim, q_row);
        block_barrier();

        // The window of this warp: its first row, and the queries of this warp in it.
        const int base = own / N * N, keys = base * row_stride<D>, mine = own * row_stride<D>;
        float s[N / 8][4], ds[N / 8][4];
        product<T, N, D>(s, q + mine, k + keys);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, own % N, 0);
        float m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, inverse[2], mean[2] = {0, 0};
        softmax_step(s, m, total, inverse);
        for (int r = 0; r < 2; ++r) total[r] = row_sum(total[r]);
        // Rows that are no token add nothing to any sum.
        for (int r = 0; r < 2; ++r)
            inverse[r] = load(token_of + row_slot(own, 2 * r)) < 0 ? 0 : 1 / total[r];
        scale_rows(s, inverse);
        wait_for_copies<0>();
        block_barrier();
        product<T, N, D>(ds, grad + mine, v + keys);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) mean[i / 2] += s[n][i] * ds[n][i];
        for (int r = 0; r < 2; ++r) mean[r] = row_sum(mean[r]);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i)
                grad_logits[n][i] = ds[n][i] = s[n][i] * (ds[n][i] - mean[i / 2]);
        if (first > work.first) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const Quad before = load(kept(n));
                for (int i = 0; i < 4; ++i) grad_logits[n][i] += before.x[i];
            }
            warp_barrier();
        }
        store_halves<T, N>(prob + own * row_stride<N>, s);
        store_halves<T, N>(grad_s + own * row_stride<N>, ds);

        const float scale[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
        const int weights = base * row_stride<N> + own % N;  // this warp's keys are columns of them
        // Opaque: not kept in registers until here.
        const int64_t first_token = int64_t{opaque(work.sample)} * tokens_of(p);
        SmallRows<uint16_t> to{token_of + own, p.grad_qkv + first_token * 3 * dim + column, 3 * dim};
        float x[D / 8][4];
        zero(x);
        accumulate<T, N, D>(x, ds, k + keys);
        scale_rows(x, scale);
        block_barrier();  // all have read k and v, and written their rows of P and dS
        store_rows<T, D>(k + mine, x, head_dim, to);

        product_transposed<T, N, N, D>(x, grad_s + weights, q + keys);
        scale_rows(x, scale);
        to.base += dim;
        store_rows<T, D>(v + mine, x, head_dim, to);

        product_transposed<T, N, N, D>(x, prob + weights, grad + keys);
        to.base += dim;
        warp_barrier();  // dk is read
        store_rows<T, D>(v + mine, x, head_dim, to);
        block_barrier();
        if (const int part = thread_index() / D; part < column_threads<D>) {
            constexpr int share = block_rows / column_threads<D>;
            const auto add = [&](Shared<float> sums, Shared<uint16_t> tile) {
                const auto sum = sums + thread_index();
                store(sum, load(sum) + column_sum<T, D, share>(tile + part * tile_size<D>(share),
                                                               thread_index() % D));
            };
            if (p.q_part) add(q_sums, k);
            if (p.v_part) add(v_sums, grad);
        }
        if (first + work.at_once < work.end)
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                Quad sum;
                for (int i = 0; i < 4; ++i) sum.x[i] = grad_logits[n][i];
                store(kept(n), sum);
            }
        block_barrier();
    }

    const SmallWork<N> done(p, opaque(block_index()));  // not kept in registers through the loop
    if (thread_index() < head_dim) {
        const int64_t place = int64_t{done.part} * dim + done.head * head_dim + thread_index();
        const auto total = [&](Shared<float> sums) {
            float sum = 0;
            for (int part = 0; part < column_threads<D>; ++part)
                sum += load(sums + (part * D + thread_index()));
            return sum;
        };
        if (p.q_part) p.q_part[place] = total(q_sums);
        if (p.v_part) p.v_part[place] = total(v_sums);
    }
    if (!p.table_part) return;
    // Rows are queries, so the diagonals count the rows of the table backwards. A warp leaves its sums
    // in the first row of its matrix.
    const auto pairs = q.template as<float>();
    const Diagonals<N> diagonals(pairs, window.width);
    diagonals.sum(grad_logits, window, own % N, 0,
                  [&](int row, float sum) { store(diagonals.matrix + row, sum); });
    block_barrier();
    float* part = p.table_part + (done.head * p.batch * p.splits + done.part) * rows;
    for (int r = thread_index(); r < rows; r += threads) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) {
            const int end = 16 * w % N + 16, last = (end < window.slots ? end : window.slots) - 1;
            const int i = window.center() + window.position(last) - r;
            if (i >= 0 && i < diagonals.columns(window.width))
                sum += load(pairs + (w * diagonals.size(window.width) + i));
        }
        part[r] = sum;
    }
}

}  // namespace diffit::cuda
