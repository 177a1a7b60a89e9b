// What the attention kernels share: tiles of rows in shared memory, products of tiles, and logits with
// their bias.
//
// A block is four warps. A tile is some rows of a head, D columns of 16 bits, D a multiple of 16;
// what a head or a window has not is zero. Its rows lie D + 8 elements apart: an odd number of 16
// byte units, so that the eight rows of an ldmatrix are in different banks. An accumulator of a warp
// is 16 x N numbers: thread l has rows l / 4 and l / 4 + 8, and columns 8 n + 2 (l % 4) + {0, 1},
// at [n][0..1] of the first row and [n][2..3] of the second.
#pragma once

#include <cmath>

#include "warp.h"
#include "windows.h"

namespace diffit::cuda {

constexpr int warps = 4, threads = 32 * warps;
constexpr int block_rows = 16 * warps;  // rows of a block, 16 to a warp, of most kernels
constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

template <int D>
constexpr int row_stride = D + 8;
template <int D>
BOTH constexpr int tile_size(int rows) {
    return rows * row_stride<D>;
}

DEVICE int lane() { return thread_index() % 32; }
DEVICE int warp() { return thread_index() / 32; }

// Slot of the column [n][i] or of the row [i] of an accumulator that starts at slot `first`.
DEVICE int column_slot(int first, int n, int i) { return first + 8 * n + lane() % 4 * 2 + i % 2; }
DEVICE int row_slot(int first, int i) { return first + lane() / 4 + i / 2 * 8; }

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

// --- tiles

// Calls each(row, column) for the 16-byte units of a tile that are this thread's. They are of one
// column, so that addresses differ by constants; the last threads may have none.
template <int D>
DEVICE int own_column() {
    return thread_index() % (D / 8) * 8;
}
template <int D, class Each>
DEVICE void for_own_units(int rows, const Each& each) {
    constexpr int at_once = threads / (D / 8);
    const int first = thread_index() / (D / 8);
    if (first >= at_once) return;
#pragma unroll
    for (int before = 0; before < rows; before += at_once)
        if (before + at_once <= rows || before + first < rows)
            each(before + first, own_column<D>());
}

// Starts to copy rows; from(row) is the address of a row, or null where there is none. `valid` is
// an address to give where nothing is read.
template <int D, class From>
DEVICE void copy_tile(Shared<uint16_t> tile, int rows, int head_dim, const uint16_t* valid,
                      const From& from) {
    for_own_units<D>(rows, [&](int row, int column) {
        const uint16_t* source = from(row);
        const bool live = source && column < head_dim;
        copy_async(tile + (row * row_stride<D> + column), live ? source + column : valid, live);
    });
}

template <class T>
DEVICE Chunk sum(const Chunk& a, const Chunk& b) {
    Chunk c;
    for (int i = 0; i < 4; ++i) {
        float a0, a1, b0, b1;
        T::unpack(a.words[i], a0, a1);
        T::unpack(b.words[i], b0, b1);
        c.words[i] = T::pack(a0 + b0, a1 + b1);
    }
    return c;
}

// This thread's unit of a row of memory.
template <int D>
DEVICE Chunk own_unit(int head_dim, const uint16_t* row) {
    if (own_column<D>() >= head_dim) return {};
    return *reinterpret_cast<const Chunk*>(row + own_column<D>());
}

// Adds a row to all rows of a tile that copy_tile has copied. Each thread adds to what it
// copied itself, so it has to wait for no other.
template <class T, int D>
DEVICE void add_row(Shared<uint16_t> tile, int rows, int head_dim, const Chunk& added) {
    if (own_column<D>() >= head_dim) return;
    for_own_units<D>(rows, [&](int row, int column) {
        const auto at = (tile + (row * row_stride<D> + column)).template as<Chunk>();
        store(at, sum<T>(load(at), added));
    });
}

// Writes what add_row has left in a tile to memory: row r to to(r), unless that is null.
template <int D, class To>
DEVICE void store_own(Shared<uint16_t> tile, int rows, int head_dim, const To& to) {
    for_own_units<D>(rows, [&](int row, int column) {
        uint16_t* target = to(row);
        if (target && column < head_dim)
            *reinterpret_cast<Chunk*>(target + column) =
                load((tile + (row * row_stride<D> + column)).template as<Chunk>());
    });
}

// Rounds an accumulator (16, D) of the warp to 16 rows of a tile.
template <class T, int D>
DEVICE void store_halves(Shared<uint16_t> tile, const float (&x)[D / 8][4]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const auto at = tile + (row_slot(0, i) * row_stride<D> + column_slot(0, n, 0));
            store(at.template as<uint32_t>(), T::pack(x[n][i], x[n][i + 1]));
        }
}

// The same, and from there to memory: row r to to(r), unless that is null.
template <class T, int D, class To>
DEVICE void store_rows(Shared<uint16_t> tile, const float (&x)[D / 8][4], int head_dim,
                       const To& to) {
    store_halves<T, D>(tile, x);
    warp_barrier();
    const int first = opaque(lane());  // addresses are not kept in registers through a loop
#pragma unroll
    for (int before = 0; before < 16 * (D / 8); before += 32) {
        const int r = (before + first) / (D / 8), c = (before + first) % (D / 8) * 8;
        uint16_t* target = to(r);
        if (target && c < head_dim)
            *reinterpret_cast<Chunk*>(target + c) =
                load((tile + (r * row_stride<D> + c)).template as<Chunk>());
    }
}

// The same without a tile: pairs of columns from registers.
template <class T, int D, class To>
DEVICE void store_directly(const float (&x)[D / 8][4], int head_dim, const To& to) {
    for (int i = 0; i < 4; i += 2) {
        uint16_t* target = to(row_slot(0, i));
        if (!target) continue;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int column = column_slot(0, n, 0);
            if (column < head_dim)
                *reinterpret_cast<uint32_t*>(target + column) = T::pack(x[n][i], x[n][i + 1]);
        }
    }
}

// Adds a row to all rows of an accumulator; pair_at(column) has two numbers of it.
template <class T, int D, class PairAt>
DEVICE void add_to_rows(float (&x)[D / 8][4], int head_dim, const PairAt& pair_at) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        const int column = column_slot(0, n, 0);
        if (column >= head_dim) continue;
        float pair[2];
        T::unpack(pair_at(column), pair[0], pair[1]);
        for (int i = 0; i < 4; ++i) x[n][i] += pair[i % 2];
    }
}

// The same of a row of memory.
template <class T, int D>
DEVICE void add_row_to_rows(float (&x)[D / 8][4], int head_dim, const uint16_t* row) {
    add_to_rows<T, D>(x, head_dim, [row](int column) {
        return *reinterpret_cast<const uint32_t*>(row + column);
    });
}

// Sum of column `column` over some rows of a tile.
template <class T, int D, int Rows = block_rows>
DEVICE float column_sum(Shared<uint16_t> tile, int column) {
    float total = 0;
    for (int row = 0; row < Rows; ++row) {
        float x, unused;
        T::unpack(load(tile + (row * row_stride<D> + column)), x, unused);
        total += x;
    }
    return total;
}

// --- products

// 16 x 16 of a tile as the first operand, (m, k) in rows m.
template <int D>
DEVICE void load_a(uint32_t (&a)[4], Shared<uint16_t> tile) {
    ldmatrix(a, tile + (lane() % 16 * row_stride<D> + lane() / 16 * 8));
}

// The same, (m, k) in rows k.
template <int D>
DEVICE void load_a_transposed(uint32_t (&a)[4], Shared<uint16_t> tile) {
    ldmatrix_transposed(a, tile + ((lane() / 16 * 8 + lane() % 8) * row_stride<D> +
                                   lane() / 8 % 2 * 8));
}

// 16 x 16 of a tile as two second operands side by side, (k, n) in rows n.
template <int D>
DEVICE void load_b(uint32_t (&b)[4], Shared<uint16_t> tile) {
    ldmatrix(b, tile + ((lane() / 16 * 8 + lane() % 8) * row_stride<D> + lane() / 8 % 2 * 8));
}

// The same, (k, n) in rows k.
template <int D>
DEVICE void load_b_transposed(uint32_t (&b)[4], Shared<uint16_t> tile) {
    ldmatrix_transposed(b, tile + (lane() % 16 * row_stride<D> + lane() / 16 * 8));
}

template <int N>
DEVICE void zero(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) c[n][i] = 0;
}

// c (16, N) += a (16, 16) b^T, b (N, 16).
template <class T, int N, int D>
DEVICE void multiply_rows(float (&c)[N / 8][4], const uint32_t (&a)[4], Shared<uint16_t> b) {
#pragma unroll
    for (int n = 0; n < N; n += 16) {
        uint32_t y[4];
        load_b<D>(y, b + n * row_stride<D>);
        T::mma(c[n / 8], a, y);
        T::mma(c[n / 8 + 1], a, y + 2);
    }
}

// c (16, N) = a (16, D) b^T, b (N, D).
template <class T, int N, int D>
DEVICE void product(float (&c)[N / 8][4], Shared<uint16_t> a, Shared<uint16_t> b) {
    zero(c);
#pragma unroll 1  // unrolled, loads ahead of their use take too many registers
    for (int k = 0; k < D; k += 16) {
        uint32_t x[4];
        load_a<D>(x, a + k);
        multiply_rows<T, N, D>(c, x, b + k);
    }
}

// c = a b^T and d = e f^T side by side: while one waits for its loads, the other multiplies.
template <class T, int N, int D>
DEVICE void two_products(float (&c)[N / 8][4], Shared<uint16_t> a, Shared<uint16_t> b,
                         float (&d)[N / 8][4], Shared<uint16_t> e, Shared<uint16_t> f) {
    zero(c);
    zero(d);
#pragma unroll 1
    for (int k = 0; k < D; k += 16) {
        uint32_t x[4], y[4];
        load_a<D>(x, a + k);
        load_a<D>(y, e + k);
        multiply_rows<T, N, D>(c, x, b + k);
        multiply_rows<T, N, D>(d, y, f + k);
    }
}

// c (16 R, N) = a (16 R, D) b^T, b (N, D): R groups of rows, in registers, and what is loaded of b
// serves all of them.
template <class T, int R, int N, int D>
DEVICE void product(float (&c)[R][N / 8][4], const uint32_t (&a)[R][D / 16][4], Shared<uint16_t> b) {
    for (int r = 0; r < R; ++r) zero(c[r]);
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t y[4];
            load_b<D>(y, b + (n * row_stride<D> + 16 * k));
#pragma unroll
            for (int r = 0; r < R; ++r) {
                T::mma(c[r][n / 8], a[r][k], y);
                T::mma(c[r][n / 8 + 1], a[r][k], y + 2);
            }
        }
}

// An accumulator as the only one of a group.
template <int N>
DEVICE float (&alone(float (&c)[N][4]))[1][N][4] {
    return reinterpret_cast<float (&)[1][N][4]>(c);
}
template <int N>
DEVICE const float (&alone(const float (&c)[N][4]))[1][N][4] {
    return reinterpret_cast<const float (&)[1][N][4]>(c);
}

// c (16 R, D) += a (16 R, 16) b, b (16, D).
template <class T, int R, int D>
DEVICE void multiply_columns(float (&c)[R][D / 8][4], const uint32_t (&a)[R][4], Shared<uint16_t> b) {
#pragma unroll
    for (int n = 0; n < D; n += 16) {
        uint32_t y[4];
        load_b_transposed<D>(y, b + n);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            T::mma(c[r][n / 8], a[r], y);
            T::mma(c[r][n / 8 + 1], a[r], y + 2);
        }
    }
}

// 16 x 16 of an accumulator, n and the next, as a first operand: rounded they have its layout.
template <class T, int N>
DEVICE void as_first_operand(uint32_t (&a)[4], const float (&c)[N][4], int n) {
    a[0] = T::pack(c[n][0], c[n][1]);
    a[1] = T::pack(c[n][2], c[n][3]);
    a[2] = T::pack(c[n + 1][0], c[n + 1][1]);
    a[3] = T::pack(c[n + 1][2], c[n + 1][3]);
}

// c (16 R, D) += a (16 R, K) b (K, D), a an accumulator.
template <class T, int R, int K, int D>
DEVICE void accumulate(float (&c)[R][D / 8][4], const float (&a)[R][K / 8][4], Shared<uint16_t> b) {
#pragma unroll
    for (int k = 0; k < K / 8; k += 2) {
        uint32_t x[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r) as_first_operand<T>(x[r], a[r], k);
        multiply_columns<T, R, D>(c, x, b + k * 8 * row_stride<D>);
    }
}

template <class T, int K, int D>
DEVICE void accumulate(float (&c)[D / 8][4], const float (&a)[K / 8][4], Shared<uint16_t> b) {
    accumulate<T, 1, K, D>(alone(c), alone(a), b);
}

// c (16, D) = a^T b, a (K, 16) with rows of a tile of width W, b (K, D).
template <class T, int K, int W, int D>
DEVICE void product_transposed(float (&c)[D / 8][4], Shared<uint16_t> a, Shared<uint16_t> b) {
    zero(c);
#pragma unroll 1
    for (int k = 0; k < K; k += 16) {
        uint32_t x[1][4];
        load_a_transposed<W>(x[0], a + k * row_stride<W>);
        multiply_columns<T, 1, D>(alone(c), x, b + k * row_stride<D>);
    }
}

// --- rows and logits

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
