// The forward pass of attention_large.h for devices whose warpgroups multiply in the background
// (compute capability 9.0): heads of U units of 8 columns, windows W wide, 16 or 32, of whole blocks.
//
// A block is two warpgroups, each with two groups of 64 queries, so that keys and values are read once for 256
// queries. While one group has its softmax, the tensor cores multiply for the other: its probabilities
// with the values, then its queries with the next keys.
#pragma once

#include "attention_large.h"
#include "warpgroup.h"

namespace diffit::cuda {

constexpr int warpgroup_threads = 2 * threads;
constexpr int warpgroup_keys = 64, warpgroup_groups = 2;
constexpr int warpgroup_queries = 2 * warpgroup_groups * block_rows;
constexpr int warpgroup_stages = 2;  // tiles of keys and of values in shared memory

// A tile of N rows for products: matrices of 8 rows of a unit one after the other, units N + 1 rows
// apart, so that those of a row, which threads side by side write, are in different banks.
template <int N>
constexpr int unit_stride = (N + 1) * 8;
// Products take two units at once: where U is odd, the last is zero.
template <int U>
constexpr int whole_units = U + U % 2;

template <int U>
constexpr int large_forward_warpgroup_shared(int height, int width) {
    const int queries = whole_units<U> * unit_stride<warpgroup_queries>,
              keys_and_values = (whole_units<U> + U) * unit_stride<warpgroup_keys>;
    return (queries + warpgroup_stages * keys_and_values) * 2 +
           table_size(table_rows(height, width)) * 4;
}

// Calls each(row, place) for the units of a tile of N rows that are this thread's. They are of one column; the
// last threads may have none.
template <int U>
DEVICE int own_unit() {
    return thread_index() % U * 8;
}
template <int U, int N, class Each>
DEVICE void for_own_rows(const Each& each) {
    constexpr int at_once = warpgroup_threads / U;
    const int first = thread_index() / U;
    if (first >= at_once) return;
#pragma unroll
    for (int before = 0; before < N; before += at_once)
        if (before + at_once <= N || before + first < N)
            each(before + first, thread_index() % U * unit_stride<N> + (before + first) * 8);
}

// Starts to copy N rows, `from` being that of the first. From one token of a row of the grid to the next, and from
// one row to the next, are `token` and `grid_row` numbers.
template <int U, int N, int W>
DEVICE void copy_units(Shared<uint16_t> to, const uint16_t* from, int token, int grid_row) {
    for_own_rows<U, N>([&](int row, int place) {
        copy_async(to + place, from + (row / W * grid_row + row % W * token + own_unit<U>()), true);
    });
}

// Zeros in the unit that no copy writes.
template <int U, int N>
DEVICE void clear_last_unit(Shared<uint16_t> tile) {
    if (U % 2 && thread_index() < N)
        store((tile + (U * unit_stride<N> + thread_index() * 8)).template as<Chunk>(), Chunk{});
}

// Adds a row of memory to what this thread has copied.
template <class T, int U, int N>
DEVICE void add_row_to_units(Shared<uint16_t> tile, const uint16_t* row) {
    const Chunk added = *reinterpret_cast<const Chunk*>(row + own_unit<U>());
    for_own_rows<U, N>([&](int, int place) {
        const auto at = (tile + place).template as<Chunk>();
        store(at, sum<T>(load(at), added));
    });
}

template <class T, int U, int W>
__global__ void __launch_bounds__(warpgroup_threads, 1)
    large_forward_warpgroup(const WindowAttention p) {
    constexpr int R = warpgroup_groups, N = warpgroup_keys, rows = warpgroup_queries, D = 8 * U;
    constexpr int query_stride = unit_stride<rows>, key_stride = unit_stride<N>;
    const Window shape(p, 0);
    const LargeWork work(p, shape, rows);
    const int own = warp() / 4 * (R * block_rows) + warp() % 4 * 16, tiles = shape.slots / N;
    const auto q = shared_memory<uint16_t>();
    const auto all_keys = q + whole_units<U> * query_stride;
    const auto all_values = all_keys + warpgroup_stages * whole_units<U> * key_stride;
    const auto table = (all_values + warpgroup_stages * U * key_stride).template as<float>();
    const auto keys = [&](int step) {
        return all_keys + step % warpgroup_stages * (whole_units<U> * key_stride);
    };
    const auto values = [&](int step) { return all_values + step % warpgroup_stages * (U * key_stride); };

    // Copies go ahead of the work, keys two tiles and values one, through all windows of the block.
    const int token = static_cast<int>(p.qkv_stride_token), grid_row = shape.grid_width * token;
    int next_window = work.split, next_tile = 0;
    const uint16_t *next_keys = nullptr, *next_values = nullptr;
    const auto copy_keys = [&](int step) {
        next_values = nullptr;
        if (next_window >= work.windows) return;
        if (next_tile == 0) {
            const Head head(p, next_window, work.head);
            copy_units<U, rows, W>(q, head.q.base + work.slot / W * grid_row, token, grid_row);
            next_keys = head.k.base;
        }
        copy_units<U, N, W>(keys(step), next_keys, token, grid_row);
        next_values = next_keys + dim_of(p);
        next_keys += N / W * grid_row;
        if (++next_tile == tiles) next_tile = 0, next_window += work.splits;
    };
    const auto copy_values = [&](int step) {
        if (next_values) copy_units<U, N, W>(values(step), next_values, token, grid_row);
    };

    const float factor = static_cast<float>(p.scale) * log2_e;
    load_table(table, p, work.head, shape.table_rows(), log2_e / factor);
    clear_last_unit<U, rows>(q);
    for (int stage = 0; stage < warpgroup_stages; ++stage) clear_last_unit<U, N>(keys(stage));
    copy_keys(0);
    copy_values(0);
    commit_copies();
    copy_keys(1);
    commit_copies();
    // Waits for the keys of the next step and the values of this, and starts to copy those after them:
    // the products with what they replace have been waited for, and now by all warps.
    const auto next_tiles = [&](int step) {
        wait_for_copies<0>();
        show_to_products();
        block_barrier();
        copy_values(step + 1);
        copy_keys(step + 2);
        commit_copies();
    };

    // The bias of this thread's first query and a window's first key. The others are where the difference
    // of positions says.
    const auto position = [](int slot) { return slot + slot / W * (W - 1); };
    const auto bias = table + (shape.center() + position(work.slot + own) + lane() / 4 - lane() % 4 * 2);

    for (int window = work.split, step = 0; window < work.windows; window += work.splits) {
        wait_for_copies<1>();
        if (p.q_row) {
            const Head head(p, window, work.head);
            add_row_to_units<T, U, rows>(q, p.q_row + head.in_row());
        }
        show_to_products();
        block_barrier();
        uint32_t own_q[R][whole_units<U> / 2][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int k = 0; k < whole_units<U> / 2; ++k)
                ldmatrix(own_q[r][k], q + ((2 * k + lane() / 16) * query_stride +
                                           (r * block_rows + own + lane() % 16) * 8));

        float o[R][U][4], s[R][N / 8][4], m[R][2], total[R][2];
        uint32_t weights[R][N / 16][4];
        // Sums begin as the bias of a tile of keys.
        const auto load_bias = [&](int r, int tile) {
            const auto here = bias + (r * position(block_rows) - tile * position(N));
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    s[r][n][i] = load(here + (i / 2 * 8 - position(8 * n) - i % 2));
        };
        const auto multiply_keys = [&](int r, int of) {
            const auto from = keys(of);
#pragma unroll
            for (int k = 0; k < whole_units<U> / 2; ++k)
                multiply_async<T, false>(s[r], own_q[r][k], {from + 2 * k * key_stride, key_stride, 64});
        };
        const auto multiply_values = [&](int r, int of) {
            const auto from = values(of);
#pragma unroll
            for (int k = 0; k < N / 16; ++k)
                multiply_async<T, true>(o[r], weights[r][k], {from + k * 128, 64, key_stride});
        };
        const auto softmax = [&](int r) {
            float decay[2];
            softmax_step(s[r], factor, m[r], total[r], decay);
            if (decay[0] != 1 || decay[1] != 1) scale_rows(o[r], decay);
#pragma unroll
            for (int k = 0; k < N / 16; ++k) as_first_operand<T>(weights[r][k], s[r], 2 * k);
            settled(weights[r]);
        };
        const auto store_result = [&](int r) {
            const Head head(p, opaque(window), work.head);  // not in registers until here
            for (int i = 0; i < 2; ++i) total[r][i] = row_sum(total[r][i]);
            const float inverse[2] = {1 / total[r][0], 1 / total[r][1]};
            scale_rows(o[r], inverse);
            if (p.v_row) add_row_to_rows<T, D>(o[r], D, p.v_row + head.in_row());
            const int first = opaque(work.slot + r * block_rows + own);
            const auto offset = [&](int row) {
                const int slot = first + row;
                return slot / W * shape.grid_width + slot % W;
            };
            uint16_t* out = p.out + head.in_result(1);
            store_directly<T, D>(o[r], D, [&](int row) { return out + offset(row) * int64_t{dim_of(p)}; });
            float* lse = p.lse + head.in_lse();
            store_lse([&](int row) { return lse + offset(row); }, m[r], total[r]);
        };
#pragma unroll
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < 2; ++i) m[r][i] = -INFINITY, total[r][i] = 0;
            zero(o[r]);
        }
        load_bias(0, 0);
        begin_products();
        multiply_keys(0, step);
        commit_products();
        load_bias(1, 0);
        wait_for_products();
        settled(s[0]);
        begin_products();
        multiply_keys(1, step);
        commit_products();
        softmax(0);
        load_bias(0, 1);
        wait_for_products();
        settled(s[1]);
        for (int tile = 0; tile + 1 < tiles; ++tile, ++step) {
            next_tiles(step);
            begin_products();
            multiply_values(0, step);
            multiply_keys(0, step + 1);
            commit_products();
            softmax(1);
            load_bias(1, tile + 1);
            wait_for_products();
            settled(o[0]);
            settled(s[0]);
            begin_products();
            multiply_values(1, step);
            multiply_keys(1, step + 1);
            commit_products();
            softmax(0);
            if (tile + 2 < tiles) load_bias(0, tile + 2);
            wait_for_products();
            settled(o[1]);
            settled(s[1]);
        }
        next_tiles(step);
        begin_products();
        multiply_values(0, step);
        commit_products();
        softmax(1);
        wait_for_products();
        settled(o[0]);
        begin_products();
        multiply_values(1, step++);
        commit_products();
        store_result(0);
        wait_for_products();
        settled(o[1]);
        store_result(1);
    }
}

}  // namespace diffit::cuda
