// Runs CUDA kernels on the CPU: the threads of a block are fibres that run one after another, each
// until it needs the others. Wrong use of shared memory is an exception, whatever order the threads
// ran in: a race (two accesses, one a write, that no barrier orders), a read of what nobody wrote or
// of a copy nobody waited for, an address out of bounds or not aligned. Global memory is the
// caller's: AddressSanitizer watches it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

constexpr int lanes = 32;

// Runs body as every thread of every block. Throws std::runtime_error.
void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body);

// Of the running thread.
int thread();
int threads();  // of its block
int64_t block();
char* shared_memory();

void block_barrier();
void warp_barrier();

// What all lanes of a warp do together: the last to come calls perform(arguments of all lanes).
void collective(const char* name, void* argument, void (*perform)(void* const* arguments));

enum class Access { read, write };

// Every access of a thread (index in the block) to shared memory.
void check(Access access, const void* at, size_t bytes, int thread);
// The same of the running thread. Lanes that come here one after another are one instruction.
void check_own(Access access, const void* at, size_t bytes);

// cp.async of the running thread: the bytes are there when it has waited. No source: zeros.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(int groups_under_way);

// Products in the background: what is issued for a warp is performed when the warp waits, if it was
// committed. They see what other threads have written and then shown.
void issue_product(std::function<void()> perform);  // within a collective
void commit_products();
void wait_for_products();
void show_to_products();
// Every access of a product to shared memory.
void check_product(const void* at, size_t bytes);

// Barriers that count what is copied in the background, in phases: the bytes are there when somebody has waited
// for the phase. A place in shared memory stands for each.
void initialize_barrier(void* barrier);
void begin_phase(void* barrier, size_t bytes);
void copy_in_phase(void* barrier, void* to, const void* from, size_t bytes);
void wait_for_phase(void* barrier, int phase);

// Accesses to shared memory as the hardware makes them, in wavefronts of at most 32 banks of 4
// bytes; more wavefronts than an access of its width needs are bank conflicts.
struct Wavefronts {
    int64_t needed, made;
};
enum class Kind { ldmatrix, load, store, copy, kinds };
Wavefronts& wavefronts(Kind kind);
// Rows of 16 bytes, eight at a time.
void count_rows(Kind kind, const void* const* rows, int count);

}  // namespace emulator
