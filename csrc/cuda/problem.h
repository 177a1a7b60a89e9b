// What the CUDA kernels are asked to do: plain data, passed from diffit_kernels.cuda (which names
// the same fields in the same order) to the launchers, and by value to the kernels.
#pragma once

#include <cstdint>

namespace diffit::cuda {

// Windowed attention with a relative position bias; see diffit_kernels/reference. Strides are in
// elements and, like all rows of bfloat16 or float16, multiples of 16 bytes. Tokens, channels and
// strides from token to token are below 2^30.
struct WindowAttention {
    int64_t batch, grid_height, grid_width, window_height, window_width, heads, head_dim;
    int64_t dtype;  // 1: bfloat16, 2: float16
    int64_t blocks;  // enough to keep a device busy, where work may be cut at will
    double scale;

    const uint16_t* qkv;  // (B, L, 3C), last stride 1
    int64_t qkv_stride_batch, qkv_stride_token;
    const float* table;  // ((2 wh - 1)(2 ww - 1), heads), any strides, or null
    int64_t table_stride_row, table_stride_head;
    const uint16_t* q_row;  // (B, C) or null, last stride 1
    const uint16_t* v_row;  // (B, C) or null, last stride 1
    int64_t row_stride_batch;

    uint16_t* out;  // (B, L, C)
    float* lse;     // (B, heads, L)

    const uint16_t* grad_out;  // (B, L, C), last stride 1
    int64_t grad_out_stride_batch, grad_out_stride_token;
    uint16_t* grad_qkv;    // (B, L, 3C)
    float* grad_table;     // ((2 wh - 1)(2 ww - 1), heads) or null
    uint16_t* grad_q_row;  // (B, C) or null
    uint16_t* grad_v_row;  // (B, C) or null
    float* workspace;      // workspace_size() numbers

    // Filled in by the launchers.
    int64_t windows, windows_across;  // of a sample, and side by side
    int64_t splits, steps;       // small: parts of a sample, and what each does one after another;
                                 // large: of the windows of all samples, each takes every splits-th
    float *weight, *delta;       // (B, heads, L): 1 / sum of a row, and rowsum(P dP)
    uint16_t* q;                 // (B, L, C): q + q_row, null without q_row
    float* table_part;           // (heads, splits, groups of keys, length) or null, see sum_parts.h
    float *q_part, *v_part;      // (B, parts, C) or null
};

}  // namespace diffit::cuda
