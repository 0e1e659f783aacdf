// Products of an expert's rows with its matrix, for all experts in one call: forward, and the gradients of both. bf16 in
// and out, sums in fp32. Weights lie as [experts, n, k], rows [tokens, k] or [tokens, n] in the order of experts; k and n
// are multiples of 16.
#include "grouped.h"

namespace anychip {
namespace {

// out [tokens, columns] = rows [tokens, depth] times each expert's matrix; `turned`: it lies as [columns, depth].
void multiply_rows(const bf16* rows, const bf16* weights, bf16* out, const int64_t* counts, int64_t experts,
                   int64_t depth, int64_t columns, bool turned) {
  const std::vector<Task> tasks = tasks_of(counts, experts, columns, kColumns, false);
#pragma omp parallel
  {
    Buffer<word> panel(kDepth / 2 * kColumns);
    Buffer<float> sums(longest(counts, experts) * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      multiply_panel(task, rows, weights, depth, columns, turned, false, panel, sums);
      store_rounded(sums, task.width, out + task.first_row * columns + task.column, columns, task.rows);
    }
  }
}

}  // namespace
}  // namespace anychip

using namespace anychip;

#define EXPORT extern "C" __attribute__((visibility("default")))

// x [tokens, k] -> out [tokens, n]
EXPORT void grouped_forward(const bf16* x, const bf16* weights, bf16* out, const int64_t* counts, int64_t experts,
                            int64_t k, int64_t n) {
  multiply_rows(x, weights, out, counts, experts, k, n, true);
}

// grad [tokens, n] -> grad_x [tokens, k]
EXPORT void grouped_backward_rows(const bf16* grad, const bf16* weights, bf16* grad_x, const int64_t* counts,
                                  int64_t experts, int64_t k, int64_t n) {
  multiply_rows(grad, weights, grad_x, counts, experts, n, k, false);
}

// grad [tokens, n], x [tokens, k] -> grad_weights [experts, n, k], zero for experts without rows
EXPORT void grouped_backward_weights(const bf16* grad, const bf16* x, bf16* grad_weights, const int64_t* counts,
                                     int64_t experts, int64_t k, int64_t n) {
  multiply_transposed(Rows{grad, n, nullptr}, Rows{x, k, nullptr}, grad_weights, counts, experts, n, k);
}
