#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diffit {

namespace generic {
extern const InstructionSet instruction_set;
}
#if defined(DIFFIT_HAVE_AVX2)
namespace avx2 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AVX512)
namespace avx512 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AMX)
namespace amx {
extern const InstructionSet instruction_set;
}
#endif

namespace {

#if defined(DIFFIT_HAVE_AMX)
// Linux hands out the tile registers on request only.
bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

std::vector<const InstructionSet*> find_instruction_sets() {
    std::vector<const InstructionSet*> found{&generic::instruction_set};
#if defined(DIFFIT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        found.push_back(&avx2::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AVX512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) found.push_back(&avx512::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AVX512_BF16)
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16) found.push_back(&avx512_bf16::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AMX)
    if (bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
        request_tiles())
        found.push_back(&amx::instruction_set);
#endif
    return found;
}

const std::vector<const InstructionSet*>& usable() {
    static const std::vector<const InstructionSet*> found = find_instruction_sets();
    return found;
}

const InstructionSet*& current() {
    static const InstructionSet* chosen = usable().back();
    return chosen;
}

// Grows, and is kept by its thread from call to call.
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

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> data_;
    size_t size_ = 0;
};

// Calls each(item, scratch) for every item, in any order, on up to `threads` threads. The scratch
// memory of a thread is zero at its first item.
template <class Each>
void for_each_item(const Kernels& kernels, int64_t items, size_t scratch_bytes, int threads,
                   const Each& each) {
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
        if (memory) std::memset(memory, 0, scratch_bytes);
        kernels.enter();
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item)
            if (memory || scratch_bytes == 0) each(item, memory);
        kernels.leave();
    }
    if (failed) throw std::bad_alloc();
}

const Kernels& kernels(DType dtype) { return current()->kernels[static_cast<int>(dtype)]; }

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

// The bias as the kernels read it (see Layout), in base 2, for rows of logits that are those of queries
// or of keys; one row of zeros without a table. The memory is kept by the calling thread.
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

// How the rows and columns of a linear layer are cut changes none of its numbers.
constexpr int64_t rows_of_item = 64;

// The most rows that an item has.
int64_t most_rows(const Linear& p) {
    return std::min(p.rows, p.rows / p.row_blocks + 2 * linear_block);
}

void run_linear(Linear p, const Kernels& k, int threads) {
    // Packed weights of floats come from the third-level cache: once for more rows, where there are.
    const int64_t rows =
        p.dtype == DType::float32
            ? std::clamp(p.rows / (2 * threads), rows_of_item, 4 * rows_of_item)
            : 2 * rows_of_item;
    p.row_blocks = std::max<int64_t>(1, p.rows / rows);
    const int64_t wanted = 4 * threads / p.row_blocks, most = p.n / (4 * linear_block);
    p.column_blocks = std::max<int64_t>(1, std::min(wanted, most));
    const size_t bytes = linear_scratch(p, most_rows(p));
    for_each_item(k, p.row_blocks * p.column_blocks, bytes, threads,
                  [&](int64_t item, char* scratch) { k.linear(p, item, scratch); });
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

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet* set : usable()) names.push_back(set->name);
    return names;
}

std::string instruction_set() { return current()->name; }

void set_instruction_set(const std::string& name) {
    for (const InstructionSet* set : usable()) {
        if (name == set->name) {
            current() = set;
            return;
        }
    }
    std::string names;
    for (const std::string& known : instruction_sets()) names += " " + known;
    throw std::invalid_argument("instruction set: expected one of" + names + ", got " + name);
}

void window_attention(WindowAttention p, int threads) {
    const Kernels& k = kernels(p.dtype);
    cut(p);
    // Here chunks leave no trace in the result: longer ones prefetch more of their own windows.
    p.chunk = std::max(p.chunk, p.windows() * (p.heads / p.group) / (16 * threads));
    expand_bias(p, true, threads);
    for_each_item(k, p.items(), k.forward_scratch(p), threads,
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
    for_each_item(k, p.items(), k.backward_scratch(p), threads,
                  [&](int64_t item, char* scratch) { k.backward(p, item, scratch); });
    if (p.grad_table) sum_table(p);
    if (p.grad_q_row) sum_rows(p, p.grad_rows_part, p.grad_q_row);
    if (p.grad_v_row) sum_rows(p, p.grad_rows_part + p.dim(), p.grad_v_row);
}

void bias_gelu(BiasGelu g, int threads) {
    const Kernels& k = kernels(g.dtype);
    g.chunk = std::max<int64_t>(1, 16384 / g.features);
    for_each_item(k, g.chunks(), 0, threads, [&](int64_t item, char*) { k.bias_gelu(g, item); });
}

void bias_gelu_backward(BiasGelu g, int threads) {
    const Kernels& k = kernels(g.dtype);
    g.chunk = 32;  // rows whose gradients are summed in single precision
    std::vector<float> part(g.chunks() * g.features);
    g.grad_bias_part = part.data();
    for_each_item(k, g.chunks(), 0, threads,
                  [&](int64_t item, char*) { k.bias_gelu_backward(g, item); });
    std::vector<double> total(g.features, 0.0);
    for (int64_t c = 0; c < g.chunks(); ++c)
        for (int64_t f = 0; f < g.features; ++f) total[f] += part[c * g.features + f];
    std::copy(total.begin(), total.end(), g.grad_bias);
}

bool has_linear(DType dtype) { return kernels(dtype).linear != nullptr; }

void linear(Linear p, Weight w, int threads) {
    static thread_local Scratch scratch;
    const Kernels& k = kernels(p.dtype);
    p.packed = w.packed = scratch.reserve(p.n * p.k * packed_size(p.dtype));
    for_each_item(k, w.panels(), 0, threads, [&](int64_t panel, char*) { k.pack(w, panel); });
    run_linear(p, k, threads);
}

// A block of rows goes through both layers at once, where there are enough blocks for the threads and
// its hidden layer stays in the second-level cache.
void mlp(const MLP& m, int threads) {
    static thread_local Scratch scratch;
    const Kernels& k = kernels(m.dtype);
    const auto hidden_size = [&](int64_t rows) {
        return (rows + linear_block - 1) / linear_block * linear_block * m.hidden_features *
               packed_size(m.dtype);
    };
    const bool at_once =
        m.rows / linear_block >= threads && hidden_size(rows_of_item) <= (1 << 20);
    const int64_t size1 = m.hidden_features * m.in_features * packed_size(m.dtype);
    const int64_t size2 = m.out_features * m.hidden_features * packed_size(m.dtype);
    char* memory = scratch.reserve(size1 + size2 + (at_once ? 0 : hidden_size(m.rows)));
    const Weight w1{m.hidden_features, m.in_features, m.fc1_weight, false, memory};
    const Weight w2{m.out_features, m.hidden_features, m.fc2_weight, false, memory + size1};
    for_each_item(k, w1.panels() + w2.panels(), 0, threads, [&](int64_t i, char*) {
        i < w1.panels() ? k.pack(w1, i) : k.pack(w2, i - w1.panels());
    });
    Linear fc1{}, fc2{};
    fc1.rows = fc2.rows = m.rows;
    fc1.dtype = fc2.dtype = m.dtype;
    fc1.k = m.in_features;
    fc1.n = fc2.k = m.hidden_features;
    fc2.n = m.out_features;
    fc1.x = m.x;
    fc1.packed = w1.packed;
    fc2.packed = w2.packed;
    fc1.bias = m.fc1_bias;
    fc2.bias = m.fc2_bias;
    fc1.gelu = true;
    fc1.product = m.hidden;
    fc1.y_dtype = m.dtype;
    fc2.x_packed = true;
    fc2.y_dtype = m.y_dtype;
    fc2.residual = m.residual;
    fc2.y = m.y;
    if (!at_once) {
        fc2.x = fc1.y = memory + size1 + size2;
        run_linear(fc1, k, threads);
        return run_linear(fc2, k, threads);
    }
    fc1.row_blocks = fc2.row_blocks =
        std::max<int64_t>(std::min<int64_t>(threads, m.rows / linear_block), m.rows / rows_of_item);
    const int64_t rows = most_rows(fc1);
    const size_t bytes =
        std::max(linear_scratch(fc1, rows), linear_scratch(fc2, rows)) + hidden_size(rows);
    for_each_item(k, fc1.row_blocks, bytes, threads, [&](int64_t item, char* scratch) {
        k.mlp(fc1, fc2, item, scratch);
    });
}

void add_layer_norm(AddLayerNorm p, int threads) {
    const auto kernel = kernels(p.y_dtype).add_layer_norm[p.x_dtype != p.y_dtype];
    p.chunk = std::max<int64_t>(1, 16384 / p.features);
    for_each_item(kernels(p.y_dtype), p.chunks(), p.features * sizeof(float), threads,
                  [&](int64_t item, char* scratch) { kernel(p, item, scratch); });
}

void add_layer_norm_backward(AddLayerNorm p, int threads) {
    const auto kernel = kernels(p.y_dtype).add_layer_norm_backward[p.x_dtype != p.y_dtype];
    p.chunk = std::max<int64_t>(1, 16384 / p.features);
    for_each_item(kernels(p.y_dtype), p.chunks(), 0, threads,
                  [&](int64_t item, char* scratch) { kernel(p, item, scratch); });
}

}  // namespace diffit
