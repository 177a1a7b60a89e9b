// Attention in windows of more than 64 tokens: tiles of queries against tiles of keys, nothing of
// size M x M. What the kernels share, and the forward pass.
//
// A block has 64 queries or keys of its own, 16 to a warp, and reads the others in tiles, the next
// one in the background.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

// Rows of the tiles that come one after another; fewer where shared memory is short.
template <int D>
constexpr int forward_keys = D <= 112 ? 64 : 32;

DEVICE int tiles_of(const Window& window, int rows) { return (window.slots + rows - 1) / rows; }

// What a block of one tile of one window works on. Work is counted as tiles, heads, windows,
// samples, the first fastest: blocks that run together read the same rows.
struct LargeWork {
    int slot;  // the first of the tile
    int head, sample, part;  // part: tile of the sample
    Window window;

    DEVICE explicit LargeWork(const WindowAttention& p) : window(p, 0) {
        const int tiles = tiles_of(window, block_rows), heads = static_cast<int>(p.heads),
                  windows = windows_of(p), tile = block_index() % tiles;
        int index = block_index() / tiles;
        head = index % heads;
        index /= heads;
        sample = index / windows;
        slot = tile * block_rows;
        part = index % windows * tiles + tile;
        window = Window(p, index % windows);
    }
};

// Slots of whole tiles.
BOTH constexpr int padded_slots(int slots) { return (slots + block_rows - 1) / block_rows * block_rows; }

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

// Where a head of a window of a sample is.
struct Head {
    const WindowAttention& p;
    int sample, head, first;  // first: token of slot 0
    TokenRows q, k, v, grad_out;
    TokenRows q_with_row;  // where large_backward_q has been

    DEVICE Head(const WindowAttention& problem, int sample_index, int head_index,
                const Window& window)
        : p(problem),
          sample(sample_index),
          head(head_index),
          first(window.first),
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

template <int D>
constexpr int large_forward_shared(int table_rows, int slots) {
    return tile_size<D>(block_rows + 4 * forward_keys<D>) * 2 +
           (table_size(table_rows) + padded_slots(slots)) * 4;
}

template <class T, int D>
__global__ void __launch_bounds__(threads, blocks_at_once<D>) large_forward(const WindowAttention p) {
    constexpr int N = forward_keys<D>;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head, window);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const Slots slots((table + table_size(window.table_rows())).template as<int>(), window);
    const auto q = (slots.offsets + padded_slots(slots.count)).template as<uint16_t>(),
               keys = q + tile_size<D>(block_rows);  // k and v, twice
    load_table(table, p, work.head, window.table_rows());
    block_barrier();

    copy_slots<D, block_rows>(q, slots, work.slot, p.head_dim, head.q);
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    const auto copy = [&](int tile) {
        if (tile * N < slots.count)
            copy_slots<D, N>(place(tile), slots, tile * N, p.head_dim, head.k, head.v);
        commit_copies();
    };
    copy(0);
    copy(1);
    wait_for_copies<1>();
    if (p.q_row) add_row<T, D>(q, block_rows, head_dim, p.q_row + head.in_row());
    block_barrier();
    const OwnRows<D> own_q(q + own * row_stride<D>);

    float o[D / 8][4], m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    zero(o);
    const int tiles = tiles_of(window, N);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies<1>();
        block_barrier();
        const auto k = place(tile), v = k + tile_size<D>(N);
        float s[N / 8][4], decay[2];
        product<T, N, D>(s, own_q, k);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, work.slot + own,
                        tile * N);
        softmax_step(s, m, total, decay);
        scale_rows(o, decay);
        accumulate<T, N, D>(o, s, v);
        block_barrier();  // the tile after the next takes the place of this one
        copy(tile + 2);
    }

    const float inverse[2] = {1 / total[0], 1 / total[1]};
    scale_rows(o, inverse);
    if (p.v_row) add_to_rows<T, D>(o, p.v_row + head.in_row(), head_dim);
    store_rows<T, D>(q + own * row_stride<D>, o, head_dim,
                     LargeRows<uint16_t>{slots, p.out + head.in_result(1), dim_of(p),
                                         work.slot + own});
    store_lse(LargeRows<float>{slots, p.lse + head.in_lse(), 1, work.slot + own}, m, total);
}

}  // namespace diffit::cuda
