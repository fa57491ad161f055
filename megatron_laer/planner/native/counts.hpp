// A microbatch's counts and their sums as the exact quotas and their prices read them. They are added
// up in slot_loads.cpp.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

#include "shape.hpp"

namespace laer {

// Tokens of each node for each expert, of each rank, and for each expert.
struct Sums {
  std::vector<int64_t> node_counts_QE, tokens_N, loads_E;
};

// Tokens on each rank for each expert: those of a matrix, or each expert's times a factor of its own,
// rounded down. Such copies of a large forecast are read at a few places only, and are no matrices.
class Counts {
 public:
  // Of rows whose sums are not known, each is added up when it is asked for.
  Counts(const Shape& shape, const int64_t* counts_NE)
      : experts_(shape.experts), counts_NE_(counts_NE) {}

  Counts(const Shape& shape, const int64_t* counts_NE, const Sums& sums)
      : experts_(shape.experts), counts_NE_(counts_NE), sums_(&sums) {}

  // Factors are in units of 2^-shift; the sums are those of the products.
  Counts(const Shape& shape, const int64_t* counts_NE, const Sums& sums, const int64_t* factor_E,
         int shift)
      : experts_(shape.experts), counts_NE_(counts_NE), sums_(&sums), factor_E_(factor_E),
        shift_(shift) {}

  int64_t operator()(int64_t rank, int expert) const {
    const int64_t tokens = counts_NE_[rank * experts_ + expert];
    return factor_E_ == nullptr ? tokens : times_factor(tokens, expert);
  }

  // The same of tokens that several ranks have.
  int64_t times_factor(int64_t tokens, int expert) const {
    return static_cast<int64_t>(static_cast<__int128>(tokens) * factor_E_[expert] >> shift_);
  }

  const Sums& sums() const { return *sums_; }

  int64_t of_node(int64_t node, int expert) const {
    return sums_->node_counts_QE[node * experts_ + expert];
  }

  int64_t sum(int64_t rank) const {
    if (sums_ != nullptr) return sums_->tokens_N[rank];
    const int64_t* counts_E = counts_NE_ + rank * experts_;
    return std::accumulate(counts_E, counts_E + experts_, int64_t{0});
  }

 private:
  int64_t experts_;
  const int64_t* counts_NE_;
  const Sums* sums_ = nullptr;
  const int64_t* factor_E_ = nullptr;
  int shift_ = 0;
};

}  // namespace laer
