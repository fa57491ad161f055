// Replicas by predicted time, in numbered phases of choose_replicas():
//   1. Bound. Where stock's placement is nearly balanced, or balance would save less than the least
//      exchange takes, no replica is made for balance. So balanced loads get none. Where the device
//      waits for the host even so, and rows fit in memory, no replica is made at all.
//   2. Balance. Layouts are made for levels between stock's largest load and the ideal. A lower level
//      needs more replicas. The layer's seconds under the loads that the construction assigns, of
//      all passes, and the exchange's are compared: a replica is made only as part of a layout that
//      removes more seconds of imbalance than its exchange takes.
//   3. Traffic, with several nodes. That layout competes with ones that use one slot of each rank or
//      more, for experts that most tokens of the rank's node want (fill_slots): by the layer's
//      seconds under exact quotas, with the exchange of tokens of the busiest rank.
// Quotas and sums of tokens take most of the time: a layout that could not win with the best split is
// left out.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "home_choice.hpp"

#include <algorithm>
#include <limits>

#include "home.hpp"
#include "quotas.hpp"

namespace laer {
namespace {

// A placement is nearly balanced if no rank is above the mean by more than this part.
constexpr int64_t kNearlyPart = 32;

// Levels above the ideal, as parts of what stock's placement is above it. Higher ones save exchanges,
// and leave rows on one rank, for which its memory may have no room. So those of fewer parts than
// kFewParts are made only where the others do not pay.
constexpr int64_t kLevelParts[] = {32, 16, 8, 2}, kFewParts = 16;

// Sums of floats in another order differ by less.
constexpr double kBelowRounding = 1.0 - 1e-9;

// Slots of a rank that are filled after the gate, where balance needs none.
constexpr int kMostAfterGate = 2;

}  // namespace

double replica_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                       const Exchanges& exchanges, double beside_s, bool is_after_gate) {
  if (most_replicas(shape, slots_S) == 0) return 0.0;
  const double whole_s = exchanges.all_s();
  const double exposed_s =
      (is_after_gate ? exchanges.restore_s : exposed_forward_seconds(costs, exchanges, beside_s)) +
      exposed_backward_seconds(costs, exchanges, beside_s);
  return exposed_s + (whole_s - exposed_s) * costs.hidden_share +
         replica_host_seconds(shape, costs, slots_S, beside_s);
}

double unbalanced_seconds(const Shape& shape, const CostModel& costs, int64_t ideal,
                          const std::vector<int64_t>& loads_S) {
  const int64_t largest = std::max({largest_load(shape, loads_S), ideal, int64_t{1}});
  const double over = 1.0 - static_cast<double>(ideal) / static_cast<double>(largest);
  return expert_seconds(shape, costs, loads_S) * over;
}

bool is_nearly_balanced(const HomeLayout& stock, int64_t ideal) {
  return stock.largest <= ideal + ideal / kNearlyPart;
}

bool is_hidden_by_host(const CostModel& costs, int64_t largest, int64_t ideal, double layer_s) {
  return layer_s <= costs.hidden_s &&
         static_cast<double>(largest) <= costs.hidden_over_mean * static_cast<double>(ideal);
}

HomeLayout balance_by_time(const Shape& shape, const Sums& sums, const CostModel& costs,
                           double least_gain_s,
                           const std::function<double(const HomeLayout&, double)>& seconds) {
  HomeLayout best = stock_placement(shape, sums);
  const int64_t ideal = ideal_load(shape, sums);
  if (is_nearly_balanced(best, ideal)) return best;
  if (unbalanced_seconds(shape, costs, ideal, best.loads_S) <= least_gain_s) return best;
  double best_s = seconds(best, std::numeric_limits<double>::infinity());
  best.is_hidden = is_hidden_by_host(costs, best.largest, ideal, best_s);
  if (best.is_hidden) return best;
  const auto compete = [&](HomeLayout layout) {
    const double layout_s = seconds(layout, best_s);
    if (layout_s >= best_s) return;
    best_s = layout_s;
    best = std::move(layout);
  };
  HomeLayout most = replicate(shape, sums, 0);
  const int64_t largest = most.largest, replicas = most.replicas, over = best.largest - largest;
  compete(std::move(most));
  for (int64_t parts : kLevelParts) {
    if (over < parts || (best.replicas > 0 && parts < kFewParts)) continue;
    HomeLayout fewer = replicate(shape, sums, largest + over / parts);
    if (fewer.replicas < replicas) compete(std::move(fewer));
  }
  return best;
}

std::vector<std::vector<int16_t>> filled_layouts(const Shape& shape, const Sums& sums,
                                                 const std::vector<int16_t>& balanced_S) {
  struct Way {
    std::vector<int16_t> slots_S;
    Fill fill;
  };
  std::vector<std::vector<int16_t>> layouts;
  for (Way way : {Way{at_home(shape), Fill::kLoadAndNode}, Way{at_home(shape), Fill::kNode},
                  Way{balanced_S, Fill::kLoadAndNode}}) {
    for (int most = 1, all = shape.capacity - shape.home; most < 2 * all; most *= 2) {
      const std::vector<int16_t> before_S = way.slots_S;
      fill_slots(shape, sums, std::min(most, all), way.fill, way.slots_S);
      if (way.slots_S != before_S) layouts.push_back(way.slots_S);
    }
  }
  return layouts;
}

namespace {

// A layout of one microbatch whose replicas are fetched after the gate.
class Candidate {
 public:
  Candidate(const Shape& shape, const CostModel& costs, const Counts& counts,
            const std::vector<int16_t>& slots_S)
      : shape_(shape), costs_(costs), counts_(counts), replicas_(shape, slots_S.data()),
        exchanges_(exchange_seconds(costs, slots_S.data())) {}

  double seconds(const std::vector<int64_t>& loads_S) const {
    return with_exchanges(
        layer_seconds(shape_, costs_, totals(shape_, counts_, replicas_, loads_S.data())));
  }

  // What no split gets below whose experts take `expert_s` at least. Tokens travel between nodes if no
  // rank of their node holds their expert, and some rank sends as many of them as the mean.
  double least_seconds(double expert_s) const {
    int64_t far = 0;
    for (int e = 0; e < shape_.experts; ++e) {
      far += counts_.sums().loads_E[e];
      replicas_.for_nodes(e, [&](int node, int, int) { far -= counts_.of_node(node, e); });
    }
    const std::vector<int64_t> none_S(shape_.slots(), 0), none_N(shape_.ranks, 0);
    Totals least{none_S, none_S, none_N, none_N, none_N};
    least.sent_far_N.front() = (far + shape_.ranks - 1) / shape_.ranks;
    return with_exchanges(expert_s + layer_seconds(shape_, costs_, least)) * kBelowRounding;
  }

  std::vector<int64_t> loads() const { return slot_loads(shape_, counts_, replicas_); }

 private:
  // The layers around this one take about as long. A longer layer never has a smaller sum.
  double with_exchanges(double layer_s) const {
    return layer_s +
           replica_seconds(shape_, costs_, replicas_.slots_S, exchanges_, layer_s, true);
  }

  const Shape& shape_;
  const CostModel& costs_;
  const Counts& counts_;
  const Replicas replicas_;
  const Exchanges exchanges_;
};

}  // namespace

HomeLayout choose_replicas(const Shape& shape, const CostModel& costs, const Counts& counts) {
  const Sums& sums = counts.sums();
  HomeLayout best = balance_by_time(
      shape, sums, costs, least_fetch_seconds(costs), [&](const HomeLayout& layout, double limit) {
        const Candidate candidate(shape, costs, counts, layout.slots_S);
        const double least_s =
            candidate.least_seconds(expert_seconds(shape, costs, layout.loads_S));
        return least_s >= limit ? limit : candidate.seconds(layout.loads_S);
      });
  if (shape.nodes() == 1 || best.is_hidden) return best;
  const double expert_s =
      costs.expert_flops * costs.gemm.least_unit_seconds(ideal_load(shape, sums));
  double best_s = std::numeric_limits<double>::infinity();
  const auto compete = [&](std::vector<int16_t> slots_S) {
    const Candidate candidate(shape, costs, counts, slots_S);
    if (candidate.least_seconds(expert_s) >= best_s) return;
    std::vector<int64_t> loads_S = candidate.loads();
    const double seconds = candidate.seconds(loads_S);
    if (seconds >= best_s) return;
    best_s = seconds;
    best.slots_S = std::move(slots_S);
    best.loads_S = std::move(loads_S);
  };
  // Ranks wait for this choice, and nothing hides the fetch: few slots are filled.
  compete(best.slots_S);
  std::vector<int16_t> home_S = at_home(shape);
  const int most = std::min(shape.capacity - shape.home, kMostAfterGate);
  fill_slots(shape, sums, most, Fill::kLoadAndNode, home_S);
  compete(std::move(home_S));
  return best;
}

}  // namespace laer
