// The experts of a mixture on tokens that stay where they are, and what their answers add up to.
//
// Tokens are gathered a panel at a time, gate and up share one product, SwiGLU is taken while its inputs are at hand, and
// nothing but gate and up is kept for backward. bf16 tokens; sums, SwiGLU and gradients of fp32 weights in fp32.
// Shapes: t tokens, k experts a token, n rows in the order of experts, e experts, h hidden, f inner; h and f are
// multiples of 16. Weights lie as [e, f, h] (gate, up) and [e, h, f] (down).
#include "grouped.h"

namespace anychip {
namespace {

constexpr int64_t kHalf = kColumns / 2;  // columns of gate, and of up, in a panel of both

struct Sizes {
  int64_t tokens, rows, experts, hidden, inner;
};

inline __m512 sigmoid_ps(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline __m512 rounded(__m512 x) { return widen(to_bf16(x)); }

// gates, ups, inner [n, f] of x [t, h] at `list` [n]
template <typename W>
void gate_and_up(const Rows& x, const W* gate, const W* up, bf16* gates, bf16* ups, bf16* inner, const int64_t* counts,
                 const Sizes& size) {
  const int64_t depth = size.hidden, columns = size.inner, most = longest(counts, size.experts);
  const std::vector<Task> tasks = tasks_of(counts, size.experts, columns, kHalf, false);
#pragma omp parallel
  {
    Buffer<word> panel(kDepth / 2 * kColumns);
    Buffer<bf16> left(most * kDepth);
    Buffer<float> sums(most * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      const int64_t both = 2 * task.width, first = (task.expert * columns + task.column) * depth;
      for (int64_t at = 0; at < depth; at += kDepth) {
        const int64_t part = std::min(kDepth, depth - at);
        pack_turned(gate + first + at, depth, task.width, part, panel, both);
        pack_turned(up + first + at, depth, task.width, part, panel + task.width, both);
        gather_rows(x, task.first_row, task.rows, at, part, left);
        product(reinterpret_cast<const word*>(static_cast<bf16*>(left)), part / 2, 1, panel, both, sums, both,
                task.rows, both, part / 2, at > 0);
      }
      for (int64_t i = 0; i < task.rows; ++i) {
        const float* row = sums + i * both;
        const int64_t to = (task.first_row + i) * columns + task.column;
        for (int64_t n = 0; n < task.width; n += kLanes) {
          const __m512 g = rounded(_mm512_loadu_ps(row + n)), u = rounded(_mm512_loadu_ps(row + task.width + n));
          store_bf16(gates + to + n, g);
          store_bf16(ups + to + n, u);
          store_bf16(inner + to + n, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid_ps(g)), u));
        }
      }
    }
  }
}

// grad [n, h] of the answers -> gradients of gates and ups, and the SwiGLU again, [n, f]
template <typename W>
void through_swiglu(const bf16* grad, const W* down, const bf16* gates, const bf16* ups, bf16* grad_gates,
                    bf16* grad_ups, bf16* inner, const int64_t* counts, const Sizes& size) {
  const std::vector<Task> tasks = tasks_of(counts, size.experts, size.inner, kColumns, false);
#pragma omp parallel
  {
    Buffer<word> panel(kDepth / 2 * kColumns);
    Buffer<float> sums(longest(counts, size.experts) * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t number = 0; number < tasks.size(); ++number) {
      const Task& task = tasks[number];
      multiply_panel(task, grad, down, size.hidden, size.inner, false, false, panel, sums);
      for (int64_t i = 0; i < task.rows; ++i) {
        const int64_t at = (task.first_row + i) * size.inner + task.column;
        for (int64_t n = 0; n < task.width; n += kLanes) {
          const __m512 d = _mm512_loadu_ps(sums + i * task.width + n);
          const __m512 g = load_bf16(gates + at + n), u = load_bf16(ups + at + n), s = sigmoid_ps(g);
          const __m512 silu = _mm512_mul_ps(g, s);
          // d silu / d g = s (1 + g (1 - s)) = s + silu (1 - s)
          const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
          store_bf16(grad_gates + at + n, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
          store_bf16(grad_ups + at + n, _mm512_mul_ps(d, silu));
          store_bf16(inner + at + n, _mm512_mul_ps(silu, u));
        }
      }
    }
  }
}

template <typename W>
void forward(const bf16* x, const int64_t* list, const int64_t* counts, const W* gate, const W* up, const W* down,
             bf16* gates, bf16* ups, bf16* inner, bf16* out, const Sizes& size) {
  gate_and_up(Rows{x, size.hidden, list}, gate, up, gates, ups, inner, counts, size);
  const bf16* rows[] = {inner};
  const W* weights[] = {down};
  multiply(rows, weights, 1, out, counts, size.experts, size.inner, size.hidden, true);
}

template <typename W>
void backward(const bf16* grad, const bf16* x, const int64_t* list, const int64_t* counts, const W* gate, const W* up,
              const W* down, const bf16* gates, const bf16* ups, bf16* grad_gates, bf16* grad_ups, bf16* inner,
              bf16* grad_rows, W* grad_gate, W* grad_up, W* grad_down, const Sizes& size) {
  const int64_t h = size.hidden, f = size.inner;
  through_swiglu(grad, down, gates, ups, grad_gates, grad_ups, inner, counts, size);
  const bf16* rows[] = {grad_gates, grad_ups};
  const W* weights[] = {gate, up};
  multiply(rows, weights, 2, grad_rows, counts, size.experts, f, h, false);
  const Rows tokens{x, h, list};
  if (grad_gate) multiply_transposed(Rows{grad_gates, f, nullptr}, tokens, grad_gate, counts, size.experts, f, h);
  if (grad_up) multiply_transposed(Rows{grad_ups, f, nullptr}, tokens, grad_up, counts, size.experts, f, h);
  if (grad_down)
    multiply_transposed(Rows{grad, h, nullptr}, Rows{inner, f, nullptr}, grad_down, counts, size.experts, h, f);
}

}  // namespace
}  // namespace anychip

using namespace anychip;

#define EXPORT extern "C" __attribute__((visibility("default")))

// x [t, h], list [n] (the token of each row), counts [e] -> gates, ups, inner [n, f], out [n, h]
EXPORT void experts_forward(const bf16* x, const int64_t* list, const int64_t* counts, const void* gate, const void* up,
                            const void* down, bf16* gates, bf16* ups, bf16* inner, bf16* out, const Sizes* size,
                            int64_t fp32) {
  if (fp32)
    forward(x, list, counts, (const float*)gate, (const float*)up, (const float*)down, gates, ups, inner, out, *size);
  else
    forward(x, list, counts, (const bf16*)gate, (const bf16*)up, (const bf16*)down, gates, ups, inner, out, *size);
}

// grad [n, h] and what forward had -> grad_gates, grad_ups, inner [n, f], grad_rows [n, h], and gradients of the weights
// where an address is given
EXPORT void experts_backward(const bf16* grad, const bf16* x, const int64_t* list, const int64_t* counts,
                             const void* gate, const void* up, const void* down, const bf16* gates, const bf16* ups,
                             bf16* grad_gates, bf16* grad_ups, bf16* inner, bf16* grad_rows, void* grad_gate,
                             void* grad_up, void* grad_down, const Sizes* size, int64_t fp32) {
  if (fp32)
    backward(grad, x, list, counts, (const float*)gate, (const float*)up, (const float*)down, gates, ups, grad_gates,
             grad_ups, inner, grad_rows, (float*)grad_gate, (float*)grad_up, (float*)grad_down, *size);
  else
    backward(grad, x, list, counts, (const bf16*)gate, (const bf16*)up, (const bf16*)down, gates, ups, grad_gates,
             grad_ups, inner, grad_rows, (bf16*)grad_gate, (bf16*)grad_up, (bf16*)grad_down, *size);
}

// answers [n, h], weights [t, k] (null: ones), place [t * k] (where each choice's answer is, n or more for none) ->
// out [t, h], the weighed sums
EXPORT void combine_forward(const bf16* answers, const float* weights, const int64_t* place, bf16* out, int64_t tokens,
                            int64_t k, int64_t rows, int64_t hidden) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t x = 0; x < hidden; x += kLanes) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t j = t * k; j < (t + 1) * k; ++j)
        if (place[j] < rows) {
          const __m512 weight = _mm512_set1_ps(weights ? weights[j] : 1.0f);
          sum = _mm512_fmadd_ps(load_bf16(answers + place[j] * hidden + x), weight, sum);
        }
      store_bf16(out + t * hidden + x, sum);
    }
}

// grad [t, h] -> grad_answers [n, h], grad_weights [t, k], zero where there is no answer
EXPORT void combine_backward(const bf16* grad, const bf16* answers, const float* weights, const int64_t* place,
                             bf16* grad_answers, float* grad_weights, int64_t tokens, int64_t k, int64_t rows,
                             int64_t hidden) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = t * k; j < (t + 1) * k; ++j) {
      grad_weights[j] = 0.0f;
      if (place[j] >= rows) continue;
      const bf16* answer = answers + place[j] * hidden;
      bf16* to = grad_answers + place[j] * hidden;
      const __m512 weight = _mm512_set1_ps(weights[j]);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t x = 0; x < hidden; x += kLanes) {
        const __m512 g = load_bf16(grad + t * hidden + x);
        sum = _mm512_fmadd_ps(g, load_bf16(answer + x), sum);
        store_bf16(to + x, _mm512_mul_ps(g, weight));
      }
      grad_weights[j] = _mm512_reduce_add_ps(sum);
    }
}
