// Checks of the emulator, one for each name on the command line: layouts of fragments against the
// formulas of the PTX manual, and mistakes that it must catch. Without a name, all names are printed.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "emulated_warp.h"

using namespace diffit::cuda;

namespace {

void require(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(2);
}

// Where a mistake must be found: what the message must have in it.
void require_failure(const std::function<void()>& run, const std::string& what) {
    try {
        run();
    } catch (const std::runtime_error& error) {
        require(std::string(error.what()).find(what) != std::string::npos,
                "expected \"" + what + "\", got \"" + error.what() + "\"");
        return;
    }
    require(false, "not found: " + what);
}

// Stores f(i) in 16-bit element i of shared memory, by the threads in turn.
template <class F>
void fill(int elements, int threads, const F& f) {
    for (int i = thread_index(); i < elements; i += threads)
        store(shared_memory<uint16_t>() + i, static_cast<uint16_t>(f(i)));
}

// --- layouts

// PTX: thread T of ldmatrix gets row T / 4, elements 2 (T % 4) and the next, of each matrix; with
// .trans the same of the transposed matrix. Row r of matrix m is at the address of thread 8 m + r.
void ldmatrix_layout() {
    emulator::run(1, 32, 1024, [] {
        // Rows far apart and in no order: element (m, r, c) is 64 m + 8 r + c.
        const auto place = [](int m, int r) { return ((8 * m + r) * 7 % 32) * 16; };
        for (int m = 0; m < 4; ++m)
            for (int r = 0; r < 8; ++r)
                if (thread_index() < 8)
                    store(shared_memory<uint16_t>() + (place(m, r) + thread_index()),
                          static_cast<uint16_t>(64 * m + 8 * r + thread_index()));
        warp_barrier();
        const int t = thread_index();
        uint32_t x[4], y[4];
        ldmatrix(x, shared_memory<uint16_t>() + place(t / 8, t % 8));
        ldmatrix_transposed(y, shared_memory<uint16_t>() + place(t / 8, t % 8));
        for (int m = 0; m < 4; ++m) {
            const uint32_t first = 64 * m + 8 * (t / 4) + 2 * (t % 4);
            require(x[m] == (first | (first + 1) << 16), "ldmatrix");
            const uint32_t upper = 64 * m + 8 * (2 * (t % 4)) + t / 4;
            require(y[m] == (upper | (upper + 8) << 16), "ldmatrix.trans");
        }
    });
}

// PTX, fragments of mma.m16n8k16 for 16-bit types, groupID = lane >> 2, in_group = lane % 4:
//   A, a0..a7: row groupID for a0 a1 a4 a5, else groupID + 8; column 2 in_group + (i & 1), + 8 from a4
//   B, b0..b3: row 2 in_group + (i & 1), + 8 from b2; column groupID
//   C, c0..c3: row groupID for c0 c1, else groupID + 8; column 2 in_group + (i & 1)
template <class Type>
void mma_layout() {
    const auto a_of = [](int row, int k) { return (row * 5 + k * 3) % 11 - 5; };
    const auto b_of = [](int k, int column) { return (k * 7 + column * 2) % 13 - 6; };
    emulator::run(1, 32, 0, [&] {
        const int group = thread_index() >> 2, in_group = thread_index() % 4;
        uint32_t a[4], b[2];
        const auto pair = [](float x, float y) { return Type::pack(x, y); };
        a[0] = pair(a_of(group, 2 * in_group), a_of(group, 2 * in_group + 1));
        a[1] = pair(a_of(group + 8, 2 * in_group), a_of(group + 8, 2 * in_group + 1));
        a[2] = pair(a_of(group, 2 * in_group + 8), a_of(group, 2 * in_group + 9));
        a[3] = pair(a_of(group + 8, 2 * in_group + 8), a_of(group + 8, 2 * in_group + 9));
        b[0] = pair(b_of(2 * in_group, group), b_of(2 * in_group + 1, group));
        b[1] = pair(b_of(2 * in_group + 8, group), b_of(2 * in_group + 9, group));
        float c[4] = {100, 200, 300, 400};
        Type::mma(c, a, b);
        for (int i = 0; i < 4; ++i) {
            const int row = group + (i < 2 ? 0 : 8), column = 2 * in_group + (i & 1);
            float expected = 100.0f * static_cast<float>(i + 1);
            for (int k = 0; k < 16; ++k) expected += a_of(row, k) * b_of(k, column);
            require(c[i] == expected, "mma");
        }
    });
}

void shuffle_layout() {
    emulator::run(1, 64, 0, [] {
        for (int lanes : {1, 2, 16})
            require(shuffle_xor(thread_index(), lanes) == (thread_index() ^ lanes), "shuffle");
    });
}

void sums_in_memory() {
    float sums[2] = {1, 2};
    emulator::run(1, 64, 0, [&] { add_async(sums + thread_index() % 2, thread_index()); });
    require(sums[0] == 1 + 992 && sums[1] == 2 + 1024, "sums");
}

// Every number is its own rounding, halfway goes to the even one, a little more goes up.
template <class Type>
void rounding() {
    for (uint32_t bits = 0; bits < 0x8000; ++bits) {
        const float x = Type::to_float(bits), next = Type::to_float(bits + 1);
        if (!std::isfinite(x)) continue;
        require(Type::to_bits(x) == bits && Type::to_bits(-x) == (bits | 0x8000), "own rounding");
        if (!std::isfinite(next)) continue;
        const float middle = static_cast<float>((static_cast<double>(x) + next) / 2);
        require(Type::to_bits(middle) == (bits % 2 ? bits + 1 : bits), "halfway");
        require(Type::to_bits(std::nextafter(middle, next)) == bits + 1, "above halfway");
        require(Type::to_bits(std::nextafter(middle, x)) == bits, "below halfway");
    }
    require(Type::to_float(Type::to_bits(INFINITY)) == INFINITY, "infinity");
    require(std::isnan(Type::to_float(Type::to_bits(NAN))), "NaN");
    require(Type::to_float(Type::to_bits(std::numeric_limits<float>::max())) == INFINITY, "overflow");
}

void copies_arrive_in_groups() {
    alignas(16) static const uint16_t source[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const auto run = [](bool wait_for_all) {
        emulator::run(1, 32, 64, [&] {
            const auto shared = shared_memory<uint16_t>();
            if (thread_index() == 0) {
                copy_async(shared, source, true);
                commit_copies();
                copy_async(shared + 8, source + 8, true);
                copy_async(shared + 16, source, false);
                commit_copies();
                wait_for_copies<1>();
                require(load(shared + 7) == 8, "the first group");
                if (wait_for_all) wait_for_copies<0>();
                require(load(shared + 8) == 9, "the second group");
                require(load(shared + 16) == 0, "zeros");
            }
        });
    };
    run(true);
    require_failure([&] { run(false); }, "not waited for");
}

// A row of 16 bytes for each bank, and all in the same banks.
void bank_conflicts() {
    for (int stride : {8, 64}) {
        auto& count = emulator::wavefronts(emulator::Kind::ldmatrix);
        count = {};
        emulator::run(1, 32, 32 * 128, [&] {
            fill(32 * 64, 32, [](int) { return 0; });
            warp_barrier();
            uint32_t x[4];
            ldmatrix(x, shared_memory<uint16_t>() + thread_index() * stride);
        });
        require(count.needed == 4 && count.made == (stride == 8 ? 4 : 32), "ldmatrix");
    }
    auto& count = emulator::wavefronts(emulator::Kind::load);
    count = {};
    emulator::run(1, 32, 32 * 128, [&] {
        for (int i = 0; i < 32; ++i)
            store(shared_memory<float>() + (32 * i + thread_index()), 0.0f);
        warp_barrier();
        load(shared_memory<float>() + thread_index());       // one wavefront
        load(shared_memory<float>() + thread_index() / 16);  // one, two words for all
        load(shared_memory<float>() + 32 * thread_index());  // 32
    });
    require(count.needed == 3 && count.made == 34, "load");
}

// --- mistakes

void missing_block_barrier() {
    const auto run = [](bool barrier) {
        emulator::run(1, 64, 128, [&] {
            fill(64, 64, [](int i) { return i; });
            if (barrier) block_barrier();
            load(shared_memory<uint16_t>() + (63 - thread_index()));
        });
    };
    run(true);
    require_failure([&] { run(false); }, "nobody wrote");
}

// Each thread reads what its neighbour of the warp wrote before: no order of running shows it.
void missing_warp_barrier() {
    const auto run = [](bool barrier) {
        emulator::run(1, 32, 64, [&] {
            fill(32, 32, [](int i) { return i; });
            if (barrier) warp_barrier();
            shuffle_xor(0, 1);  // no barrier
            load(shared_memory<uint16_t>() + (thread_index() + 1) % 32);
        });
    };
    run(true);
    require_failure([&] { run(false); }, "race: read after a write");
}

void missing_barrier_before_a_write() {
    const auto run = [](bool barrier) {
        emulator::run(1, 64, 128, [&] {
            fill(64, 64, [](int i) { return i; });
            block_barrier();
            load(shared_memory<uint16_t>() + (thread_index() + 32) % 64);
            if (barrier) block_barrier();
            fill(64, 64, [](int i) { return i; });
        });
    };
    run(true);
    require_failure([&] { run(false); }, "race");
}

void warp_barrier_between_warps() {
    require_failure(
        [] {
            emulator::run(1, 64, 128, [] {
                fill(64, 64, [](int i) { return i; });
                warp_barrier();
                load(shared_memory<uint16_t>() + (thread_index() + 32) % 64);
            });
        },
        "nobody wrote");
}

// It waits for its own copies; others have to be told by a barrier.
void missing_barrier_after_a_copy() {
    alignas(16) static const uint16_t source[8] = {};
    const auto run = [](bool barrier) {
        emulator::run(1, 32, 32 * 16, [&] {
            copy_async(shared_memory<uint16_t>() + 8 * thread_index(), source, true);
            commit_copies();
            wait_for_copies<0>();
            if (barrier) warp_barrier();
            load(shared_memory<uint16_t>() + 8 * (31 - thread_index()));
        });
    };
    run(true);
    require_failure([&] { run(false); }, "nobody wrote");
}

void missing_wait() {
    alignas(16) static const uint16_t source[8] = {};
    require_failure(
        [] {
            emulator::run(1, 32, 16, [] {
                if (thread_index() == 0) copy_async(shared_memory<uint16_t>(), source, true);
                block_barrier();
                load(shared_memory<uint16_t>());
            });
        },
        "read of a cp.async that was not waited for");
    require_failure(
        [] {
            emulator::run(1, 32, 16, [] {
                if (thread_index() == 0) copy_async(shared_memory<uint16_t>(), source, true);
            });
        },
        "ends before a cp.async was waited for");
}

void shared_memory_out_of_bounds() {
    require_failure([] { emulator::run(1, 32, 64, [] { fill(33, 1, [](int) { return 0; }); }); },
                    "out of bounds");
}

void shared_memory_not_written() {
    require_failure(
        [] { emulator::run(1, 32, 64, [] { load(shared_memory<float>() + 1); }); }, "nobody wrote");
}

void unaligned_row() {
    require_failure(
        [] {
            emulator::run(1, 32, 1024, [] {
                fill(512, 32, [](int) { return 0; });
                warp_barrier();
                uint32_t x[4];
                ldmatrix(x, shared_memory<uint16_t>() + (8 * thread_index() + 4));
            });
        },
        "not aligned");
}

void barrier_that_not_all_reach() {
    require_failure([] { emulator::run(1, 64, 0, [] { if (thread_index() < 40) block_barrier(); }); },
                    "wait");
    require_failure([] { emulator::run(1, 32, 0, [] { if (thread_index() < 31) warp_barrier(); }); },
                    "wait");
}

void different_instructions_in_a_warp() {
    require_failure(
        [] {
            emulator::run(1, 32, 0, [] {
                if (thread_index() < 16)
                    warp_barrier();
                else
                    shuffle_xor(0, 1);
            });
        },
        "its warp is at");
}

// AddressSanitizer ends the process: this returns only if it did not see it.
void global_memory_out_of_bounds() {
    std::vector<uint16_t> global(37);
    emulator::run(1, 64, 128, [&] {
        fill(64, 64, [&](int i) { return i < 38 ? global.data()[i] : 0; });
    });
}

const std::map<std::string, void (*)()> checks = {
    {"ldmatrix_layout", ldmatrix_layout},
    {"mma_layout_bfloat16", mma_layout<BFloat16>},
    {"mma_layout_float16", mma_layout<Float16>},
    {"shuffle_layout", shuffle_layout},
    {"sums_in_memory", sums_in_memory},
    {"rounding_bfloat16", rounding<BFloat16>},
    {"rounding_float16", rounding<Float16>},
    {"copies_arrive_in_groups", copies_arrive_in_groups},
    {"bank_conflicts", bank_conflicts},
    {"missing_block_barrier", missing_block_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"missing_barrier_before_a_write", missing_barrier_before_a_write},
    {"warp_barrier_between_warps", warp_barrier_between_warps},
    {"missing_barrier_after_a_copy", missing_barrier_after_a_copy},
    {"missing_wait", missing_wait},
    {"shared_memory_out_of_bounds", shared_memory_out_of_bounds},
    {"shared_memory_not_written", shared_memory_not_written},
    {"unaligned_row", unaligned_row},
    {"barrier_that_not_all_reach", barrier_that_not_all_reach},
    {"different_instructions_in_a_warp", different_instructions_in_a_warp},
    {"global_memory_out_of_bounds", global_memory_out_of_bounds},
};

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2)
        for (const auto& check : checks) std::puts(check.first.c_str());
    for (int i = 1; i < argc; ++i) {
        const auto check = checks.find(argv[i]);
        require(check != checks.end(), "no such check");
        check->second();
    }
}
