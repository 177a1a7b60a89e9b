// Attention in windows of more than 64 tokens: tiles of queries against tiles of keys, nothing of
// size M x M. What the kernels share, and the forward pass.
//
// A block has 64 queries or keys of its own, 16 to a warp, in the forward pass up to twice as many, and
// reads the others in tiles, the next one in the background.
#pragma once

#include "logits.h"

namespace diffit::cuda {

// Rows of the tiles that come one after another; fewer where shared memory is short.
template <int D>
constexpr int forward_keys = D <= 112 ? 64 : 32;
// Blocks that a multiprocessor holds at once.
constexpr int forward_blocks = 2;
// Windows that a block computes at most, one after another.
constexpr int most_in_turn = 64;
// Groups of 16 queries of a warp: what is loaded of a key serves them all.
template <int D>
constexpr int forward_groups = D <= 80 ? 2 : 1;

DEVICE int tiles_of(const Window& window, int rows) { return (window.slots + rows - 1) / rows; }

// What a block works on: one tile of one head, in every splits-th window. Windows are counted over
// all samples. The tiles of a head come first: blocks that run together read the same rows.
struct LargeWork {
    int slot;  // the first of the tile
    int tile, head, split, splits, windows;

    DEVICE LargeWork(const WindowAttention& p, const Window& shape, int rows)
        : splits(static_cast<int>(p.splits)), windows(static_cast<int>(p.batch) * windows_of(p)) {
        const int tiles = tiles_of(shape, rows), heads = static_cast<int>(p.heads);
        tile = block_index() % tiles;
        slot = tile * rows;
        head = block_index() / tiles % heads;
        split = block_index() / tiles / heads;
    }
};

// Slots of whole tiles: the largest has 128 rows.
BOTH constexpr int padded_slots(int slots) { return (slots + 127) / 128 * 128; }

// Where the slots of a window are: in a table, since every tile looks them up. After the last slot
// come more of the same, to the end of its tile.
struct Slots {
    Shared<int> offsets;
    int count;

    DEVICE Slots(Shared<int> place, const Window& window) : offsets(place), count(window.slots) {
        for (int slot = thread_index(); slot < padded_slots(count); slot += threads)
            store(place + slot, window.offset(slot < count ? slot : count - 1));
    }
};

// Rows of slots from `first` on, `base` being that of slot 0; null where there is no token.
template <class X>
struct LargeRows {
    Slots slots;
    X* base;
    int64_t stride;
    int first;
    DEVICE X* operator()(int row) const {
        const int slot = first + row;
        return slot < slots.count ? base + load(slots.offsets + slot) * stride : nullptr;
    }
};

// Rows of tokens, by their offsets from the token of slot 0: an address is one instruction, a product
// of 32 bits.
struct TokenRows {
    const uint16_t* base;
    int stride;  // bytes

    DEVICE TokenRows(const uint16_t* rows, int64_t elements)
        : base(rows), stride(static_cast<int>(2 * elements)) {}
    DEVICE TokenRows at(int64_t column) const {
        TokenRows part = *this;
        part.base += column;
        return part;
    }
    DEVICE const uint16_t* operator()(int offset) const {
        return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(base) +
                                                 static_cast<int64_t>(offset) * stride);
    }
};

// Where a head of a window is, of those of all samples.
struct Head {
    const WindowAttention& p;
    int sample, window, head, first;  // window: of the sample; first: token of slot 0
    TokenRows q, k, v, grad_out;
    TokenRows q_with_row;  // where large_backward_q has been

    DEVICE Head(const WindowAttention& problem, int index, int head_index)
        : p(problem),
          sample(index / windows_of(p)),
          window(index % windows_of(p)),
          head(head_index),
          first(Window(p, window).first),
          q(p.qkv + sample * p.qkv_stride_batch + first * p.qkv_stride_token + head * p.head_dim,
            p.qkv_stride_token),
          k(q.at(dim_of(p))),
          v(k.at(dim_of(p))),
          grad_out(p.grad_out + sample * p.grad_out_stride_batch +
                       first * p.grad_out_stride_token + head * p.head_dim,
                   p.grad_out_stride_token),
          q_with_row(p.q ? p.q + in_result(1) : q.base, p.q ? dim_of(p) : p.qkv_stride_token) {}

    // In q_row and v_row.
    DEVICE int64_t in_row() const { return sample * p.row_stride_batch + head * p.head_dim; }
    // In a (B, L, parts C) without gaps, in part 0.
    DEVICE int64_t in_result(int parts) const {
        return (int64_t{sample} * tokens_of(p) + first) * parts * dim_of(p) + head * p.head_dim;
    }
    // In (B, heads, L).
    DEVICE int64_t in_lse() const { return (sample * p.heads + head) * tokens_of(p) + first; }
};

// Starts to copy N slots of a window, from `first` on, to tiles one after the other, one of each
// tensor. Addresses are valid where nothing is read, too: a branch would cost more than the copy.
template <int D, int N, class... Rows>
DEVICE void copy_slots(Shared<uint16_t> to, const Slots& slots, int first, int64_t head_dim,
                       const Rows&... tensors) {
    const bool inside = own_column<D>() < head_dim;
    const TokenRows from[] = {tensors.at(inside ? own_column<D>() : 0)...};
    for_own_units<D>(N, [&](int row, int column) {
        const int offset = load(slots.offsets + (first + row));
        const bool live = inside && first + row < slots.count;
        auto place = to + (row * row_stride<D> + column);
#pragma unroll
        for (const TokenRows& rows : from) {
            copy_async(place, rows(offset), live);
            place = place + tile_size<D>(N);
        }
    });
}

// Bytes of the table and of where the slots are.
BOTH constexpr int large_shared(int height, int width) {
    return (table_size(table_rows(height, width)) + padded_slots(height * width)) * 4;
}
template <int D>
constexpr int large_forward_shared(int height, int width) {
    return tile_size<D>(forward_groups<D> * block_rows + 4 * forward_keys<D>) * 2 +
           large_shared(height, width);
}

// A block has done with the queries in shared memory as soon as its warps have them in registers, so
// the first tiles of its next window come while it computes with the last ones of this.
template <class T, int D>
__global__ void __launch_bounds__(threads, forward_blocks) large_forward(const WindowAttention p) {
    constexpr int R = forward_groups<D>, N = forward_keys<D>, rows = R * block_rows;
    const Window shape(p, 0);
    const LargeWork work(p, shape, rows);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * R * warp(),
              tiles = tiles_of(shape, N);
    const auto q = shared_memory<uint16_t>(), keys = q + tile_size<D>(rows);  // k and v, twice
    const auto table = (keys + tile_size<D>(4 * N)).template as<float>();
    const Slots slots((table + table_size(shape.table_rows())).template as<int>(), shape);
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    const auto copy_first = [&](int window, int step) {
        const Head head(p, window, work.head);
        // Opaque: addresses and bounds of all rows are too many to keep in registers.
        copy_slots<D, rows>(q, slots, opaque(work.slot), p.head_dim, head.q);
        copy_slots<D, N>(place(step), slots, opaque(0), p.head_dim, head.k, head.v);
    };
    load_table(table, p, work.head, shape.table_rows());
    block_barrier();
    copy_first(work.split, 0);
    commit_copies();

    for (int window = work.split, step = 0; window < work.windows; window += work.splits) {
        const Head head(p, window, work.head);
        wait_for_copies<0>();
        if (p.q_row) add_row<T, D>(q, rows, head_dim, own_unit<D>(head_dim, p.q_row + head.in_row()));
        block_barrier();
        uint32_t own_q[R][D / 16][4];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                load_a<D>(own_q[r][k], q + ((own + 16 * r) * row_stride<D> + 16 * k));

        float o[R][D / 8][4], m[R][2], total[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            zero(o[r]);
            for (int i = 0; i < 2; ++i) m[r][i] = -INFINITY, total[r][i] = 0;
        }
        for (int tile = 0; tile < tiles; ++tile, ++step) {
            if (tile) {
                wait_for_copies<0>();
                block_barrier();
            }
            // All have left the tile before: the next one takes its place.
            if (tile + 1 < tiles)
                copy_slots<D, N>(place(step + 1), slots, (tile + 1) * N, p.head_dim, head.k, head.v);
            else if (window + work.splits < work.windows)
                copy_first(window + work.splits, step + 1);
            commit_copies();
            const auto k = place(step), v = k + tile_size<D>(N);
            float s[R][N / 8][4];
            product<T, R, N, D>(s, own_q, k);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float decay[2];
                add_bias<false>(s[r], static_cast<float>(p.scale), shape, p.table, table,
                                work.slot + own + 16 * r, tile * N);
                softmax_step(s[r], m[r], total[r], decay);
                if (decay[0] != 1 || decay[1] != 1) scale_rows(o[r], decay);
            }
            accumulate<T, R, N, D>(o, s, v);
        }

        const Head done(p, opaque(window), work.head);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < 2; ++i) total[r][i] = row_sum(total[r][i]);
            const float inverse[2] = {1 / total[r][0], 1 / total[r][1]};
            const int first = opaque(work.slot + own + 16 * r);  // not in a register until here
            scale_rows(o[r], inverse);
            if (p.v_row) add_row_to_rows<T, D>(o[r], head_dim, p.v_row + done.in_row());
            const LargeRows<uint16_t> out{slots, p.out + done.in_result(1), dim_of(p), first};
            store_directly<T, D>(o[r], head_dim, out);
            store_lse(LargeRows<float>{slots, p.lse + done.in_lse(), 1, first}, m[r], total[r]);
        }
    }
}

}  // namespace diffit::cuda
