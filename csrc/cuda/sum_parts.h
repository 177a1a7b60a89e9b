// Sums of what blocks wrote, part by part: the same bits on every run.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

// The parts of a problem, and the blocks that sum them: those of the table come first, then those of
// q_row, then those of v_row.
struct Parts {
    int rows;                                    // of q_row and v_row, for each sample
    int table_splits, table_keys, table_length;  // see sum_table
    int table_blocks, row_blocks;                // of the table, if it is asked for, and of one row
};

// A warp sums 32 numbers that lie side by side.
constexpr int sum_warps = 16, sum_threads = 32 * sum_warps;

// Warps of a block that sum different columns of a row; where these are few, several share the parts.
BOTH constexpr int row_warps(int parts) { return parts < sum_warps ? sum_warps / parts : 1; }
BOTH int row_blocks(int dim, int parts) {  // for each sample
    const int columns = 32 * row_warps(parts);
    return (dim + columns - 1) / columns;
}
BOTH int table_blocks(int rows) { return (rows + 31) / 32; }  // for each head

// The sum over every `across`-th warp, for the first of them.
DEVICE float sum_of_warps(float total, int across) {
    const auto totals = shared_memory<float>();
    store(totals + thread_index(), total);
    block_barrier();
    if (warp() < across)
        for (int other = thread_index() + 32 * across; other < sum_threads; other += 32 * across)
            total += load(totals + other);
    return total;
}

// out (B, C) from part (B, parts, C), C innermost.
template <class T>
DEVICE void sum_rows(const float* part, int parts, int dim, int block, uint16_t* out) {
    const int across = row_warps(parts), down = sum_warps / across, blocks = row_blocks(dim, parts);
    const int sample = block / blocks;
    const int column = (block % blocks * across + warp() % across) * 32 + lane();
    float total = 0;
    if (column < dim && warp() < across * down) {
        const float* from = part + int64_t{sample} * parts * dim + column;
#pragma unroll 4
        for (int k = warp() / across; k < parts; k += down) total += from[int64_t{k} * dim];
    }
    total = sum_of_warps(total, across);
    if (warp() < across && column < dim)
        out[int64_t{sample} * dim + column] = static_cast<uint16_t>(T::pack(total, 0));
}

// The gradient of the table from parts (heads, splits, groups, length). A part is of one group of
// `keys` keys of a window, and begins with the row of the table in which the last of them meets the
// first query.
DEVICE void sum_table(const WindowAttention& p, int splits, int keys, int length, int block) {
    const Window window(p, 0);
    const int rows = window.table_rows(), blocks = table_blocks(rows), heads = static_cast<int>(p.heads);
    const int head = block / blocks, row = block % blocks * 32 + lane();
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
    total = sum_of_warps(total, 1);
    if (!warp() && row < rows) p.grad_table[row * heads + head] = total;
}

// All of them in one launch: each would take little longer than to start it.
template <class T>
__global__ void __launch_bounds__(sum_threads, 1)
    sum_parts(const WindowAttention p, const Parts parts) {
    int block = block_index();
    if (block < parts.table_blocks) {
        sum_table(p, parts.table_splits, parts.table_keys, parts.table_length, block);
        return;
    }
    block -= parts.table_blocks;
    const bool of_q = p.grad_q_row && block < parts.row_blocks;
    sum_rows<T>(of_q ? p.q_part : p.v_part, parts.rows, dim_of(p), block % parts.row_blocks,
                of_q ? p.grad_q_row : p.grad_v_row);
}

}  // namespace diffit::cuda
