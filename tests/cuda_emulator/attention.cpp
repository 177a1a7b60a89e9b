// Runs the kernels forward and backward on zeros, for AddressSanitizer and the emulator to watch: every
// buffer of memory is exactly as large as the problem says. Prints how often each kind of access to
// shared memory had to wait for a bank.
//
//   attention window_height window_width grid_height grid_width batch heads head_dim
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "emulator.h"
#include "problem.h"

using diffit::cuda::WindowAttention;

extern "C" int64_t diffit_workspace_size(const WindowAttention*);
extern "C" const char* diffit_window_attention(const WindowAttention*, void*);
extern "C" const char* diffit_window_attention_backward(const WindowAttention*, void*);

int main(int argc, char** argv) {
    if (argc != 8) return 2;
    int64_t sizes[7];
    for (int i = 0; i < 7; ++i) sizes[i] = std::atoll(argv[i + 1]);
    WindowAttention p{};
    p.window_height = sizes[0];
    p.window_width = sizes[1];
    p.grid_height = sizes[2];
    p.grid_width = sizes[3];
    p.batch = sizes[4];
    p.heads = sizes[5];
    p.head_dim = sizes[6];
    p.dtype = 1;
    p.blocks = 4;
    p.scale = 0.5;
    const int64_t tokens = p.grid_height * p.grid_width, dim = p.heads * p.head_dim;
    const int64_t table_rows = (2 * p.window_height - 1) * (2 * p.window_width - 1);
    using Numbers = std::vector<uint16_t>;
    Numbers qkv(p.batch * tokens * 3 * dim), grad_qkv(qkv.size()), out(p.batch * tokens * dim),
        grad_out(out.size()), q_row(p.batch * dim), v_row(q_row.size()), grad_q_row(q_row.size()),
        grad_v_row(q_row.size());
    std::vector<float> table(table_rows * p.heads), grad_table(table.size()),
        lse(p.batch * p.heads * tokens);
    p.qkv = qkv.data();
    p.qkv_stride_token = 3 * dim;
    p.qkv_stride_batch = tokens * p.qkv_stride_token;
    p.table = table.data();
    p.table_stride_row = p.heads;
    p.table_stride_head = 1;
    p.q_row = q_row.data();
    p.v_row = v_row.data();
    p.row_stride_batch = dim;
    p.out = out.data();
    p.lse = lse.data();
    p.grad_out = grad_out.data();
    p.grad_out_stride_token = dim;
    p.grad_out_stride_batch = tokens * dim;
    p.grad_qkv = grad_qkv.data();
    p.grad_table = grad_table.data();
    p.grad_q_row = grad_q_row.data();
    p.grad_v_row = grad_v_row.data();
    std::vector<float> workspace(diffit_workspace_size(&p));
    p.workspace = workspace.data();
    using Run = const char* (*)(const WindowAttention*, void*);
    const std::pair<const char*, Run> runs[] = {{"forward", diffit_window_attention},
                                                {"backward", diffit_window_attention_backward}};
    for (const auto& [name, run] : runs) {
        if (const char* error = run(&p, nullptr)) {
            std::fprintf(stderr, "%s\n", error);
            return 1;
        }
        int kind = 0;
        for (const char* access : {"ldmatrix", "load", "store", "copy"}) {
            auto& count = emulator::wavefronts(static_cast<emulator::Kind>(kind++));
            std::printf("%s %s %lld %lld\n", name, access, static_cast<long long>(count.needed),
                        static_cast<long long>(count.made));
            count = {};
        }
    }
}
