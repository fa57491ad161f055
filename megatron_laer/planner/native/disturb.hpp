// Disturbed copies of a forecast, equal on every machine: what loads may become until a layout made
// for them is in use.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace laer {

// SplitMix64, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ULL);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  int below(int limit) { return static_cast<int>(next() % static_cast<uint64_t>(limit)); }
  double uniform() { return static_cast<double>(next() >> 11) / (int64_t{1} << 53); }

 private:
  uint64_t state_;
};

// exp(0.3 z) at the 16 quantiles of the normal distribution, in 1/256.
constexpr int64_t kFactors[16] = {146, 172, 189, 203, 215, 227, 238, 250,
                                  262, 275, 289, 305, 323, 347, 380, 448};

inline int64_t random_factor(Random& random) { return kFactors[random.below(16)]; }

// Counts [rows, E], each expert's times a factor of its own.
inline std::vector<int64_t> disturb(const int64_t* counts, int rows, int experts, Random& random) {
  std::vector<int64_t> disturbed(counts, counts + static_cast<int64_t>(rows) * experts);
  for (int e = 0; e < experts; ++e) {
    const int64_t factor = random_factor(random);
    for (int row = 0; row < rows; ++row) {
      int64_t& tokens = disturbed[static_cast<size_t>(row) * experts + e];
      tokens = (tokens * factor + 128) / 256;
    }
  }
  return disturbed;
}

}  // namespace laer
