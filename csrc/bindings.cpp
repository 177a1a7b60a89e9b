// The Python module diffit_kernels._native. Tensors come as addresses and strides (in elements):
// no torch headers, so that no upgrade of torch breaks it. diffit_kernels.native checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// batch, height, width, window height, window width, heads, head width, dtype, threads
using Shape = std::array<int64_t, 9>;

diffit::WindowAttention problem(const Shape& shape, double scale) {
    diffit::WindowAttention p{};
    p.batch = shape[0];
    p.height = shape[1];
    p.width = shape[2];
    p.window_height = shape[3];
    p.window_width = shape[4];
    p.heads = shape[5];
    p.head_dim = shape[6];
    p.dtype = static_cast<diffit::DType>(shape[7]);
    p.scale = scale;
    return p;
}

void window_attention(const Shape& shape, double scale, Address qkv, int64_t qkv_stride_batch,
                      int64_t qkv_stride_token, Address table, Address q_row, Address v_row,
                      int64_t row_stride_batch, Address out, Address lse) {
    diffit::WindowAttention p = problem(shape, scale);
    p.qkv = pointer<void>(qkv);
    p.qkv_stride_batch = qkv_stride_batch;
    p.qkv_stride_token = qkv_stride_token;
    p.table = pointer<float>(table);
    p.q_row = pointer<void>(q_row);
    p.v_row = pointer<void>(v_row);
    p.row_stride_batch = row_stride_batch;
    p.out = pointer<void>(out);
    p.lse = pointer<float>(lse);
    diffit::window_attention(p, static_cast<int>(shape[8]));
}

void window_attention_backward(const Shape& shape, double scale, Address qkv,
                               int64_t qkv_stride_batch, int64_t qkv_stride_token, Address table,
                               Address q_row, int64_t row_stride_batch, Address grad_out,
                               int64_t grad_out_stride_batch, int64_t grad_out_stride_token,
                               Address grad_qkv, Address grad_table, Address grad_q_row,
                               Address grad_v_row) {
    diffit::WindowAttention p = problem(shape, scale);
    p.qkv = pointer<void>(qkv);
    p.qkv_stride_batch = qkv_stride_batch;
    p.qkv_stride_token = qkv_stride_token;
    p.table = pointer<float>(table);
    p.q_row = pointer<void>(q_row);
    p.row_stride_batch = row_stride_batch;
    p.grad_out = pointer<void>(grad_out);
    p.grad_out_stride_batch = grad_out_stride_batch;
    p.grad_out_stride_token = grad_out_stride_token;
    p.grad_qkv = pointer<void>(grad_qkv);
    p.grad_table = pointer<float>(grad_table);
    p.grad_q_row = pointer<float>(grad_q_row);
    p.grad_v_row = pointer<float>(grad_v_row);
    diffit::window_attention_backward(p, static_cast<int>(shape[8]));
}

// rows, features, dtype, threads
using Rows = std::array<int64_t, 4>;

diffit::BiasGelu problem(const Rows& shape, Address hidden, Address bias, Address activation) {
    diffit::BiasGelu g{};
    g.rows = shape[0];
    g.features = shape[1];
    g.dtype = static_cast<diffit::DType>(shape[2]);
    g.hidden = pointer<void>(hidden);
    g.bias = pointer<void>(bias);
    g.activation = pointer<void>(activation);
    return g;
}

void bias_gelu(const Rows& shape, Address hidden, Address bias, Address activation) {
    diffit::bias_gelu(problem(shape, hidden, bias, activation), static_cast<int>(shape[3]));
}

void bias_gelu_backward(const Rows& shape, Address hidden, Address bias, Address activation,
                        Address grad, Address grad_bias) {
    diffit::BiasGelu g = problem(shape, hidden, bias, activation);
    g.grad = pointer<void>(grad);
    g.grad_bias = pointer<float>(grad_bias);
    diffit::bias_gelu_backward(g, static_cast<int>(shape[3]));
}

// rows, in_features, out_features, dtype, whether the weight is transposed, threads
using LinearShape = std::array<int64_t, 6>;

void linear(const LinearShape& shape, Address x, Address weight, Address bias, Address y) {
    diffit::Linear p{};
    p.rows = shape[0];
    p.k = shape[1];
    p.n = shape[2];
    p.dtype = p.y_dtype = static_cast<diffit::DType>(shape[3]);
    p.x = pointer<void>(x);
    p.bias = pointer<void>(bias);
    p.y = pointer<void>(y);
    diffit::Weight w{};
    w.n = p.n;
    w.k = p.k;
    w.data = pointer<void>(weight);
    w.transposed = shape[4];
    diffit::linear(p, w, static_cast<int>(shape[5]));
}

// rows, in_features, out_features, dtype, dtype of the gradient, threads
using WeightShape = std::array<int64_t, 6>;

void weight_gradient(const WeightShape& shape, Address grad_y, Address x, Address grad_weight,
                     Address grad_bias) {
    diffit::WeightGradient g{};
    g.rows = shape[0];
    g.k = shape[1];
    g.n = shape[2];
    g.dtype = static_cast<diffit::DType>(shape[3]);
    g.grad_dtype = static_cast<diffit::DType>(shape[4]);
    g.grad_y = pointer<void>(grad_y);
    g.x = pointer<void>(x);
    g.grad_weight = pointer<void>(grad_weight);
    g.grad_bias = pointer<float>(grad_bias);
    diffit::weight_gradient(g, static_cast<int>(shape[5]));
}

// rows, in_features, hidden_features, out_features, dtype, dtype of y, threads
using MLPShape = std::array<int64_t, 7>;

void mlp(const MLPShape& shape, Address x, Address fc1_weight, Address fc1_bias,
         Address fc2_weight, Address fc2_bias, Address residual, Address hidden, Address y) {
    diffit::MLP p{};
    p.rows = shape[0];
    p.in_features = shape[1];
    p.hidden_features = shape[2];
    p.out_features = shape[3];
    p.dtype = static_cast<diffit::DType>(shape[4]);
    p.y_dtype = static_cast<diffit::DType>(shape[5]);
    p.x = pointer<void>(x);
    p.fc1_weight = pointer<void>(fc1_weight);
    p.fc1_bias = pointer<void>(fc1_bias);
    p.fc2_weight = pointer<void>(fc2_weight);
    p.fc2_bias = pointer<void>(fc2_bias);
    p.residual = pointer<void>(residual);
    p.hidden = pointer<void>(hidden);
    p.y = pointer<void>(y);
    diffit::mlp(p, static_cast<int>(shape[6]));
}

// Of the time token and of the hidden layer.
using Features = std::array<int64_t, 2>;

void block(const Shape& shape, double scale, const std::array<double, 2>& eps,
           const Features& features, Address q_row, Address v_row, int64_t row_stride_batch,
           Address x, Address temb, Address qkv_weight, Address qkv_bias, Address temb_weight,
           Address temb_bias, Address table, Address proj_weight, Address proj_bias,
           Address fc1_weight, Address fc1_bias, Address fc2_weight, Address fc2_bias, Address y) {
    diffit::DiffiTBlock b{};
    b.attention = problem(shape, scale);
    b.attention.table = pointer<float>(table);
    b.attention.q_row = pointer<void>(q_row);
    b.attention.v_row = pointer<void>(v_row);
    b.attention.row_stride_batch = row_stride_batch;
    b.eps1 = static_cast<float>(eps[0]);
    b.eps2 = static_cast<float>(eps[1]);
    b.temb_features = features[0];
    b.hidden_features = features[1];
    b.x = pointer<void>(x);
    b.qkv_weight = pointer<void>(qkv_weight);
    b.qkv_bias = pointer<void>(qkv_bias);
    b.temb = pointer<void>(temb);
    b.temb_weight = pointer<void>(temb_weight);
    b.temb_bias = pointer<void>(temb_bias);
    b.proj_weight = pointer<void>(proj_weight);
    b.proj_bias = pointer<void>(proj_bias);
    b.fc1_weight = pointer<void>(fc1_weight);
    b.fc1_bias = pointer<void>(fc1_bias);
    b.fc2_weight = pointer<void>(fc2_weight);
    b.fc2_bias = pointer<void>(fc2_bias);
    b.y = pointer<void>(y);
    diffit::block(b, static_cast<int>(shape[8]));
}

// rows, features, dtype of x, dtype of y, threads
using NormShape = std::array<int64_t, 5>;

diffit::AddLayerNorm problem(const NormShape& shape, double eps) {
    diffit::AddLayerNorm p{};
    p.rows = shape[0];
    p.features = shape[1];
    p.x_dtype = static_cast<diffit::DType>(shape[2]);
    p.y_dtype = static_cast<diffit::DType>(shape[3]);
    p.eps = static_cast<float>(eps);
    return p;
}

void add_layer_norm(const NormShape& shape, double eps, Address x, Address y, Address s,
                    Address n) {
    diffit::AddLayerNorm p = problem(shape, eps);
    p.x = pointer<void>(x);
    p.y = pointer<void>(y);
    p.s = pointer<void>(s);
    p.n = pointer<void>(n);
    diffit::add_layer_norm(p, static_cast<int>(shape[4]));
}

void add_layer_norm_backward(const NormShape& shape, double eps, Address grad_s, Address grad_n,
                             Address s, Address grad) {
    diffit::AddLayerNorm p = problem(shape, eps);
    p.grad_s = pointer<void>(grad_s);
    p.grad_n = pointer<void>(grad_n);
    p.s = pointer<void>(s);
    p.grad = pointer<void>(grad);
    diffit::add_layer_norm_backward(p, static_cast<int>(shape[4]));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of diffit_kernels; called through diffit_kernels.native.";
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("instruction_sets", diffit::instruction_sets);
    m.def("instruction_set", diffit::instruction_set);
    m.def("set_instruction_set", diffit::set_instruction_set);
    m.def("window_attention", window_attention, release);
    m.def("window_attention_backward", window_attention_backward, release);
    m.def("bias_gelu", bias_gelu, release);
    m.def("bias_gelu_backward", bias_gelu_backward, release);
    m.def("linear_product",
          [](int dtype) { return diffit::linear_product(static_cast<diffit::DType>(dtype)); });
    m.def("has_weight_gradient", [](int dtype) {
        return diffit::has_weight_gradient(static_cast<diffit::DType>(dtype));
    });
    m.def("linear", linear, release);
    m.def("weight_gradient", weight_gradient, release);
    m.def("mlp", mlp, release);
    m.def("block", block, release);
    m.def("add_layer_norm", add_layer_norm, release);
    m.def("add_layer_norm_backward", add_layer_norm_backward, release);
}
