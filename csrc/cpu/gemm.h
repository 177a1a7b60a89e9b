// Small matrix products C (+)= A B, on packed operands. An engine says how operands are stored:
//   A  (m, k), rows contiguous
//   B  (k / pair, n) groups of `pair` consecutive k: what the dot product instructions read
//   C  (m, n) float
// Dimensions are multiples of m_align, W (n) and k_align; packing pads with zeros.
#pragma once

#include "vec.h"

namespace diffit {
namespace {

constexpr int round_up(int64_t n, int multiple) {
    return static_cast<int>((n + multiple - 1) / multiple * multiple);
}

template <int n>
struct Number {
    constexpr operator int() const { return n; }
};

// f(Number<n>), n <= N known at run time.
template <int N, class F>
inline void with_vectors(int n, const F& f) {
    if constexpr (N > 1) {
        if (n < N) return with_vectors<N - 1>(n, f);
    }
    f(Number<N>{});
}

// C = A B, and how far it is in B from one block of columns to the next.
template <class E>
struct Product {
    static constexpr int block = E::vectors * W;  // columns
    int M, N, K;
    const typename E::A* a;
    int lda;
    const typename E::B* b;
    int ldb;
    int64_t block_step;
    float* c;
    int ldc;

    void run() const {
        if (block_step == block) return E::template gemm<false>(M, N, K, a, lda, b, ldb, c, ldc);
        for (int n = 0; n < N; n += block)
            E::template gemm<false>(M, N - n < block ? N - n : block, K, a, lda,
                                    b + n / block * block_step, ldb, c + n, ldc);
    }
};

// Float operands and fused multiply-adds.
struct FloatEngine {
    using A = float;
    using B = float;
    static constexpr bool brief = false;  // of exponentials, see exp2
    static vf exp2_as_a(vf x) { return exp2(x); }  // as A holds it, so that sums are of what it holds
    static constexpr int pair = 1;
    static constexpr int vectors = W == 16 ? 4 : 2;  // the widest register tile
    static constexpr int queries = vectors * W;      // of a block of attention at most
    static constexpr int m_align = 8;
    static constexpr int k_align = 1;
    static constexpr int pad = W > 8 ? W : 8;  // of packed dimensions
    static constexpr bool ahead = false;       // see Forward

    static void enter() {}
    static void leave() {}

    // Rows j and j + 1 of B.
    template <int NV>
    static void put_b(B* b, int ldb, int j, const vf (&x)[NV], const vf (&y)[NV]) {
        put_a(b + j * ldb, x);
        put_a(b + (j + 1) * ldb, y);
    }
    template <int NV>
    static void put_a(A* a, const vf (&x)[NV]) {
        for (int v = 0; v < NV; ++v) store(a + v * W, x[v]);
    }

    // The W words of 32 bits at word c of a row of d numbers as A, zeros past its end.
    template <class T>
    static vf words(const T* row, int c, int d) {
        return W <= 8 || c + W <= d ? load(row + c) : load(row + c, d - c);
    }

    // scale (row(i) + add), d numbers, as rows i < count of A.
    template <class Row>
    static void rows_to_a(int count, const Row& row, const float* add, float scale, int d, A* a,
                          int lda) {
        for (int i = 0; i < count; ++i) convert_row(a + i * lda, row(i), add, scale, d);
    }

    // `pair` rows of d numbers as a row of B, and rows c of a product with it as
    // row(i) = factors[i] c[i] + add.
    template <class T>
    static void rows_to_b(const T* const (&row)[pair], int d, B* b) {
        copy_row(b, row[0], d);
    }
    template <class Row>
    static void store_rows(int count, const Row& row, const float* c, int ldc,
                           const float* factors, const float* add, int d) {
        for (int i = 0; i < count; ++i) {
            const vf factor = splat(factors[i]);
            const float* x = c + i * ldc;
            int j = 0;
            for (; j + W <= d; j += W) store(row(i) + j, load(x + j) * factor + load(add + j));
            if (W > 8 && j < d) store(row(i) + j, load(x + j) * factor + load(add + j), 8);
        }
    }

    // B of a product that runs over the rows of A.
    static const B* rows_as_b(const A* a, int, int, int, B*) { return a; }

    // Rows of a tile: sums fill about half of the registers, and hide the latency of an addition.
    template <int NV>
    static constexpr int rows = NV > vectors / 2 ? 4 : 8;

    template <int NV, bool accumulate>
    static void tile(int K, const A* a, int lda, const B* b, int ldb, float* c, int ldc) {
        constexpr int MR = rows<NV>;
        vf acc[MR][NV] = {};
        for (int k = 0; k < K; ++k) {
            vf x[NV];
            for (int v = 0; v < NV; ++v) x[v] = load(b + k * ldb + v * W);
            for (int i = 0; i < MR; ++i) {
                const vf y = splat(a[i * lda + k]);
                for (int v = 0; v < NV; ++v) acc[i][v] += y * x[v];
            }
        }
        for (int i = 0; i < MR; ++i) {
            for (int v = 0; v < NV; ++v) {
                float* sum = c + i * ldc + v * W;
                store(sum, accumulate ? load(sum) + acc[i][v] : acc[i][v]);
            }
        }
    }

    // Blocks of k keep that part of B in the first-level cache. What they add to C starts from 0,
    // since a long chain of additions to one sum would lose digits. Of few columns PyTorch makes dot
    // products in shorter chains yet.
    template <bool accumulate>
    static void gemm(int M, int N, int K, const A* a, int lda, const B* b, int ldb, float* c,
                     int ldc) {
        const int block = N > W ? 128 : 16;
        product<accumulate>(M, N, K < block ? K : block, a, lda, b, ldb, c, ldc);
        for (int k = block; k < K; k += block)
            product<true>(M, N, K - k < block ? K - k : block, a + k, lda, b + k * ldb, ldb, c,
                          ldc);
    }

    // Columns in tiles of `vectors` vectors and then of fewer. With AVX-512 five are not cut in four and
    // one.
    template <bool accumulate>
    static void product(int M, int N, int K, const A* a, int lda, const B* b, int ldb, float* c,
                        int ldc) {
        constexpr int most = W == 16 ? vectors + 1 : vectors;
        const auto strip = [&](int n, auto width) {
            for (int m = 0; m < M; m += rows<width>)
                tile<width, accumulate>(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc);
        };
        int n = 0;
        for (; N - n > most * W; n += vectors * W) strip(n, Number<vectors>{});
        if (n < N) with_vectors<most>((N - n) / W, [&](auto width) { strip(n, width); });
    }
};

#if defined(__AVX512BF16__)

// bfloat16 operands in pairs, float sums: AVX512-BF16 dot products, or AMX tiles.
struct Bfloat16Engine {
    using A = uint16_t;
    using B = uint32_t;
    static constexpr bool brief = true;
    static vf exp2_as_a(vf x) { return exp2_bfloat16(x); }
    static constexpr int pair = 2;
    static constexpr int vectors = 2;
    static constexpr int queries = 64;
    static constexpr int m_align = 16;
    static constexpr int k_align = 32;
    static constexpr int pad = 32;
    // Tile registers are not loaded from stores that are still on their way to the cache.
#if defined(__AMX_BF16__)
    static constexpr bool ahead = true;
#else
    static constexpr bool ahead = false;
#endif

    template <int NV>
    static void put_b(B* b, int ldb, int j, const vf (&x)[NV], const vf (&y)[NV]) {
        for (int v = 0; v < NV; ++v)
            _mm512_storeu_si512(b + j / 2 * ldb + v * W, interleaved(x[v], y[v]));
    }
    template <int NV>
    static void put_a(A* a, const vf (&x)[NV]) {
        int v = 0;
        for (; v + 2 <= NV; v += 2)
            _mm512_storeu_si512(a + v * W,
                                (__m512i)_mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]));
        if (v < NV) store(reinterpret_cast<bf16*>(a) + v * W, x[v]);
    }

    // 32 numbers of which the even are those of x and the odd those of y.
    static __m512i interleaved(vf x, vf y) {
        const __m512i order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
            4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
    }

    // W numbers of two rows as pairs.
    static void interleave(const A* a, int64_t lda, B* b) {
        const vu low = widen(load_half(a)), high = widen(load_half(a + lda));
        store(reinterpret_cast<float*>(b), (vf)(low | (high << 16)));
    }
    static vf words(const bf16* row, int c, int d) {
        return c + W <= d / 2 ? load(reinterpret_cast<const float*>(row) + c)
                              : load(reinterpret_cast<const float*>(row) + c, d / 2 - c);
    }
    template <class Row>
    static void rows_to_a(int count, const Row& row, const float* add, float scale, int d, A* a,
                          int lda) {
        int c = 0;
        for (; c + 32 <= d; c += 32) {
            const vf low = load(add + c) * scale, high = load(add + c + W) * scale;
            const vf even = DIFFIT_SHUFFLE(low, high, DIFFIT_EVEN);
            const vf odd = DIFFIT_SHUFFLE(low, high, DIFFIT_ODD);
            for (int i = 0; i < count; ++i) {
                const vu x = (vu)_mm512_loadu_si512(row(i) + c);
                _mm512_storeu_si512(a + i * lda + c,
                                    interleaved((vf)(x << 16) * scale + even,
                                                (vf)(x & 0xffff0000u) * scale + odd));
            }
        }
        if (c == d) return;
        bf16* out = reinterpret_cast<bf16*>(a) + c;
        for (int i = 0; i < count; ++i)
            convert_row(out + i * lda, row(i) + c, add + c, scale, d - c);
    }

    // Of 32 columns a first vector of B, and of c, has those at 0 to 3, 8 to 11 and so on, a second
    // the rest: so they need not cross lanes on the way in, and come back as narrow numbers.
    static void rows_to_b(const bf16* const (&row)[pair], int d, B* b) {
        int c = 0;
        for (; c + 32 <= d; c += 32) {
            const __m512i x = _mm512_loadu_si512(row[0] + c), y = _mm512_loadu_si512(row[1] + c);
            _mm512_storeu_si512(b + c, _mm512_unpacklo_epi16(x, y));
            _mm512_storeu_si512(b + c + W, _mm512_unpackhi_epi16(x, y));
        }
        const auto both = [](vf low, vf high) { return (vf)((vu)low >> 16 | (vu)high); };
        float* out = reinterpret_cast<float*>(b);
        for (; c + W <= d; c += W) store(out + c, both(load(row[0] + c), load(row[1] + c)));
        if (c < d) store(out + c, both(load(row[0] + c, 8), load(row[1] + c, 8)));
    }
    template <class Row>
    static void store_rows(int count, const Row& row, const float* c, int ldc,
                           const float* factors, const float* add, int d) {
        int j = 0;
        for (; j + 32 <= d; j += 32) {
            const __m512 low = (__m512)load(add + j), high = (__m512)load(add + j + W);
            const vf first = (vf)_mm512_shuffle_f32x4(low, high, 0x88);
            const vf second = (vf)_mm512_shuffle_f32x4(low, high, 0xdd);
            for (int i = 0; i < count; ++i) {
                const float* x = c + i * ldc + j;
                const vf y = load(x) * factors[i] + first, z = load(x + W) * factors[i] + second;
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)z, (__m512)y);
                const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
                _mm512_storeu_si512(row(i) + j, _mm512_permutexvar_epi64(order, both));
            }
        }
        for (; j < d; j += W) {
            const int n = std::min(W, d - j);
            for (int i = 0; i < count; ++i)
                store(row(i) + j, load(c + i * ldc + j) * factors[i] + load(add + j), n);
        }
    }
    static const B* rows_as_b(const A* a, int lda, int rows, int columns, B* b) {
        for (int r = 0; r < rows; r += 2)
            for (int c = 0; c < columns; c += W)
                interleave(a + r * lda + c, lda, b + r / 2 * lda + c);
        return b;
    }

#if defined(__AMX_BF16__)

    struct alignas(64) TileConfig {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static void enter() {
        static constexpr TileConfig config;
        _tile_loadconfig(&config);
    }
    static void leave() { _tile_release(); }

    // TM x TN tiles of 16 x 16 sums.
    template <int TM, int TN, bool accumulate>
    static void tile(int K, const A* a, int lda, const B* b, int ldb, float* c, int ldc) {
        const int a_bytes = lda * 2, b_bytes = ldb * 4, c_bytes = ldc * 4;
        if (accumulate) {
            _tile_loadd(0, c, c_bytes);
            if (TN == 2) _tile_loadd(1, c + 16, c_bytes);
            if (TM == 2) _tile_loadd(2, c + 16 * ldc, c_bytes);
            if (TM == 2 && TN == 2) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
        } else {
            _tile_zero(0);
            if (TN == 2) _tile_zero(1);
            if (TM == 2) _tile_zero(2);
            if (TM == 2 && TN == 2) _tile_zero(3);
        }
        for (int k = 0; k < K; k += 32) {
            _tile_loadd(4, a + k, a_bytes);
            _tile_loadd(6, b + k / 2 * ldb, b_bytes);
            _tile_dpbf16ps(0, 4, 6);
            if (TN == 2) {
                _tile_loadd(7, b + k / 2 * ldb + 16, b_bytes);
                _tile_dpbf16ps(1, 4, 7);
            }
            if (TM == 2) {
                _tile_loadd(5, a + 16 * lda + k, a_bytes);
                _tile_dpbf16ps(2, 5, 6);
            }
            if (TM == 2 && TN == 2) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, c_bytes);
        if (TN == 2) _tile_stored(1, c + 16, c_bytes);
        if (TM == 2) _tile_stored(2, c + 16 * ldc, c_bytes);
        if (TM == 2 && TN == 2) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    }

    template <bool accumulate>
    static void gemm(int M, int N, int K, const A* a, int lda, const B* b, int ldb, float* c,
                     int ldc) {
        asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
        for (int n = 0; n < N; n += 32) {
            for (int m = 0; m < M; m += 32) {
                const bool tall = m + 32 <= M, wide = n + 32 <= N;
                const auto run = tall ? (wide ? tile<2, 2, accumulate> : tile<2, 1, accumulate>)
                                      : (wide ? tile<1, 2, accumulate> : tile<1, 1, accumulate>);
                run(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc);
            }
        }
    }

#else

    static void enter() {}
    static void leave() {}

    template <int NV, bool accumulate>
    static void tile(int K, const A* a, int lda, const B* b, int ldb, float* c, int ldc) {
        constexpr int rows = 8;
        __m512 acc[rows][NV];
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < NV; ++v)
                acc[i][v] = accumulate ? _mm512_loadu_ps(c + i * ldc + v * W) : _mm512_setzero_ps();
        for (int k = 0; k < K; k += 2) {
            __m512bh x[NV];
            for (int v = 0; v < NV; ++v)
                x[v] = (__m512bh)_mm512_loadu_si512(b + k / 2 * ldb + v * W);
            for (int i = 0; i < rows; ++i) {
                int two;
                std::memcpy(&two, a + i * lda + k, sizeof two);
                const __m512bh y = (__m512bh)_mm512_set1_epi32(two);
                for (int v = 0; v < NV; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], y, x[v]);
            }
        }
        for (int i = 0; i < rows; ++i)
            for (int v = 0; v < NV; ++v) _mm512_storeu_ps(c + i * ldc + v * W, acc[i][v]);
    }

    template <bool accumulate>
    static void gemm(int M, int N, int K, const A* a, int lda, const B* b, int ldb, float* c,
                     int ldc) {
        int n = 0;
        for (; n + 2 * W <= N; n += 2 * W)
            for (int m = 0; m < M; m += 8)
                tile<2, accumulate>(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc);
        for (; n < N; n += W)
            for (int m = 0; m < M; m += 8)
                tile<1, accumulate>(K, a + m * lda, lda, b + n, ldb, c + m * ldc + n, ldc);
    }

#endif
};

#endif  // __AVX512BF16__

}  // namespace
}  // namespace diffit
