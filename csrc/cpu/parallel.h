// What operators share: the kernels in use, memory, threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "problem.h"

namespace diffit {

// Of the instruction set in use.
const Kernels& kernels(DType dtype);

// Fills in the bias as the kernels read it (see Layout), in base 2, for rows of logits that are those of
// queries or of keys; one row of zeros without a table. The memory is kept by the calling thread.
void expand_bias(WindowAttention& p, bool of_queries, int threads);

// Grows; where it is thread_local, it is kept from call to call.
class Scratch {
public:
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            data_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
            size_ = data_ ? bytes : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }

    // Frees it if it is larger.
    void keep(size_t most) {
        if (size_ <= most) return;
        data_.reset();
        size_ = 0;
    }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> data_;
    size_t size_ = 0;
};

// Calls each(item, scratch) for every item, in any order, on up to `threads` threads. The first `zeros`
// bytes of a thread's scratch memory are zero at its first item.
template <class Each>
void for_each_item(const Kernels& kernels, int64_t items, size_t scratch_bytes, size_t zeros,
                   int threads, const Each& each) {
    threads = static_cast<int>(std::min<int64_t>(threads, items));
    bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        char* memory = nullptr;
        try {
            memory = scratch.reserve(scratch_bytes);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
        if (memory) std::memset(memory, 0, zeros);
        kernels.enter();
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item)
            if (memory || scratch_bytes == 0) each(item, memory);
        kernels.leave();
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace diffit
