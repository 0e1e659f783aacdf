// Products of an expert's rows with its matrix, for all experts in one call: forward, and the gradients of both. bf16 in
// and out, sums in fp32. Weights lie as [experts, n, k], rows [tokens, k] or [tokens, n] in the order of experts; k and n
// are multiples of 16.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace anychip {
namespace {

constexpr int64_t kColumns = 192;  // of a panel, which stays in a core's second cache
constexpr int64_t kDepth = 256;    // 48 columns of it, which a product takes at a time, stay in the first

struct Task {
  int64_t expert, first_row, rows, column;
};

// Every expert's columns in panels; the longest first, so that no thread is left with one at the end.
std::vector<Task> tasks_of(const int64_t* counts, int64_t experts, int64_t columns, bool empty_too) {
  std::vector<Task> tasks;
  int64_t row = 0;
  for (int64_t e = 0; e < experts; row += counts[e], ++e)
    if (counts[e] > 0 || empty_too)
      for (int64_t at = 0; at < columns; at += kColumns) tasks.push_back({e, row, counts[e], at});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.rows > b.rows; });
  return tasks;
}

void round_rows(const float* from, int64_t width, bf16* to, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t x = 0; x < width; x += kLanes) store_bf16(to + i * stride + x, _mm512_loadu_ps(from + i * width + x));
}

int64_t longest(const int64_t* counts, int64_t experts) { return *std::max_element(counts, counts + experts); }

// out [tokens, columns] = rows [tokens, depth] times each expert's matrix; `turned`: it lies as [columns, depth].
void multiply_rows(const bf16* rows, const bf16* weights, bf16* out, const int64_t* counts, int64_t experts,
                   int64_t depth, int64_t columns, bool turned) {
  const std::vector<Task> tasks = tasks_of(counts, experts, columns, false);
  const int64_t most = experts ? longest(counts, experts) : 0;
#pragma omp parallel
  {
    Buffer<word> panel(kDepth / 2 * kColumns);
    Buffer<float> sums(std::max<int64_t>(most, 1) * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      const int64_t width = std::min(kColumns, columns - task.column);
      const bf16* matrix = weights + task.expert * depth * columns;
      for (int64_t at = 0; at < depth; at += kDepth) {
        const int64_t part = std::min(kDepth, depth - at);
        if (turned)
          pair_transposed(matrix + task.column * depth + at, depth, width, width, part, panel);
        else
          pair_rows(matrix + at * columns + task.column, columns, part, part, width, panel);
        const word* left = reinterpret_cast<const word*>(rows + task.first_row * depth + at);
        product(left, depth / 2, 1, panel, width, sums, width, task.rows, width, part / 2, at > 0);
      }
      round_rows(sums, width, out + task.first_row * columns + task.column, columns, task.rows);
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
  const std::vector<Task> tasks = tasks_of(counts, experts, k, true);
#pragma omp parallel
  {
    Buffer<word> left(kDepth / 2 * n), panel(kDepth / 2 * kColumns);
    Buffer<float> sums(n * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      const int64_t width = std::min(kColumns, k - task.column);
      if (task.rows == 0) std::fill(static_cast<float*>(sums), sums + n * width, 0.0f);
      for (int64_t at = 0; at < task.rows; at += kDepth) {
        const int64_t part = std::min(kDepth, task.rows - at), padded = round_up(part, 2);
        pair_rows(grad + (task.first_row + at) * n, n, part, padded, n, left);
        pair_rows(x + (task.first_row + at) * k + task.column, k, part, padded, width, panel);
        product(left, 1, n, panel, width, sums, width, n, width, padded / 2, at > 0);
      }
      round_rows(sums, width, grad_weights + task.expert * n * k + task.column, k, n);
    }
  }
}
