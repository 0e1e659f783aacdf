// Attention of bf16 tensors and its gradients, one key/value head at a time.
//
// Products take bf16 and add up in fp32, softmax is in fp32. Scores of 64 queries exist at a time, so memory is linear in
// the length; what a query may not see is not computed. Each (batch element, key/value head) is computed by one thread
// in one order: results do not depend on the number of threads. Formulas: arXiv 2205.14135, appendix B.
#include <algorithm>
#include <cmath>

#include "attention.h"

namespace anychip {
namespace {

constexpr int64_t kRows = 64;

struct Shape {
  int64_t batch, heads, groups, queries, keys, size;  // groups: key/value heads; size: head_dim, a multiple of 16
  int64_t causal;  // the last query sees every key, each one before it one key fewer

  int64_t visible(int64_t query) const { return causal ? keys - queries + query + 1 : keys; }
};

struct Mask {
  const uint8_t* visible;  // null: everything is
  int64_t batch, head, query;

  const uint8_t* row(int64_t b, int64_t h, int64_t q) const {
    return visible ? visible + b * batch + h * head + q * query : nullptr;
  }
};

void forward(const bf16* q, Strides qs, const bf16* k, Strides ks, const bf16* v, Strides vs, bf16* out, Strides os,
             float* lse, Mask mask, Shape shape, float scale) {
  const int64_t share = shape.heads / shape.groups, size = shape.size;
  const int64_t keys = round_up(shape.keys, kLanes), ld = keys + kLanes;
#pragma omp parallel
  {
    Buffer<word> keys_across(size / 2 * keys), values(keys / 2 * size);
    Buffer<float> scores(kRows * ld), mixed(kRows * size);
    Buffer<bf16> weights(kRows * ld);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t group = 0; group < shape.groups; ++group) {
        pair_transposed(k + b * ks.batch + group * ks.head, ks.token, shape.keys, keys, size, keys_across);
        pair_rows(v + b * vs.batch + group * vs.head, vs.token, shape.keys, keys, size, values);
        for (int64_t h = group * share; h < (group + 1) * share; ++h)
          for (int64_t start = 0; start < shape.queries; start += kRows) {
            const int64_t rows = std::min(kRows, shape.queries - start);
            const int64_t cols = round_up(shape.visible(start + rows - 1), kLanes);
            const bf16* queries = q + b * qs.batch + h * qs.head + start * qs.token;
            product(reinterpret_cast<const word*>(queries), qs.token / 2, 1, keys_across, keys, scores, ld, rows, cols,
                    size / 2);
            float sums[kRows];
            for (int64_t r = 0; r < rows; ++r) {
              float peak;
              softmax_row(scores + r * ld, mask.row(b, h, start + r), shape.visible(start + r), cols, scale, weights + r * ld,
                          sums + r, &peak);
              lse[(b * shape.heads + h) * shape.queries + start + r] = peak + std::log(sums[r]);
            }
            product(reinterpret_cast<const word*>(static_cast<bf16*>(weights)), ld / 2, 1, values, size, mixed, size,
                    rows, size, cols / 2);
            for (int64_t r = 0; r < rows; ++r) {
              bf16* to = out + b * os.batch + h * os.head + (start + r) * os.token;
              const __m512 inverse = _mm512_set1_ps(sums[r] == 0.0f ? 0.0f : 1.0f / sums[r]);
              for (int64_t x = 0; x < size; x += kLanes)
                store_bf16(to + x, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * size + x), inverse));
            }
          }
      }
  }
}

inline float dot(const bf16* a, const bf16* b, int64_t size) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t x = 0; x < size; x += kLanes) sum = _mm512_fmadd_ps(load_bf16(a + x), load_bf16(b + x), sum);
  return _mm512_reduce_add_ps(sum);
}

void write(const float* from, int64_t rows, int64_t size, bf16* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t x = 0; x < size; x += kLanes) store_bf16(to + r * stride + x, _mm512_loadu_ps(from + r * size + x));
}

struct Row {
  const float *scores, *grads;
  const uint8_t* mask;
  int64_t end;  // keys that a query sees; 0 for a row that is only there to make a pair
  float lse, correction;
};

// 16 keys of a row: probabilities and gradients of the scores.
inline void gradients(const Row& row, int64_t n, float scale, __m512* weights, __m512* grad) {
  const __mmask16 lanes = seen(row.mask, n, row.end);
  const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row.scores + n), _mm512_set1_ps(scale), _mm512_set1_ps(row.lse));
  *weights = _mm512_maskz_mov_ps(lanes, exp_ps(x));
  const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(row.grads + n), _mm512_set1_ps(row.correction));
  *grad = _mm512_maskz_mul_ps(lanes, _mm512_mul_ps(*weights, centred), _mm512_set1_ps(scale));
}

void backward(const bf16* g, Strides gs, const bf16* q, Strides qs, const bf16* k, Strides ks, const bf16* v,
              Strides vs, const bf16* out, Strides os, const float* lse, bf16* gq, Strides gqs, bf16* gk, Strides gks,
              bf16* gv, Strides gvs, Mask mask, Shape shape, float scale) {
  const int64_t share = shape.heads / shape.groups, size = shape.size;
  const int64_t keys = round_up(shape.keys, kLanes), ld = keys + kLanes;
#pragma omp parallel
  {
    Buffer<word> keys_across(size / 2 * keys), values_across(size / 2 * keys), key_rows(keys / 2 * size);
    Buffer<word> query_rows(kRows / 2 * size), grad_rows(kRows / 2 * size);
    Buffer<float> scores(kRows * ld), grads(kRows * ld), grad_queries(kRows * size);
    Buffer<float> grad_keys(keys * size), grad_values(keys * size);
    Buffer<bf16> grad_scores(kRows * ld);
    Buffer<word> paired_weights(kRows / 2 * ld), paired_grads(kRows / 2 * ld);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < shape.batch; ++b)
      for (int64_t group = 0; group < shape.groups; ++group) {
        const bf16* own_keys = k + b * ks.batch + group * ks.head;
        pair_transposed(own_keys, ks.token, shape.keys, keys, size, keys_across);
        pair_rows(own_keys, ks.token, shape.keys, keys, size, key_rows);
        pair_transposed(v + b * vs.batch + group * vs.head, vs.token, shape.keys, keys, size, values_across);
        std::fill_n(static_cast<float*>(grad_keys), keys * size, 0.0f);
        std::fill_n(static_cast<float*>(grad_values), keys * size, 0.0f);
        for (int64_t h = group * share; h < (group + 1) * share; ++h)
          for (int64_t start = 0; start < shape.queries; start += kRows) {
            const int64_t rows = std::min(kRows, shape.queries - start), pairs = (rows + 1) / 2;
            const int64_t cols = round_up(shape.visible(start + rows - 1), kLanes);
            const bf16* queries = q + b * qs.batch + h * qs.head + start * qs.token;
            const bf16* incoming = g + b * gs.batch + h * gs.head + start * gs.token;
            const bf16* results = out + b * os.batch + h * os.head + start * os.token;
            product(reinterpret_cast<const word*>(queries), qs.token / 2, 1, keys_across, keys, scores, ld, rows, cols,
                    size / 2);
            product(reinterpret_cast<const word*>(incoming), gs.token / 2, 1, values_across, keys, grads, ld, rows,
                    cols, size / 2);
            for (int64_t p = 0; p < pairs; ++p) {
              Row row[2];
              for (int64_t i = 0; i < 2; ++i) {
                const int64_t r = 2 * p + i, at = r < rows ? r : 2 * p;
                row[i] = {scores + at * ld,
                          grads + at * ld,
                          mask.row(b, h, start + at),
                          r < rows ? shape.visible(start + r) : 0,
                          lse[(b * shape.heads + h) * shape.queries + start + at],
                          dot(incoming + at * gs.token, results + at * os.token, size)};
              }
              for (int64_t n = 0; n < cols; n += kLanes) {
                __m512 weights[2], grad[2];
                for (int i = 0; i < 2; ++i) {
                  gradients(row[i], n, scale, weights + i, grad + i);
                  store_bf16(grad_scores + (2 * p + i) * ld + n, grad[i]);
                }
                const auto pair = [](__m512 low, __m512 high) {
                  return _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(low)),
                                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(high)), 16));
                };
                _mm512_storeu_si512(paired_weights + p * ld + n, pair(weights[0], weights[1]));
                _mm512_storeu_si512(paired_grads + p * ld + n, pair(grad[0], grad[1]));
              }
            }
            product(reinterpret_cast<const word*>(static_cast<bf16*>(grad_scores)), ld / 2, 1, key_rows, size,
                    grad_queries, size, rows, size, cols / 2);
            write(grad_queries, rows, size, gq + b * gqs.batch + h * gqs.head + start * gqs.token, gqs.token);
            pair_rows(queries, qs.token, rows, 2 * pairs, size, query_rows);
            pair_rows(incoming, gs.token, rows, 2 * pairs, size, grad_rows);
            product(paired_grads, 1, ld, query_rows, size, grad_keys, size, cols, size, pairs, true);
            product(paired_weights, 1, ld, grad_rows, size, grad_values, size, cols, size, pairs, true);
          }
        write(grad_keys, shape.keys, size, gk + b * gks.batch + group * gks.head, gks.token);
        write(grad_values, shape.keys, size, gv + b * gvs.batch + group * gvs.head, gvs.token);
      }
  }
}

}  // namespace
}  // namespace anychip

extern "C" __attribute__((visibility("default"))) void attention_forward(const uint16_t* q, const anychip::Strides* qs, const uint16_t* k,
                                  const anychip::Strides* ks, const uint16_t* v, const anychip::Strides* vs,
                                  uint16_t* out, const anychip::Strides* os, float* lse, const anychip::Mask* mask,
                                  const anychip::Shape* shape, float scale) {
  anychip::forward(q, *qs, k, *ks, v, *vs, out, *os, lse, *mask, *shape, scale);
}

extern "C" __attribute__((visibility("default"))) void attention_backward(const uint16_t* g, const anychip::Strides* gs, const uint16_t* q,
                                   const anychip::Strides* qs, const uint16_t* k, const anychip::Strides* ks,
                                   const uint16_t* v, const anychip::Strides* vs, const uint16_t* out,
                                   const anychip::Strides* os, const float* lse, uint16_t* gq,
                                   const anychip::Strides* gqs, uint16_t* gk, const anychip::Strides* gks, uint16_t* gv,
                                   const anychip::Strides* gvs, const anychip::Mask* mask, const anychip::Shape* shape,
                                   float scale) {
  anychip::backward(g, *gs, q, *qs, k, *ks, v, *vs, out, *os, lse, gq, *gqs, gk, *gks, gv, *gvs, *mask, *shape, scale);
}
