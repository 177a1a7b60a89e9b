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

// Where slots of a window are, from `first` on; null where there is no token.
template <class X>
struct LargeRows {
    const Window& window;
    X* base;
    int64_t stride;
    int first;
    DEVICE X* operator()(int row) const {
        const int slot = first + row;
        return slot < window.slots ? base + window.token(slot) * stride : nullptr;
    }
};

// What all kernels find at the start: where a head of a sample is.
struct Head {
    int64_t dim, row;  // row: of (B, C)
    const uint16_t *qkv, *grad_out;
    int64_t rows;  // first of (B, heads, L)

    DEVICE Head(const WindowAttention& p, int64_t sample, int64_t head)
        : dim(dim_of(p)),
          row(sample * dim + head * p.head_dim),
          qkv(p.qkv + sample * p.qkv_stride_batch + head * p.head_dim),
          grad_out(p.grad_out + sample * p.grad_out_stride_batch + head * p.head_dim),
          rows((sample * p.heads + head) * tokens_of(p)) {}
};

// Starts to copy k and v of N slots of a window, from `first` on, to two tiles one after the other.
template <int D, int N>
DEVICE void copy_keys(Shared<uint16_t> to, const WindowAttention& p, const Head& head,
                      const Window& window, int first) {
    for (int part = 0; part < 2; ++part)
        copy_tile<D>(to + tile_size<D>(part * N), N, static_cast<int>(p.head_dim), head.qkv,
                     LargeRows<const uint16_t>{window, head.qkv + (part + 1) * head.dim,
                                               p.qkv_stride_token, first});
}

// The same of q and dO.
template <int D, int N>
DEVICE void copy_queries(Shared<uint16_t> to, const WindowAttention& p, const Head& head,
                         const Window& window, int first) {
    const int head_dim = static_cast<int>(p.head_dim);
    copy_tile<D>(to, N, head_dim, head.qkv,
                 LargeRows<const uint16_t>{window, head.qkv, p.qkv_stride_token, first});
    copy_tile<D>(to + tile_size<D>(N), N, head_dim, head.qkv,
                 LargeRows<const uint16_t>{window, head.grad_out, p.grad_out_stride_token, first});
}

template <int D>
constexpr int large_forward_shared(int table_rows) {
    return tile_size<D>(block_rows + 4 * forward_keys<D>) * 2 + table_size(table_rows) * 4;
}

template <class T, int D>
__global__ void __launch_bounds__(threads, 1) large_forward(const WindowAttention p) {
    constexpr int N = forward_keys<D>;
    const LargeWork work(p);
    const Window& window = work.window;
    const Head head(p, work.sample, work.head);
    const int head_dim = static_cast<int>(p.head_dim), own = 16 * warp();
    const auto table = shared_memory<float>();
    const auto q = (table + table_size(window.table_rows())).template as<uint16_t>(),
               keys = q + tile_size<D>(block_rows);  // k and v, twice
    load_table(table, p, work.head, window.table_rows());

    copy_tile<D>(q, block_rows, head_dim, head.qkv,
                 LargeRows<const uint16_t>{window, head.qkv, p.qkv_stride_token, work.slot});
    const auto place = [&](int step) { return keys + tile_size<D>(step % 2 * 2 * N); };
    copy_keys<D, N>(place(0), p, head, window, 0);
    commit_copies();

    float o[D / 8][4], m[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    zero(o);
    const int tiles = tiles_of(window, N);
    for (int tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) copy_keys<D, N>(place(tile + 1), p, head, window, (tile + 1) * N);
        commit_copies();
        wait_for_copies<1>();
        if (tile == 0 && p.q_row) add_row<T, D>(q, block_rows, head_dim, p.q_row + head.row);
        block_barrier();
        const auto k = place(tile), v = k + tile_size<D>(N);
        float s[N / 8][4], decay[2];
        product<T, N, D>(s, q + own * row_stride<D>, k);
        add_bias<false>(s, static_cast<float>(p.scale), window, p.table, table, work.slot + own,
                        tile * N);
        softmax_step(s, m, total, decay);
        scale_rows(o, decay);
        accumulate<T, N, D>(o, s, v);
        block_barrier();  // the tile after the next takes the place of this one
    }

    const float inverse[2] = {1 / total[0], 1 / total[1]};
    scale_rows(o, inverse);
    if (p.v_row) add_to_rows<T, D>(o, p.v_row + head.row, head_dim);
    uint16_t* out = p.out + work.sample * tokens_of(p) * head.dim + work.head * head_dim;
    store_rows<T, D>(q + own * row_stride<D>, o, head_dim,
                     LargeRows<uint16_t>{window, out, head.dim, work.slot + own});
    store_lse(LargeRows<float>{window, p.lse + head.rows, 1, work.slot + own}, m, total);
}

}  // namespace diffit::cuda
