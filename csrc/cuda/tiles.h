// Tiles of rows in shared memory, which the attention kernels share.
//
// A block is four warps. A tile is some rows of a head, D columns of 16 bits, D a multiple of 16;
// what a head or a window has not is zero. Its rows lie D + 8 elements apart: an odd number of 16
// byte units, so that the eight rows of an ldmatrix are in different banks. An accumulator of a warp
// is 16 x N numbers: thread l has rows l / 4 and l / 4 + 8, and columns 8 n + 2 (l % 4) + {0, 1},
// at [n][0..1] of the first row and [n][2..3] of the second.
#pragma once

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

}  // namespace diffit::cuda
