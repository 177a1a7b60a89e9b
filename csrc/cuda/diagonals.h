// The gradient of the table: sums of dS over what meets in one row of it.
#pragma once

#include "tiles.h"

namespace diffit::cuda {

// Rows of a window that so many slots may reach beyond that of the first, whose number is a multiple of
// theirs.
BOTH constexpr int rows_beyond(int slots, int width) {
    const int step = (width & -width) < slots ? width & -width : slots;
    return (width - step + slots - 1) / width;
}

// Rows of the table, one after another, in which 16 keys meet the queries of a window: from that of the
// last key and the first query on.
BOTH constexpr int table_part_size(int height, int width) {
    return height * width + (height - 1) * (width - 1) + 15 + rows_beyond(16, width) * (width - 1);
}

// Where a warp brings together, of dS of its 16 keys and N queries, what belongs to one row of the
// table: a matrix with a row for each key. A pair is in column (i - query) + (last - j) + dy (pitch - 1):
// i and j are its slots, counted from the first query and the last key, and dy the rows of the window
// between them, counted alike. That is a row of the table, less one that all have in common,
// where the pitch is the width; a wide window has a smaller pitch, so that the columns are few.
template <int N>
struct Diagonals {
    Shared<float> matrix;
    int stride;

    BOTH static constexpr int pitch(int width) { return width < N + 16 ? width : N + 16; }
    BOTH static constexpr int columns(int width) {
        return N + 15 + (rows_beyond(N, width) + rows_beyond(16, width)) * (pitch(width) - 1);
    }
    // Of 16 bytes, to a row: an odd number, so that fewer rows share banks.
    BOTH static constexpr int units(int width) { return (columns(width) + 3) / 4 | 1; }
    BOTH static constexpr int size(int width) { return 16 * 4 * units(width); }

    DEVICE Diagonals(Shared<float> place, int width)
        : matrix(place + warp() * size(width)), stride(4 * units(width)) {
        clear();
    }

    DEVICE void clear() const {
        for (int unit = lane(); unit < 4 * stride; unit += 32)
            store((matrix + 4 * unit).template as<Chunk>(), Chunk{});
    }

    // Sums dS, (keys from `key` on, queries from `query` on), and calls each(row, sum), with rows of the
    // table counted from that of the last key and query 0 on.
    template <class Each>
    DEVICE void sum(const float (&ds)[N / 8][4], const Window& window, int key, int query,
                    const Each& each) const {
        key = opaque(key);  // what depends on it alone takes too many registers in a loop
        const int step = pitch(window.width) - 1;
        const int last = key + 16 < window.slots ? key + 15 : window.slots - 1;
        const int origin = last - query + (window.row(last) - window.row(query)) * step;
        warp_barrier();
        for (int r = 0; r < 2; ++r) {
            const int slot = row_slot(key, 2 * r);
            if (slot >= window.slots) continue;
            const auto row =
                matrix + (row_slot(0, 2 * r) * stride + origin - slot - window.row(slot) * step);
            // Eight queries may be a part of one row of the window.
            if (window.width % 8 == 0) {
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        store(row + (column_slot(query, n, c) + window.row(query + 8 * n) * step),
                              ds[n][2 * r + c]);
            } else {
#pragma unroll
                for (int n = 0; n < N / 8; ++n)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int other = column_slot(query, n, c);
                        store(row + (other + window.row(other) * step), ds[n][2 * r + c]);
                    }
            }
        }
        warp_barrier();
        const int first = window.position(query);
        for (int column = lane(); column < columns(window.width); column += 32) {
            const int i = first + column + column / (N + 15) * (window.width - step - 1);
            float total[2] = {0, 0};
#pragma unroll
            for (int t = 0; t < 16; ++t) total[t % 2] += load(matrix + (t * stride + column));
            each(i, total[0] + total[1]);
        }
    }

    // Before the next tiles. Where they are cut alike, the same places are written again.
    DEVICE void renew(const Window& window) const {
        if (window.width % 16 || (N % window.width && window.width % N)) {
            warp_barrier();
            clear();
        }
    }
};

}  // namespace diffit::cuda
