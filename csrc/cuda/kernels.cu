// Compiled once per head width and dtype, so that the work is shared by the cores of a build:
// DIFFIT_WIDTH is 16 .. 128, DIFFIT_TYPE BFloat16 or Float16, DIFFIT_KERNELS the name of the result.
#include "kernels.h"

#include "attention_large_backward.h"
#include "attention_small.h"

namespace diffit::cuda {

extern const Kernels DIFFIT_KERNELS;

const Kernels DIFFIT_KERNELS{
    {{"small_forward", small_forward<DIFFIT_TYPE, DIFFIT_WIDTH, 16>,
      small_forward_shared<DIFFIT_WIDTH>},
     {"small_forward", small_forward<DIFFIT_TYPE, DIFFIT_WIDTH, 64>,
      small_forward_shared<DIFFIT_WIDTH>}},
    {{"small_backward", small_backward<DIFFIT_TYPE, DIFFIT_WIDTH, 16>,
      small_backward_shared<DIFFIT_WIDTH, 16>},
     {"small_backward", small_backward<DIFFIT_TYPE, DIFFIT_WIDTH, 64>,
      small_backward_shared<DIFFIT_WIDTH, 64>}},
    {"large_forward", large_forward<DIFFIT_TYPE, DIFFIT_WIDTH>, large_forward_shared<DIFFIT_WIDTH>},
    {"large_backward_q", large_backward_q<DIFFIT_TYPE, DIFFIT_WIDTH>,
     large_backward_q_shared<DIFFIT_WIDTH>},
    {"large_backward_kv", large_backward_kv<DIFFIT_TYPE, DIFFIT_WIDTH>,
     large_backward_kv_shared<DIFFIT_WIDTH>},
    forward_groups<DIFFIT_WIDTH> * block_rows,
    forward_blocks,
};

}  // namespace diffit::cuda
