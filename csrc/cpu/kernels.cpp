// The kernels of one instruction set, DIFFIT_ISA. This file is compiled once for each; nothing in
// it but the table may have external linkage, or the linker could mix them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "linear.h"
#include "skinny_linear.h"
#include "weight_gradient.h"
#include "window_attention.h"
#include "window_attention_backward.h"

namespace diffit {
namespace {

#if defined(__AVX512BF16__)
using EngineOfBfloat16 = Bfloat16Engine;
#else
using EngineOfBfloat16 = FloatEngine;
#endif

template <class E, class T>
using Wide = Backward<E, T, E::queries>;
template <class E, class T>
using Narrow = Backward<E, T, Product<E>::block>;

template <class E>
bool is_narrow(const WindowAttention& p) {
    return p.window_tokens() <= Product<E>::block;
}
template <class E, class T>
size_t backward_scratch(const WindowAttention& p) {
    return is_narrow<E>(p) ? Narrow<E, T>::scratch(p) : Wide<E, T>::scratch(p);
}
template <class E, class T>
void backward(const WindowAttention& p, int64_t item, char* scratch) {
    is_narrow<E>(p) ? Narrow<E, T>::run(p, item, scratch) : Wide<E, T>::run(p, item, scratch);
}

template <class E, class T>
constexpr Kernels kernels_of() {
    return {E::enter,
            E::leave,
            Forward<E, T>::scratch,
            backward_scratch<E, T>,
            Forward<E, T>::run,
            backward<E, T>,
            BiasGeluKernel<T>::forward,
            BiasGeluKernel<T>::backward,
            {AddLayerNormKernel<T, T>::forward, AddLayerNormKernel<float, T>::forward},
            {AddLayerNormKernel<T, T>::backward, AddLayerNormKernel<float, T>::backward}};
}

// P: see linear.h.
template <class P>
constexpr Kernels with_linear(Kernels kernels) {
    kernels.product = P::name;
    kernels.packed_size = P::packed_size;
    kernels.pack = LinearKernel<P>::pack;
    kernels.linear_scratch = LinearKernel<P>::scratch;
    kernels.linear = LinearKernel<P>::run;
    kernels.mlp = LinearKernel<P>::mlp;
    kernels.skinny_scratch = SkinnyLinearKernel<typename P::T>::scratch;
    kernels.skinny_linear = SkinnyLinearKernel<typename P::T>::run;
    return kernels;
}

#if defined(__AMX_BF16__)

template <class E, class T>
constexpr Kernels all_kernels() {
    Kernels kernels = kernels_of<E, T>();
    if constexpr (!std::is_same<T, fp16>::value) {
        kernels = with_linear<TileProduct<T>>(kernels);
        kernels.enter = Bfloat16Engine::enter;
        kernels.leave = Bfloat16Engine::leave;
        kernels.weight_gradient_scratch = WeightGradientKernel<T>::scratch;
        kernels.weight_gradient = WeightGradientKernel<T>::run;
        kernels.sum_parts = WeightGradientKernel<T>::sum_parts;
    }
    return kernels;
}

#else

template <class E, class T>
constexpr Kernels all_kernels() {
    constexpr bool vectors = W >= 8 && std::is_same<E, FloatEngine>::value;
    if constexpr (vectors) return with_linear<VectorProduct<T>>(kernels_of<E, T>());
    return kernels_of<E, T>();
}

#endif

}  // namespace

#define DIFFIT_STRING_(x) #x
#define DIFFIT_STRING(x) DIFFIT_STRING_(x)

namespace DIFFIT_ISA {
extern const InstructionSet instruction_set;
const InstructionSet instruction_set = {
    DIFFIT_STRING(DIFFIT_ISA),
    {all_kernels<FloatEngine, float>(), all_kernels<EngineOfBfloat16, bf16>(),
     all_kernels<FloatEngine, fp16>()}};
}  // namespace DIFFIT_ISA

}  // namespace diffit
