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

// out (rows, heads) from part (heads, parts, rows).
inline __global__ void __launch_bounds__(threads, 1) sum_table(const float* part, int64_t parts,
                                                            int64_t rows, int64_t heads, float* out) {
    const int64_t i = int64_t{block_index()} * threads + thread_index();
    if (i >= rows * heads) return;
    const int64_t head = i / rows, r = i % rows;
    float total = 0;
    for (int64_t k = 0; k < parts; ++k) total += part[(head * parts + k) * rows + r];
    out[r * heads + head] = total;
}

}  // namespace diffit::cuda
