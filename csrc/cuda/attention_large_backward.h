// The backward pass of attention in windows of more than 64 tokens, in two kernels.
//
// They compute the probabilities again from the log-sum-exp. Its rounding would scale whole rows of
// them, so the first kernel also sums its row and writes 1 / sum as the `weight` of the row, beside
// delta = rowsum(P dP). That is also rowsum(dO (out - v_row)), but from an out that is rounded to 16
// bits dS = P (dP - delta) would not vanish where it has to: where one key has all the weight, or all
// values are equal.
#pragma once

#include "attention_large.h"
#include "diagonals.h"

namespace diffit::cuda {

// Rows of the tiles that come one after another; fewer where shared memory is short.
template <int D>
constexpr int backward_rows = D <= 96 ? 32 : 16;

// Blocks of the kernel of dQ that a multiprocessor holds at once. With three a thread has 168
// registers, which is too few for some widths on some architectures.
template <int D>
constexpr int q_blocks = D <= 32 || D == 80 ? 3 : 2;

template <int D>
constexpr int large_backward_q_shared(int height, int width) {
    return tile_size<D>(2 * block_rows + 4 * backward_rows<D>) * 2 + large_shared(height, width);
}

// dQ of a tile of queries; their weight and delta; the tile's part of the gradients of the rows. dS
// needs a delta that is known after the last key only. So dQ is summed about the delta of the keys so
// far, and moved with it: sum P (dP - a) K = sum P (dP - b) K + (b - a) sum P K.
//
// The other kernel needs its queries with their row again and again, so they are written to p.q.
template <class T, int D>
__global__ void __launch_bounds__(threads, q_blocks<D>)
    large_backward_q(const WindowAttention p) {
    constexpr int N = backward_rows<D>;
    const Window shape(p, 0);
    const LargeWork work(p, shape, block_rows);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp(), tiles = tiles_of(shape, N);
    const auto table = shared_memory<float>();
    const Slots slots((table + table_size(shape.table_rows())).template as<int>(), shape);
    const auto q = (slots.offsets + padded_slots(slots.count)).template as<uint16_t>(),
               grad = q + tile_size<D>(block_rows),
               keys = grad + tile_size<D>(block_rows);  // k and v, twice
    const auto place = [&](int tile) { return keys + tile_size<D>(tile % 2 * 2 * N); };
    load_table(table, p, work.head, shape.table_rows());

    for (int window = work.split; window < work.windows; window += work.splits) {
        const Head head(p, window, work.head);
        block_barrier();  // the window before is done with its tiles
        // Opaque: addresses and bounds of all rows are too many to keep in registers.
        copy_slots<D, block_rows>(q, slots, opaque(work.slot), p.head_dim, head.q, head.grad_out);
        copy_slots<D, N>(keys, slots, opaque(0), p.head_dim, head.k, head.v);
        commit_copies();
        wait_for_copies<0>();
        if (p.q_row) {
            add_row<T, D>(q, block_rows, head_dim, own_unit<D>(head_dim, p.q_row + head.in_row()));
            store_own<D>(q, block_rows, head_dim,
                         LargeRows<uint16_t>{slots, p.q + head.in_result(1), dim_of(p), work.slot});
        }
        block_barrier();

        float sums[2][D / 8][4], row_lse[2], sum[2] = {0, 0}, of_grad[2] = {0, 0},
            delta[2] = {0, 0};
        auto &dq = sums[0], &pk = sums[1];
        zero(dq);
        zero(pk);
        const LargeRows<const float> lse{slots, p.lse + head.in_lse(), 1, work.slot + own};
        for (int r = 0; r < 2; ++r) {
            const float* from = lse(row_slot(0, 2 * r));
            // A query that is no token has no weight anywhere, and adds nothing to any sum.
            row_lse[r] = from ? *from * log2_e : INFINITY;
        }
        for (int tile = 0; tile < tiles; ++tile) {
            if (tile) {
                wait_for_copies<0>();
                block_barrier();
            }
            // All have left the tile before: the next one takes its place.
            if (tile + 1 < tiles)
                copy_slots<D, N>(place(tile + 1), slots, (tile + 1) * N, opaque(head_dim), head.k,
                                 head.v);
            commit_copies();
            const auto k = place(tile), v = k + tile_size<D>(N);
            float both[2][N / 8][4];
            auto &ds = both[0], &s = both[1];
            product<T, N, D>(s, q + own * row_stride<D>, k);
            add_bias<false>(s, static_cast<float>(p.scale), shape, p.table, table, work.slot + own,
                            tile * N);
            product<T, N, D>(ds, grad + own * row_stride<D>, v);
            float part[2] = {0, 0}, part_of_grad[2] = {0, 0}, move[2];
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i) {
                    s[n][i] = exp2_fast(s[n][i] - row_lse[i / 2]);
                    part[i / 2] += s[n][i];
                    part_of_grad[i / 2] += s[n][i] * ds[n][i];
                }
            for (int r = 0; r < 2; ++r) {
                sum[r] += row_sum(part[r]);
                of_grad[r] += row_sum(part_of_grad[r]);
                const float next = sum[r] > 0 ? of_grad[r] / sum[r] : 0;
                move[r] = delta[r] - next;
                delta[r] = next;
            }
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                for (int i = 0; i < 4; ++i) dq[n][i] += move[i / 2] * pk[n][i];
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                for (int i = 0; i < 4; ++i) ds[n][i] = s[n][i] * (ds[n][i] - delta[i / 2]);
            accumulate<T, 2, N, D>(sums, both, k);
        }

        // Not kept in registers while the keys go by.
        const Head done(p, opaque(window), work.head);
        const int first = opaque(work.slot + own);
        float weight[2];
        for (int r = 0; r < 2; ++r) {
            weight[r] = row_lse[r] == INFINITY ? 1 : 1 / sum[r];
            const int slot = row_slot(first, 2 * r);
            if (slot < slots.count && lane() % 4 == 0) {
                const int64_t at = done.in_lse() + load(slots.offsets + slot);
                p.weight[at] = weight[r];
                p.delta[at] = delta[r];
            }
            weight[r] *= static_cast<float>(p.scale);
        }
        scale_rows(dq, weight);
        warp_barrier();  // the queries of this warp are read
        store_rows<T, D>(q + own * row_stride<D>, dq, head_dim,
                         LargeRows<uint16_t>{slots, p.grad_qkv + done.in_result(3), 3 * dim_of(p),
                                             first});
        block_barrier();
        if (const int column = thread_index(); column < head_dim) {
            const int64_t parts = windows_of(p) * tiles_of(shape, block_rows);
            const int64_t part = done.window * tiles_of(shape, block_rows) + work.tile;
            const int64_t at =
                (done.sample * parts + part) * dim_of(p) + work.head * head_dim + column;
            if (p.q_part) p.q_part[at] = column_sum<T, D>(q, column);
            if (p.v_part) p.v_part[at] = column_sum<T, D>(grad, column);
        }
    }
}

// Two numbers that lie side by side, as the columns of an accumulator do.
struct alignas(8) Pair {
    float x[2];
};
DEVICE Pair load_pair(Shared<float> at) { return load(at.template as<Pair>()); }

template <int D>
constexpr int large_backward_kv_shared(int height, int width) {
    return large_backward_q_shared<D>(height, width) +
           (3 * padded_slots(height * width) + warps * Diagonals<backward_rows<D>>::size(width)) * 4;
}

// dK and dV of a tile of keys, with the logits transposed: (keys, queries). A warp also sums dS onto
// its part of the gradient of the table.
template <class T, int D>
__global__ void __launch_bounds__(threads, 2)
    large_backward_kv(const WindowAttention p) {
    constexpr int N = backward_rows<D>;
    const Window shape(p, 0);
    const LargeWork work(p, shape, block_rows);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp(), tiles = tiles_of(shape, N);
    const auto table = shared_memory<float>();
    const Slots slots((table + table_size(shape.table_rows())).template as<int>(), shape);
    const int padded = padded_slots(slots.count);
    const auto lse = (slots.offsets + padded).template as<float>(), weight = lse + padded,
               delta = weight + padded;
    const Diagonals<N> diagonals(delta + padded, shape.width);
    const auto k = (delta + (padded + warps * diagonals.size(shape.width))).template as<uint16_t>(),
               v = k + tile_size<D>(block_rows),
               queries = v + tile_size<D>(block_rows);  // q and dO, twice
    const auto place = [&](int tile) { return queries + tile_size<D>(tile % 2 * 2 * N); };
    load_table(table, p, work.head, shape.table_rows());

    float* part = nullptr;
    const int length = table_part_size(shape.height, shape.width);
    if (p.table_part && work.slot + own < shape.slots) {
        const int groups = (shape.slots + 15) / 16;
        part = p.table_part + ((int64_t{work.head} * work.splits + work.split) * groups +
                               (work.slot + own) / 16) * length;
        for (int r = lane(); r < length; r += 32) part[r] = 0;
        warp_barrier();
    }

    for (int window = work.split; window < work.windows; window += work.splits) {
        const Head head(p, window, work.head);
        block_barrier();  // the window before is done with its tiles
        copy_slots<D, block_rows>(k, slots, opaque(work.slot), p.head_dim, head.k, head.v);
        copy_slots<D, N>(queries, slots, opaque(0), p.head_dim, head.q_with_row, head.grad_out);
        commit_copies();
        for (int slot = thread_index(); slot < padded; slot += threads) {
            const bool live = slot < slots.count;
            const int64_t at = head.in_lse() + load(slots.offsets + slot);
            store(lse + slot, live ? p.lse[at] * log2_e : 0.0f);
            store(weight + slot, live ? p.weight[at] : 0.0f);
            store(delta + slot, live ? p.delta[at] : 0.0f);
        }

        float dk[D / 8][4], dv[D / 8][4];
        zero(dk);
        zero(dv);
        for (int tile = 0; tile < tiles; ++tile) {
            wait_for_copies<0>();
            block_barrier();
            // All have left the tile before: the next one takes its place.
            if (tile + 1 < tiles)
                copy_slots<D, N>(place(tile + 1), slots, (tile + 1) * N, p.head_dim, head.q_with_row,
                                 head.grad_out);
            commit_copies();
            const auto q = place(tile), grad = q + tile_size<D>(N);
            float s[N / 8][4], ds[N / 8][4];
            two_products<T, N, D>(s, k + own * row_stride<D>, q, ds, v + own * row_stride<D>, grad);
            add_bias<true>(s, static_cast<float>(p.scale), shape, p.table, table, work.slot + own,
                           tile * N);
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const int query = column_slot(tile * N, n, 0);
                const Pair of_lse = load_pair(lse + query), of_weight = load_pair(weight + query);
                for (int i = 0; i < 4; ++i)
                    s[n][i] = exp2_fast(s[n][i] - of_lse.x[i % 2]) * of_weight.x[i % 2];
            }
            accumulate<T, N, D>(dv, s, grad);
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const Pair of_delta = load_pair(delta + column_slot(tile * N, n, 0));
                for (int i = 0; i < 4; ++i) ds[n][i] = s[n][i] * (ds[n][i] - of_delta.x[i % 2]);
            }
            accumulate<T, N, D>(dk, ds, q);
            if (part) {
                diagonals.sum(ds, shape, work.slot + own, tile * N, [&](int row, float sum) {
                    if (row < length) add_async(part + row, sum);
                });
                diagonals.renew(shape);
            }
        }

        const Head done(p, opaque(window), work.head);
        const float scale[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
        scale_rows(dk, scale);
        const int dim = dim_of(p);
        uint16_t* grad_k = p.grad_qkv + done.in_result(3) + dim;
        warp_barrier();  // the keys and values of this warp are read
        store_rows<T, D>(k + own * row_stride<D>, dk, head_dim,
                         LargeRows<uint16_t>{slots, grad_k, 3 * dim, work.slot + own});
        store_rows<T, D>(v + own * row_stride<D>, dv, head_dim,
                         LargeRows<uint16_t>{slots, grad_k + dim, 3 * dim, work.slot + own});
    }
}

}  // namespace diffit::cuda
