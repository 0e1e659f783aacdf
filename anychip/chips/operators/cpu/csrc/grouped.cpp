// Products of an expert's rows with its matrix, for all experts in one call: forward, and the gradients of both. bf16 in
// and out, sums in fp32. Weights lie as [experts, n, k], rows [tokens, k] or [tokens, n] in the order of experts; k and n
// are multiples of 16.
#include "grouped.h"

using namespace anychip;

#define EXPORT extern "C" __attribute__((visibility("default")))

// x [tokens, k] -> out [tokens, n]
EXPORT void grouped_forward(const bf16* x, const bf16* weights, bf16* out, const int64_t* counts, int64_t experts,
                            int64_t k, int64_t n) {
  multiply(&x, &weights, 1, out, counts, experts, k, n, true);
}

// grad [tokens, n] -> grad_x [tokens, k]
EXPORT void grouped_backward_rows(const bf16* grad, const bf16* weights, bf16* grad_x, const int64_t* counts,
                                  int64_t experts, int64_t k, int64_t n) {
  multiply(&grad, &weights, 1, grad_x, counts, experts, n, k, false);
}

// grad [tokens, n], x [tokens, k] -> grad_weights [experts, n, k], zero for experts without rows
EXPORT void grouped_backward_weights(const bf16* grad, const bf16* x, bf16* grad_weights, const int64_t* counts,
                                     int64_t experts, int64_t k, int64_t n) {
  multiply_transposed(Rows{grad, n, nullptr}, Rows{x, k, nullptr}, grad_weights, counts, experts, n, k);
}
