// The kernels of one head width, rounded up to 16, and one dtype; compiled by kernels.cu.
#pragma once

#include <cstddef>

#include "problem.h"

namespace diffit::cuda {

struct Kernel {
    const char* name;
    void (*function)(const WindowAttention);
    int (*shared_bytes)(int table_rows, int slots);
};

struct Kernels {
    // For windows of at most 16 and 64 tokens.
    Kernel small_forward[2], small_backward[2];
    Kernel large_forward, large_backward_q, large_backward_kv, large_backward_table;
};

}  // namespace diffit::cuda
