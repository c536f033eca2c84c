// Mask of dropout, a function of the seed and the pair; see rpe_ops/dropout.py.

#pragma once

#include <cstdint>
#include <utility>

#include "vectors.h"

namespace rpe_ops {

// Words 0 and 1 of Philox4x32-10 with counter (c0, c1, 0, 0).
inline std::pair<uint32_t, uint32_t> philox(uint64_t seed, uint32_t c0, uint32_t c1) {
  uint32_t c2 = 0, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {c0, c1};
}

// factors[j] = 1 / (1 - p) where the weight of key j survives, else 0.
template <typename scalar_t>
RPE_OPS_CLONES void fill_dropout(scalar_t* factors, int64_t count, uint32_t k0, uint32_t k1,
                                 uint32_t threshold, scalar_t survivor) {
  for (int64_t j = 0; j < count; ++j) {
    uint32_t x = static_cast<uint32_t>(j) * 0x9E3779B9u + k0;
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x ^= k1;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    x ^= x >> 16;
    factors[j] = x >= threshold ? survivor : scalar_t(0);
  }
}

}  // namespace rpe_ops
