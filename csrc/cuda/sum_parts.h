// Sums of what blocks wrote, part by part: the same bits on every run.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

// out (B, C) from part (B, parts, C), C innermost.
template <class T>
__global__ void __launch_bounds__(threads, 1) sum_rows(const float* part, int64_t parts, int64_t dim,
                                                    int64_t size, uint16_t* out) {
    const int64_t i = int64_t{block_index()} * threads + thread_index();
    if (i >= size) return;
    float total = 0;
    for (int64_t k = 0; k < parts; ++k) total += part[(i / dim * parts + k) * dim + i % dim];
    out[i] = static_cast<uint16_t>(T::pack(total, 0));
}

// The gradient of the table from parts (heads, splits, groups, length). A part is of one group of
// `keys` keys of a window, and begins with the row of the table in which the last of them meets the
// first query.
constexpr int sum_warps = 16, sum_threads = 32 * sum_warps;
inline __global__ void __launch_bounds__(sum_threads, 1)
    sum_table(const WindowAttention p, int splits, int keys, int length) {
    const Window window(p, 0);
    const int rows = window.table_rows(), blocks = (rows + 31) / 32, heads = static_cast<int>(p.heads);
    const int head = block_index() / blocks, row = block_index() % blocks * 32 + lane();
    const int groups = (window.slots + keys - 1) / keys;
    // Warps take the groups in turn; where there are fewer, several share the splits of one.
    const int across = groups < sum_warps ? groups : sum_warps, down = sum_warps / across;
    float total = 0;
    for (int group = warp() % across; group < groups && warp() < across * down; group += across) {
        const int end = (group + 1) * keys, last = (end < window.slots ? end : window.slots) - 1;
        const int i = row - (window.center() - window.position(last));
        if (row >= rows || i < 0 || i >= length) continue;
        const float* part = p.table_part + (int64_t{head} * splits * groups + group) * length + i;
#pragma unroll 4
        for (int split = warp() / across; split < splits; split += down)
            total += part[int64_t{split} * groups * length];
    }
    const auto totals = shared_memory<float>();
    store(totals + thread_index(), total);
    block_barrier();
    if (warp() || row >= rows) return;
    for (int other = 1; other < sum_warps; ++other) total += load(totals + (32 * other + lane()));
    p.grad_table[row * heads + head] = total;
}

}  // namespace diffit::cuda
