// Products of a few rows with a bf16 matrix that was packed once: what one step of decoding spends its time on.
//
// A panel holds 64 output columns, paired along the inputs, so that one thread reads it from first byte to last. Every
// output is summed in fp32 in the order of its inputs, whatever rows stand beside it and however many threads there are:
// `run` inputs at a time, whose sums are added up.
#include <algorithm>

#include "kernels.h"

namespace anychip {
namespace {

constexpr int64_t kVectors = 4, kPanel = kVectors * kLanes, kRows = 6;

inline void store(bf16* to, __mmask16 kept, __m512 x) { _mm256_mask_storeu_epi16(to, kept, to_bf16(x)); }

inline void store(float* to, __mmask16 kept, __m512 x) { _mm512_mask_storeu_ps(to, kept, x); }

// y [Rows, columns] = x [Rows, 2 pairs] times one panel, plus a bias.
template <int Rows, typename Result>
void panel_product(const bf16* x, int64_t pairs, int64_t run, const word* panel, const bf16* bias, int64_t columns,
                   Result* y, int64_t outputs) {
  __m512 total[Rows][kVectors];
  for (int64_t first = 0; first < pairs; first += run) {
    __m512 sum[Rows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int64_t p = first; p < std::min(first + run, pairs); ++p, panel += kPanel) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) _mm_prefetch(panel + 16 * kPanel + j * kLanes, _MM_HINT_T0);
      __m512bh right[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_load_si512(panel + j * kLanes);
#pragma GCC unroll 6
      for (int i = 0; i < Rows; ++i) {
        const word* row = reinterpret_cast<const word*>(x + i * 2 * pairs);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(row[p]));
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) total[i][j] = first ? _mm512_add_ps(total[i][j], sum[i][j]) : sum[i][j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __mmask16 kept = lanes_below(columns - j * kLanes);
    const __m512 more = bias ? load_bf16(bias + j * kLanes, kept) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) store(y + i * outputs + j * kLanes, kept, _mm512_add_ps(total[i][j], more));
  }
}

template <typename Result>
void some_rows(int64_t rows, const bf16* x, int64_t pairs, int64_t run, const word* panel, const bf16* bias,
               int64_t columns, Result* y, int64_t outputs) {
  switch (rows) {
    case 6: return panel_product<6>(x, pairs, run, panel, bias, columns, y, outputs);
    case 5: return panel_product<5>(x, pairs, run, panel, bias, columns, y, outputs);
    case 4: return panel_product<4>(x, pairs, run, panel, bias, columns, y, outputs);
    case 3: return panel_product<3>(x, pairs, run, panel, bias, columns, y, outputs);
    case 2: return panel_product<2>(x, pairs, run, panel, bias, columns, y, outputs);
    case 1: return panel_product<1>(x, pairs, run, panel, bias, columns, y, outputs);
  }
}

template <typename Result>
void multiply(const bf16* x, int64_t rows, int64_t inputs, int64_t run, const word* packed, const bf16* bias,
              int64_t outputs, Result* y) {
  const int64_t pairs = inputs / 2;
#pragma omp parallel for schedule(dynamic)
  for (int64_t start = 0; start < outputs; start += kPanel)
    for (int64_t row = 0; row < rows; row += kRows)
      some_rows(std::min(kRows, rows - row), x + row * inputs, pairs, run / 2, packed + start * pairs,
                bias ? bias + start : nullptr, outputs - start, y + row * outputs + start, outputs);
}

}  // namespace
}  // namespace anychip

extern "C" {

// weight [outputs, inputs] -> packed [ceil(outputs / 64), inputs / 2, 64] words; inputs are even, columns missing are zeros.
__attribute__((visibility("default"))) void pack_weight(const anychip::bf16* weight, int64_t outputs, int64_t inputs,
                                                        anychip::word* packed) {
  using namespace anychip;
  const int64_t pairs = inputs / 2;
#pragma omp parallel for
  for (int64_t start = 0; start < outputs; start += kPanel)
    pair_transposed(weight + start * inputs, inputs, std::min(kPanel, outputs - start), kPanel, inputs,
                    packed + start * pairs);
}

// y [rows, outputs] = x [rows, inputs] times the packed weight, plus bias [outputs] where there is one; `run` is even.
__attribute__((visibility("default"))) void packed_product(const anychip::bf16* x, int64_t rows, int64_t inputs,
                                                           int64_t run, const anychip::word* packed,
                                                           const anychip::bf16* bias, int64_t outputs,
                                                           anychip::bf16* y) {
  anychip::multiply(x, rows, inputs, run, packed, bias, outputs, y);
}

// The same, not rounded to bf16.
__attribute__((visibility("default"))) void packed_product_wide(const anychip::bf16* x, int64_t rows, int64_t inputs,
                                                                int64_t run, const anychip::word* packed,
                                                                const anychip::bf16* bias, int64_t outputs, float* y) {
  anychip::multiply(x, rows, inputs, run, packed, bias, outputs, y);
}
}
