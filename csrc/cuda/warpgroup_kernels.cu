// Compiled once per dtype, for compute capability 9.0 alone: DIFFIT_TYPE is BFloat16 or Float16,
// DIFFIT_KERNELS the name of the result.
#include "attention_large_warpgroup.h"

namespace diffit::cuda {

template <int U, int W>
constexpr WarpgroupKernel forward_kernel{"large_forward_warpgroup", large_forward_warpgroup<DIFFIT_TYPE, U, W>,
                                large_forward_warpgroup_shared<U>};

extern const WarpgroupKernels DIFFIT_KERNELS;

const WarpgroupKernels DIFFIT_KERNELS{
    {{forward_kernel<8, 16>, forward_kernel<8, 32>}, {forward_kernel<9, 16>, forward_kernel<9, 32>}}};

}  // namespace diffit::cuda
