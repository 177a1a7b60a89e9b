#include <limits>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace diffit {

namespace {

// How the rows and columns of a linear layer are cut changes none of its numbers.
constexpr int64_t rows_of_item = 128;

// Packed weights, kept from call to call unless they are large.
thread_local Scratch packed_weights;
constexpr size_t most_kept = 64 << 20;
// Of the hidden layer of an MLP, where its layers run one after the other.
constexpr int64_t most_hidden = 32 << 20;

// The most rows that an item has.
int64_t most_rows(const Linear& p) {
    return std::min(p.rows, p.rows / p.row_blocks + 2 * linear_block);
}

void run_linear(Linear p, const Kernels& k, int threads) {
    // Packed weights of more than 2 bytes come from the third-level cache: once for more rows, where
    // there are.
    const int64_t rows =
        k.packed_size > 2
            ? std::clamp(p.rows / (2 * threads), rows_of_item / 2, 2 * rows_of_item)
            : rows_of_item;
    p.row_blocks = std::max<int64_t>(1, p.rows / rows);
    const int64_t wanted = 4 * threads / p.row_blocks, most = p.n / (4 * linear_block);
    p.column_blocks = std::max<int64_t>(1, std::min(wanted, most));
    const size_t bytes = k.linear_scratch(p, most_rows(p));
    for_each_item(k, p.row_blocks * p.column_blocks, bytes, 0, threads,
                  [&](int64_t item, char* scratch) { k.linear(p, item, scratch); });
}

// Sets where in memory the weights lie once packed, one behind the other; returns their panels.
template <size_t count>
int64_t place(Weight (&weights)[count], const Kernels& k, Scratch& memory) {
    int64_t size = 0, panels = 0;
    for (const Weight& w : weights) size += w.n * w.k;
    char* packed = memory.reserve(size * k.packed_size);
    for (Weight& w : weights) {
        w.packed = packed;
        packed += w.n * w.k * k.packed_size;
        panels += w.panels();
    }
    return panels;
}

// One of the panels of all weights.
void pack_panel(const Weight* w, int64_t panel, const Kernels& k) {
    for (; panel >= w->panels(); ++w) panel -= w->panels();
    k.pack(*w, panel);
}

template <size_t count>
void pack(Weight (&weights)[count], const Kernels& k, int threads) {
    for_each_item(k, place(weights, k, packed_weights), 0, 0, threads,
                  [&](int64_t panel, char*) { pack_panel(weights, panel, k); });
}

// A block of rows goes through both layers at once, where there are enough blocks for the threads and
// its hidden layer is no larger than the second-level cache.
void run_mlp(const MLP& m, const void* packed1, const void* packed2, const Kernels& k, int threads) {
    const auto hidden_size = [&](int64_t rows) {
        return (rows + linear_block - 1) / linear_block * linear_block * m.hidden_features *
               k.packed_size;
    };
    Linear fc1{}, fc2{};
    fc1.rows = fc2.rows = m.rows;
    fc1.dtype = fc2.dtype = m.dtype;
    fc1.k = m.in_features;
    fc1.n = fc2.k = m.hidden_features;
    fc2.n = m.out_features;
    fc1.x = m.x;
    fc1.norm_eps = m.norm_eps;
    fc1.packed = packed1;
    fc2.packed = packed2;
    fc1.bias = m.fc1_bias;
    fc2.bias = m.fc2_bias;
    fc1.gelu = true;
    fc1.product = m.hidden;
    fc1.y_dtype = m.dtype;
    fc2.x_packed = true;
    fc2.y_dtype = m.y_dtype;
    fc2.residual = m.residual;
    fc2.y = m.y;
    const int64_t blocks = m.rows / linear_block;
    if (blocks < threads || hidden_size(rows_of_item) > 2 * resident) {
        // One layer after the other, in parts of the rows.
        static thread_local Scratch hidden;
        const int64_t parts = std::min(blocks, hidden_size(m.rows) / most_hidden + 1);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = blocks * part / parts * linear_block;
            const int64_t end = part + 1 < parts ? blocks * (part + 1) / parts * linear_block : m.rows;
            Linear p1 = rows_of(fc1, first, end - first, k.packed_size);
            Linear p2 = rows_of(fc2, first, end - first, k.packed_size);
            p2.x = p1.y = hidden.reserve(hidden_size(p1.rows));
            run_linear(p1, k, threads);
            run_linear(p2, k, threads);
        }
        return;
    }
    // As many blocks for each thread.
    const int64_t wanted = (m.rows / rows_of_item + threads - 1) / threads * threads;
    fc1.row_blocks = fc2.row_blocks = std::clamp<int64_t>(wanted, threads, blocks);
    const int64_t rows = most_rows(fc1);
    const size_t bytes =
        std::max(k.linear_scratch(fc1, rows), k.linear_scratch(fc2, rows)) + hidden_size(rows);
    for_each_item(k, fc1.row_blocks, bytes, 0, threads, [&](int64_t item, char* scratch) {
        k.mlp(fc1, fc2, item, scratch);
    });
}

// What a thread takes through attention and the layers around it at once, about rows_of_item tokens:
// some samples, or some rows of windows of one.
class Strips {
public:
    explicit Strips(const WindowAttention& a) : whole_(a) {
        const int64_t rows = rows_of_item, per_sample = a.height / a.window_height;
        int64_t deep = std::clamp<int64_t>(rows / (a.window_height * a.width), 1, per_sample);
        while (per_sample % deep) --deep;
        height_ = deep * a.window_height;
        const int64_t samples = std::clamp<int64_t>(rows / a.tokens(), 1, a.batch);
        count_ = height_ < a.height ? a.batch * (a.height / height_) : a.batch / samples;
    }

    void expand_bias(int threads) { diffit::expand_bias(whole_, true, threads); }

    int64_t count() const { return count_; }

    // The most tokens of one.
    int64_t tokens() const {
        const int64_t samples = height_ < whole_.height ? 1 : (whole_.batch + count_ - 1) / count_;
        return samples * height_ * whole_.width;
    }

    // Its first token, of those of all samples.
    int64_t first(int64_t strip) const {
        if (height_ < whole_.height) return strip * height_ * whole_.width;
        return whole_.batch * strip / count_ * whole_.tokens();
    }

    // Attention inside it, of q, k and v and to a result that it has for itself.
    WindowAttention attention(int64_t strip) const {
        WindowAttention a = whole_;
        const int64_t sample = first(strip) / a.tokens();
        a.batch = height_ < a.height ? 1 : first(strip + 1) / a.tokens() - sample;
        a.height = height_;
        a.qkv_stride_batch = a.tokens() * a.qkv_stride_token;
        a.chunk = a.windows();
        const int64_t row = sample * a.row_stride_batch * size_of(a.dtype);
        if (a.q_row) a.q_row = static_cast<const char*>(a.q_row) + row;
        if (a.v_row) a.v_row = static_cast<const char*>(a.v_row) + row;
        return a;
    }

private:
    WindowAttention whole_;
    int64_t height_, count_;  // rows of the grid in one; how many there are
};

// y = proj(attention(qkv(x))) + residual. a, qkv and proj lack what depends on the rows they run on.
void run_tmsa(WindowAttention a, Linear qkv, Linear proj, const Kernels& k, int threads) {
    const int64_t rows = qkv.rows, row_size = a.dim() * size_of(a.dtype);
    a.qkv_stride_token = 3 * a.dim();
    // Within a strip heads are grouped for the cache alone.
    a.group = std::clamp<int64_t>(512 / a.window_tokens(), 1, a.heads);
    while (a.heads % a.group) --a.group;
    Strips strips(a);
    const int64_t most = strips.tokens();
    const int64_t rounds = (strips.count() + threads - 1) / threads;
    const bool idle = 4 * strips.count() <= 3 * rounds * threads;  // a quarter of the threads
    // Somewhat more than the second-level cache is still better than memory.
    if (idle || most < linear_block || 4 * most * row_size > 3 * resident) {
        Scratch packed, out;
        qkv.y = packed.reserve(3 * rows * row_size);
        run_linear(qkv, k, threads);
        a.qkv = qkv.y;
        a.qkv_stride_batch = a.tokens() * a.qkv_stride_token;
        proj.x = a.out = out.reserve(rows * row_size);
        window_attention(a, threads);
        return run_linear(proj, k, threads);
    }
    strips.expand_bias(threads);
    qkv.row_blocks = qkv.column_blocks = proj.row_blocks = proj.column_blocks = 1;
    const size_t zeros = k.forward_scratch(strips.attention(0));
    const size_t products = std::max(k.linear_scratch(qkv, most), k.linear_scratch(proj, most));
    const size_t bytes = zeros + products + 4 * most * row_size;
    for_each_item(k, strips.count(), bytes, zeros, threads, [&](int64_t strip, char* scratch) {
        const int64_t first = strips.first(strip) * row_size;
        WindowAttention part = strips.attention(strip);
        char* memory = scratch + zeros;
        Linear layer = qkv;
        layer.rows = part.batch * part.tokens();
        layer.x = static_cast<const char*>(qkv.x) + first;
        part.qkv = layer.y = memory + products;
        k.linear(layer, 0, memory);
        part.out = memory + products + 3 * most * row_size;
        for (int64_t item = 0; item < part.items(); ++item) k.forward(part, item, scratch);
        layer = proj;
        layer.rows = part.batch * part.tokens();
        layer.x = part.out;
        layer.residual = static_cast<const char*>(proj.residual) + first;
        layer.y = static_cast<char*>(proj.y) + first;
        k.linear(layer, 0, memory);
    });
}

}  // namespace

void bias_gelu(BiasGelu g, int threads) {
    const Kernels& k = kernels(g.dtype);
    g.chunk = std::max<int64_t>(1, 16384 / g.features);
    for_each_item(k, g.chunks(), 0, 0, threads, [&](int64_t item, char*) { k.bias_gelu(g, item); });
}

void bias_gelu_backward(BiasGelu g, int threads) {
    const Kernels& k = kernels(g.dtype);
    g.chunk = 32;  // rows whose gradients are summed in single precision
    std::vector<float> part(g.chunks() * g.features);
    g.grad_bias_part = part.data();
    for_each_item(k, g.chunks(), 0, 0, threads,
                  [&](int64_t item, char*) { k.bias_gelu_backward(g, item); });
    std::vector<double> total(g.features, 0.0);
    for (int64_t c = 0; c < g.chunks(); ++c)
        for (int64_t f = 0; f < g.features; ++f) total[f] += part[c * g.features + f];
    std::copy(total.begin(), total.end(), g.grad_bias);
}

void add_layer_norm(AddLayerNorm p, int threads) {
    const auto kernel = kernels(p.y_dtype).add_layer_norm[p.x_dtype != p.y_dtype];
    p.chunk = std::max<int64_t>(1, 16384 / p.features);
    for_each_item(kernels(p.y_dtype), p.chunks(), norm_rows * p.features * sizeof(float), 0, threads,
                  [&](int64_t item, char* scratch) { kernel(p, item, scratch); });
}

void add_layer_norm_backward(AddLayerNorm p, int threads) {
    const auto kernel = kernels(p.y_dtype).add_layer_norm_backward[p.x_dtype != p.y_dtype];
    p.chunk = std::max<int64_t>(1, 16384 / p.features);
    for_each_item(kernels(p.y_dtype), p.chunks(), 0, 0, threads,
                  [&](int64_t item, char* scratch) { kernel(p, item, scratch); });
}

std::string linear_product(DType dtype) { return kernels(dtype).product; }

bool has_weight_gradient(DType dtype) { return kernels(dtype).weight_gradient != nullptr; }

void linear(Linear p, Weight w, int threads) {
    const Kernels& k = kernels(p.dtype);
    if (p.rows < linear_block) {
        SkinnyLinear few{p.rows, p.n, p.k, p.dtype, p.x, w.data, {p.bias, nullptr}, p.y, linear_block};
        return for_each_item(
            k, p.n / few.chunk, k.skinny_scratch(few), 0, threads,
            [&](int64_t item, char* scratch) { k.skinny_linear(few, item, scratch); });
    }
    Weight weights[] = {w};
    pack(weights, k, threads);
    p.packed = weights[0].packed;
    run_linear(p, k, threads);
    packed_weights.keep(most_kept);
}

void weight_gradient(WeightGradient g, int threads) {
    const Kernels& k = kernels(g.dtype);
    const auto parts = [](int64_t size, int64_t most) { return (size + most - 1) / most; };
    const bool floats = g.dtype == DType::float32;
    // What is packed, and the rectangle of the weight, are about as large as the second-level cache.
    const int64_t most = floats ? 256 : g.rows <= 1024 ? 1024 : 512;
    g.chunk = std::min(g.rows, most);
    g.n_parts = parts(g.n, 576);
    g.k_parts = parts(g.k, 1152);
    // Rows are cut by sizes alone: threads would change the numbers.
    g.row_parts = std::clamp<int64_t>(std::min(8 / (g.n_parts * g.k_parts), g.rows / 1024), 1, 8);
    // Each part of one side packs all of the other.
    int64_t& longer = g.n >= g.k ? g.n_parts : g.k_parts;
    const int64_t others = g.row_parts * g.n_parts * g.k_parts / longer;
    longer = std::max(longer, std::min(parts(2 * threads, others),
                                       std::max(g.n, g.k) / (2 * linear_block)));

    const bool whole =
        g.row_parts == 1 && (g.grad_dtype == DType::float32 || g.rows <= g.chunk);
    Scratch sums, bias_sums;
    g.sum_dtype = whole ? g.grad_dtype : DType::float32;
    g.sums = whole ? g.grad_weight : sums.reserve(g.row_parts * g.n * g.k * sizeof(float));
    g.bias_sums = reinterpret_cast<double*>(bias_sums.reserve(g.row_parts * g.n * sizeof(double)));
    for_each_item(k, g.row_parts * g.n_parts * g.k_parts, k.weight_gradient_scratch(g), 0, threads,
                  [&](int64_t item, char* scratch) { k.weight_gradient(g, item, scratch); });
    for (int64_t c = 0; g.grad_bias && c < g.n; ++c) {
        double sum = 0;
        for (int64_t part = 0; part < g.row_parts; ++part) sum += g.bias_sums[part * g.n + c];
        g.grad_bias[c] = static_cast<float>(sum);
    }
    if (!whole)
        for_each_item(k, g.n, 0, 0, threads, [&](int64_t row, char*) { k.sum_parts(g, row); });
}

void mlp(const MLP& m, int threads) {
    const Kernels& k = kernels(m.dtype);
    Weight weights[] = {{m.hidden_features, m.in_features, m.fc1_weight, false, nullptr},
                        {m.out_features, m.hidden_features, m.fc2_weight, false, nullptr}};
    pack(weights, k, threads);
    run_mlp(m, weights[0].packed, weights[1].packed, k, threads);
    packed_weights.keep(most_kept);
}

void block(const DiffiTBlock& b, int threads) {
    WindowAttention a = b.attention;
    const Kernels& k = kernels(a.dtype);
    const int64_t dim = a.dim(), rows = a.batch * a.tokens(), size = size_of(a.dtype);
    Scratch of_rows, of_s;
    char* row_memory = of_rows.reserve(a.batch * 3 * dim * size);
    char* s = of_s.reserve(rows * dim * size);

    SkinnyLinear row{};
    row.rows = b.temb ? a.batch : 0;
    row.n = 3 * dim;
    row.k = b.temb_features;
    row.dtype = a.dtype;
    row.x = b.temb;
    row.weight = b.temb_weight;
    row.biases[0] = b.temb_bias;
    row.biases[1] = b.qkv_bias;
    row.y = row_memory;
    row.chunk = linear_block;
    if (b.temb) {
        a.q_row = row_memory;
        a.v_row = row_memory + 2 * dim * size;
        a.row_stride_batch = 3 * dim;
    }
    Weight weights[] = {{3 * dim, dim, b.qkv_weight, false, nullptr},
                        {dim, dim, b.proj_weight, false, nullptr},
                        {b.hidden_features, dim, b.fc1_weight, false, nullptr},
                        {dim, b.hidden_features, b.fc2_weight, false, nullptr}};
    const int64_t panels = place(weights, k, packed_weights), part = dim / row.chunk;
    // Softmax does not see what is added to k.
    for_each_item(k, panels + (b.temb ? 2 * part : 0), k.skinny_scratch(row), 0, threads,
                  [&](int64_t item, char* scratch) {
                      if (item < panels) return pack_panel(weights, item, k);
                      item -= panels;
                      k.skinny_linear(row, item < part ? item : item + part, scratch);
                  });

    Linear qkv{}, proj{};
    qkv.rows = proj.rows = rows;
    qkv.k = proj.k = proj.n = dim;
    qkv.n = 3 * dim;
    qkv.dtype = qkv.y_dtype = proj.dtype = proj.y_dtype = a.dtype;
    constexpr float least = std::numeric_limits<float>::min();  // 0 would mean no norm
    qkv.norm_eps = std::max(b.eps1, least);
    qkv.x = proj.residual = b.x;
    qkv.packed = weights[0].packed;
    proj.packed = weights[1].packed;
    proj.bias = b.proj_bias;
    proj.y = s;
    run_tmsa(a, qkv, proj, k, threads);

    MLP m{};
    m.rows = rows;
    m.in_features = m.out_features = dim;
    m.hidden_features = b.hidden_features;
    m.dtype = m.y_dtype = a.dtype;
    m.norm_eps = std::max(b.eps2, least);
    m.x = m.residual = s;
    m.fc1_bias = b.fc1_bias;
    m.fc2_bias = b.fc2_bias;
    m.y = b.y;
    run_mlp(m, weights[2].packed, weights[3].packed, k, threads);
    packed_weights.keep(most_kept);
}

}  // namespace diffit
