// The choice between the two ways to pack: inside nodes where these can balance themselves.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "construct.hpp"

#include <utility>

#include "home.hpp"
#include "home_choice.hpp"
#include "pack_by_node.hpp"
#include "pack_scarce.hpp"
#include "proportional.hpp"
#include "rank_contents.hpp"

namespace laer {
namespace {

// Chosen on the real trace and on the named workloads; neighbouring values do nearly as well.
constexpr PackingWeights kLocal{50, 0}, kSteady{0, 25};

}  // namespace

bool can_balance(const Shape& shape) {
  return shape.experts <= static_cast<int64_t>(shape.ranks) * (shape.capacity - 1) + 1;
}

std::vector<int16_t> construct(const Shape& shape, const Sums& sums, Purpose purpose) {
  const int64_t cap = ideal_load(shape, sums);
  const int64_t* node_counts_QE = sums.node_counts_QE.data();
  RankContents contents(shape);
  if (!pack_by_node(shape, node_counts_QE, cap, contents)) {
    pack_scarce(shape, node_counts_QE, cap, purpose == Purpose::kNow ? kLocal : kSteady, contents);
  }
  return contents.finish(node_counts_QE);
}

Fresh fresh(const Shape& shape, const CostModel* costs, const Counts& counts) {
  if (shape.home > 0) {
    HomeLayout made = costs == nullptr ? replicate(shape, counts.sums(), 0)
                                       : choose_replicas(shape, *costs, counts);
    // Between nodes a flow also keeps tokens in their node: the choice has solved it.
    const bool has_loads = shape.nodes() == 1 ? made.is_ideal : costs != nullptr;
    if (!has_loads) made.loads_S.clear();
    return {std::move(made.slots_S), std::move(made.loads_S)};
  }
  return {can_balance(shape) ? construct(shape, counts.sums(), Purpose::kNow)
                             : proportional(shape, counts.sums(), Purpose::kNow),
          {}};
}

}  // namespace laer
