// The choice between two ways to make a layout, and the headroom that one of them is given.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "greedy.hpp"

#include <algorithm>

#include "construct.hpp"
#include "proportional.hpp"

namespace laer {
namespace {

// An expert that is small against a rank can grow fast; a hot one hardly can, and has replicas to
// shed load by. So each is planned for with an eighth more, at most an eighth of a rank's share.
std::vector<int64_t> with_headroom(const Shape& shape, const int64_t* node_counts_QE) {
  const int nodes = shape.nodes(), experts = shape.experts;
  std::vector<int64_t> loads_E(experts, 0);
  int64_t total = 0;
  for (int node = 0; node < nodes; ++node) {
    for (int e = 0; e < experts; ++e) {
      loads_E[e] += node_counts_QE[static_cast<int64_t>(node) * experts + e];
    }
  }
  for (int64_t load : loads_E) total += load;
  std::vector<int64_t> raised_QE(static_cast<size_t>(nodes) * experts);
  for (int node = 0; node < nodes; ++node) {
    for (int e = 0; e < experts; ++e) {
      const size_t at = static_cast<size_t>(node) * experts + e;
      const int64_t tokens = node_counts_QE[at];
      const int64_t room = std::min(loads_E[e], total / shape.ranks) / 8;
      const auto share = static_cast<__int128>(tokens) * room / std::max<int64_t>(loads_E[e], 1);
      raised_QE[at] = tokens + static_cast<int64_t>(share);
    }
  }
  return raised_QE;
}

}  // namespace

std::vector<int16_t> greedy(const Shape& shape, const int64_t* node_counts_QE) {
  const int64_t spare = static_cast<int64_t>(shape.slots()) - shape.experts;
  const bool scarce = spare < 2 * static_cast<int64_t>(shape.ranks);
  if (!scarce || !can_balance(shape)) {
    return proportional(shape, node_counts_QE, Purpose::kForecast);
  }
  return construct(shape, with_headroom(shape, node_counts_QE).data(), Purpose::kForecast);
}

}  // namespace laer
