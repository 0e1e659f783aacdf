// RMSNorm of bf16 rows and its gradients: a row is read once and finished while it is in cache. Sums are in fp32 and in an
// order that depends on the width alone, so a row has the same bits whatever is beside it and on however many threads.
#include <algorithm>
#include <cmath>

#include "kernels.h"

using namespace anychip;

namespace {

constexpr int64_t kBlock = 32;      // rows whose gradients of the weight are summed by one thread
constexpr int64_t kAlone = 1 << 14;  // numbers that one thread finishes before others are awake

inline float sum_of(const __m512* parts) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3])));
}

}  // namespace

// x [rows, width], weight [width] -> y = x * rstd * weight; rstd [rows] = 1 / sqrt(mean(x^2) + eps).
extern "C" __attribute__((visibility("default"))) void rms_norm(const bf16* x, const float* weight, float eps, bf16* y,
                                                                float* rstd, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* from = x + r * width;
    __m512 squares[4] = {};
    for (int64_t n = 0; n < width; n += kLanes) {
      const __m512 v = load_bf16(from + n, lanes_below(width - n));
      squares[n / kLanes % 4] = _mm512_fmadd_ps(v, v, squares[n / kLanes % 4]);
    }
    rstd[r] = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps);
    const __m512 factor = _mm512_set1_ps(rstd[r]);
    for (int64_t n = 0; n < width; n += kLanes) {
      const __mmask16 lanes = lanes_below(width - n);
      const __m512 normed = _mm512_mul_ps(load_bf16(from + n, lanes), factor);
      _mm256_mask_storeu_epi16(y + r * width + n, lanes,
                               to_bf16(_mm512_mul_ps(normed, _mm512_maskz_loadu_ps(lanes, weight + n))));
    }
  }
}

// grad, x [rows, width], weight [width], rstd [rows] -> grad_x [rows, width]; blocks [ceil(rows / 32), width], whose sum
// is the gradient of the weight.
extern "C" __attribute__((visibility("default"))) void rms_norm_backward(const bf16* grad, const bf16* x,
                                                                         const float* weight, const float* rstd,
                                                                         bf16* grad_x, float* blocks, int64_t rows,
                                                                         int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
  for (int64_t block = 0; block < (rows + kBlock - 1) / kBlock; ++block) {
    float* const sums = blocks + block * width;
    std::fill_n(sums, width, 0.0f);
    for (int64_t r = block * kBlock; r < std::min(rows, (block + 1) * kBlock); ++r) {
      const bf16 *g = grad + r * width, *from = x + r * width;
      const __m512 factor = _mm512_set1_ps(rstd[r]);
      __m512 shares[4] = {};
      for (int64_t n = 0; n < width; n += kLanes) {
        const __mmask16 lanes = lanes_below(width - n);
        const __m512 aligned = _mm512_mul_ps(load_bf16(g + n, lanes), _mm512_mul_ps(load_bf16(from + n, lanes), factor));
        _mm512_mask_storeu_ps(sums + n, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, sums + n), aligned));
        shares[n / kLanes % 4] =
            _mm512_fmadd_ps(aligned, _mm512_maskz_loadu_ps(lanes, weight + n), shares[n / kLanes % 4]);
      }
      const __m512 share = _mm512_set1_ps(sum_of(shares) / static_cast<float>(width));
      for (int64_t n = 0; n < width; n += kLanes) {
        const __mmask16 lanes = lanes_below(width - n);
        const __m512 scaled = _mm512_mul_ps(load_bf16(g + n, lanes), _mm512_maskz_loadu_ps(lanes, weight + n));
        const __m512 normed = _mm512_mul_ps(load_bf16(from + n, lanes), factor);
        const __m512 back = _mm512_mul_ps(_mm512_fnmadd_ps(normed, share, scaled), factor);
        _mm256_mask_storeu_epi16(grad_x + r * width + n, lanes, to_bf16(back));
      }
    }
  }
}
