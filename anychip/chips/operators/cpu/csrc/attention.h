// What the kernels of attention share, so that a token gets the same bits in training and in decoding.
#pragma once

#include <cmath>
#include <limits>

#include "kernels.h"

namespace anychip {

// Numbers between neighbours along batch, heads, tokens; head_dim is contiguous.
struct Strides {
  int64_t batch, head, token;
};

inline __mmask16 seen(const uint8_t* mask, int64_t at, int64_t end) {
  const __mmask16 lanes = lanes_below(end - at);
  if (!mask) return lanes;
  return lanes & _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes, mask + at), _mm_set1_epi8(-1));
}

// One row of scores -> unnormalised probabilities (bf16), their sum and the row's maximum.
inline void softmax_row(float* scores, const uint8_t* mask, int64_t end, int64_t padded, float scale, bf16* to,
                        float* sum, float* peak) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most = none;
  for (int64_t n = 0; n < padded; n += kLanes) {
    const __m512 x = _mm512_mask_mul_ps(none, seen(mask, n, end), _mm512_loadu_ps(scores + n), _mm512_set1_ps(scale));
    _mm512_storeu_ps(scores + n, x);
    most = _mm512_max_ps(most, x);
  }
  *peak = _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(std::isinf(*peak) ? 0.0f : *peak);  // a row that sees nothing gives zeros
  __m512 total = _mm512_setzero_ps();
  for (int64_t n = 0; n < padded; n += kLanes) {
    const __m512 e = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + n), shift));
    total = _mm512_add_ps(total, e);
    store_bf16(to + n, e);
  }
  *sum = _mm512_reduce_add_ps(total);
}

}  // namespace anychip
