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

// Rows of the tiles that come one after another; fewer where shared memory is short.
template <int D>
constexpr int backward_rows = D <= 112 ? 32 : 16;

template <int D>
constexpr int large_backward_shared(int table_rows, int slots) {
    return tile_size<D>(2 * block_rows + 4 * backward_rows<D>) * 2 +
           (table_size(table_rows) + padded_slots(slots)) * 4;
}

template <int D>
constexpr int large_backward_kv_shared(int table_rows, int slots) {
    return large_backward_shared<D>(table_rows, slots) + 3 * padded_slots(slots) * 4;
}

// dQ of a tile of queries; their weight and delta; the tile's part of the gradients of the rows. It
// goes through the keys twice: the first time for weight and delta. The other kernels need its
// queries with their row again and again, so it writes them to p.q.
template <class T, int D>
__global__ void __launch_bounds__(threads, blocks_at_once<D>)
    large_backward_q(const WindowAttention p) {
    constexpr int N = backward_rows<D>;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head, window);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const Slots slots((table + table_size(window.table_rows())).template as<int>(), window);
    const auto q = (slots.offsets + padded_slots(slots.count)).template as<uint16_t>(),
               grad = q + tile_size<D>(block_rows),
               keys = grad + tile_size<D>(block_rows);  // k and v, twice
    load_table(table, p, work.head, window.table_rows());
    block_barrier();

    copy_slots<D, block_rows>(q, slots, work.slot, p.head_dim, head.q, head.grad_out);
    const int tiles = tiles_of(window, N);
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    const auto copy = [&](int step) {
        if (step < 2 * tiles)
            copy_slots<D, N>(place(step), slots, step % tiles * N, p.head_dim, head.k, head.v);
        commit_copies();
    };
    copy(0);
    copy(1);
    wait_for_copies<1>();
    if (p.q_row) {
        add_row<T, D>(q, block_rows, head_dim, p.q_row + head.in_row());
        store_own<D>(q, block_rows, head_dim,
                     LargeRows<uint16_t>{slots, p.q + head.in_result(1), dim_of(p), work.slot});
    }
    block_barrier();
    const OwnRows<D> own_q(q + own * row_stride<D>);

    float dq[D / 8][4], row_lse[2], delta[2] = {0, 0}, total[2] = {0, 0};
    zero(dq);
    const LargeRows<const float> lse{slots, p.lse + head.in_lse(), 1, work.slot + own};
    for (int r = 0; r < 2; ++r) {
        const float* from = lse(row_slot(0, 2 * r));
        // A query that is no token has no weight anywhere, and adds nothing to any sum.
        row_lse[r] = from ? *from * log2_e : INFINITY;
    }
    for (int step = 0; step < 2 * tiles; ++step) {
        const int tile = step % tiles;
        wait_for_copies<1>();
        block_barrier();
        const auto k = place(step), v = k + tile_size<D>(N);
        float s[N / 8][4], ds[N / 8][4];
        product<T, N, D>(s, own_q, k);
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
        copy(step + 2);
    }

    float weight[2];
    for (int r = 0; r < 2; ++r) {
        weight[r] = 1 / total[r];
        const int slot = row_slot(work.slot + own, 2 * r);
        if (slot < slots.count && lane() % 4 == 0) {
            const int64_t at = head.in_lse() + load(slots.offsets + slot);
            p.weight[at] = weight[r];
            p.delta[at] = delta[r];
        }
        weight[r] *= static_cast<float>(p.scale);
    }
    scale_rows(dq, weight);
    store_rows<T, D>(q + own * row_stride<D>, dq, head_dim,
                     LargeRows<uint16_t>{slots, p.grad_qkv + head.in_result(3), 3 * dim_of(p),
                                         work.slot + own});
    block_barrier();
    if (thread_index() < head_dim) {
        const int64_t parts = windows_of(p) * tiles_of(window, block_rows);
        const int64_t at = (work.sample * parts + work.part) * dim_of(p) + work.head * head_dim +
                           thread_index();
        if (p.q_part) p.q_part[at] = column_sum<T, D>(q, thread_index());
        if (p.v_part) p.v_part[at] = column_sum<T, D>(grad, thread_index());
    }
}

// Two numbers that lie side by side, as the columns of an accumulator do.
struct alignas(8) Pair {
    float x[2];
};
DEVICE Pair load_pair(Shared<float> at) { return load(at.template as<Pair>()); }

// dK and dV of a tile of keys, with the logits transposed: (keys, queries).
template <class T, int D>
__global__ void __launch_bounds__(threads, blocks_at_once<D>)
    large_backward_kv(const WindowAttention p) {
    constexpr int N = backward_rows<D>;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head, window);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const Slots slots((table + table_size(window.table_rows())).template as<int>(), window);
    const int padded = padded_slots(slots.count);
    const auto lse = (slots.offsets + padded_slots(slots.count)).template as<float>(),
               weight = lse + padded, delta = weight + padded;
    const auto k = (delta + padded).template as<uint16_t>(), v = k + tile_size<D>(block_rows),
               queries = v + tile_size<D>(block_rows);  // q and dO, twice
    load_table(table, p, work.head, window.table_rows());
    for (int slot = thread_index(); slot < padded; slot += threads) {
        const bool live = slot < slots.count;
        const int64_t at = head.in_lse() + (live ? window.offset(slot) : 0);
        store(lse + slot, live ? p.lse[at] * log2_e : 0.0f);
        store(weight + slot, live ? p.weight[at] : 0.0f);
        store(delta + slot, live ? p.delta[at] : 0.0f);
    }
    block_barrier();

    copy_slots<D, block_rows>(k, slots, work.slot, p.head_dim, head.k, head.v);
    const auto place = [&](int step) { return queries + tile_size<D>(step % 2 * 2 * N); };
    const auto copy = [&](int tile) {
        if (tile * N < slots.count)
            copy_slots<D, N>(place(tile), slots, tile * N, p.head_dim, head.q_with_row,
                             head.grad_out);
        commit_copies();
    };
    copy(0);
    copy(1);

    float dk[D / 8][4], dv[D / 8][4];
    zero(dk);
    zero(dv);
    const int tiles = tiles_of(window, N);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<1>();
        block_barrier();
        const auto q = place(tile), grad = q + tile_size<D>(N);
        float s[N / 8][4], ds[N / 8][4];
        product<T, N, D>(s, k + own * row_stride<D>, q);
        add_bias<true>(s, static_cast<float>(p.scale), window, p.table, table, work.slot + own,
                       tile * N);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const int query = column_slot(tile * N, n, 0);
            const Pair of_lse = load_pair(lse + query), of_weight = load_pair(weight + query);
            for (int i = 0; i < 4; ++i)
                s[n][i] = exp2_fast(s[n][i] - of_lse.x[i % 2]) * of_weight.x[i % 2];
        }
        accumulate<T, N, D>(dv, s, grad);
        product<T, N, D>(ds, v + own * row_stride<D>, grad);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const Pair of_delta = load_pair(delta + column_slot(tile * N, n, 0));
            for (int i = 0; i < 4; ++i) ds[n][i] = s[n][i] * (ds[n][i] - of_delta.x[i % 2]);
        }
        accumulate<T, N, D>(dk, ds, q);
        block_barrier();  // the tile after the next takes the place of this one
        copy(tile + 2);
    }

    const float scale[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
    scale_rows(dk, scale);
    const int dim = dim_of(p);
    uint16_t* grad_k = p.grad_qkv + head.in_result(3) + dim;
    store_rows<T, D>(k + own * row_stride<D>, dk, head_dim,
                     LargeRows<uint16_t>{slots, grad_k, 3 * dim, work.slot + own});
    store_rows<T, D>(v + own * row_stride<D>, dv, head_dim,
                     LargeRows<uint16_t>{slots, grad_k + dim, 3 * dim, work.slot + own});
}

// Keys that are taken at once for the table.
template <int D>
constexpr int table_keys = D <= 112 ? 64 : 32;

// The tile of dS at the end takes the place of the queries.
template <int D>
constexpr int large_backward_table_shared(int table_rows, int slots) {
    const int tiles = tile_size<D>(2 * (block_rows + table_keys<D>)) * 2,
              floats = block_rows * float_stride<table_keys<D>> * 4;
    return (tiles > floats ? tiles : floats) + (2 * table_size(table_rows) + padded_slots(slots)) * 4;
}

// The gradient of the table from a tile of queries of one head and every splits-th window: dS of the
// tile and one tile of keys after another, summed over the windows in registers, then onto the table.
// Windows are counted over all samples.
template <class T, int D>
__global__ void __launch_bounds__(threads, blocks_at_once<D>)
    large_backward_table(const WindowAttention p) {
    constexpr int N = table_keys<D>;
    const Window shape(p, 0);
    const int q_tiles = tiles_of(shape, block_rows), table_rows = shape.table_rows();
    const int query = block_index() % q_tiles * block_rows;
    const int splits = static_cast<int>(p.splits), windows = windows_of(p),
              items = static_cast<int>(p.batch) * windows;  // fewer than blocks of the other kernels
    const int split = block_index() / q_tiles % splits, head_index = block_index() / q_tiles / splits;
    const int own = 16 * warp();
    const auto table = shared_memory<float>(), sums = table + table_size(table_rows);
    const Slots slots((sums + table_size(table_rows)).template as<int>(), shape);
    const auto q = (slots.offsets + padded_slots(slots.count)).template as<uint16_t>(),
               grad = q + tile_size<D>(block_rows), k = grad + tile_size<D>(block_rows),
               v = k + tile_size<D>(N);
    const auto floats = q.template as<float>();
    load_table(table, p, head_index, table_rows);
    for (int r = thread_index(); r < table_rows; r += threads) store(sums + r, 0.0f);
    block_barrier();

    for (int key = 0; key < shape.slots; key += N) {
        float grad_logits[N / 8][4];
        zero(grad_logits);
        for (int item = split; item < items; item += splits) {
            const Head head(p, item / windows, head_index, Window(p, item % windows));
            // Opaque: addresses and bounds of all rows are too many to keep in registers.
            copy_slots<D, block_rows>(q, slots, opaque(query), p.head_dim, head.q_with_row,
                                      head.grad_out);
            copy_slots<D, N>(k, slots, opaque(key), p.head_dim, head.k, head.v);
            commit_copies();
            float of_row[3][2];
            for (int r = 0; r < 2; ++r) {
                const int slot = row_slot(query + own, 2 * r);
                const bool live = slot < slots.count;
                const int64_t at = head.in_lse() + (live ? load(slots.offsets + slot) : 0);
                of_row[0][r] = live ? p.lse[at] * log2_e : INFINITY;
                of_row[1][r] = live ? p.weight[at] : 0;
                of_row[2][r] = live ? p.delta[at] : 0;
            }
            wait_for_copies<0>();
            block_barrier();
            float s[N / 8][4], ds[N / 8][4];
            product<T, N, D>(s, q + own * row_stride<D>, k);
            add_bias<false>(s, static_cast<float>(p.scale), shape, p.table, table, query + own, key);
            product<T, N, D>(ds, grad + own * row_stride<D>, v);
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
        block_barrier();  // the next queries take the place of the sums
    }
    float* part = p.table_part + (int64_t{head_index} * splits * q_tiles + block_index() % (splits * q_tiles)) *
                                     table_rows;
    for (int r = thread_index(); r < table_rows; r += threads) part[r] = load(sums + r);
}

}  // namespace diffit::cuda
