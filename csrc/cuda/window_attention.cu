// Chooses and launches the kernels of a problem, and the C interface that diffit_kernels.cuda calls.
// A function returns null or what went wrong, until the next call on the same thread.
#include <algorithm>
#include <limits>
#include <string>

#include "attention_large_warpgroup.h"
#include "diagonals.h"
#include "kernels.h"
#include "launch.h"
#include "sum_parts.h"
#include "tensor_map.h"

namespace diffit::cuda {

// Head widths that kernels.cu is compiled for; a test that needs but one may say so.
#ifndef DIFFIT_FOR_EACH_WIDTH
#define DIFFIT_FOR_EACH_WIDTH(X) X(16) X(32) X(48) X(64) X(80) X(96) X(112) X(128)
#endif

#define DIFFIT_DECLARE(WIDTH) extern const Kernels bfloat16_##WIDTH, float16_##WIDTH;
DIFFIT_FOR_EACH_WIDTH(DIFFIT_DECLARE)
#ifdef DIFFIT_WARPGROUPS
extern const WarpgroupKernels bfloat16_warpgroup, float16_warpgroup;
#endif

namespace {

// The forward kernel of attention_large_warpgroup.h, or null where it cannot run.
const WarpgroupKernel* warpgroup_kernel_of(const WindowAttention& p) {
#ifdef DIFFIT_WARPGROUPS
    // Windows of whole blocks, tensors that can be mapped, a scale to divide by.
    const int64_t row = p.grid_width * p.qkv_stride_token;
    const bool fits = (p.head_dim == 64 || p.head_dim == 72) &&
                      (p.window_width == 16 || p.window_width == 32) &&
                      p.window_height * p.window_width % warpgroup_queries == 0 &&
                      p.qkv_stride_token >= 3 * dim_of(p) && p.qkv_stride_batch >= row &&
                      p.qkv_stride_batch % row == 0 && row < int64_t{1} << 38 &&
                      p.qkv_stride_batch < int64_t{1} << 38 && p.scale >= 0x1p-10 && p.scale <= 0x1p10;
    const auto& kernels = p.dtype == 1 ? bfloat16_warpgroup : float16_warpgroup;
    if (fits && has_warpgroups())
        return &kernels.large_forward[p.head_dim == 72][p.window_width == 32];
#else
    (void)p;
#endif
    return nullptr;
}

const Kernels& kernels_of(const WindowAttention& p) {
#define DIFFIT_ENTRY(WIDTH) {&bfloat16_##WIDTH, &float16_##WIDTH},
    static const Kernels* const table[][2] = {DIFFIT_FOR_EACH_WIDTH(DIFFIT_ENTRY)};
    return *table[(p.head_dim + 15) / 16 - 1][p.dtype - 1];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The problem and how it is cut: by its shape alone, so that sums are the same on every device. (The
// forward pass sums nothing over blocks.)
struct Plan {
    WindowAttention p;
    int64_t window_tokens, tokens;
    Parts parts;
    bool small;

    explicit Plan(const WindowAttention& problem) : p(problem) {
        const int height = static_cast<int>(p.window_height), width = static_cast<int>(p.window_width);
        window_tokens = p.window_height * p.window_width;
        tokens = p.grid_height * p.grid_width;
        p.windows = tokens / window_tokens;
        p.windows_across = p.grid_width / p.window_width;
        small = window_tokens <= block_rows;
        if (small) {
            const int64_t groups = ceil_div(p.windows, window_tokens <= 16 ? block_rows / 16 : 1);
            p.steps = ceil_div(groups, ceil_div(p.blocks, p.batch * p.heads));
            p.splits = ceil_div(groups, p.steps);
            parts.rows = static_cast<int>(p.splits);
            parts.table_splits = static_cast<int>(p.batch * p.splits);
            parts.table_keys = static_cast<int>(window_tokens);
            parts.table_length = table_rows(height, width);
        } else {
            cut();
            parts.rows = static_cast<int>(p.windows * ceil_div(window_tokens, block_rows));
            parts.table_splits = static_cast<int>(p.splits);
            parts.table_keys = 16;
            parts.table_length = table_part_size(height, width);
        }
    }

    // Blocks of a large backward kernel, about p.blocks, and the splits for them.
    int64_t cut() {
        const int64_t blocks = ceil_div(window_tokens, block_rows) * p.heads;
        p.splits = std::clamp<int64_t>(p.blocks / blocks, 1, p.batch * p.windows);
        return blocks * p.splits;
    }

    // The same of the forward kernel, where `at_once` blocks run at once: the cut that is done first,
    // if to begin costs a block half of a window.
    int64_t cut_forward(int rows, int64_t at_once) {
        const int64_t blocks = ceil_div(window_tokens, rows) * p.heads, windows = p.batch * p.windows;
        int64_t least = std::numeric_limits<int64_t>::max();
        for (int64_t in_turn = 1; in_turn <= std::min<int64_t>(windows, most_in_turn); ++in_turn) {
            const int64_t splits = ceil_div(windows, in_turn);
            const int64_t time = ceil_div(blocks * splits, at_once) * (2 * in_turn + 1);
            if (time < least) least = time, p.splits = splits;
        }
        return blocks * p.splits;
    }

    // Gives each part of the workspace its place; returns the numbers in all of them.
    int64_t divide_workspace() {
        int64_t used = 0;
        const auto take = [&](auto*& part, bool wanted, int64_t size) {
            part = wanted ? reinterpret_cast<decltype(part + 0)>(p.workspace + used) : nullptr;
            used += wanted ? size : 0;
        };
        take(p.q, !small && p.q_row, (p.batch * tokens * dim_of(p) + 1) / 2);  // first: it is aligned
        take(p.weight, !small, p.batch * p.heads * tokens);
        take(p.delta, !small, p.batch * p.heads * tokens);
        take(p.table_part, p.grad_table,
             p.heads * parts.table_splits * ceil_div(window_tokens, parts.table_keys) *
                 parts.table_length);
        take(p.q_part, p.grad_q_row, p.batch * parts.rows * dim_of(p));
        take(p.v_part, p.grad_v_row, p.batch * parts.rows * dim_of(p));
        return used;
    }

    int shared_bytes(const Kernel& kernel) const {
        return kernel.shared_bytes(static_cast<int>(p.window_height), static_cast<int>(p.window_width));
    }

    void run(const Kernel& kernel, int64_t blocks, void* stream) const {
        launch(kernel.name, kernel.function, blocks, threads, shared_bytes(kernel), stream, p);
    }

    // What the blocks of the backward pass wrote.
    void sum(void* stream) {
        const int rows = table_rows(static_cast<int>(p.window_height),
                                    static_cast<int>(p.window_width));
        const int64_t of_table = p.grad_table ? p.heads * table_blocks(rows) : 0;
        const int64_t of_row = p.batch * row_blocks(dim_of(p), parts.rows);
        const int64_t blocks = of_table + of_row * (!!p.grad_q_row + !!p.grad_v_row);
        if (!blocks) return;
        parts.table_blocks = static_cast<int>(of_table);
        parts.row_blocks = static_cast<int>(of_row);
        launch("sum_parts", p.dtype == 1 ? sum_parts<BFloat16> : sum_parts<Float16>, blocks,
               sum_threads, sum_threads * sizeof(float), stream, p, parts);
    }
};

// Of the kernel that needs most, forward and backward.
int shared_bytes(const WindowAttention& problem) {
    const Plan plan(problem);
    const Kernels& kernels = kernels_of(problem);
    const int index = plan.window_tokens > 16;
    const auto bytes = [&](auto&... of) { return std::max({plan.shared_bytes(of)...}); };
    if (plan.small) return bytes(kernels.small_forward[index], kernels.small_backward[index]);
    return bytes(kernels.large_forward, kernels.large_backward_q, kernels.large_backward_kv);
}

void forward(const WindowAttention& problem, void* stream) {
    Plan plan(problem);
    const WindowAttention& p = plan.p;
    const Kernels& kernels = kernels_of(p);
    if (plan.small) {
        plan.run(kernels.small_forward[plan.window_tokens > 16], p.heads * p.batch * p.splits, stream);
        return;
    }
    if (const WarpgroupKernel* kernel = warpgroup_kernel_of(p)) {
        const int64_t blocks = plan.cut_forward(warpgroup_queries, forward_blocks * multiprocessors());
        const int width = static_cast<int>(p.window_width), height = static_cast<int>(p.window_height);
        const auto map = [&](int columns) {
            return tensor_map(p.qkv, p, columns, width, block_rows / width);
        };
        launch<WindowAttention, TileMaps>(kernel->name, kernel->function, blocks, threads,
                                          kernel->shared_bytes(height, width), stream, p,
                                          {map(64), map(8)});
        return;
    }
    const int64_t at_once = kernels.large_forward_at_once * multiprocessors();
    plan.run(kernels.large_forward, plan.cut_forward(kernels.large_forward_rows, at_once), stream);
}

void backward(const WindowAttention& problem, void* stream) {
    Plan plan(problem);
    plan.divide_workspace();
    const WindowAttention& p = plan.p;
    const Kernels& kernels = kernels_of(p);
    if (plan.small) {
        plan.run(kernels.small_backward[plan.window_tokens > 16], p.heads * p.batch * p.splits,
                 stream);
    } else {
        const int64_t blocks = plan.cut();
        plan.run(kernels.large_backward_q, blocks, stream);
        plan.run(kernels.large_backward_kv, blocks, stream);
    }
    plan.sum(stream);
}

template <class Function>
const char* attempt(Function function) {
    static thread_local std::string message;
    try {
        function();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace
}  // namespace diffit::cuda

#define EXPORT extern "C" __attribute__((visibility("default")))

using diffit::cuda::WindowAttention;

// Bytes of a problem, for a caller in another language to compare with its own.
EXPORT int64_t diffit_problem_size() { return sizeof(WindowAttention); }

// Whether one of the kernels, and so all, can run on the current device.
EXPORT const char* diffit_unavailable() {
    using namespace diffit::cuda;
    return attempt([] { require(sum_parts<BFloat16>); });
}

// Numbers of float32 that the backward pass of a problem needs.
EXPORT int64_t diffit_workspace_size(const WindowAttention* problem) {
    return diffit::cuda::Plan(*problem).divide_workspace();
}

// Bytes of shared memory that a block needs for a problem.
EXPORT int64_t diffit_shared_bytes(const WindowAttention* problem) {
    return diffit::cuda::shared_bytes(*problem);
}

EXPORT const char* diffit_window_attention(const WindowAttention* problem, void* stream) {
    return diffit::cuda::attempt([&] { diffit::cuda::forward(*problem, stream); });
}

EXPORT const char* diffit_window_attention_backward(const WindowAttention* problem, void* stream) {
    return diffit::cuda::attempt([&] { diffit::cuda::backward(*problem, stream); });
}
