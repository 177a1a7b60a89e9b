// The kernels of one head width, rounded up to 16, and one dtype; compiled by kernels.cu.
#pragma once

#include <cstddef>

#include "problem.h"
#include "warpgroup.h"

namespace diffit::cuda {

struct Kernel {
    const char* name;
    void (*function)(const WindowAttention);
    int (*shared_bytes)(int window_height, int window_width);
};

struct Kernels {
    // For windows of at most 16 and 64 tokens.
    Kernel small_forward[2], small_backward[2];
    Kernel large_forward, large_backward_q, large_backward_kv;
    int large_forward_rows, large_forward_at_once;  // of a block; blocks of a multiprocessor
};

// The boxes in which a tile is copied: 64 columns, and those left.
struct TileMaps {
    TensorMap columns, left;
};

struct WarpgroupKernel {
    const char* name;
    void (*function)(const WindowAttention, const TileMaps);
    int (*shared_bytes)(int window_height, int window_width);
};

// Those of one dtype for warpgroups: of heads 64 and 72 wide, of windows 16 and 32 wide.
struct WarpgroupKernels {
    WarpgroupKernel large_forward[2][2];
};

}  // namespace diffit::cuda
