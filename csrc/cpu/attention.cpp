#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace diffit {

namespace {

// Work is cut by the problem alone, so that results do not depend on the number of threads. An item
// takes the heads of a small window together, since their rows lie side by side, and about 1024 tokens
// in all; less where that leaves few items, more where it makes too many parts to add up.
void cut(WindowAttention& p) {
    const int64_t few = p.windows() * p.heads / 32;
    p.group = std::clamp<int64_t>(std::min(512 / p.window_tokens(), few), 1, p.heads);
    while (p.heads % p.group) --p.group;
    const int64_t wanted = std::max<int64_t>(1, 1024 / (p.window_tokens() * p.group));
    const int64_t most = std::max<int64_t>(1, p.windows() * (p.heads / p.group) / 64);
    p.chunk = std::max(std::min(wanted, most), (p.windows() + 255) / 256);
}

void sum_table(const WindowAttention& p) {
    const int64_t rows = p.table_rows(), size = p.heads * rows;
    std::vector<double> total(size);
    for (int64_t c = 0; c < p.chunks(); ++c)
        for (int64_t i = 0; i < size; ++i) total[i] += p.grad_table_part[c * size + i];
    for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t r = 0; r < rows; ++r)
            p.grad_table[r * p.heads + h] = static_cast<float>(total[h * rows + r]);
}

// The parts of a sample come from the chunks that have windows of it. From window to window chunk and
// sample stay or grow by one, so that no two pairs of them have the same sum, their place.
void sum_rows(const WindowAttention& p, const double* part, float* grad) {
    const int64_t per_sample = p.windows() / p.batch, dim = p.dim();
    std::vector<double> total(dim);
    for (int64_t s = 0; s < p.batch; ++s) {
        const int64_t first = s * per_sample / p.chunk, last = ((s + 1) * per_sample - 1) / p.chunk;
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t c = first; c <= last; ++c)
            for (int64_t i = 0; i < dim; ++i) total[i] += part[(c + s) * 2 * dim + i];
        std::copy(total.begin(), total.end(), grad + s * dim);
    }
}

}  // namespace

void expand_bias(WindowAttention& p, bool of_queries, int threads) {
    static thread_local Scratch scratch;
    const int64_t wh = p.window_height, ww = p.window_width, rows = 2 * wh - 1, row = 2 * ww - 1;
    const int64_t heads = p.table ? p.heads : 0, table_size = p.table_rows();
    p.bias_stride = p.table ? ww * rows * ww : 0;
    const int64_t used = heads * p.bias_stride, zeros = (p.table ? 0 : wh * ww) + bias_slack;
    float* bias = reinterpret_cast<float*>(
        scratch.reserve((used + zeros + heads * table_size) * sizeof(float)));
    std::fill_n(bias + used, zeros, 0.0f);
#pragma omp parallel for num_threads(threads) if (heads > 1 && threads > 1)
    for (int64_t h = 0; h < heads; ++h) {
        float* column = bias + used + zeros + h * table_size;
        for (int64_t r = 0; r < table_size; ++r)
            column[of_queries ? table_size - 1 - r : r] = p.table[r * p.heads + h] * 1.44269504f;
        float* out = bias + h * p.bias_stride;
        for (int64_t x = 0; x < ww; ++x)
            for (int64_t dy = 0; dy < rows; ++dy, out += ww)
                std::copy_n(column + dy * row + ww - 1 - x, ww, out);
    }
    p.bias = bias;
}

void window_attention(WindowAttention p, int threads) {
    const Kernels& k = kernels(p.dtype);
    cut(p);
    // Here chunks leave no trace in the result: longer ones prefetch more of their own windows.
    p.chunk = std::max(p.chunk, p.windows() * (p.heads / p.group) / (16 * threads));
    expand_bias(p, true, threads);
    const size_t bytes = k.forward_scratch(p);
    for_each_item(k, p.items(), bytes, bytes, threads,
                  [&](int64_t item, char* scratch) { k.forward(p, item, scratch); });
}

void window_attention_backward(WindowAttention p, int threads) {
    const Kernels& k = kernels(p.dtype);
    cut(p);
    expand_bias(p, false, threads);
    std::vector<double> table_part(p.grad_table ? p.chunks() * p.heads * p.table_rows() : 0);
    std::vector<double> rows_part((p.chunks() + p.batch) * 2 * p.dim());
    p.grad_table_part = table_part.data();
    p.grad_rows_part = rows_part.data();
    const size_t bytes = k.backward_scratch(p);
    for_each_item(k, p.items(), bytes, bytes, threads,
                  [&](int64_t item, char* scratch) { k.backward(p, item, scratch); });
    if (p.grad_table) sum_table(p);
    if (p.grad_q_row) sum_rows(p, p.grad_rows_part, p.grad_q_row);
    if (p.grad_v_row) sum_rows(p, p.grad_rows_part + p.dim(), p.grad_v_row);
}

}  // namespace diffit
