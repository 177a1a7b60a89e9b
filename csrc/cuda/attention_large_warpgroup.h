// The forward pass of attention_large.h for compute capability 9.0, where a warpgroup multiplies in the
// background and one thread copies tiles. Heads have U units of 8 columns, 8 or 9; windows are W wide,
// 16 or 32, and of whole blocks.
//
// A block is one warpgroup with two groups of 64 queries. While one group has its softmax, the tensor
// cores multiply for the other: its probabilities with the values, then its queries with the next keys.
#pragma once

#include "attention_large.h"
#include "kernels.h"

namespace diffit::cuda {

constexpr int warpgroup_groups = 2;  // of queries
constexpr int warpgroup_queries = warpgroup_groups * block_rows;
constexpr int warpgroup_stages = 2;  // tiles of keys and of values in shared memory

// A tile is 64 slots: rows of 64 columns, swizzled, and behind them, of the columns left, matrices of 8
// rows of 16 bytes.
template <int U>
struct Tile {
    static constexpr int rows = block_rows, left = rows * 64;  // where the columns left begin
    static constexpr int size = left + (U - 8) * rows * 8, bytes = 2 * size;

    // Where a unit of a row is.
    DEVICE static int place(int row, int unit) {
        return unit < 8 ? row * 64 + (unit ^ row % 8) * 8 : left + row * 8;
    }
};

template <int U>
struct WarpgroupShared {
    static constexpr int queries = 0;
    static constexpr int keys = queries + warpgroup_groups * Tile<U>::size;
    static constexpr int values = keys + warpgroup_stages * Tile<U>::size;
    // Products take two units at once: beside the ninth stand zeros.
    static constexpr int zeros = values + warpgroup_stages * Tile<U>::size;
    static constexpr int barriers = zeros + (U - 8) * block_rows * 8;
    static constexpr int places = barriers + 2 * warpgroup_stages * 4;
    static constexpr int table = places + most_in_turn * 8;
};

template <int U>
constexpr int large_forward_warpgroup_shared(int height, int width) {
    return WarpgroupShared<U>::table * 2 + table_size(table_rows(height, width)) * 4;
}

// One step of a softmax over keys that come in parts, of logits s factor in base 2. As the other
// softmax_step, but the rows of a warp, whose sums so far are o, are rescaled where logits of one of them
// rose too far: a vote, where the maximum of each row would take four shuffles.
template <int N, int U>
DEVICE void softmax_step(float (&s)[N][4], float factor, float (&m)[2], float (&total)[2],
                         float (&o)[U][4]) {
    float most[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) most[i / 2] = fmaxf(most[i / 2], s[n][i]);
    if (any_lane(most[0] * factor > m[0] + rise || most[1] * factor > m[1] + rise)) {
        float decay[2];
        for (int r = 0; r < 2; ++r) {
            const float next = fmaxf(m[r], row_max(most[r]) * factor);
            decay[r] = next == -INFINITY ? 0 : exp2_fast(m[r] - next);
            m[r] = next;
            total[r] *= decay[r];
        }
        scale_rows(o, decay);
    }
    // The bias may mask every key so far: -inf less -inf is no number.
    const float shift[2] = {m[0] == -INFINITY ? 0 : m[0], m[1] == -INFINITY ? 0 : m[1]};
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) {
            s[n][i] = exp2_fast(s[n][i] * factor - shift[i / 2]);
            total[i / 2] += s[n][i];
        }
}

template <class T, int U, int W>
__global__ void __launch_bounds__(threads, forward_blocks)
    large_forward_warpgroup(const WindowAttention p, const GRID_CONSTANT TileMaps maps) {
    constexpr int R = warpgroup_groups, N = block_rows, D = 8 * U;
    using Shape = WarpgroupShared<U>;
    const Window shape(p, 0);
    const LargeWork work(p, shape, warpgroup_queries);
    const int own = 16 * warp(), tiles = shape.slots / N;
    const auto memory = shared_memory<uint16_t>();
    const auto queries = memory + Shape::queries;
    const auto stage = [](int step) { return step % warpgroup_stages; };
    const auto keys = [&](int step) { return memory + (Shape::keys + stage(step) * Tile<U>::size); };
    const auto values = [&](int step) { return memory + (Shape::values + stage(step) * Tile<U>::size); };
    const auto zeros = memory + Shape::zeros;
    const auto keys_there = (memory + Shape::barriers).template as<uint64_t>();
    const auto values_there = keys_there + warpgroup_stages;
    const auto table = (memory + Shape::table).template as<float>();

    // Where the windows are that come in turn: x, y and sample.
    const auto places = (memory + Shape::places).template as<int>();
    for (int turn = thread_index(); turn < most_in_turn; turn += threads) {
        const int index = work.split + turn * work.splits, window = index % windows_of(p);
        const int across = static_cast<int>(p.windows_across);
        store(places + 4 * turn, window % across * W);
        store(places + (4 * turn + 1), window / across * shape.height);
        store(places + (4 * turn + 2), index / windows_of(p));
    }

    // What the first thread copies: keys two tiles ahead of the work, values one, through all windows.
    const int turns = (work.windows - work.split + work.splits - 1) / work.splits;
    int next_turn = 0, next_tile = 0;  // of keys; values come behind
    const auto copy_tile = [&](Shared<uint16_t> to, int part, int turn, int slot,
                               CopyBarrier there) {
        const auto place = places + 4 * turn;
        const int x = load(place), y = load(place + 1) + slot / W, sample = load(place + 2);
        const int column = part * dim_of(p) + work.head * D;
        copy_box(to, maps.columns, column, x, y, sample, there);
        if constexpr (U > 8) copy_box(to + Tile<U>::left, maps.left, column + 64, x, y, sample, there);
    };
    const auto copy_values = [&](int step) {
        const int turn = next_tile ? next_turn : next_turn - 1;
        const int tile = (next_tile ? next_tile : tiles) - 1;
        if (turn * tiles + tile < step) return;
        const auto there = values_there + stage(step);
        expect_bytes(there, Tile<U>::bytes);
        copy_tile(values(step), 2, turn, tile * N, there);
    };
    const auto copy_keys = [&](int step) {
        if (next_turn == turns) return;
        const auto there = keys_there + stage(step);
        expect_bytes(there, Tile<U>::bytes * (next_tile ? 1 : 1 + warpgroup_groups));
        if (next_tile == 0)
            for (int tile = 0; tile < warpgroup_groups; ++tile)
                copy_tile(queries + tile * Tile<U>::size, 0, next_turn, work.slot + tile * N,
                          there);
        copy_tile(keys(step), 1, next_turn, next_tile * N, there);
        if (++next_tile == tiles) next_tile = 0, ++next_turn;
    };

    const float factor = static_cast<float>(p.scale) * log2_e;
    load_table(table, p, work.head, shape.table_rows(), log2_e / factor);
    for (int i = thread_index(); i < (U - 8) * block_rows; i += threads)
        store((zeros + 8 * i).template as<Chunk>(), Chunk{});
    block_barrier();
    if (thread_index() == 0) {
        for (int i = 0; i < 2 * warpgroup_stages; ++i) initialize(keys_there + i);
        show_to_products();
        copy_keys(0);
        copy_values(0);
        copy_keys(1);
    }
    show_to_products();
    block_barrier();

    // The bias of this thread's first query and a window's first key. The others are where the difference
    // of positions says.
    const auto position = [](int slot) { return slot + slot / W * (W - 1); };
    const auto bias = table + (shape.center() + position(work.slot + own) + lane() / 4 -
                               lane() % 4 * 2);

    for (int turn = 0, step = 0; turn < turns; ++turn) {
        const auto head_of = [&](int turn) {
            return Head(p, work.split + turn * work.splits, work.head);
        };
        wait_for_phase(keys_there + stage(step), step / warpgroup_stages);
        if (p.q_row) {
            const uint16_t* row = p.q_row + head_of(turn).in_row();
#pragma unroll 1
            for (int i = opaque(thread_index()); i < warpgroup_queries * U; i += threads) {
                const int slot = i / U, unit = i % U;
                const auto at = (queries + (slot / N * Tile<U>::size + Tile<U>::place(slot % N, unit)))
                                    .template as<Chunk>();
                store(at, sum<T>(load(at), *reinterpret_cast<const Chunk*>(row + unit * 8)));
            }
            show_to_products();  // what is copied there next comes later
            block_barrier();
        }
        uint32_t own_q[R][(U + 1) / 2][4];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const auto tile = queries + r * Tile<U>::size;
            const int row = opaque(own) + lane() % 16;
#pragma unroll
            for (int k = 0; k < 4; ++k)
                ldmatrix(own_q[r][k], tile + Tile<U>::place(row, 2 * k + lane() / 16));
            if constexpr (U > 8)
                ldmatrix(own_q[r][U / 2], lane() < 16 ? tile + Tile<U>::place(row, 8) : zeros + row * 8);
        }

        float o[R][U][4], s[R][N / 8][4], m[R][2] = {}, total[R][2] = {};
        uint32_t weights[R][N / 16][4];
        // Sums begin as the bias of a tile of keys.
        const auto load_bias = [&](int r, int tile) {
            const auto here = bias + (r * position(N) - tile * position(N));
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    s[r][n][i] = load(here + (i / 2 * 8 - position(8 * n) - i % 2));
        };
        const auto multiply_keys = [&](int r, int of) {
            const auto tile = keys(of);
#pragma unroll
            for (int k = 0; k < 4; ++k)
                multiply_async<T, false>(s[r], own_q[r][k], SwizzledRows{tile + 16 * k});
            if constexpr (U > 8) {
                const auto left = tile + Tile<U>::left;
                const int to_zeros =
                    Shape::zeros - Shape::keys - stage(of) * Tile<U>::size - Tile<U>::left;
                multiply_async<T, false>(s[r], own_q[r][U / 2], Matrices{left, to_zeros, 64});
            }
        };
        const auto multiply_values = [&](int r, int of) {
            const auto tile = values(of);
            auto& columns = reinterpret_cast<float (&)[8][4]>(o[r]);
#pragma unroll
            for (int k = 0; k < N / 16; ++k)
                multiply_async<T, true>(columns, weights[r][k], SwizzledRows{tile + k * 16 * 64});
            if constexpr (U > 8)
#pragma unroll
                for (int k = 0; k < N / 16; ++k)
                    multiply_async<T, true>(reinterpret_cast<float (&)[1][4]>(o[r][U - 1]), weights[r][k],
                                            Matrices{tile + (Tile<U>::left + k * 128), 64, 0});
        };
        const auto softmax = [&](int r) {
            softmax_step(s[r], factor, m[r], total[r], o[r]);
#pragma unroll
            for (int k = 0; k < N / 16; ++k) as_first_operand<T>(weights[r][k], s[r], 2 * k);
            settled(weights[r]);
        };
        // Waits for the values of a step. Products with the tiles before have been waited for, and now by
        // all warps, so that copy_next may replace them.
        const auto await_values = [&](int of) {
            wait_for_phase(values_there + stage(of), of / warpgroup_stages);
            block_barrier();
        };
        const auto copy_next = [&](int of) {
            if (thread_index()) return;
            copy_values(of + 1);
            copy_keys(of + 2);
        };
        const auto store_result = [&](int r) {
            const Head head = head_of(opaque(turn));  // not in registers until here
            for (int i = 0; i < 2; ++i) total[r][i] = row_sum(total[r][i]);
            const float inverse[2] = {1 / total[r][0], 1 / total[r][1]};
            scale_rows(o[r], inverse);
            if (p.v_row) add_row_to_rows<T, D>(o[r], D, p.v_row + head.in_row());
            const int first = opaque(work.slot) + r * N + opaque(thread_index()) / 32 * 16;
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
            for (int i = 0; i < 2; ++i) m[r][i] = -INFINITY;
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
            wait_for_phase(keys_there + stage(step + 1), (step + 1) / warpgroup_stages);
            await_values(step);
            begin_products();
            multiply_values(0, step);
            multiply_keys(0, step + 1);
            commit_products();
            softmax(1);
            copy_next(step);
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
        await_values(step);
        begin_products();
        multiply_values(0, step);
        commit_products();
        softmax(1);
        copy_next(step);
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
