#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {
namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr int nobody = -1, several = -2;

struct Copy {
    char* to;
    std::vector<char> bytes;
};

struct Fibre {
    ucontext_t start;  // setjmp and longjmp switch after that: they make no system calls
    jmp_buf at;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    enum { ready, at_warp, at_block, done } state = done;
    void* sanitizer_stack = nullptr;
    std::deque<std::vector<Copy>> groups;  // of copies under way, the last not committed
    size_t accesses = 0;                   // since the warp last met
    uint32_t shown = 0;                    // how often it has shown what it wrote to products
};

// Where in the order of barriers something was done, and by whom.
struct Event {
    int thread = nobody;
    uint32_t block_epoch = 0, warp_epoch = 0;
    uint32_t shown = 0;  // of the thread
};

// Two bytes of shared memory.
struct Cell {
    Event write;
    Event read;               // the latest; thread: one, or several of a warp between two barriers
    int read_warp = nobody;   // since the last barrier of the block: one, or several
    int copying = nobody;     // the thread whose copy is under way
    bool written = false;
};

struct Warp {
    uint32_t epoch = 0;
    int arrived = 0;
    const char* name = nullptr;
    void (*perform)(void* const*) = nullptr;
    void* arguments[lanes];
    // Accesses of the lanes by position since the warp last met, to count bank conflicts.
    struct Instruction {
        Kind kind;
        size_t bytes;
        std::vector<const char*> addresses;
    };
    std::vector<Instruction> instructions;
    std::vector<std::function<void()>> issued, committed;  // products
};

struct Phase {
    size_t bytes;  // still to come
    std::vector<Copy> copies;
};
struct Barrier {
    int over = 0;  // phases
    std::deque<Phase> phases;
};

std::vector<Fibre> fibres;
std::vector<Warp> warps;
std::map<const void*, Barrier> barriers;
std::vector<Cell> cells;
std::unique_ptr<char, decltype(&std::free)> memory(nullptr, std::free);
size_t memory_bytes = 0;
uint32_t block_epoch = 0;
int arrived_at_block = 0, threads_of_block = 0, running = nobody;
int64_t running_block = 0;
const std::function<void()>* running_body = nullptr;
jmp_buf scheduler;
std::string failure;
Wavefronts counts[static_cast<int>(Kind::kinds)];

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

Warp& warp_of(int thread) { return warps[thread / lanes]; }

[[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error("block " + std::to_string(running_block) + ", thread " +
                             std::to_string(running) + ": " + what);
}

void leave(bool for_good = false) {
    Fibre& self = fibres[running];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self.sanitizer_stack, scheduler_stack,
                                   scheduler_stack_bytes);
#endif
    (void)for_good;
    if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.sanitizer_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void enter(int thread) {
    running = thread;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fibres[thread].stack.get(), stack_bytes);
#endif
    Fibre& fibre = fibres[thread];
    if (_setjmp(scheduler) == 0) {
        if (fibre.started) _longjmp(fibre.at, 1);
        fibre.started = true;
        setcontext(&fibre.start);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
    running = nobody;
}

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    try {
        (*running_body)();
        for (const auto& group : fibres[running].groups)
            if (!group.empty()) fail("it ends before a cp.async was waited for");
        if (const Warp& warp = warp_of(running); warp.issued.size() + warp.committed.size())
            fail("it ends before a product was waited for");
    } catch (const std::exception& error) {
        failure = error.what();
    }
    fibres[running].state = Fibre::done;
    leave(true);
}

// Wavefronts of one instruction: 4 bytes a lane go in one, 16 bytes in four of eight lanes each.
void count(const Warp::Instruction& instruction) {
    const size_t at_once = lanes * 4 / std::max<size_t>(instruction.bytes, 4);
    Wavefronts& total = wavefronts(instruction.kind);
    for (size_t first = 0; first < instruction.addresses.size(); first += at_once) {
        const size_t end = std::min(first + at_once, instruction.addresses.size());
        std::array<std::set<size_t>, 32> banks;
        for (size_t i = first; i < end; ++i) {
            const size_t offset = instruction.addresses[i] - memory.get();
            for (size_t word = offset / 4; word * 4 < offset + instruction.bytes; ++word)
                banks[word % 32].insert(word);
        }
        size_t most = 0;
        for (const auto& bank : banks) most = std::max(most, bank.size());
        total.needed += 1;
        total.made += static_cast<int64_t>(most);
    }
}

void meet(int warp) {
    for (const auto& instruction : warps[warp].instructions) count(instruction);
    warps[warp].instructions.clear();
    for (int lane = 0; lane < lanes; ++lane) fibres[warp * lanes + lane].accesses = 0;
}

bool happened_before(const Event& event, int thread) {
    return event.thread == thread || event.block_epoch < block_epoch ||
           (event.thread / lanes == thread / lanes && event.warp_epoch < warp_of(thread).epoch);
}

std::vector<Copy>& open_group() {
    auto& groups = fibres[running].groups;
    if (groups.empty()) groups.emplace_back();
    return groups.back();
}

Cell* cells_at(const void* at, size_t bytes) {
    const ptrdiff_t offset = static_cast<const char*>(at) - memory.get();
    if (offset < 0 || offset + bytes > memory_bytes)
        fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
             " of " + std::to_string(memory_bytes) + " are out of bounds");
    if (offset % bytes)
        fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
             " are not aligned");
    return &cells[offset / 2];
}

std::string place(const Cell& cell) {
    return " at byte " + std::to_string(2 * (&cell - cells.data())) + " of shared memory";
}

void check_write(Cell& cell, int thread) {
    if (cell.copying != nobody) fail("write to the target of a cp.async under way" + place(cell));
    if (cell.written && !happened_before(cell.write, thread))
        fail("race: write after a write of thread " + std::to_string(cell.write.thread) +
             place(cell));
    if (cell.read_warp != nobody && cell.read.block_epoch == block_epoch &&
        (cell.read_warp != thread / lanes ||
         (cell.read.warp_epoch == warp_of(thread).epoch && cell.read.thread != thread)))
        fail("race: write after a read of another thread" + place(cell));
    cell.write = {thread, block_epoch, warp_of(thread).epoch, fibres[thread].shown};
    cell.written = true;
}

void check_read(Cell& cell, int thread) {
    if (cell.copying != nobody) fail("read of a cp.async that was not waited for" + place(cell));
    if (!cell.written) fail("read of what nobody wrote" + place(cell));
    if (!happened_before(cell.write, thread))
        fail("race: read after a write of thread " + std::to_string(cell.write.thread) +
             place(cell));
    const int warp = thread / lanes;
    const uint32_t warp_epoch = warp_of(thread).epoch;
    if (cell.read_warp == nobody || cell.read.block_epoch != block_epoch) {
        cell.read = {thread, block_epoch, warp_epoch, 0};
        cell.read_warp = warp;
    } else if (cell.read_warp != warp) {
        cell.read_warp = several;
    } else if (cell.read.warp_epoch != warp_epoch) {
        cell.read = {thread, block_epoch, warp_epoch, 0};
    } else if (cell.read.thread != thread) {
        cell.read.thread = several;
    }
}

void run_block() {
    // Exactly sized, so that AddressSanitizer too knows where it ends; nothing in it is a number.
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 1024, memory_bytes)) throw std::bad_alloc();
    memory.reset(static_cast<char*>(allocated));
    std::memset(memory.get(), 0xff, memory_bytes);
    cells.assign(memory_bytes / 2, {});
    warps.assign(threads_of_block / lanes, {});
    barriers.clear();
    block_epoch = 1;
    arrived_at_block = 0;
    for (int i = 0; i < threads_of_block; ++i) {
        Fibre& fibre = fibres[i];
        fibre.started = false;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp = fibre.stack.get();
        fibre.start.uc_stack.ss_size = stack_bytes;
        fibre.start.uc_link = nullptr;
        makecontext(&fibre.start, fibre_main, 0);
        fibre.state = Fibre::ready;
        fibre.groups.clear();
        fibre.accesses = 0;
        fibre.shown = 0;
    }
    for (bool progress = true; progress;) {
        progress = false;
        for (int i = 0; i < threads_of_block; ++i) {
            if (fibres[i].state != Fibre::ready) continue;
            progress = true;
            enter(i);
            if (!failure.empty()) throw std::runtime_error(failure);
        }
    }
    for (int i = 0; i < threads_of_block; ++i)
        if (fibres[i].state != Fibre::done)
            throw std::runtime_error("block " + std::to_string(running_block) + ", thread " +
                                     std::to_string(i) + " waits for threads that do not come");
    for (size_t warp = 0; warp < warps.size(); ++warp) meet(static_cast<int>(warp));
}

}  // namespace

void run(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& body) {
    if (threads % lanes) throw std::runtime_error("expected whole warps");
    if (fibres.size() < static_cast<size_t>(threads)) fibres = std::vector<Fibre>(threads);
    threads_of_block = threads;
    memory_bytes = shared_bytes;
    running_body = &body;
    failure.clear();
    for (running_block = 0; running_block < blocks; ++running_block) run_block();
}

int thread() { return running; }
int threads() { return threads_of_block; }
int64_t block() { return running_block; }
char* shared_memory() { return memory.get(); }

void block_barrier() {
    if (++arrived_at_block < threads_of_block) {
        fibres[running].state = Fibre::at_block;
        leave();
        return;
    }
    arrived_at_block = 0;
    ++block_epoch;
    for (size_t warp = 0; warp < warps.size(); ++warp) meet(static_cast<int>(warp));
    for (int i = 0; i < threads_of_block; ++i) fibres[i].state = Fibre::ready;
}

void collective(const char* name, void* argument, void (*perform)(void* const*)) {
    const int index = running / lanes;
    Warp& warp = warps[index];
    if (warp.arrived && (warp.name != name || warp.perform != perform))
        fail(std::string("its warp is at ") + warp.name + " and it at " + name);
    warp.name = name;
    warp.perform = perform;
    warp.arguments[running % lanes] = argument;
    if (++warp.arrived < lanes) {
        fibres[running].state = Fibre::at_warp;
        leave();
        return;
    }
    warp.arrived = 0;
    meet(index);
    perform(warp.arguments);
    for (int lane = 0; lane < lanes; ++lane) fibres[index * lanes + lane].state = Fibre::ready;
}

void warp_barrier() {
    collective("a barrier", nullptr, [](void* const*) { ++warp_of(running).epoch; });
}

void check(Access access, const void* at, size_t bytes, int thread) {
    Cell* cell = cells_at(at, bytes);
    for (size_t i = 0; i < bytes / 2; ++i)
        access == Access::read ? check_read(cell[i], thread) : check_write(cell[i], thread);
}

void log_own(Kind kind, const void* at, size_t bytes) {
    auto& instructions = warp_of(running).instructions;
    const size_t position = fibres[running].accesses++;
    if (instructions.size() <= position) instructions.resize(position + 1, {kind, bytes, {}});
    instructions[position].addresses.push_back(static_cast<const char*>(at));
}

void check_own(Access access, const void* at, size_t bytes) {
    check(access, at, bytes, running);
    log_own(access == Access::read ? Kind::load : Kind::store, at, bytes);
}

void copy_async(void* to, const void* from, size_t bytes) {
    if (from && reinterpret_cast<uintptr_t>(from) % bytes)
        fail("cp.async: the source is not aligned to " + std::to_string(bytes) + " bytes");
    check(Access::write, to, bytes, running);
    log_own(Kind::copy, to, bytes);
    Copy copy{static_cast<char*>(to), std::vector<char>(bytes, 0)};
    if (from) std::memcpy(copy.bytes.data(), from, bytes);
    std::memset(to, 0xff, bytes);
    Cell* cell = cells_at(to, bytes);
    for (size_t i = 0; i < bytes / 2; ++i) cell[i].copying = running;
    open_group().push_back(std::move(copy));
}

void commit_copies() {
    open_group();
    fibres[running].groups.emplace_back();
}

void wait_for_copies(int groups_under_way) {
    auto& groups = fibres[running].groups;
    // The last group is not committed: it is not waited for.
    while (static_cast<int>(groups.size()) - 1 > groups_under_way) {
        for (const Copy& copy : groups.front()) {
            std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
            Cell* cell = cells_at(copy.to, copy.bytes.size());
            for (size_t i = 0; i < copy.bytes.size() / 2; ++i) {
                cell[i].copying = nobody;
                cell[i].write = {running, block_epoch, warp_of(running).epoch, fibres[running].shown};
            }
        }
        groups.pop_front();
    }
}

void issue_product(std::function<void()> perform) {
    warp_of(running).issued.push_back(std::move(perform));
}

void commit_products() {
    collective("a commit of products", nullptr, [](void* const*) {
        Warp& warp = warp_of(running);
        for (auto& product : warp.issued) warp.committed.push_back(std::move(product));
        warp.issued.clear();
    });
}

void wait_for_products() {
    collective("a wait for products", nullptr, [](void* const*) {
        Warp& warp = warp_of(running);
        for (const auto& product : warp.committed) product();
        warp.committed.clear();
    });
}

void show_to_products() { ++fibres[running].shown; }

void check_product(const void* at, size_t bytes) {
    check(Access::read, at, bytes, running);
    Cell* cell = cells_at(at, bytes);
    for (size_t i = 0; i < bytes / 2; ++i)
        if (const Event& write = cell[i].write;
            write.thread != nobody && fibres[write.thread].shown == write.shown)
            fail("a product reads what was not shown to products" + place(cell[i]));
}

void initialize_barrier(void* barrier) {
    check(Access::write, barrier, 8, running);
    barriers[barrier] = {};
}

void begin_phase(void* barrier, size_t bytes) { barriers.at(barrier).phases.push_back({bytes, {}}); }

void copy_in_phase(void* barrier, void* to, const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(from) % bytes)
        fail("a box: the source is not aligned to " + std::to_string(bytes) + " bytes");
    Phase& phase = barriers.at(barrier).phases.back();
    if (phase.bytes < bytes) fail("more bytes are copied than the barrier expects");
    phase.bytes -= bytes;
    check(Access::write, to, bytes, running);
    Copy copy{static_cast<char*>(to), std::vector<char>(bytes)};
    std::memcpy(copy.bytes.data(), from, bytes);
    std::memset(to, 0xff, bytes);
    Cell* cell = cells_at(to, bytes);
    for (size_t i = 0; i < bytes / 2; ++i) cell[i].copying = running;
    phase.copies.push_back(std::move(copy));
}

void wait_for_phase(void* at, int phase) {
    check(Access::read, at, 8, running);
    Barrier& barrier = barriers.at(at);
    // The hardware knows the parity alone.
    for (int tries = 0; barrier.over % 2 == phase % 2; ++tries) {
        if (!barrier.phases.empty()) {
            if (barrier.phases.front().bytes) fail("fewer bytes are copied than the barrier expects");
            for (const Copy& copy : barrier.phases.front().copies) {
                std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
                Cell* cell = cells_at(copy.to, copy.bytes.size());
                for (size_t i = 0; i < copy.bytes.size() / 2; ++i) {
                    cell[i].copying = nobody;
                    cell[i].write = {nobody, block_epoch - 1, 0, 0};  // seen by all that wait
                }
            }
            barrier.phases.pop_front();
            ++barrier.over;
        } else if (tries > threads_of_block) {
            fail("it waits for copies that nobody starts");
        } else {
            fibres[running].state = Fibre::ready;
            leave();
        }
    }
}

Wavefronts& wavefronts(Kind kind) { return counts[static_cast<int>(kind)]; }

void count_rows(Kind kind, const void* const* rows, int count_of_rows) {
    Warp::Instruction instruction{kind, 16, {}};
    for (int i = 0; i < count_of_rows; ++i)
        instruction.addresses.push_back(static_cast<const char*>(rows[i]));
    count(instruction);
}

}  // namespace emulator
