// Loops over the pairs of a row of queries.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// Compiles a function for several vector widths; one is chosen when the library is loaded.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define RPE_OPS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RPE_OPS_CLONES
#endif

namespace rpe_ops {

// A sum is split into this many parts, because the compiler may not reorder additions.
constexpr int kLanes = 16;

template <typename scalar_t>
inline scalar_t total(const scalar_t* lanes) {
  scalar_t sum = 0;
  for (int n = 0; n < kLanes; ++n) sum += lanes[n];
  return sum;
}

// values[j] += row[ids[j]]
template <typename scalar_t>
RPE_OPS_CLONES void add_gathered(scalar_t* __restrict values, const scalar_t* __restrict row,
                                 const int* __restrict ids, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] += row[ids[j]];
}

// values[j] += rows[j][ids[j]]
template <typename scalar_t>
RPE_OPS_CLONES void add_gathered_of_keys(scalar_t* __restrict values,
                                         const scalar_t* __restrict rows, int64_t stride,
                                         const int* __restrict ids, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] += rows[j * stride + ids[j]];
}

// sums[r][ids[r][j]] += pairs[r][j]. Adjacent keys often have the same bucket, so that an addition
// waits for the one before. Four rows are computed together to hide this wait.
template <typename scalar_t>
void add_to_buckets(scalar_t* sums, int64_t sums_stride, const scalar_t* pairs,
                    int64_t pairs_stride, const int* ids, int64_t ids_stride, int64_t rows,
                    int64_t count) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    scalar_t* s = sums + r * sums_stride;
    const scalar_t* p = pairs + r * pairs_stride;
    const int* n = ids + r * ids_stride;
    for (int64_t j = 0; j < count; ++j) {
      s[n[j]] += p[j];
      s[sums_stride + n[ids_stride + j]] += p[pairs_stride + j];
      s[2 * sums_stride + n[2 * ids_stride + j]] += p[2 * pairs_stride + j];
      s[3 * sums_stride + n[3 * ids_stride + j]] += p[3 * pairs_stride + j];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) {
      sums[r * sums_stride + ids[r * ids_stride + j]] += pairs[r * pairs_stride + j];
    }
  }
}

// sums[j][ids[j]] += pairs[j]
template <typename scalar_t>
void add_to_buckets_of_keys(scalar_t* sums, int64_t stride, const scalar_t* pairs,
                            const int* ids, int64_t count) {
  for (int64_t j = 0; j < count; ++j) sums[j * stride + ids[j]] += pairs[j];
}

// Replaces the gradients of the weights after dropout by those of the logits, and multiplies the
// weights by the factors of dropout.
template <typename scalar_t>
RPE_OPS_CLONES void through_softmax(scalar_t* __restrict gradients, scalar_t* __restrict weights,
                                    const scalar_t* __restrict factors, scalar_t delta,
                                    int64_t count) {
  if (!factors) {
    for (int64_t j = 0; j < count; ++j) gradients[j] = weights[j] * (gradients[j] - delta);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    gradients[j] = weights[j] * (gradients[j] * factors[j] - delta);
    weights[j] *= factors[j];
  }
}

// Returns e^x for x up to 88, to about one rounding; 0 for x below -87. The algorithm is expf of
// the Cephes library: a power of two from the exponent's bits, times a polynomial. The compiler can
// vectorize a loop over this function, but not a loop over std::exp.
inline float exponential(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: the last bits of the sum are the integer
  const float shifted = x * 1.44269504f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                        5.0000001201e-1f, 1.0f, 1.0f}) {
    y = y * r + c;
  }
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : y * power;
}

inline double exponential(double x) { return std::exp(x); }

// Sets values[j] = exp(values[j] - shift) and returns their sum. If all values are -inf, shift is
// -inf too, and 0 is used instead.
template <typename scalar_t>
RPE_OPS_CLONES scalar_t exponentials(scalar_t* values, scalar_t shift, int64_t count) {
  if (shift == -std::numeric_limits<scalar_t>::infinity()) shift = 0;
  scalar_t lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int n = 0; n < kLanes; ++n) {
      values[j + n] = exponential(values[j + n] - shift);
      lanes[n] += values[j + n];
    }
  }
  for (; j < count; ++j) lanes[0] += values[j] = exponential(values[j] - shift);
  return total(lanes);
}

// Returns the largest value; -inf if there is none.
template <typename scalar_t>
RPE_OPS_CLONES scalar_t largest(const scalar_t* values, int64_t count) {
  scalar_t lanes[kLanes];
  for (auto& lane : lanes) lane = -std::numeric_limits<scalar_t>::infinity();
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int n = 0; n < kLanes; ++n) lanes[n] = values[j + n] > lanes[n] ? values[j + n] : lanes[n];
  }
  for (; j < count; ++j) lanes[0] = values[j] > lanes[0] ? values[j] : lanes[0];
  scalar_t result = lanes[0];
  for (const auto lane : lanes) result = lane > result ? lane : result;
  return result;
}

// values[j] *= factor
template <typename scalar_t>
RPE_OPS_CLONES void multiply(scalar_t* values, scalar_t factor, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] *= factor;
}

// values[j] *= factors[j]
template <typename scalar_t>
RPE_OPS_CLONES void multiply(scalar_t* __restrict values, const scalar_t* __restrict factors,
                             int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] *= factors[j];
}

template <typename scalar_t>
RPE_OPS_CLONES scalar_t dot(const scalar_t* x, const scalar_t* y, int64_t count) {
  scalar_t lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int n = 0; n < kLanes; ++n) lanes[n] += x[j + n] * y[j + n];
  }
  for (; j < count; ++j) lanes[0] += x[j] * y[j];
  return total(lanes);
}

}  // namespace rpe_ops
