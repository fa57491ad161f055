// A microbatch's counts as the exact quotas and their prices read them. It does not add them up by
// node: see quotas.hpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <numeric>

#include "shape.hpp"

namespace laer {

// Tokens on each rank for each expert: those of a matrix, or each expert's times a factor of its own,
// rounded down. Such copies of a large forecast are read at a few places only, and are no matrices.
class Counts {
 public:
  // Without the sums of ranks, each is added up when it is asked for.
  Counts(const Shape& shape, const int64_t* counts_NE, const int64_t* sums_N = nullptr)
      : experts_(shape.experts), counts_NE_(counts_NE), sums_N_(sums_N) {}

  // Factors are in units of 2^-shift; the sums of ranks are known.
  Counts(const Shape& shape, const int64_t* counts_NE, const int64_t* factor_E, int shift,
         const int64_t* sums_N)
      : experts_(shape.experts), counts_NE_(counts_NE), factor_E_(factor_E), shift_(shift),
        sums_N_(sums_N) {}

  int64_t operator()(int64_t rank, int expert) const {
    const int64_t tokens = counts_NE_[rank * experts_ + expert];
    return factor_E_ == nullptr ? tokens : times_factor(tokens, expert);
  }

  // The same of tokens that several ranks have.
  int64_t times_factor(int64_t tokens, int expert) const {
    return static_cast<int64_t>(static_cast<__int128>(tokens) * factor_E_[expert] >> shift_);
  }

  int64_t sum(int64_t rank) const {
    if (sums_N_ != nullptr) return sums_N_[rank];
    const int64_t* counts_E = counts_NE_ + rank * experts_;
    return std::accumulate(counts_E, counts_E + experts_, int64_t{0});
  }

 private:
  int64_t experts_;
  const int64_t* counts_NE_;
  const int64_t* factor_E_ = nullptr;
  int shift_ = 0;
  const int64_t* sums_N_ = nullptr;
};

}  // namespace laer
