// What the CPU kernels are asked to do: plain data, shared by all instruction sets.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace diffit {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// What is to stay in the second-level cache: half of that of processors with AMX.
constexpr int64_t resident = 1 << 20;

// Windowed attention with a relative position bias; see diffit_kernels/reference.
struct WindowAttention {
    int64_t batch, height, width, window_height, window_width, heads, head_dim;
    DType dtype;
    double scale;

    const void* qkv;  // (B, L, 3C), last stride 1, other strides in elements
    int64_t qkv_stride_batch, qkv_stride_token;
    const float* table;  // ((2 wh - 1)(2 ww - 1), heads) or null
    const void* q_row;   // (B, C) or null, last stride 1
    const void* v_row;   // (B, C) or null, last stride 1
    int64_t row_stride_batch;

    void* out;   // (B, L, C)
    float* lse;  // (B, heads, L), in the forward pass may be null

    const void* grad_out;  // (B, L, C), last stride 1
    int64_t grad_out_stride_batch, grad_out_stride_token;
    void* grad_qkv;     // (B, L, 3C)
    float* grad_table;  // as table, or null
    float *grad_q_row, *grad_v_row;  // (B, C), or null

    // Filled in by attention.cpp and layers.cpp.
    const float* bias;       // expanded bias, see expand_bias
    int64_t bias_stride;     // from head to head
    double* grad_table_part;  // (chunks, heads, table rows), or null
    double* grad_rows_part;   // (chunks + batch, 2, C), zeros: of q_row and v_row, by chunk + sample
    int64_t chunk, group;    // windows and heads in one item of work

    int64_t tokens() const { return height * width; }
    int64_t dim() const { return heads * head_dim; }
    int64_t window_tokens() const { return window_height * window_width; }
    int64_t windows() const { return batch * (tokens() / window_tokens()); }
    int64_t chunks() const { return (windows() + chunk - 1) / chunk; }
    int64_t table_rows() const { return (2 * window_height - 1) * (2 * window_width - 1); }
    // Groups of heads vary fastest.
    int64_t items() const { return chunks() * (heads / group); }
};

// Rows and columns of a block of a linear layer, and a multiple of which its sizes must be.
constexpr int linear_block = 32;

// The weight of a linear layer, and how the kernel reads it.
struct Weight {
    int64_t n, k;
    const void* data;  // (n, k), or if transposed (k, n)
    bool transposed;
    void* packed;  // n k numbers, of Kernels::packed_size bytes each
    int64_t panels() const { return n / linear_block; }
};

// y = f(x w^T + bias) + residual in dtype, f the identity or tanh-GELU.
struct Linear {
    int64_t rows, n, k;  // rows at least, n and k a multiple of linear_block; see linear of dispatch.h
    DType dtype;
    const void* x;       // (rows, k), or if x_packed the y of a layer with GELU
    bool x_packed;
    float norm_eps;      // if not 0, the layer norm of x stands in its place
    const void* packed;  // the weight
    const void* bias;    // (n,) or null
    bool gelu;  // then y is packed for the next layer
    void* product;  // (rows, n), x w^T, or null
    DType y_dtype;  // dtype, or without GELU float32
    const void* residual;  // (rows, n) in y_dtype, or null
    void* y;               // (rows, n) in y_dtype

    int64_t row_blocks, column_blocks;  // into which it is cut
};

// grad_weight = grad_y^T x, and the sum of grad_y's rows.
struct WeightGradient {
    int64_t rows, n, k;  // multiples of linear_block
    DType dtype, grad_dtype;
    const void *grad_y, *x;  // (rows, n), (rows, k)
    void* grad_weight;       // (n, k), in grad_dtype, that of the others or float32
    float* grad_bias;        // (n,) or null

    int64_t row_parts, n_parts, k_parts;  // into which it is cut
    int64_t chunk;                        // rows of a part that are packed at once
    DType sum_dtype;
    void* sums;         // (row_parts, n, k) in sum_dtype
    double* bias_sums;  // (row_parts, n)
};

// y = gelu(x w1^T + b1) w2^T + b2 + residual, all but residual and y in dtype; norm_eps as of Linear.
struct MLP {
    int64_t rows, in_features, hidden_features, out_features;  // as the sizes of Linear
    DType dtype, y_dtype;
    float norm_eps;
    const void *x, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *residual;
    void* hidden;  // (rows, hidden_features), x w1^T, or null
    void* y;
};

// y = x w^T + biases where rows are few; rows and k of any size.
struct SkinnyLinear {
    int64_t rows, n, k;
    DType dtype;
    const void *x, *weight;  // (rows, k), (n, k)
    const void* biases[2];   // (n,) or null
    void* y;                 // (rows, n)

    int64_t chunk;  // columns in one item of work, a divisor of n
};

// s = x + attention(norm(x) qkv_weight^T) proj_weight^T + proj_bias, y = s + mlp(norm(s)). The rows of
// attention are given, or those of temb temb_weight^T + temb_bias + qkv_bias.
struct DiffiTBlock {
    WindowAttention attention;
    float eps1, eps2;  // of the norms
    int64_t temb_features, hidden_features;
    const void *x, *qkv_weight;  // (B L, C), (3C, C)
    const void *temb, *temb_weight, *temb_bias, *qkv_bias;  // (B, T), (3C, T), (3C,), or null
    const void *proj_weight, *proj_bias;                    // (C, C), (C,) or null
    const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
    void* y;  // (B L, C)
};

// gelu(hidden + bias) over (rows, features), and its gradient.
struct BiasGelu {
    int64_t rows, features;
    DType dtype;
    const void* hidden;  // (rows, features)
    const void* bias;    // (features,)
    void* activation;    // (rows, features); in the forward pass may be hidden itself
    void* grad;          // (rows, features): in, gradient of activation; out, of hidden
    float* grad_bias;     // (features,)

    float* grad_bias_part;  // (chunks, features)
    int64_t chunk;          // rows in one item of work
    int64_t chunks() const { return (rows + chunk - 1) / chunk; }
};

// s = x + y and n, its layer norm without parameters, over (rows, features); and the gradient. x and
// s have dtype x_dtype, y and n dtype y_dtype: the same, or the former is float32. Without y, s and
// grad_s (null) the layer norm of x alone.
struct AddLayerNorm {
    int64_t rows, features;
    DType x_dtype, y_dtype;
    float eps;
    const void *x, *y;
    void *s, *n;
    const void *grad_s, *grad_n;
    void* grad;  // of x, and of y

    int64_t chunk;  // rows in one item of work
    int64_t chunks() const { return (rows + chunk - 1) / chunk; }
};

// Rows that are normalised at once, and lie in scratch as floats.
constexpr int64_t norm_rows = 4;

// The layer for some rows alone, where a packed number has so many bytes.
static inline Linear rows_of(const Linear& p, int64_t first, int64_t rows, int64_t packed_size) {
    const int64_t size = size_of(p.dtype), y_size = size_of(p.y_dtype);
    const auto moved = [first](auto* start, int64_t bytes) {
        return start ? reinterpret_cast<decltype(start)>(uintptr_t(start) + first * bytes) : nullptr;
    };
    Linear part = p;
    part.rows = rows;
    part.x = moved(p.x, p.k * (p.x_packed ? packed_size : size));
    part.product = moved(p.product, p.n * size);
    part.residual = moved(p.residual, p.n * y_size);
    part.y = moved(p.y, p.n * (p.gelu ? packed_size : y_size));
    return part;
}

// The kernels of one instruction set and dtype. A thread calls enter, any number of kernels, leave.
struct Kernels {
    void (*enter)();
    void (*leave)();
    size_t (*forward_scratch)(const WindowAttention&);  // bytes, zero at first
    size_t (*backward_scratch)(const WindowAttention&);
    void (*forward)(const WindowAttention&, int64_t item, char* scratch);
    void (*backward)(const WindowAttention&, int64_t item, char* scratch);
    void (*bias_gelu)(const BiasGelu&, int64_t item);
    void (*bias_gelu_backward)(const BiasGelu&, int64_t item);
    // For x of the dtype of y, and of float32.
    void (*add_layer_norm[2])(const AddLayerNorm&, int64_t item, char* scratch);
    void (*add_layer_norm_backward[2])(const AddLayerNorm&, int64_t item, char* scratch);
    // Of linear layers: what multiplies, empty and all null where PyTorch's products are as fast, and the
    // bytes of a packed number. Those of weights' gradients may be null by themselves.
    const char* product = "";
    int64_t packed_size = 0;
    void (*pack)(const Weight&, int64_t panel) = nullptr;
    size_t (*linear_scratch)(const Linear&, int64_t rows) = nullptr;
    void (*linear)(const Linear&, int64_t item, char* scratch) = nullptr;
    void (*mlp)(const Linear& fc1, const Linear& fc2, int64_t item, char* scratch) = nullptr;
    size_t (*weight_gradient_scratch)(const WeightGradient&) = nullptr;
    void (*weight_gradient)(const WeightGradient&, int64_t item, char* scratch) = nullptr;
    void (*sum_parts)(const WeightGradient&, int64_t row) = nullptr;
    size_t (*skinny_scratch)(const SkinnyLinear&) = nullptr;
    void (*skinny_linear)(const SkinnyLinear&, int64_t item, char* scratch) = nullptr;
};

struct InstructionSet {
    const char* name;
    Kernels kernels[3];  // by DType
};

// Lanes that a kernel may touch past the end of the expanded bias, and of its gradient in scratch.
constexpr int64_t bias_slack = 64;

}  // namespace diffit
