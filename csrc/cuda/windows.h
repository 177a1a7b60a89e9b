// Windows of a grid: the tokens in them, and where two of them meet in the table.
#pragma once

#include "problem.h"
#include "warp.h"

namespace diffit::cuda {

// Rows of the table of a window.
BOTH constexpr int table_rows(int height, int width) { return (2 * height - 1) * (2 * width - 1); }

// Slots of a window, and the tokens they are.
struct Window {
    int height, width, slots;  // of the window
    int grid_width;
    int first;  // token of the sample in slot 0
    uint32_t inverse;

    DEVICE Window(const WindowAttention& p, int window)
        : height(static_cast<int>(p.window_height)),
          width(static_cast<int>(p.window_width)),
          slots(height * width),
          grid_width(static_cast<int>(p.grid_width)),
          inverse((1u << 21) / width + 1) {
        const int across = static_cast<int>(p.windows_across);
        first = window / across * height * grid_width + window % across * width;
    }

    // slot / width, exact for slots below 2048 and widths up to 1024.
    DEVICE int row(int slot) const { return static_cast<int>(slot * inverse >> 21); }
    // Tokens from that of slot 0 to that of `slot`.
    DEVICE int offset(int slot) const {
        const int y = row(slot);
        return y * grid_width + (slot - y * width);
    }
    DEVICE int token(int slot) const { return first + offset(slot); }
    // Numbers such that slots i and j meet in row position(i) - position(j) + center() of the table.
    DEVICE int position(int slot) const { return slot + row(slot) * (width - 1); }
    DEVICE int center() const { return position(slots - 1); }
    DEVICE int table_rows() const { return cuda::table_rows(height, width); }
};

// Floats that the table takes, in whole units of 16 bytes.
BOTH constexpr int table_size(int table_rows) { return (table_rows + 3) / 4 * 4; }

DEVICE int windows_of(const WindowAttention& p) { return static_cast<int>(p.windows); }
BOTH int tokens_of(const WindowAttention& p) {
    return static_cast<int>(p.grid_height) * static_cast<int>(p.grid_width);
}
BOTH int dim_of(const WindowAttention& p) {
    return static_cast<int>(p.heads) * static_cast<int>(p.head_dim);
}

}  // namespace diffit::cuda
