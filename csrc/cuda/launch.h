// Starts a kernel on a stream. Compiled by a C++ compiler, on the emulator.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

namespace diffit::cuda {

// Of the current device.
inline int multiprocessors() {
#if defined(__CUDACC__)
    int device = 0, count = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    return count;
#else
    return 2;
#endif
}

// Whether the current device runs what is compiled for sm_90a.
inline bool has_warpgroups() {
#if defined(__CUDACC__)
    int device = 0, major = 0, minor = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
           major == 9 && minor == 0;
#else
    return true;
#endif
}

// Throws std::runtime_error where the driver or the current device cannot run the kernel.
template <class... Arguments>
void require(void (*kernel)(Arguments...)) {
#if defined(__CUDACC__)
    cudaFuncAttributes attributes;
    const cudaError_t error =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) {
        cudaGetLastError();  // is not to be found by a later call
        throw std::runtime_error(cudaGetErrorString(error));
    }
#else
    (void)kernel;
#endif
}

// Throws std::runtime_error with the configuration of the launch. Asks for no memory and waits for
// nothing, so a CUDA graph can capture it.
template <class... Arguments>
void launch(const char* name, void (*kernel)(Arguments...), int64_t blocks, int block_threads,
            size_t shared_bytes, void* stream, Arguments... arguments) {
    const auto configuration = [&] {
        return std::string(name) + " with " + std::to_string(blocks) + " blocks of " +
               std::to_string(block_threads) + " threads and " + std::to_string(shared_bytes) +
               " bytes of shared memory";
    };
    if (blocks > 0x7fffffff) throw std::runtime_error(configuration() + ": too many blocks");
#if defined(__CUDACC__)
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024)  // more than that is given on request only
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    if (error == cudaSuccess) {
        void* pointers[] = {&arguments...};
        error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                                 dim3(static_cast<unsigned>(blocks)), dim3(block_threads), pointers,
                                 shared_bytes, static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // is not to be found by a later call
        throw std::runtime_error(configuration() + ": " + cudaGetErrorString(error));
    }
#else
    (void)stream;
    try {
        emulator::run(blocks, block_threads, shared_bytes, [&] { kernel(arguments...); });
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(configuration() + ": " + error.what());
    }
#endif
}

}  // namespace diffit::cuda
