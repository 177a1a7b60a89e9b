// Attention in windows of at most 64 tokens: whole rows of logits in registers.
//
// A block takes 64 rows of one head at a time: one window of N = 64 slots, 16 queries to a warp, or
// four of N = 16, one to a warp. It walks through some windows of one sample. The backward pass
// computes the softmax as the forward pass did, and needs neither the output nor the log-sum-exp.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

// The part of a sample that a block works on.
template <int N>
struct SmallWork {
    static constexpr int at_once = block_rows / N;  // windows
    int head, part, sample;  // part: of all samples
    int first, end;          // windows

    DEVICE explicit SmallWork(const WindowAttention& p)
        : head(block_index() % static_cast<int>(p.heads)),
          part(block_index() / static_cast<int>(p.heads)),
          sample(part / static_cast<int>(p.splits)),
          first(part % static_cast<int>(p.splits) * static_cast<int>(p.steps) * at_once),
          end(first + static_cast<int>(p.steps) * at_once) {
        if (end > windows_of(p)) end = windows_of(p);
    }

    // The token of each of the 64 rows, -1 where there is none.
    DEVICE void find_tokens(Shared<int> to, const WindowAttention& p, int from) const {
        const int row = thread_index(), slot = row % N;
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

template <int D>
constexpr int small_forward_shared(int height, int width) {
    return 3 * tile_size<D>(block_rows) * 2 + (block_rows + table_size(table_rows(height, width))) * 4;
}

template <class T, int D, int N>
__global__ void __launch_bounds__(threads, 1) small_forward(const WindowAttention p) {
    const SmallWork<N> work(p);
    const Window window(p, 0);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const int dim = dim_of(p), column = work.head * head_dim;
    const int64_t tokens = tokens_of(p);
    const auto q = shared_memory<uint16_t>(), k = q + tile_size<D>(block_rows),
               v = k + tile_size<D>(block_rows);
    const auto token_of = (v + tile_size<D>(block_rows)).template as<int>();
    const auto table = (token_of + block_rows).template as<float>();
    const uint16_t* qkv = p.qkv + work.sample * p.qkv_stride_batch + column;
    load_table(table, p, work.head, window.table_rows());

    for (int first = work.first; first < work.end; first += work.at_once) {
        work.find_tokens(token_of, p, first);
        block_barrier();
        for (int part = 0; part < 3; ++part)
            copy_tile<D>(q + part * tile_size<D>(block_rows), block_rows, head_dim, qkv,
                         SmallRows<const uint16_t>{token_of, qkv + part * dim, p.qkv_stride_token});
        commit_copies();
        wait_for_copies<0>();
        if (p.q_row)
            add_row<T, D>(q, block_rows, head_dim, p.q_row + work.sample * p.row_stride_batch + column);
        block_barrier();

        const int keys = own / N * N * row_stride<D>;  // of the window of this warp
        float s[N / 8][4], o[D / 8][4];
        product<T, N, D>(s, q + own * row_stride<D>, k + keys);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, own % N, 0);
        float m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, unused[2];
        softmax_step(s, m, total, unused);
        for (int r = 0; r < 2; ++r) total[r] = row_sum(total[r]);
        zero(o);
        accumulate<T, N, D>(o, s, v + keys);
        const float inverse[2] = {1 / total[0], 1 / total[1]};
        scale_rows(o, inverse);
        if (p.v_row)
            add_to_rows<T, D>(o, p.v_row + work.sample * p.row_stride_batch + column, head_dim);

        warp_barrier();  // the queries of this warp are read
        store_rows<T, D>(q + own * row_stride<D>, o, head_dim,
                         SmallRows<uint16_t>{token_of + own,
                                             p.out + work.sample * tokens * dim + column, dim});
        const SmallRows<float> lse{token_of + own,
                                   p.lse + (work.sample * p.heads + work.head) * tokens, 1};
        store_lse(lse, m, total);
        block_barrier();
    }
}

// Stores an accumulator (16, N) of the warp into its rows of a (64, N) tile of float32.
template <int N>
constexpr int float_stride = N + 1;
template <int N>
DEVICE void store_floats(Shared<float> tile, const float (&x)[N / 8][4]) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            store(tile + ((16 * warp() + row_slot(0, i)) * float_stride<N> + column_slot(0, n, i)),
                  x[n][i]);
}

// The sum of dS of a window over the pairs of row r of the table, query by query.
template <int N>
DEVICE float fold(Shared<float> tile, const Window& window, int r) {
    const int stride = 2 * window.width - 1;
    const int dy = r / stride - (window.height - 1), dx = r % stride - (window.width - 1);
    const int shift = -dy * window.width - dx;  // from query to key
    int x = -dx;                                // of the key
    float total = 0;
    for (int i = 0; i < window.slots; ++i) {
        const int j = i + shift;
        if (x >= 0 && x < window.width && j >= 0 && j < window.slots)
            total += load(tile + (i * float_stride<N> + j));
        if (++x == window.width - dx) x = -dx;
    }
    return total;
}

template <int D, int N>
constexpr int small_backward_shared(int height, int width) {
    const int tiles = (4 * tile_size<D>(block_rows) + 2 * tile_size<N>(block_rows)) * 2;
    const int floats = block_rows * float_stride<N> * 4;  // take their place at the end
    return (tiles > floats ? tiles : floats) + (block_rows + table_size(table_rows(height, width))) * 4;
}

template <class T, int D, int N>
__global__ void __launch_bounds__(threads, 1) small_backward(const WindowAttention p) {
    const SmallWork<N> work(p);
    const Window window(p, 0);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const int rows = window.table_rows(), dim = dim_of(p), column = work.head * head_dim;
    const auto token_of = shared_memory<int>();
    const auto table = (token_of + block_rows).template as<float>();
    const auto q = (table + table_size(rows)).template as<uint16_t>(),
               k = q + tile_size<D>(block_rows), v = k + tile_size<D>(block_rows),
               grad = v + tile_size<D>(block_rows), prob = grad + tile_size<D>(block_rows),
               grad_s = prob + tile_size<N>(block_rows);
    const uint16_t* qkv = p.qkv + work.sample * p.qkv_stride_batch + column;
    const uint16_t* grad_out = p.grad_out + work.sample * p.grad_out_stride_batch + column;
    uint16_t* grad_qkv = p.grad_qkv + int64_t{work.sample} * tokens_of(p) * 3 * dim + column;
    load_table(table, p, work.head, rows);

    float grad_logits[N / 8][4], q_sum = 0, v_sum = 0;
    zero(grad_logits);
    for (int first = work.first; first < work.end; first += work.at_once) {
        work.find_tokens(token_of, p, first);
        block_barrier();
        for (int part = 0; part < 3; ++part)
            copy_tile<D>(q + part * tile_size<D>(block_rows), block_rows, head_dim, qkv,
                         SmallRows<const uint16_t>{token_of, qkv + part * dim, p.qkv_stride_token});
        copy_tile<D>(grad, block_rows, head_dim, qkv,
                     SmallRows<const uint16_t>{token_of, grad_out, p.grad_out_stride_token});
        commit_copies();
        wait_for_copies<0>();
        if (p.q_row)
            add_row<T, D>(q, block_rows, head_dim, p.q_row + work.sample * p.row_stride_batch + column);
        block_barrier();

        // The window of this warp: its first row, and the queries of this warp in it.
        const int base = own / N * N, keys = base * row_stride<D>, mine = own * row_stride<D>;
        float s[N / 8][4], ds[N / 8][4];
        product<T, N, D>(s, q + mine, k + keys);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, own % N, 0);
        float m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}, inverse[2], mean[2] = {0, 0};
        softmax_step(s, m, total, inverse);
        // Rows that are no token add nothing to any sum.
        for (int r = 0; r < 2; ++r)
            inverse[r] = load(token_of + row_slot(own, 2 * r)) < 0 ? 0 : 1 / row_sum(total[r]);
        scale_rows(s, inverse);
        product<T, N, D>(ds, grad + mine, v + keys);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) mean[i / 2] += s[n][i] * ds[n][i];
        for (int r = 0; r < 2; ++r) mean[r] = row_sum(mean[r]);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) {
                ds[n][i] = s[n][i] * (ds[n][i] - mean[i / 2]);
                grad_logits[n][i] += ds[n][i];
            }
        store_halves<T, N>(prob + own * row_stride<N>, s);
        store_halves<T, N>(grad_s + own * row_stride<N>, ds);

        const float scale[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
        const int weights = base * row_stride<N> + own % N;  // this warp's keys are columns of them
        SmallRows<uint16_t> to{token_of + own, grad_qkv, 3 * dim};
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
        if (thread_index() < head_dim) {
            if (p.q_part) q_sum += column_sum<T, D>(k, thread_index());
            if (p.v_part) v_sum += column_sum<T, D>(grad, thread_index());
        }
        block_barrier();
    }

    const int64_t place = int64_t{work.part} * dim + column + thread_index();
    if (p.q_part && thread_index() < head_dim) p.q_part[place] = q_sum;
    if (p.v_part && thread_index() < head_dim) p.v_part[place] = v_sum;
    if (!p.table_part) return;
    const auto floats = q.template as<float>();
    store_floats<N>(floats, grad_logits);
    block_barrier();
    float* part = p.table_part + (work.head * p.batch * p.splits + work.part) * rows;
    for (int r = thread_index(); r < rows; r += threads) {
        float sum = 0;
        for (int row = 0; row < block_rows; row += N)
            sum += fold<N>(floats + row * float_stride<N>, window, r);
        part[r] = sum;
    }
}

}  // namespace diffit::cuda
