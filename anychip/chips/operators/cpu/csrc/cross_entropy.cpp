// Cross-entropy of bf16 logits, a row at a time: its loss, and softmax minus one-hot, while the row is in cache.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

using namespace anychip;

// logits [tokens, vocab], `stride` numbers apart; target [tokens] -> losses [tokens]; gradient [tokens, vocab] where an
// address is given. A row with a NaN gives NaNs.
extern "C" __attribute__((visibility("default"))) void cross_entropy_rows(const bf16* logits, int64_t stride,
                                                                          const int64_t* target, float* losses,
                                                                          float* gradient, int64_t tokens,
                                                                          int64_t vocab) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const bf16* row = logits + t * stride;
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 most = lowest;
    for (int64_t n = 0; n < vocab; n += kLanes) {
      const __mmask16 lanes = lanes_below(vocab - n);
      most = _mm512_mask_max_ps(most, lanes, most, load_bf16(row + n, lanes));
    }
    const float peak = _mm512_reduce_max_ps(most);
    const __m512 shift = _mm512_set1_ps(peak);
    __m512 sum = _mm512_setzero_ps();
    float* const to = gradient ? gradient + t * vocab : nullptr;
    for (int64_t n = 0; n < vocab; n += kLanes) {
      const __mmask16 lanes = lanes_below(vocab - n);
      const __m512 e = _mm512_maskz_mov_ps(lanes, exp_ps(_mm512_sub_ps(load_bf16(row + n, lanes), shift)));
      sum = _mm512_add_ps(sum, e);
      if (to) _mm512_mask_storeu_ps(to + n, lanes, e);
    }
    const float total = _mm512_reduce_add_ps(sum);
    const uint32_t at_target = static_cast<uint32_t>(row[target[t]]) << 16;
    float logit;
    std::memcpy(&logit, &at_target, sizeof logit);
    losses[t] = std::log(total) + peak - logit;
    if (!to) continue;
    const __m512 inverse = _mm512_set1_ps(1.0f / total);
    for (int64_t n = 0; n < vocab; n += kLanes) {
      const __mmask16 lanes = lanes_below(vocab - n);
      _mm512_mask_storeu_ps(to + n, lanes, _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, to + n), inverse));
    }
    to[target[t]] -= 1.0f;
  }
}
