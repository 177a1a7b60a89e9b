#include <cstdlib>
#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diffit {

namespace generic {
extern const InstructionSet instruction_set;
}
#if defined(DIFFIT_HAVE_AVX2)
namespace avx2 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AVX512)
namespace avx512 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const InstructionSet instruction_set;
}
#endif
#if defined(DIFFIT_HAVE_AMX)
namespace amx {
extern const InstructionSet instruction_set;
}
#endif

namespace {

#if defined(DIFFIT_HAVE_AVX512_BF16)
bool has_bfloat16() {
#if defined(DIFFIT_EMULATE_AMX)
    return true;
#else
    return __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

#if defined(DIFFIT_HAVE_AMX)
bool has_tiles() {
#if defined(DIFFIT_EMULATE_AMX)
    return true;
#elif defined(__linux__) && defined(__x86_64__)
    // Linux hands out the tile registers on request only.
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

std::vector<const InstructionSet*> find_instruction_sets() {
    std::vector<const InstructionSet*> found{&generic::instruction_set};
#if defined(DIFFIT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        found.push_back(&avx2::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AVX512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) found.push_back(&avx512::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AVX512_BF16)
    const bool bf16 = avx512 && has_bfloat16();
    if (bf16) found.push_back(&avx512_bf16::instruction_set);
#endif
#if defined(DIFFIT_HAVE_AMX)
    if (bf16 && has_tiles()) found.push_back(&amx::instruction_set);
#endif
    return found;
}

const std::vector<const InstructionSet*>& usable() {
    static const std::vector<const InstructionSet*> found = find_instruction_sets();
    return found;
}

const InstructionSet*& current() {
    static const InstructionSet* chosen = usable().back();
    return chosen;
}

}  // namespace

const Kernels& kernels(DType dtype) { return current()->kernels[static_cast<int>(dtype)]; }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet* set : usable()) names.push_back(set->name);
    return names;
}

std::string instruction_set() { return current()->name; }

void set_instruction_set(const std::string& name) {
    for (const InstructionSet* set : usable()) {
        if (name == set->name) {
            current() = set;
            return;
        }
    }
    std::string names;
    for (const std::string& known : instruction_sets()) names += " " + known;
    throw std::invalid_argument("instruction set: expected one of" + names + ", got " + name);
}

}  // namespace diffit
