// AVX-512-BF16 and AMX by plain AVX-512, so that the kernels for them run on processors without them,
// and sanitizers see the memory that tiles are loaded from and stored to. Included before all else
// where DIFFIT_EMULATE_AMX is on.
//
// As the instructions: tiles sum the even and the odd numbers of all pairs apart, and numbers below
// 2^-126 count as zero. A wrong configuration, none, or a tile used twice ends the process.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12: its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AVX512BF16__ 1
#if defined(EMULATED_TILES)
#define __AMX_BF16__ 1
#endif

namespace {
namespace emulated {

// Numbers below 2^-126 are zero as long as this exists.
class TinyIsZero {
public:
    TinyIsZero() { _mm_setcsr(before_ | 0x8040); }
    ~TinyIsZero() { _mm_setcsr(before_); }

private:
    const unsigned before_ = _mm_getcsr();
};

// The numbers of pairs as floats.
__m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
__m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
}

__m256i rounded(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i half = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    half = _mm512_mask_or_epi32(half, nan, bits, _mm512_set1_epi32(0x00400000));
    const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    half = _mm512_mask_and_epi32(half, tiny, bits, _mm512_set1_epi32(INT32_MIN));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(half, 16));
}

__m256bh narrow(__m512 x) { return (__m256bh)rounded(x); }

__m512bh narrow(__m512 high, __m512 low) {
    const __m512i both = _mm512_castsi256_si512(rounded(low));
    return (__m512bh)_mm512_inserti64x4(both, rounded(high), 1);
}

#if defined(EMULATED_TILES)

constexpr int tiles = 8, rows = 16, row_bytes = 64;

// The tile registers of a thread.
thread_local bool configured = false;
alignas(64) thread_local char registers[tiles][rows][row_bytes];

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated AMX: %s\n", what);
    std::abort();
}

using Tile = char[rows][row_bytes];

Tile& tile(int index) {
    require(configured, "no configuration of tiles is loaded");
    require(0 <= index && index < tiles, "no such tile");
    return registers[index];
}

void load_configuration(const void* configuration) {
    unsigned char bytes[64];
    std::memcpy(bytes, configuration, sizeof bytes);
    unsigned char expected[64] = {1};  // the palette
    for (int i = 0; i < tiles; ++i) {
        expected[16 + 2 * i] = row_bytes;
        expected[48 + i] = rows;
    }
    require(std::memcmp(bytes, expected, sizeof bytes) == 0, "expected 8 tiles of 16 x 64 bytes");
    std::memset(registers, 0, sizeof registers);
    configured = true;
}

void release() { configured = false; }

void zero(int to) { std::memset(tile(to), 0, sizeof(Tile)); }

void load(int to, const void* from, int64_t stride) {
    Tile& loaded = tile(to);
    for (int row = 0; row < rows; ++row)
        std::memcpy(loaded[row], static_cast<const char*>(from) + row * stride, row_bytes);
}

void store(int from, void* to, int64_t stride) {
    const Tile& stored = tile(from);
    for (int row = 0; row < rows; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, stored[row], row_bytes);
}

void multiply(int to, int left, int right) {
    require(to != left && to != right && left != right, "expected three different tiles");
    const TinyIsZero tiny_is_zero;
    Tile &sums = tile(to), &a = tile(left), &b = tile(right);
    for (int row = 0; row < rows; ++row) {
        __m512 of_even = _mm512_setzero_ps(), of_odd = _mm512_setzero_ps();
        for (int k = 0; k < row_bytes / 4; ++k) {
            int pair;
            std::memcpy(&pair, a[row] + 4 * k, sizeof pair);
            const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(b[k]);
            of_even = _mm512_fmadd_ps(even(x), even(y), of_even);
            of_odd = _mm512_fmadd_ps(odd(x), odd(y), of_odd);
        }
        const __m512 before = _mm512_load_ps(sums[row]);
        _mm512_store_ps(sums[row], _mm512_add_ps(before, _mm512_add_ps(of_even, of_odd)));
    }
}

#else

__m512 dot(__m512 sums, __m512bh left, __m512bh right) {
    const TinyIsZero tiny_is_zero;
    const __m512i x = (__m512i)left, y = (__m512i)right;
    return _mm512_fmadd_ps(even(x), even(y), _mm512_fmadd_ps(odd(x), odd(y), sums));
}

#endif  // EMULATED_TILES

}  // namespace emulated
}  // namespace

#define _mm512_cvtneps_pbh emulated::narrow
#define _mm512_cvtne2ps_pbh emulated::narrow
#if defined(EMULATED_TILES)
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_configuration
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply
#else
#define _mm512_dpbf16_ps emulated::dot
#endif
