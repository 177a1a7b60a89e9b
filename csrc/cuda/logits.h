// Logits with their bias, and the softmax over their rows.
#pragma once

#include <cmath>

#include "products.h"

namespace diffit::cuda {

// The table of a head times `factor`, by default for logits in base 2; zeros where there is none.
DEVICE void load_table(Shared<float> to, const WindowAttention& p, int64_t head, int rows,
                       float factor = log2_e) {
    constexpr int at_once = 4;
    const int step = threads_of_block();
    const float* from = p.table + head * p.table_stride_head;
    for (int first = opaque(thread_index()); first < rows; first += at_once * step) {
        float x[at_once];
        for (int i = 0; i < at_once; ++i) {
            const int r = first + i * step;
            x[i] = p.table && r < rows ? from[r * p.table_stride_row] : 0;
        }
        for (int i = 0; i < at_once; ++i)
            if (first + i * step < rows) store(to + (first + i * step), x[i] * factor);
    }
}

// The sum over a row of an accumulator of what its four threads have; likewise the maximum.
DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
DEVICE float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

template <int N>
DEVICE void scale_rows(float (&x)[N][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) x[n][i] *= factor[i / 2];
}

// Products to logits in base 2: s scale + bias, -inf in columns that are no token. Rows are queries
// and columns keys, or the reverse. `table` is null where there is none.
template <bool RowsAreKeys, int N>
DEVICE void add_bias(float (&s)[N][4], float scale, const Window& window, bool biased,
                     Shared<float> table, int first_row, int first_column) {
    const int last = window.slots - 1;
    // In a loop over windows the offsets are always the same, and too many to keep in registers.
    first_column = opaque(first_column);
    first_row = opaque(first_row);
    int row_position[2];
    for (int r = 0; r < 2; ++r) {
        const int slot = row_slot(first_row, 2 * r);
        row_position[r] = window.position(slot < last ? slot : last);
    }
    // Eight columns that are a part of a row of the window stand side by side in the table.
    if (biased && window.width % 8 == 0 && first_column + 8 * N <= window.slots) {
        const int sign = RowsAreKeys ? 1 : -1, column = column_slot(0, 0, 0);
        const Shared<float> here[2] = {table + (window.center() + sign * (column - row_position[0])),
                                       table + (window.center() + sign * (column - row_position[1]))};
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int there = sign * window.position(first_column + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                s[n][i] = s[n][i] * (scale * log2_e) + load(here[i / 2] + there + sign * (i % 2));
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int slot = column_slot(first_column, n, c);
            const int position = window.position(slot < last ? slot : last);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float& x = s[n][2 * r + c];
                x *= scale * log2_e;
                if (biased) {
                    const int offset = row_position[r] - position;
                    x += load(table + (window.center() + (RowsAreKeys ? -offset : offset)));
                }
                if (slot > last) x = -INFINITY;
            }
        }
    }
}

// How far logits in base 2 may rise before what was summed is rescaled: exp2 of it is no large number
// in any dtype.
constexpr float rise = 8;

// One step of a softmax over columns that come in parts: s becomes exp2(s - m), with m near the
// maximum of all columns so far, total the sum of this thread's, and decay the factor of what was summed
// before: 1 where m is still near enough.
template <int N>
DEVICE void softmax_step(float (&s)[N][4], float (&m)[2], float (&total)[2], float (&decay)[2]) {
    float next[2] = {m[0], m[1]}, sum[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) next[i / 2] = fmaxf(next[i / 2], s[n][i]);
    float shift[2];
    for (int r = 0; r < 2; ++r) {
        next[r] = row_max(next[r]);
        if (next[r] <= m[r] + rise) next[r] = m[r];
        // The bias may mask every key so far: -inf less -inf is no number.
        shift[r] = next[r] == -INFINITY ? 0 : next[r];
        decay[r] = exp2_fast(m[r] - shift[r]);
        m[r] = next[r];
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) {
            s[n][i] = exp2_fast(s[n][i] - shift[i / 2]);
            sum[i / 2] += s[n][i];
        }
    for (int r = 0; r < 2; ++r) total[r] = total[r] * decay[r] + sum[r];
}

// The log-sum-exp of the rows of an accumulator to at(row), unless that is null.
template <class At>
DEVICE void store_lse(const At& at, const float (&m)[2], const float (&total)[2]) {
    for (int r = 0; r < 2; ++r) {
        float* to = at(row_slot(0, 2 * r));
        if (to && lane() % 4 == 0) *to = (m[r] + log2f(total[r])) * ln_2;
    }
}

}  // namespace diffit::cuda
