// Products of tiles, by the warps of a block.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

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

}  // namespace diffit::cuda
