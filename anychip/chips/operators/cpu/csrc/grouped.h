// What products of experts share: how they are cut into tasks, and how rows and weights are packed. Weights are bf16 or
// fp32 masters, which are rounded on the way; all sizes are multiples of 16.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace anychip {

constexpr int64_t kColumns = 192;  // of a panel, which stays in a core's second cache
constexpr int64_t kDepth = 256;    // 48 columns of it, which a product takes at a time, stay in the first

struct Task {
  int64_t expert, first_row, rows, column, width;
};

// Every expert's columns in panels; the longest first, so that no thread is left with one at the end.
inline std::vector<Task> tasks_of(const int64_t* counts, int64_t experts, int64_t columns, int64_t panel,
                                  bool empty_too) {
  std::vector<Task> tasks;
  int64_t row = 0;
  for (int64_t e = 0; e < experts; row += counts[e], ++e)
    if (counts[e] > 0 || empty_too)
      for (int64_t at = 0; at < columns; at += panel)
        tasks.push_back({e, row, counts[e], at, std::min(panel, columns - at)});
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.rows * a.width > b.rows * b.width; });
  return tasks;
}

inline int64_t longest(const int64_t* counts, int64_t experts) {
  return experts ? std::max<int64_t>(*std::max_element(counts, counts + experts), 1) : 1;
}

inline __m256i load_rounded(const bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

inline __m256i load_rounded(const float* from) { return to_bf16(_mm512_loadu_ps(from)); }

// 16 words or, of an odd half, 8.
inline __m512i load_words(const bf16* from, bool whole) {
  return whole ? _mm512_loadu_si512(from) : _mm512_zextsi256_si512(load_rounded(from));
}

inline __m512i load_words(const float* from, bool whole) {
  if (!whole) return _mm512_zextsi256_si512(load_rounded(from));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kLanes), _mm512_loadu_ps(from));
}

// weights [count, size], `stride` numbers apart -> transposed and paired, [size / 2, count], `ldb` words apart.
template <typename W>
inline void pack_turned(const W* weights, int64_t stride, int64_t count, int64_t size, word* to, int64_t ldb) {
  for (int64_t n = 0; n < count; n += kLanes)
    for (int64_t at = 0; at < size; at += 2 * kLanes) {
      const bool whole = at + 2 * kLanes <= size;
      __m512i block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load_words(weights + (n + i) * stride + at, whole);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (whole || i < kLanes / 2) _mm512_storeu_si512(to + (at / 2 + i) * ldb + n, block[i]);
    }
}

inline __m512i paired(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// weights [count, size], `stride` numbers apart, of an even count -> paired, [count / 2, size].
template <typename W>
inline void pack_straight(const W* weights, int64_t stride, int64_t count, int64_t size, word* to) {
  for (int64_t p = 0; p < count / 2; ++p, to += size, weights += 2 * stride)
    for (int64_t x = 0; x < size; x += kLanes)
      _mm512_storeu_si512(to + x, paired(load_rounded(weights + x), load_rounded(weights + stride + x)));
}

// Rows of a matrix: from one on, or those that a list names.
struct Rows {
  const bf16* data;
  int64_t stride;
  const int64_t* list;  // null: the rows themselves

  const bf16* operator()(int64_t row) const { return data + (list ? list[row] : row) * stride; }
};

// Columns of rows [count] -> paired, [ceil(count / 2), size]; a missing last row counts as zeros.
inline void pack_rows(const Rows& rows, int64_t first, int64_t count, int64_t column, int64_t size, word* to) {
  for (int64_t i = 0; i < count; i += 2, to += size) {
    const bf16* low = rows(first + i) + column;
    const bf16* high = i + 1 < count ? rows(first + i + 1) + column : nullptr;
    for (int64_t x = 0; x < size; x += kLanes)
      _mm512_storeu_si512(to + x, paired(load_rounded(low + x), high ? load_rounded(high + x) : _mm256_setzero_si256()));
  }
}

// Columns of rows side by side, [count, size].
inline void gather_rows(const Rows& rows, int64_t first, int64_t count, int64_t column, int64_t size, bf16* to) {
  for (int64_t i = 0; i < count; ++i, to += size) std::copy_n(rows(first + i) + column, size, to);
}

inline void store_rounded(const float* from, int64_t width, bf16* to, int64_t stride, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t x = 0; x < width; x += kLanes) store_bf16(to + i * stride + x, _mm512_loadu_ps(from + i * width + x));
}

// sums [rows, width] = (or +=) a task's rows [rows, depth] times its columns of the expert's matrix, which lies as
// [columns, depth] (`turned`) or as [depth, columns].
template <typename W>
inline void multiply_panel(const Task& task, const bf16* rows, const W* weights, int64_t depth, int64_t columns,
                           bool turned, bool add, word* panel, float* sums) {
  const W* matrix = weights + task.expert * depth * columns;
  for (int64_t at = 0; at < depth; at += kDepth) {
    const int64_t part = std::min(kDepth, depth - at);
    if (turned)
      pack_turned(matrix + task.column * depth + at, depth, task.width, part, panel, task.width);
    else
      pack_straight(matrix + at * columns + task.column, columns, part, task.width, panel);
    const word* left = reinterpret_cast<const word*>(rows + task.first_row * depth + at);
    product(left, depth / 2, 1, panel, task.width, sums, task.width, task.rows, task.width, part / 2, add || at > 0);
  }
}

// out [n, columns] = the sum over `count` pairs of rows [n, depth] times weights; `turned`: these lie as [columns, depth].
template <typename W>
inline void multiply(const bf16* const* rows, const W* const* weights, int count, bf16* out, const int64_t* counts,
                     int64_t experts, int64_t depth, int64_t columns, bool turned) {
  const std::vector<Task> tasks = tasks_of(counts, experts, columns, kColumns, false);
#pragma omp parallel
  {
    Buffer<word> panel(kDepth / 2 * kColumns);
    Buffer<float> sums(longest(counts, experts) * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      for (int i = 0; i < count; ++i)
        multiply_panel(task, rows[i], weights[i], depth, columns, turned, i > 0, panel, sums);
      store_rounded(sums, task.width, out + task.first_row * columns + task.column, columns, task.rows);
    }
  }
}

// gradient [height, columns] of each expert's matrix = left^T right, for rows left [tokens, height], right [tokens,
// columns]; zero for experts without rows.
template <typename W>
inline void multiply_transposed(const Rows& left, const Rows& right, W* gradient, const int64_t* counts,
                                int64_t experts, int64_t height, int64_t columns) {
  constexpr bool direct = std::is_same<W, float>::value;
  const std::vector<Task> tasks = tasks_of(counts, experts, columns, kColumns, true);
#pragma omp parallel
  {
    Buffer<word> across(kDepth / 2 * height), panel(kDepth / 2 * kColumns);
    Buffer<float> sums(direct ? kLanes : height * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      W* to = gradient + task.expert * height * columns + task.column;
      float* c = direct ? reinterpret_cast<float*>(to) : static_cast<float*>(sums);
      const int64_t ldc = direct ? columns : task.width;
      if (task.rows == 0)
        for (int64_t i = 0; i < height; ++i) std::fill_n(c + i * ldc, task.width, 0.0f);
      for (int64_t at = 0; at < task.rows; at += kDepth) {
        const int64_t part = std::min(kDepth, task.rows - at);
        pack_rows(left, task.first_row + at, part, 0, height, across);
        pack_rows(right, task.first_row + at, part, task.column, task.width, panel);
        product(across, 1, height, panel, task.width, c, ldc, height, task.width, (part + 1) / 2, at > 0);
      }
      if constexpr (!direct) store_rounded(c, task.width, to, columns, height);
    }
  }
}

}  // namespace anychip
