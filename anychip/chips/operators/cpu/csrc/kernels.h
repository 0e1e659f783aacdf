// What the kernels share: bf16 pairs, products of small tiles, exp. AVX-512 with VDPBF16PS.
//
// A "word" is two bf16 numbers side by side, the unit that one multiply-add takes. A matrix is "paired" when a word holds
// one column's numbers of two neighbouring rows.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace anychip {

using bf16 = uint16_t;
using word = uint32_t;

constexpr int64_t kLanes = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline __mmask16 lanes_below(int64_t count) { return count >= kLanes ? 0xFFFF : (1u << (count > 0 ? count : 0)) - 1; }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 load_bf16(const bf16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

inline __m512 load_bf16(const bf16* from, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, from)); }

inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store_bf16(bf16* to, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }

// e^x within 2 units in the last place; 0 below -104; NaN stays NaN.
inline __m512 exp_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// Memory of one thread, aligned to cache lines.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(count * int64_t{sizeof(T)}, 64)))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }

 private:
  T* data_;
};

// C [Rows, 16 Vectors] = (or +=) A [Rows, 2 pairs] B [2 pairs, 16 Vectors]. A's words lie `row` apart from row to row and
// `step` from pair to pair; B is paired with rows of `ldb` words.
template <int Rows, int Vectors>
inline void tile(const word* a, int64_t row, int64_t step, const word* b, int64_t ldb, float* c, int64_t ldc,
                 int64_t pairs, bool add) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * kLanes) : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[Vectors];
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + p * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * row + p * step]));
#pragma GCC unroll 3
      for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(c + i * ldc + j * kLanes, sum[i][j]);
}

template <int Vectors>
inline void columns(const word* a, int64_t row, int64_t step, const word* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t rows, int64_t pairs, bool add) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) tile<8, Vectors>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, pairs, add);
  a += i * row, c += i * ldc;
  switch (rows - i) {
    case 7: return tile<7, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 6: return tile<6, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 5: return tile<5, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 4: return tile<4, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 3: return tile<3, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 2: return tile<2, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
    case 1: return tile<1, Vectors>(a, row, step, b, ldb, c, ldc, pairs, add);
  }
}

// As `tile`, for any number of rows and a number of columns that is a multiple of 16.
inline void product(const word* a, int64_t row, int64_t step, const word* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t rows, int64_t cols, int64_t pairs, bool add = false) {
  while (cols > 0) {
    const int64_t vectors = cols / kLanes;
    const int64_t taken = vectors == 4 ? 2 : vectors < 3 ? vectors : 3;
    if (taken == 3) columns<3>(a, row, step, b, ldb, c, ldc, rows, pairs, add);
    if (taken == 2) columns<2>(a, row, step, b, ldb, c, ldc, rows, pairs, add);
    if (taken == 1) columns<1>(a, row, step, b, ldb, c, ldc, rows, pairs, add);
    b += taken * kLanes, c += taken * kLanes, cols -= taken * kLanes;
  }
}

// rows [count, size] (`stride` numbers apart) -> paired [count / 2, size]; a missing last row counts as zeros.
inline void pair_rows(const bf16* rows, int64_t stride, int64_t count, int64_t padded, int64_t size, word* to) {
  const bf16* const end = rows + count * stride;
  for (int64_t p = 0; p < padded / 2; ++p, to += size, rows += 2 * stride)
    for (int64_t x = 0; x < size; x += kLanes) {
      const __m256i none = _mm256_setzero_si256();
      const __m256i low = rows < end ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + x)) : none;
      const __m256i high =
          rows + stride < end ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + stride + x)) : none;
      _mm512_storeu_si512(to + x, _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }
}

// 16 rows of 16 words, transposed in place.
inline void transpose(__m512i* rows) {
  __m512i half[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    half[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    half[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {  // rows[i + j] then holds columns j, 4 + j, 8 + j and 12 + j of rows i to i + 3
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// rows [count, size] -> the transposed matrix, paired: [size / 2, padded] words; missing columns are zeros. `padded` is a
// multiple of 16.
inline void pair_transposed(const bf16* rows, int64_t stride, int64_t count, int64_t padded, int64_t size, word* to) {
  const int64_t words = size / 2;
  for (int64_t n = 0; n < padded; n += kLanes)
    for (int64_t p = 0; p < words; p += kLanes) {
      const __mmask16 kept = lanes_below(words - p);
      __m512i block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = n + i < count ? _mm512_maskz_loadu_epi32(kept, rows + (n + i) * stride + 2 * p) : _mm512_setzero_si512();
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (p + i < words) _mm512_storeu_si512(to + (p + i) * padded + n, block[i]);
    }
}

}  // namespace anychip
