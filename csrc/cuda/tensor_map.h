// Tensors as copies of tiles see them. Compiled by a C++ compiler, for the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "problem.h"
#include "warpgroup.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace diffit::cuda {

// Rows of `columns` numbers, of a grid of samples, copied in boxes of `box_columns`, `width` and
// `height`; swizzled, where a row has 128 bytes. Throws std::runtime_error.
inline TensorMap tensor_map(const uint16_t* data, const WindowAttention& p, int box_columns, int width,
                            int height) {
    const int64_t token = 2 * p.qkv_stride_token;  // bytes
#if defined(__CUDACC__)
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function,
                                                          cudaEnableDefault, &found);
#endif
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    TensorMap map;
    const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
    const cuuint64_t sizes[4] = {size(3 * p.heads * p.head_dim), size(p.grid_width),
                                 size(p.grid_height), size(p.batch)};
    const cuuint64_t strides[3] = {size(token), size(token * p.grid_width),
                                   size(2 * p.qkv_stride_batch)};
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(width),
                               static_cast<cuuint32_t>(height), 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const CUresult error = encode(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<uint16_t*>(data), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(error));
    return map;
#else
    return {data, {token / 2, token / 2 * p.grid_width, p.qkv_stride_batch}, {box_columns, width, height}};
#endif
}

}  // namespace diffit::cuda
