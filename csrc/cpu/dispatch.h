// Runs a problem on this processor: instruction set, memory, threads.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace diffit {

// Names of the instruction sets that this build has and this processor runs, slowest first.
std::vector<std::string> instruction_sets();
// The one in use: the last of them, unless set.
std::string instruction_set();
void set_instruction_set(const std::string& name);

void window_attention(WindowAttention problem, int threads);
void window_attention_backward(WindowAttention problem, int threads);
void bias_gelu(BiasGelu problem, int threads);
void bias_gelu_backward(BiasGelu problem, int threads);
// What multiplies in the kernels of linear layers for this dtype, tiles or vectors; empty without them.
std::string linear_product(DType dtype);
bool has_weight_gradient(DType dtype);
// Fewer rows than a block too, if the weight is not transposed.
void linear(Linear problem, Weight weight, int threads);
void weight_gradient(WeightGradient problem, int threads);
void mlp(const MLP& problem, int threads);
void block(const DiffiTBlock& problem, int threads);
void add_layer_norm(AddLayerNorm problem, int threads);
void add_layer_norm_backward(AddLayerNorm problem, int threads);

}  // namespace diffit
