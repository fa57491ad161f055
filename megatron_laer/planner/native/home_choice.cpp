// Replicas by predicted time, in numbered phases of choose_replicas():
//   1. Bound. Where stock's placement is nearly balanced, or slower than perfect balance by less than
//      the least exchange takes, no replica is made for balance. So balanced loads get none.
//   2. Balance. Layouts are made for levels between stock's largest load and the ideal. A lower level
//      needs more replicas. The layer's seconds under the loads that the construction assigns, of
//      all passes, and the exchange's are compared: a replica is made only as part of a layout that
//      removes more seconds of imbalance than its exchange takes. On one node those are the
//      experts' seconds.
//   3. Locality, with several nodes. Free slots are filled, node by node, with the experts that most
//      of the node's tokens want and no rank of it holds, while the layer's seconds under exact
//      quotas, with its exchange of tokens, fall.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "home_choice.hpp"

#include <algorithm>
#include <limits>

#include "home.hpp"
#include "quotas.hpp"

namespace laer {
namespace {

// A placement is nearly balanced if no rank is above the mean by more than this part: the cost
// model is not exact enough to tell if less is worth an exchange.
constexpr int64_t kNearlyPart = 32;

// Levels above the ideal, as parts of what stock's placement is above it: for plans, which are made
// in the background, and after the gate, where ranks wait.
const std::vector<int64_t> kLevelParts = {2, 4, 8, 16, 64}, kFewLevelParts = {2, 8, 32};

double expert_seconds(const Shape& shape, const CostModel& costs, const HomeLayout& layout) {
  double most_s = 0.0;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    double rank_s = 0.0;
    for (int slot = rank * shape.capacity; slot < (rank + 1) * shape.capacity; ++slot) {
      rank_s += costs.gemm.unit_seconds(layout.loads_S[slot]);
    }
    most_s = std::max(most_s, rank_s);
  }
  return costs.expert_flops * most_s;
}

// Layouts for lower and lower levels; those as before are left out.
std::vector<HomeLayout> by_level(const Shape& shape, const int64_t* node_counts_QE,
                                 const HomeLayout& stock, const std::vector<int64_t>& level_parts) {
  std::vector<HomeLayout> layouts;
  const HomeLayout ideal = replicate(shape, node_counts_QE, 0);
  for (int64_t parts : level_parts) {
    const int64_t above = (stock.largest - ideal.largest) / parts;
    if (above == 0) break;
    layouts.push_back(replicate(shape, node_counts_QE, ideal.largest + above));
    if (layouts.back().replicas >= ideal.replicas) layouts.pop_back();
  }
  layouts.push_back(ideal);
  return layouts;
}

}  // namespace

double replica_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                       double beside_s, bool is_after_gate) {
  if (!has_replicas(shape, slots_S)) return 0.0;
  const Exchanges exchanges = exchange_seconds(shape, costs, slots_S);
  const double whole_s = exchanges.all_s();
  const double exposed_s =
      is_after_gate ? exchanges.restore_s + exposed_backward_seconds(costs, exchanges, beside_s)
                    : exposed_seconds(shape, costs, slots_S, beside_s);
  return exposed_s + (whole_s - exposed_s) * costs.hidden_share +
         replica_host_seconds(shape, costs, slots_S, beside_s);
}

bool is_nearly_balanced(const Shape& shape, const int64_t* node_counts_QE) {
  const int64_t ideal = ideal_load(shape, node_counts_QE);
  return stock_placement(shape, node_counts_QE).largest <= ideal + ideal / kNearlyPart;
}

std::vector<std::vector<int16_t>> replica_steps(const Shape& shape,
                                                const int64_t* node_counts_QE) {
  std::vector<std::vector<int16_t>> steps;
  for (HomeLayout& layout :
       by_level(shape, node_counts_QE, stock_placement(shape, node_counts_QE), kLevelParts)) {
    steps.push_back(std::move(layout.slots_S));
  }
  return steps;
}

HomeLayout choose_replicas(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
                           const int64_t* node_counts_QE) {
  const Counts counts(shape, counts_NE);
  HomeLayout best = stock_placement(shape, node_counts_QE);
  const auto seconds_of = [&](const std::vector<int16_t>& slots_S,
                              const std::vector<int64_t>& loads_S) {
    const Replicas replicas(shape, slots_S.data());
    return layer_seconds(shape, costs,
                         totals(shape, counts, node_counts_QE, replicas, loads_S.data()));
  };
  const auto assigned_s = [&](const HomeLayout& layout) {
    return shape.nodes() == 1 ? expert_seconds(shape, costs, layout)
                              : seconds_of(layout.slots_S, layout.loads_S);
  };
  double best_s = assigned_s(best);
  // The layers around this one take about as long.
  const auto with_exchange = [&](double layer_s, const std::vector<int16_t>& slots_S) {
    return layer_s + replica_seconds(shape, costs, slots_S.data(), layer_s, true);
  };

  // Phases 1 and 2.
  const double ideal_s =
      costs.expert_flops * costs.gemm.least_unit_seconds(ideal_load(shape, node_counts_QE));
  if (!is_nearly_balanced(shape, node_counts_QE) && best_s - ideal_s > least_fetch_seconds(costs)) {
    for (HomeLayout& layout : by_level(shape, node_counts_QE, best, kFewLevelParts)) {
      const double seconds = with_exchange(assigned_s(layout), layout.slots_S);
      if (seconds >= best_s) continue;
      best_s = seconds;
      best = std::move(layout);
    }
  }

  // Phase 3.
  if (shape.nodes() == 1) return best;
  double least_s = std::numeric_limits<double>::infinity();
  const auto layer_s = [&](const std::vector<int16_t>& slots_S) {
    std::vector<int64_t> loads_S(shape.slots());
    slot_loads(shape, counts, node_counts_QE, Replicas(shape, slots_S.data()), loads_S.data());
    const double seconds = with_exchange(seconds_of(slots_S, loads_S), slots_S);
    if (seconds < least_s) {
      least_s = seconds;
      best.loads_S = std::move(loads_S);
    }
    return seconds;
  };
  fill_while_faster(shape, node_counts_QE, layer_s, layer_s(best.slots_S), best.slots_S);
  return best;
}

void fill_while_faster(const Shape& shape, const int64_t* node_counts_QE,
                       const std::function<double(const std::vector<int16_t>&)>& seconds,
                       double best_s, std::vector<int16_t>& slots_S) {
  while (true) {
    std::vector<int16_t> filled_S = slots_S;
    if (!fill_for_locality(shape, node_counts_QE, 1, filled_S)) return;
    const double filled_s = seconds(filled_S);
    if (filled_s >= best_s) return;
    best_s = filled_s;
    slots_S = std::move(filled_S);
  }
}

}  // namespace laer
