// Random numbers, and factors that disturb a forecast, equal on every machine: what loads may become
// until a layout made for them is in use.
#pragma once

#include <cstdint>

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
constexpr int kNumFactors = 16;
constexpr int64_t kFactors[kNumFactors] = {146, 172, 189, 203, 215, 227, 238, 250,
                                           262, 275, 289, 305, 323, 347, 380, 448};

}  // namespace laer
