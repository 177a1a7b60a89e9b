// One vector of floats of the instruction set this file is compiled for, and what is done with it.
// GCC's vector extension keeps the kernels in one source for SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace diffit {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef double vd __attribute__((vector_size(W * 8)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline vf splat(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(x);
#else
    return vf{} + x;
#endif
}
inline vi as_int(vf x) { return (vi)x; }
inline vf as_float(vi x) { return (vf)x; }

inline vf load(const float* p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

inline vh load_half(const void* p) {
    vh x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Conversions for which compilers have no single instruction unless it is named.
inline vu widen(vh x) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vu);
#endif
}
inline vh narrow(vu x) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, vh);
#endif
}

// Whether all lanes of a comparison are true.
inline bool all(vi x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) == 0xffff;
#else
    bool result = true;
    for (int i = 0; i < W; ++i) result &= x[i] != 0;
    return result;
#endif
}

inline float sum_of_lanes(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float lanes[W], sum = 0;
    store(lanes, x);
    for (int i = 0; i < W; ++i) sum += lanes[i];
    return sum;
#endif
}

// a where it is larger, else b; b where either is NaN.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// a where it is smaller, else b; b where either is NaN.
inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline vf load(const bf16* p) { return (vf)(widen(load_half(p)) << 16); }

inline void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &h, sizeof h);
#else
    const vu u = (vu)x;
    const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const vu nan = (vu)(x != x);
    const vh h = narrow((rounded & ~nan) | (0x7fc0 & nan));
    std::memcpy(p, &h, sizeof h);
#endif
}

inline vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)load_half(p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)load_half(p));
#else
    const vu h = widen(load_half(p));
    const vu magnitude = h & 0x7fff;
    const vf x = (vf)(magnitude << 13) * 0x1p112f;  // right for subnormal numbers too
    const vu special = (vu)(magnitude >= 0x7c00) & 0x7f800000u;
    return (vf)((vu)x | special | ((h & 0x8000) << 16));
#endif
}

inline void store(fp16* p, vf x) {
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
    const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &h, sizeof h);
#else
    const vu magnitude = (vu)x & 0x7fffffffu;
    // Below 2^-14, adding 0.5 aligns the mantissa with that of a subnormal number and rounds.
    const vu small = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
    const vu normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const vu is_small = (vu)((vf)magnitude < 0x1p-14f), is_nan = (vu)(x != x);
    const vu is_large = (vu)((vf)magnitude >= 65520.0f);
    vu h = (small & is_small) | (normal & ~is_small);
    h = (h & ~(is_large | is_nan)) | (0x7c00 & is_large) | (0x7e00 & is_nan);
    const vh bits = narrow(h | (((vu)x >> 16) & 0x8000));
    std::memcpy(p, &bits, sizeof bits);
#endif
}

// The first n <= W elements; the other lanes are 0.
#if defined(__AVX512F__)

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline vf load(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p); }
inline vf load(const bf16* p, int n) {
    const vh x = (vh)_mm256_maskz_loadu_epi16(first_lanes(n), p);
    return (vf)(widen(x) << 16);
}
inline vf load(const fp16* p, int n) {
    return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline void store(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x); }
template <class T>
inline void store(T* p, vf x, int n) {
    vh half;
    store(reinterpret_cast<T*>(&half), x);
    _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)half);
}

#else

template <class T>
inline vf load(const T* p, int n) {
    if (n == W) return load(p);
    T lanes[W] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}
template <class T>
inline void store(T* p, vf x, int n) {
    if (n == W) return store(p, x);
    T lanes[W];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
}

#endif

// Calls each(first, lanes) for the vectors of a row.
template <class Each>
inline void over(int64_t count, const Each& each) {
    int64_t c = 0;
    for (; c + W <= count; c += W) each(c, W);
    if (c < count) each(c, static_cast<int>(count - c));
}

// out[c] = scale * (x[c] + add[c]) for c < d, a multiple of 8.
template <class T, class U>
inline void convert_row(U* out, const T* x, const float* add, float scale, int d) {
    const auto converted = [&](vf v, int c) { return (add ? v + load(add + c) : v) * scale; };
    int c = 0;
    for (; c + W <= d; c += W) store(out + c, converted(load(x + c), c));
    if (W > 8 && c < d) store(out + c, converted(load(x + c, 8), c), 8);
}

template <class T, class U>
inline void copy_row(U* out, const T* x, int d) {
    convert_row(out, x, nullptr, 1.0f, d);
}
inline void copy_row(bf16* out, const bf16* x, int d) {
    int c = 0;
    for (; c + 32 <= d; c += 32) std::memcpy(out + c, x + c, 32 * sizeof(bf16));
    for (; c < d; c += 8) std::memcpy(out + c, x + c, 8 * sizeof(bf16));
}

// With `write`, for a row that will be stored.
template <int write = 0, class T>
inline void prefetch_row(const T* x, int d) {
    for (int c = 0; c < d; c += 64 / sizeof(T)) __builtin_prefetch(x + c, write);
}

#if defined(__AVX512F__)
inline vf fraction(vf x) {
    return (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// x 2^floor(y)
inline vf scale_by_exp2(vf x, vf y) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)y); }

// 2^r - 1 for r in [0, 1), exact at 0 and at 1.
inline vf brief_exp2_minus_1(vf r) {
    return ((splat(7.8267469e-2f) * r + 2.2630836e-1f) * r + 6.9542417e-1f) * r;
}

// 2^x in brief, as a number that bfloat16 holds.
inline vf exp2_bfloat16(vf x) {
    constexpr float magic = 0x1.8p16f;  // adding it to a number of [1, 2] rounds to 7 bits
    return scale_by_exp2((brief_exp2_minus_1(fraction(x)) + (1.0f + magic)) - magic, x);
}
#endif

// 2^x, NaN where x is NaN. The relative error is below 2e-7, or below 1.1e-4 in `brief`, for results
// that are rounded to bfloat16. With AVX-512 for any x, 0 and infinity included; otherwise x is taken
// as the nearest number of [-125, 126].
template <bool brief = false>
inline vf exp2(vf x) {
#if defined(__AVX512F__)
    if constexpr (brief) return scale_by_exp2(brief_exp2_minus_1(fraction(x)) + 1.0f, x);
    const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = max(splat(-125.0f), min(splat(126.0f), x));
    const vf magic = splat(0x1.8p23f);  // adding it rounds to an integer, left in the low bits
    const vf shifted = x + magic;
    const vf r = x - (shifted - magic);
#endif
    // A minimax polynomial of 2^r on [-1/2, 1/2] that is exact at 0.
    vf p = splat(1.5345812e-4f) * r + 1.3399931e-3f;
    p = p * r + 9.6184891e-3f;
    p = p * r + 5.5503286e-2f;
    p = p * r + 2.4022646e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
    return as_float(as_int(p) + (as_int(shifted) << 23));
#endif
}

// Natural logarithm of a normal x > 0; NaN stays NaN.
inline vf log(vf x) {
    // x = 2^e (1 + m) with 1 + m in [sqrt(1/2), sqrt(2)).
    const vi bits = as_int(x) - 0x3f3504f3;
    const vf e = __builtin_convertvector(bits >> 23, vf);
    const vf m = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    // log(1 + m) = 2 atanh(s), s = m / (2 + m), as a series in s^2 <= 0.0295.
    const vf s = m / (m + 2.0f), s2 = s * s;
    vf p = splat(2.0f / 9);
    p = p * s2 + 2.0f / 7;
    p = p * s2 + 2.0f / 5;
    p = p * s2 + 2.0f / 3;
    p = p * s2 + 2.0f;
    // log(2) in two parts: its product with e is exact in the first.
    const vf y = e * 0.693359375f + (e * -2.12194440e-4f + p * s);
    return x != x ? x : y;
}

// 1 / x for normal x, to about 1 ulp, or to 2^-14 in `brief`.
template <bool brief = false>
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
    const vf y = (vf)_mm512_rcp14_ps((__m512)x);
    return brief ? y : y + y * (1.0f - x * y);
#else
    return 1.0f / x;
#endif
}

#if defined(__AVX512F__)
#define DIFFIT_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define DIFFIT_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define DIFFIT_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define DIFFIT_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define DIFFIT_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define DIFFIT_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define DIFFIT_LOW 0, 4, 1, 5
#define DIFFIT_HIGH 2, 6, 3, 7
#endif

#if defined(__clang__)
#define DIFFIT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DIFFIT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Lane i: the numbers of x[i] combined by `of`, which takes two vectors.
template <class Of>
inline vf across_lanes(const vf (&x)[W], const Of& of) {
    vf y[W];
    for (int i = 0; i < W; ++i) y[i] = x[i];
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            y[i] = of(DIFFIT_SHUFFLE(y[i], y[i + half], DIFFIT_LOW),
                      DIFFIT_SHUFFLE(y[i], y[i + half], DIFFIT_HIGH));
    return y[0];
}

// dst[c][r] = row(r, c)[0] for 32-bit elements, W of which row(r, c) gives at once; rows and columns are
// multiples of W.
template <class Row>
inline void transpose(const Row& row, void* dst, int64_t dst_stride, int rows, int columns) {
    float* out = static_cast<float*>(dst);
    for (int r = 0; r < rows; r += W) {
        for (int c = 0; c < columns; c += W) {
            vf x[W], y[W];
            for (int i = 0; i < W; ++i) x[i] = row(r + i, c);
            // log2(W) rounds of interleaving rows i and i + W / 2.
            for (int width = 1; width < W; width *= 2) {
                for (int i = 0; i < W / 2; ++i) {
                    y[2 * i] = DIFFIT_SHUFFLE(x[i], x[i + W / 2], DIFFIT_LOW);
                    y[2 * i + 1] = DIFFIT_SHUFFLE(x[i], x[i + W / 2], DIFFIT_HIGH);
                }
                for (int i = 0; i < W; ++i) x[i] = y[i];
            }
            for (int i = 0; i < W; ++i) store(out + (c + i) * dst_stride + r, x[i]);
        }
    }
}
inline void transpose(const void* src, int64_t src_stride, void* dst, int64_t dst_stride, int rows,
                      int columns) {
    const float* in = static_cast<const float*>(src);
    transpose([&](int r, int c) { return load(in + r * src_stride + c); }, dst, dst_stride, rows,
              columns);
}

}  // namespace
}  // namespace diffit
