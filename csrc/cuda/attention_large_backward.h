// The backward pass of attention in windows of more than 64 tokens, in three kernels.
//
// They compute the probabilities again from the log-sum-exp. Its rounding would scale whole rows of
// them, so the first kernel also sums its row and writes 1 / sum as the `weight` of the row, beside
// delta = rowsum(P dP). That is also rowsum(dO (out - v_row)), but from an out that is rounded to 16
// bits dS = P (dP - delta) would not vanish where it has to: where one key has all the weight, or all
// values are equal.
#pragma once

#include "attention_large.h"

namespace diffit::cuda {

constexpr int backward_rows = 32;  // of the tiles that come one after another

template <int D>
constexpr int large_backward_shared(int table_rows) {
    return tile_size<D>(2 * block_rows + 4 * backward_rows) * 2 + table_size(table_rows) * 4;
}

// dQ of a tile of queries; their weight and delta; the tile's part of the gradients of the rows. It
// goes through the keys twice: the first time for weight and delta.
template <class T, int D>
__global__ void __launch_bounds__(threads, 1) large_backward_q(const WindowAttention p) {
    constexpr int N = backward_rows;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const auto q = (table + table_size(window.table_rows())).template as<uint16_t>(),
               grad = q + tile_size<D>(block_rows),
               keys = grad + tile_size<D>(block_rows);  // k and v, twice
    load_table(table, p, work.head, window.table_rows());

    copy_queries<D, block_rows>(q, p, head, window, work.slot);
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    copy_keys<D, N>(place(0), p, head, window, 0);
    commit_copies();

    float dq[D / 8][4], row_lse[2], delta[2] = {0, 0}, total[2] = {0, 0};
    zero(dq);
    const LargeRows<float> lse{window, p.lse + head.rows, 1, work.slot + own};
    for (int r = 0; r < 2; ++r) {
        const float* from = lse(row_slot(0, 2 * r));
        // A query that is no token has no weight anywhere, and adds nothing to any sum.
        row_lse[r] = from ? *from * log2_e : INFINITY;
    }
    const int tiles = tiles_of(window, N);
    for (int step = 0; step < 2 * tiles; ++step) {
        const int tile = step % tiles;
        if (step + 1 < 2 * tiles)
            copy_keys<D, N>(place(step + 1), p, head, window, (step + 1) % tiles * N);
        commit_copies();
        wait_for_copies<1>();
        if (step == 0 && p.q_row) add_row<T, D>(q, block_rows, head_dim, p.q_row + head.row);
        block_barrier();
        const auto k = place(step), v = k + tile_size<D>(N);
        float s[N / 8][4], ds[N / 8][4];
        product<T, N, D>(s, q + own * row_stride<D>, k);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, work.slot + own,
                        tile * N);
        product<T, N, D>(ds, grad + own * row_stride<D>, v);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) s[n][i] = exp2_fast(s[n][i] - row_lse[i / 2]);
        if (step < tiles) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i) {
                    total[i / 2] += s[n][i];
                    delta[i / 2] += s[n][i] * ds[n][i];
                }
            if (step == tiles - 1)
                for (int r = 0; r < 2; ++r) {
                    total[r] = row_sum(total[r]);
                    if (row_lse[r] == INFINITY) total[r] = 1;
                    delta[r] = row_sum(delta[r]) / total[r];
                }
        } else {
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i) ds[n][i] = s[n][i] * (ds[n][i] - delta[i / 2]);
            accumulate<T, N, D>(dq, ds, k);
        }
        block_barrier();  // the tile after the next takes the place of this one
    }

    float weight[2];
    for (int r = 0; r < 2; ++r) {
        weight[r] = 1 / total[r];
        const int row = row_slot(work.slot + own, 2 * r);
        if (row < window.slots && lane() % 4 == 0) {
            p.weight[head.rows + window.token(row)] = weight[r];
            p.delta[head.rows + window.token(row)] = delta[r];
        }
        weight[r] *= static_cast<float>(p.scale);
    }
    scale_rows(dq, weight);
    uint16_t* grad_qkv = p.grad_qkv + work.sample * tokens_of(p) * 3 * head.dim + work.head * head_dim;
    store_rows<T, D>(q + own * row_stride<D>, dq, head_dim,
                     LargeRows<uint16_t>{window, grad_qkv, 3 * head.dim, work.slot + own});
    block_barrier();
    if (thread_index() < head_dim) {
        const int64_t parts = windows_of(p) * tiles_of(window, block_rows);
        const int64_t at = (work.sample * parts + work.part) * head.dim + work.head * head_dim +
                           thread_index();
        if (p.q_part) p.q_part[at] = column_sum<T, D>(q, thread_index());
        if (p.v_part) p.v_part[at] = column_sum<T, D>(grad, thread_index());
    }
}

// What each query has for a column of an accumulator: 0 where there is none.
template <int N>
DEVICE void load_columns(float (&x)[N / 8][2], const LargeRows<const float>& from) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
        for (int c = 0; c < 2; ++c) {
            const float* at = from(column_slot(0, n, c));
            x[n][c] = at ? *at : 0;
        }
}

// dK and dV of a tile of keys, with the logits transposed: (keys, queries).
template <class T, int D>
__global__ void __launch_bounds__(threads, 1) large_backward_kv(const WindowAttention p) {
    constexpr int N = backward_rows;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const auto k = (table + table_size(window.table_rows())).template as<uint16_t>(),
               v = k + tile_size<D>(block_rows),
               queries = v + tile_size<D>(block_rows);  // q and dO, twice
    load_table(table, p, work.head, window.table_rows());

    copy_keys<D, block_rows>(k, p, head, window, work.slot);
    const auto place = [&](int step) { return queries + tile_size<D>(step % 2 * 2 * N); };
    copy_queries<D, N>(place(0), p, head, window, 0);
    commit_copies();

    float dk[D / 8][4], dv[D / 8][4];
    zero(dk);
    zero(dv);
    const int tiles = tiles_of(window, N);
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) copy_queries<D, N>(place(tile + 1), p, head, window, (tile + 1) * N);
        commit_copies();
        wait_for_copies<1>();
        const auto q = place(tile), grad = q + tile_size<D>(N);
        if (p.q_row) add_row<T, D>(q, N, head_dim, p.q_row + head.row);
        block_barrier();
        float s[N / 8][4], ds[N / 8][4], of_query[N / 8][2];
        product<T, N, D>(s, k + own * row_stride<D>, q);
        add_bias<true>(s, static_cast<float>(p.scale), window, p.table, table, work.slot + own,
                       tile * N);
        load_columns<N>(of_query, {window, p.lse + head.rows, 1, tile * N});
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i)
                s[n][i] = exp2_fast(s[n][i] - of_query[n][i % 2] * log2_e);
        load_columns<N>(of_query, {window, p.weight + head.rows, 1, tile * N});
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) s[n][i] *= of_query[n][i % 2];
        accumulate<T, N, D>(dv, s, grad);
        product<T, N, D>(ds, v + own * row_stride<D>, grad);
        load_columns<N>(of_query, {window, p.delta + head.rows, 1, tile * N});
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
            for (int i = 0; i < 4; ++i) ds[n][i] = s[n][i] * (ds[n][i] - of_query[n][i % 2]);
        accumulate<T, N, D>(dk, ds, q);
        block_barrier();  // the tile after the next takes the place of this one
    }

    const float scale[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
    scale_rows(dk, scale);
    uint16_t* grad_qkv = p.grad_qkv + work.sample * tokens_of(p) * 3 * head.dim + work.head * head_dim;
    store_rows<T, D>(k + own * row_stride<D>, dk, head_dim,
                     LargeRows<uint16_t>{window, grad_qkv + head.dim, 3 * head.dim, work.slot + own});
    store_rows<T, D>(v + own * row_stride<D>, dv, head_dim,
                     LargeRows<uint16_t>{window, grad_qkv + 2 * head.dim, 3 * head.dim,
                                         work.slot + own});
}

template <int D>
constexpr int large_backward_table_shared(int table_rows) {
    return tile_size<D>(2 * (block_rows + backward_rows)) * 2 +
           block_rows * float_stride<backward_rows> * 4 + 2 * table_size(table_rows) * 4;
}

// The gradient of the table from a tile of queries of one head and every splits-th window: dS of the
// tile and one tile of keys after another, summed over the windows in registers, then onto the table.
// Windows are counted over all samples.
template <class T, int D>
__global__ void __launch_bounds__(threads, 1) large_backward_table(const WindowAttention p) {
    constexpr int N = backward_rows;
    const Window shape(p, 0);
    const int q_tiles = tiles_of(shape, block_rows), table_rows = shape.table_rows();
    const int query = static_cast<int>(block_index() % q_tiles) * block_rows;
    const int64_t split = block_index() / q_tiles % p.splits;
    const int64_t head_index = block_index() / q_tiles / p.splits;
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>(), sums = table + table_size(table_rows),
               floats = sums + table_size(table_rows);
    const auto q = (floats + block_rows * float_stride<N>).template as<uint16_t>(),
               grad = q + tile_size<D>(block_rows), k = grad + tile_size<D>(block_rows),
               v = k + tile_size<D>(N);
    load_table(table, p, head_index, table_rows);
    for (int r = thread_index(); r < table_rows; r += threads) store(sums + r, 0.0f);

    for (int key = 0; key < shape.slots; key += N) {
        float grad_logits[N / 8][4];
        zero(grad_logits);
        for (int64_t item = split; item < p.batch * windows_of(p); item += p.splits) {
            const int64_t sample = item / windows_of(p);
            const Window window(p, item % windows_of(p));
            const Head head(p, sample, head_index);
            copy_queries<D, block_rows>(q, p, head, window, query);
            copy_keys<D, N>(k, p, head, window, key);
            commit_copies();
            wait_for_copies<0>();
            if (p.q_row) add_row<T, D>(q, block_rows, head_dim, p.q_row + head.row);
            block_barrier();
            float s[N / 8][4], ds[N / 8][4], of_row[3][2];
            product<T, N, D>(s, q + own * row_stride<D>, k);
            add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, query + own, key);
            product<T, N, D>(ds, grad + own * row_stride<D>, v);
            for (int r = 0; r < 2; ++r) {
                const int slot = row_slot(query + own, 2 * r);
                const bool live = slot < window.slots;
                const int64_t at = head.rows + (live ? window.token(slot) : 0);
                of_row[0][r] = live ? p.lse[at] * log2_e : INFINITY;
                of_row[1][r] = live ? p.weight[at] : 0;
                of_row[2][r] = live ? p.delta[at] : 0;
            }
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i)
                    grad_logits[n][i] += exp2_fast(s[n][i] - of_row[0][i / 2]) * of_row[1][i / 2] *
                                         (ds[n][i] - of_row[2][i / 2]);
            block_barrier();  // the next window takes the place of this one
        }
        store_floats<N>(floats, grad_logits);
        block_barrier();
        // A row of the table is always the same thread's.
        const int last_query = query + block_rows < shape.slots ? query + block_rows : shape.slots;
        const int last_key = key + N < shape.slots ? key + N : shape.slots;
        const int least = shape.center() + shape.position(query) - shape.position(last_key - 1);
        const int most = shape.center() + shape.position(last_query - 1) - shape.position(key);
        const int before = least % threads;
        for (int r = least - before + thread_index(); r <= most; r += threads)
            if (r >= least)
                store(sums + r,
                      load(sums + r) + fold<N>(floats, block_rows, shape, query, key, r));
    }
    float* part = p.table_part + (head_index * p.splits * q_tiles + block_index() % (p.splits * q_tiles)) *
                                     table_rows;
    for (int r = thread_index(); r < table_rows; r += threads) part[r] = load(sums + r);
}

}  // namespace diffit::cuda
