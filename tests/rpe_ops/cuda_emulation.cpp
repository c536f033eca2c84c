// Runs the CUDA kernels of gather and bucket sum on the CPU, with one thread per lane, and compares
// them with plain loops. This finds wrong indices, bounds and strides and missing barriers, but
// nothing that is special on a GPU. Prints every mismatch; exits with 1 if there is any.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(bytes)
struct Dim {
  unsigned x = 1, y = 1;
};
static Dim blockDim, gridDim;
static thread_local Dim blockIdx, threadIdx;
static std::vector<std::barrier<>*> warp_barriers;
static void __syncwarp() { warp_barriers[threadIdx.y]->arrive_and_wait(); }
using std::min;
namespace rpe_ops {
alignas(16) unsigned char shared[48 * 1024];
}

#include "gather_kernels.cuh"

using namespace rpe_ops;
static int mismatches = 0;

// Runs the blocks one after the other, and the lanes of a block in parallel.
template <typename Kernel, typename... Args>
void launch(unsigned blocks, unsigned warps, Kernel kernel, Args... args) {
  gridDim = {blocks, 1};
  blockDim = {kWarp, warps};
  for (unsigned block = 0; block < blocks; ++block) {
    std::vector<std::thread> lanes;
    warp_barriers.clear();
    for (unsigned y = 0; y < warps; ++y) warp_barriers.push_back(new std::barrier<>(kWarp));
    for (unsigned lane = 0; lane < kWarp * warps; ++lane) {
      lanes.emplace_back([=] {
        blockIdx = {block, 0};
        threadIdx = {lane % kWarp, lane / kWarp};
        kernel(args...);
      });
    }
    for (auto& lane : lanes) lane.join();
    for (auto* barrier : warp_barriers) delete barrier;
  }
}

struct Case {
  int64_t outer, inner, num_queries, num_keys, num_buckets;
  int chunk;
  unsigned blocks, warps;
};

template <typename T>
void expect(const char* what, const Case& c, const std::vector<T>& actual,
            const std::vector<double>& expected, double tolerance) {
  for (size_t x = 0; x < expected.size(); ++x) {
    if (!(std::abs(actual[x] - expected[x]) <= tolerance)) {
      std::printf("%s of L_q %ld L_k %ld K %ld chunk %d: [%zu] is %g, expected %g\n", what,
                  long(c.num_queries), long(c.num_keys), long(c.num_buckets), c.chunk, x,
                  double(actual[x]), expected[x]);
      ++mismatches;
      return;
    }
  }
}

template <typename T, typename index_t>
void run(const Case& c) {
  std::mt19937 random(0);
  const int64_t slices = c.outer * c.inner, L_q = c.num_queries, L_k = c.num_keys;
  const int64_t K = c.num_buckets, width = std::max(L_k, K);
  // Values are (inner, outer, L_q, width, 2), of which every second number is used: inner and outer
  // are swapped and no stride is 1. The bucket ids are stored transposed.
  std::vector<T> values(slices * L_q * width * 2);
  for (auto& value : values) value = std::normal_distribution<T>()(random);
  std::vector<index_t> ids(L_q * L_k);
  for (auto& id : ids) id = static_cast<index_t>(random() % K);
  const Slices layout{slices, c.inner, L_q * width * 2, c.outer * L_q * width * 2, width * 2, 2};
  const BucketIds<index_t> bucket_ids{ids.data(), L_q, L_k, 1, L_q};
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> gathered(slices * L_q * L_k, nan), summed(slices * L_q * K, nan);
  std::vector<double> pairs(gathered.size()), sums(summed.size(), 0.0);
  for (int64_t n = 0; n < slices; ++n) {
    for (int64_t i = 0; i < L_q; ++i) {
      const int64_t row = ((n % c.inner * c.outer + n / c.inner) * L_q + i) * width;
      for (int64_t j = 0; j < L_k; ++j) {
        const int64_t id = ids[j * L_q + i];
        pairs[(n * L_q + i) * L_k + j] = values[(row + id) * 2];
        sums[(n * L_q + i) * K + id] += values[(row + j) * 2];
      }
    }
  }
  launch(c.blocks, c.warps, gather_kernel<T, index_t>, values.data(), layout, bucket_ids, K,
         gathered.data());
  expect("gather", c, gathered, pairs, 0.0);
  launch(c.blocks, c.warps, bucket_sum_kernel<T, T, index_t>, values.data(), layout, bucket_ids, K,
         c.chunk, summed.data());
  const double rounding = 8 * std::numeric_limits<T>::epsilon();
  expect("bucket sum", c, summed, sums, rounding * 4 * std::sqrt(double(L_k)));
}

int main() {
  const Case cases[] = {
      {2, 3, 7, 45, 9, 9, 2, 4},   {1, 1, 1, 1, 1, 1, 1, 1},   {2, 2, 5, 33, 50, 16, 3, 2},
      {1, 3, 4, 100, 3, 3, 8, 1}, {3, 1, 3, 7, 130, 128, 1, 1},
  };
  for (const Case& c : cases) {
    run<float, int32_t>(c);
    run<double, int64_t>(c);
  }
  return mismatches > 0;
}
