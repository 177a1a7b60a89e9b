// Windows of the grid as the kernels take them: sizes rounded up, scratch memory, and the rows of a
// group of heads.
#pragma once

#include "gemm.h"
#include "problem.h"

namespace diffit {
namespace {

constexpr double log2_e = 1.4426950408889634;

// Takes pieces off a block of scratch memory. The memory is zero when a thread begins, and an item
// leaves what pads keys, values and queries at 0. Lanes of P and dS past the last query hold other
// finite numbers; they meet zero rows of dO and Q.
struct Arena {
    uintptr_t base;
    size_t used = 0;
    explicit Arena(char* scratch) : base(reinterpret_cast<uintptr_t>(scratch)) {}
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

template <class E>
struct Sizes {
    int M, d, ww;
    int m_rows, m_k, m_pad;  // window tokens as rows of A, as k, and as packed
    int d_rows, d_k, d_pad;  // head width likewise

    explicit Sizes(const WindowAttention& p)
        : M(p.window_tokens()), d(p.head_dim), ww(p.window_width),
          m_rows(round_up(M, E::m_align)), m_k(round_up(M, E::k_align)),
          m_pad(round_up(M, E::pad)), d_rows(round_up(d, E::m_align)),
          d_k(round_up(d, E::k_align)), d_pad(round_up(d, E::pad)) {}
};

// Where the tokens of a window lie in its sample, and the rows of their logits in the expanded bias.
//
// The bias is expanded once per call so that a row of logits reads it contiguously. The forward pass
// has a row for each query i and a column for each key j, with dx = xj - xi; for one column xi of
// queries, with dy = yj - yi,
//     bias[xi][(dy + wh - 1) ww + xj] = table[(wh - 1 - dy)(2 ww - 1) + ww - 1 - dx]
// and the row of query (yi, xi) is bias[xi] + (wh - 1 - yi) ww, for keys 0 .. M - 1 in order. The
// backward pass has rows of keys and columns of queries: the same with i and j exchanged and the
// table read from its end.
struct Layout {
    int64_t* token;
    int32_t* bias;

    Layout(Arena& arena, const WindowAttention& p)
        : token(arena.take<int64_t>(p.window_tokens())),
          bias(arena.take<int32_t>(p.window_tokens())) {}

    void fill(const WindowAttention& p) const {
        const int64_t ww = p.window_width, wh = p.window_height;
        const bool biased = p.table != nullptr;
        for (int64_t y = 0, i = 0; y < wh; ++y) {
            for (int64_t x = 0; x < ww; ++x, ++i) {
                token[i] = y * p.width + x;
                bias[i] = biased ? static_cast<int32_t>(x * (2 * wh - 1) * ww + (wh - 1 - y) * ww)
                                 : 0;
            }
        }
    }
};

// A group of heads of one window, and where it begins.
struct Group {
    int64_t window, head, sample, token, column;

    Group(const WindowAttention& p, int64_t window, int64_t head) : window(window), head(head) {
        const int64_t per_sample = p.windows() / p.batch, columns = p.width / p.window_width;
        const int64_t y = window % per_sample / columns, x = window % columns;
        sample = window / per_sample;
        token = y * p.window_height * p.width + x * p.window_width;
        column = head * p.head_dim;
    }

    // The one that is computed next, or itself at the end.
    Group next(const WindowAttention& p) const {
        return {p, window + 1 < p.windows() ? window + 1 : window, head};
    }

    // Its first element in an input (B, L, ...).
    template <class T>
    const T* of(const void* x, int64_t stride_batch, int64_t stride_token) const {
        return static_cast<const T*>(x) + sample * stride_batch + token * stride_token + column;
    }
};

// Calls each(group) for the windows of an item.
template <class Each>
inline void for_each_window(const WindowAttention& p, int64_t item, const Each& each) {
    const int64_t groups = p.heads / p.group, head = item % groups * p.group;
    const int64_t first = item / groups * p.chunk;
    for (int64_t w = first; w < p.windows() && w < first + p.chunk; ++w) each(Group(p, w, head));
}

inline float* packed(float* a) { return a; }
inline bf16* packed(uint16_t* a) { return reinterpret_cast<bf16*>(a); }

// Walks over the rows of the next window while this one is computed, in the order of memory: one row
// for every `calls`, so that the calls of all heads and blocks of queries take each row once.
class Ahead {
public:
    explicit Ahead(int heads, int calls = 1) : heads_(heads), calls_of_row_(calls) {}

    // touch(token of the window, head of the group)
    template <class Touch>
    void step(const Touch& touch) {
        if (++calls_ < calls_of_row_) return;
        calls_ = 0;
        touch(token_, head_);
        if (++head_ < heads_) return;
        head_ = 0;
        ++token_;
    }

private:
    int heads_, calls_of_row_, calls_ = 0, head_ = 0, token_ = 0;
};

// The rows of a group of heads, one head after the other.
template <class A>
struct Rows {
    A* data;
    int64_t head_stride;
    int stride;

    Rows(Arena& arena, int64_t heads, int rows, int stride)
        : data(arena.take<A>(heads * rows * stride)), head_stride(int64_t(rows) * stride),
          stride(stride) {}

    A* head(int64_t h) const { return data + h * head_stride; }

    // Row r of every head from x (heads, d), in the order of memory.
    template <class T>
    void copy(int64_t r, const T* x, int64_t heads, int d) const {
        for (int64_t h = 0; h < heads; ++h) copy_row(packed(head(h) + r * stride), x + h * d, d);
    }
    // The same of scale * (x + add).
    template <class T>
    void convert(int64_t r, const T* x, const float* add, float scale, int64_t heads,
                 int d) const {
        for (int64_t h = 0; h < heads; ++h)
            convert_row(packed(head(h) + r * stride), x + h * d, add + h * d, scale, d);
    }
};

// Row of a sample, as floats; zeros where there is none.
template <class T>
inline void load_row(float* out, const void* row, int64_t offset, int64_t d) {
    if (row) {
        copy_row(out, static_cast<const T*>(row) + offset, d);
    } else {
        std::memset(out, 0, d * sizeof(float));
    }
}

}  // namespace
}  // namespace diffit
