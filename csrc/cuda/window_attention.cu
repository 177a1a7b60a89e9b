// Chooses and launches the kernels of a problem, and the C interface that diffit_kernels.cuda calls.
// A function returns null or what went wrong, until the next call on the same thread.
#include <algorithm>
#include <string>

#include "kernels.h"
#include "launch.h"
#include "sum_parts.h"

namespace diffit::cuda {

// Head widths that kernels.cu is compiled for; a test that needs but one may say so.
#ifndef DIFFIT_FOR_EACH_WIDTH
#define DIFFIT_FOR_EACH_WIDTH(X) X(16) X(32) X(48) X(64) X(80) X(96) X(112) X(128)
#endif

#define DIFFIT_DECLARE(WIDTH) extern const Kernels bfloat16_##WIDTH, float16_##WIDTH;
DIFFIT_FOR_EACH_WIDTH(DIFFIT_DECLARE)

namespace {

const Kernels& kernels_of(const WindowAttention& p) {
#define DIFFIT_ENTRY(WIDTH) {&bfloat16_##WIDTH, &float16_##WIDTH},
    static const Kernels* const table[][2] = {DIFFIT_FOR_EACH_WIDTH(DIFFIT_ENTRY)};
    return *table[(p.head_dim + 15) / 16 - 1][p.dtype - 1];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The problem and how it is cut: by its shape alone, so that sums are the same on every device.
struct Plan {
    WindowAttention p;
    int64_t window_tokens, table_rows, samples_windows, tokens, q_tiles, row_parts, table_parts;
    bool small;

    explicit Plan(const WindowAttention& problem) : p(problem) {
        window_tokens = p.window_height * p.window_width;
        table_rows = (2 * p.window_height - 1) * (2 * p.window_width - 1);
        tokens = p.grid_height * p.grid_width;
        const int64_t windows = tokens / window_tokens;
        samples_windows = p.batch * windows;
        q_tiles = ceil_div(window_tokens, block_rows);
        small = window_tokens <= block_rows;
        if (small) {
            const int64_t groups = ceil_div(windows, window_tokens <= 16 ? block_rows / 16 : 1);
            p.steps = ceil_div(groups, ceil_div(p.blocks, p.batch * p.heads));
            p.splits = ceil_div(groups, p.steps);
            row_parts = p.splits;
            table_parts = p.batch * p.splits;
        } else {
            // For the table a few windows to a block: their sum is put onto it once.
            p.splits = std::min(samples_windows, ceil_div(p.blocks / 4, p.heads * q_tiles));
            row_parts = windows * q_tiles;
            table_parts = p.splits * q_tiles;
        }
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
        take(p.table_part, p.grad_table, p.heads * table_parts * table_rows);
        take(p.q_part, p.grad_q_row, p.batch * row_parts * dim_of(p));
        take(p.v_part, p.grad_v_row, p.batch * row_parts * dim_of(p));
        return used;
    }

    void run(const Kernel& kernel, int64_t blocks, void* stream) const {
        launch(kernel.name, kernel.function, blocks, threads,
               kernel.shared_bytes(static_cast<int>(table_rows), static_cast<int>(window_tokens)),
               stream, p);
    }
};

void forward(const WindowAttention& problem, void* stream) {
    const Plan plan(problem);
    const WindowAttention& p = plan.p;
    const Kernels& kernels = kernels_of(p);
    if (plan.small)
        plan.run(kernels.small_forward[plan.window_tokens > 16], p.heads * p.batch * p.splits, stream);
    else
        plan.run(kernels.large_forward, plan.q_tiles * p.heads * plan.samples_windows, stream);
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
        const int64_t blocks = plan.q_tiles * p.heads * plan.samples_windows;
        plan.run(kernels.large_backward_q, blocks, stream);
        plan.run(kernels.large_backward_kv, blocks, stream);
        if (p.grad_table)
            plan.run(kernels.large_backward_table, plan.q_tiles * p.heads * p.splits, stream);
    }
    const int64_t dim = dim_of(p), size = p.batch * dim;
    const auto sum_of_rows = p.dtype == 1 ? sum_rows<BFloat16> : sum_rows<Float16>;
    for (auto [part, out] : {std::pair(p.q_part, p.grad_q_row), std::pair(p.v_part, p.grad_v_row)})
        if (out)
            launch<const float*, int64_t, int64_t, int64_t, uint16_t*>(
                "sum_rows", sum_of_rows, ceil_div(size, threads), threads, 0, stream, part,
                plan.row_parts, dim, size, out);
    if (p.grad_table)
        launch<const float*, int64_t, int64_t, int64_t, float*>(
            "sum_table", sum_table, ceil_div(plan.table_rows * p.heads, threads), threads, 0, stream,
            p.table_part, plan.table_parts, plan.table_rows, p.heads, p.grad_table);
}

const char* attempt(void (*function)(const WindowAttention&, void*), const WindowAttention& problem,
                    void* stream) {
    static thread_local std::string message;
    try {
        function(problem, stream);
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

// Numbers of float32 that the backward pass of a problem needs.
EXPORT int64_t diffit_workspace_size(const WindowAttention* problem) {
    return diffit::cuda::Plan(*problem).divide_workspace();
}

EXPORT const char* diffit_window_attention(const WindowAttention* problem, void* stream) {
    return diffit::cuda::attempt(diffit::cuda::forward, *problem, stream);
}

EXPORT const char* diffit_window_attention_backward(const WindowAttention* problem, void* stream) {
    return diffit::cuda::attempt(diffit::cuda::backward, *problem, stream);
}
