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
    int tile, slot;  // slot: the first of the tile
    int64_t head, window_index, sample, part;  // part: tile of the sample
    Window window;

    DEVICE explicit LargeWork(const WindowAttention& p) : window(p, 0) {
        const int tiles = tiles_of(window, block_rows);
        int64_t index = block_index();
        tile = static_cast<int>(index % tiles);
        index /= tiles;
        head = index % p.heads;
        index /= p.heads;
        window_index = index % windows_of(p);
        sample = index / windows_of(p);
        slot = tile * block_rows;
        part = window_index * tiles + tile;
        window = Window(p, window_index);
    }
};

// Where the slots of a window are: in a table, since every tile looks them up.
struct Slots {
    Shared<int> offsets;
    int count;

    DEVICE Slots(Shared<int> place, const Window& window) : offsets(place), count(window.slots) {
        for (int slot = thread_index(); slot < count; slot += threads)
            store(place + slot, window.offset(slot));
    }
    // The offset of a slot, or of the last one.
    DEVICE int64_t nearest(int slot) const {
        return load(offsets + (slot < count ? slot : count - 1));
    }
};
BOTH constexpr int slots_size(int slots) { return (slots + 3) / 4 * 4; }

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

// What all kernels find at the start: where a head of a sample is.
struct Head {
    int64_t dim, row;  // row: in q_row and v_row
    // Of slot 0; q is with its row, where large_backward_q has been.
    const uint16_t *qkv, *grad_out, *q;
    int64_t q_stride;
    int64_t token;  // of all samples
    int64_t rows;   // in (B, heads, L)

    DEVICE Head(const WindowAttention& p, int64_t sample, int64_t head, const Window& window)
        : dim(dim_of(p)),
          row(sample * p.row_stride_batch + head * p.head_dim),
          qkv(p.qkv + sample * p.qkv_stride_batch + window.first * p.qkv_stride_token +
              head * p.head_dim),
          grad_out(p.grad_out + sample * p.grad_out_stride_batch +
                   window.first * p.grad_out_stride_token + head * p.head_dim),
          q(p.q ? p.q + (sample * tokens_of(p) + window.first) * dim + head * p.head_dim : qkv),
          q_stride(p.q ? dim : p.qkv_stride_token),
          token(sample * tokens_of(p) + window.first),
          rows((sample * p.heads + head) * tokens_of(p) + window.first) {}
};

// Starts to copy k and v of N slots of a window, from `first` on, to two tiles one after the other.
template <int D, int N>
DEVICE void copy_keys(Shared<uint16_t> to, const WindowAttention& p, const Head& head,
                      const Slots& slots, int first) {
    copy_tiles<D>(to, N, static_cast<int>(p.head_dim), [&](int row) {
        const uint16_t* k = head.qkv + head.dim + slots.nearest(first + row) * p.qkv_stride_token;
        return TwoRows{k, k + head.dim, first + row < slots.count};
    });
}

// The same of q and dO.
template <int D, int N>
DEVICE void copy_queries(Shared<uint16_t> to, const WindowAttention& p, const Head& head,
                         const Slots& slots, int first) {
    copy_tiles<D>(to, N, static_cast<int>(p.head_dim), [&](int row) {
        const int64_t offset = slots.nearest(first + row);
        return TwoRows{head.q + offset * head.q_stride,
                       head.grad_out + offset * p.grad_out_stride_token, first + row < slots.count};
    });
}

template <int D>
constexpr int large_forward_shared(int table_rows, int slots) {
    return tile_size<D>(block_rows + 4 * forward_keys<D>) * 2 +
           (table_size(table_rows) + slots_size(slots)) * 4;
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
    const auto q = (slots.offsets + slots_size(slots.count)).template as<uint16_t>(),
               keys = q + tile_size<D>(block_rows);  // k and v, twice
    load_table(table, p, work.head, window.table_rows());
    block_barrier();

    copy_tile<D>(q, block_rows, head_dim, head.qkv,
                 LargeRows<const uint16_t>{slots, head.qkv, p.qkv_stride_token, work.slot});
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    const auto copy = [&](int tile) {
        if (tile * N < slots.count) copy_keys<D, N>(place(tile), p, head, slots, tile * N);
        commit_copies();
    };
    copy(0);
    copy(1);
    wait_for_copies<1>();
    if (p.q_row) add_row<T, D>(q, block_rows, head_dim, p.q_row + head.row);
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
    if (p.v_row) add_to_rows<T, D>(o, p.v_row + head.row, head_dim);
    store_rows<T, D>(q + own * row_stride<D>, o, head_dim,
                     LargeRows<uint16_t>{slots, p.out + head.token * head.dim + work.head * head_dim,
                                         head.dim, work.slot + own});
    store_lse(LargeRows<float>{slots, p.lse + head.rows, 1, work.slot + own}, m, total);
}

}  // namespace diffit::cuda
