// Attention of single new tokens, each to the cache of its own sequence: what one step of decoding does.
//
// A row has the bits that attention.cpp gives it in a pass over the whole sequence, whatever rows are beside it: the same
// products in the same order, the same softmax. Each (token, key/value head) is computed by one thread.
#include <algorithm>

#include "attention.h"

namespace anychip {
namespace {

constexpr int64_t kBlock = 64;  // keys that are paired at a time

struct Heads {
  int64_t queries, groups, size;  // groups: key/value heads; size: head_dim, a multiple of 16
};

// Where a token stands in the step, which sequence it is of and how many tokens are before it there.
struct Token {
  int64_t row, sequence, position;
};

// Rows of [tokens, heads, size], `stride` numbers apart from token to token.
struct Rows {
  bf16* first;
  int64_t stride;

  bf16* at(int64_t row) const { return first + row * stride; }
};

// [sequences, heads, tokens, size].
struct Cache {
  bf16* first;
  Strides strides;

  bf16* at(int64_t sequence, int64_t head) const { return first + sequence * strides.batch + head * strides.head; }
};

void keep(const Rows& rows, const Cache& cache, const Token& token, const Heads& heads) {
  for (int64_t group = 0; group < heads.groups; ++group)
    std::copy_n(rows.at(token.row) + group * heads.size, heads.size,
                cache.at(token.sequence, group) + token.position * cache.strides.token);
}

void attend(const Rows& q, const Rows& k, const Rows& v, const Cache& keys, const Cache& values, const Rows& out,
            const Token* tokens, int64_t count, Heads heads, float scale) {
  const int64_t share = heads.queries / heads.groups, size = heads.size;
  int64_t longest = 0;
  for (int64_t t = 0; t < count; ++t) {
    keep(k, keys, tokens[t], heads);  // a token of a piece sees those before it in the piece
    keep(v, values, tokens[t], heads);
    longest = std::max(longest, round_up(tokens[t].position + 1, kBlock));
  }
#pragma omp parallel if (count * heads.groups > 1)
  {
    Buffer<word> block(kBlock / 2 * size);
    Buffer<float> scores(share * longest), mixed(share * size), sums(share);
    Buffer<bf16> weights(share * longest);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < count; ++t)
      for (int64_t group = 0; group < heads.groups; ++group) {
        const Token& token = tokens[t];
        const int64_t seen = token.position + 1;
        const bf16* queries = q.at(token.row) + group * share * size;
        const bf16* own_keys = keys.at(token.sequence, group);
        const bf16* own_values = values.at(token.sequence, group);
        for (int64_t n = 0; n < seen; n += kBlock) {
          pair_transposed(own_keys + n * keys.strides.token, keys.strides.token, std::min(kBlock, seen - n), kBlock, size,
                          block);
          product(reinterpret_cast<const word*>(queries), size / 2, 1, block, kBlock, scores + n, longest, share, kBlock,
                  size / 2);
        }
        for (int64_t h = 0; h < share; ++h) {
          float peak;
          softmax_row(scores + h * longest, nullptr, seen, round_up(seen, kBlock), scale, weights + h * longest, sums + h,
                      &peak);
        }
        for (int64_t n = 0; n < seen; n += kBlock) {
          const int64_t taken = std::min(kBlock, seen - n), padded = round_up(taken, kLanes);
          pair_rows(own_values + n * values.strides.token, values.strides.token, taken, padded, size, block);
          product(reinterpret_cast<const word*>(static_cast<bf16*>(weights)) + n / 2, longest / 2, 1, block, size, mixed,
                  size, share, size, padded / 2, n > 0);
        }
        for (int64_t h = 0; h < share; ++h) {
          bf16* to = out.at(token.row) + (group * share + h) * size;
          const __m512 inverse = _mm512_set1_ps(1.0f / sums[h]);
          for (int64_t x = 0; x < size; x += kLanes)
            store_bf16(to + x, _mm512_mul_ps(_mm512_loadu_ps(mixed + h * size + x), inverse));
        }
      }
  }
}

}  // namespace
}  // namespace anychip

// q [tokens, heads, size], k and v [tokens, groups, size] and out: a place and the stride between tokens each. k and v are
// written into the caches first.
extern "C" __attribute__((visibility("default"))) void cached_attention(
    const anychip::Rows* q, const anychip::Rows* k, const anychip::Rows* v, const anychip::Rows* out,
    const anychip::Cache* keys, const anychip::Cache* values, const anychip::Token* tokens, int64_t count,
    const anychip::Heads* heads, float scale) {
  anychip::attend(*q, *k, *v, *keys, *values, *out, tokens, count, *heads, scale);
}
