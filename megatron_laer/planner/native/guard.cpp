// Each mode in a function of its own; what is asked of both layouts is in Microbatch.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "guard.hpp"

#include <algorithm>
#include <numeric>

#include "construct.hpp"
#include "home.hpp"
#include "home_choice.hpp"
#include "match_previous.hpp"
#include "quotas.hpp"

namespace laer {
namespace {

// One microbatch, and what both layouts are asked.
struct Microbatch {
  const Shape& shape;
  const Counts& counts;

  std::vector<int64_t> loads(const int16_t* slots_S) const {
    return slot_loads(shape, counts, Replicas(shape, slots_S));
  }

  // A layout for these counts, and the loads of its slots.
  Fresh fresh(const CostModel* costs, const int16_t* planned_S) const {
    Fresh made = laer::fresh(shape, costs, counts);
    if (shape.home == 0) match_previous(shape, planned_S, made.slots_S);
    if (made.loads_S.empty()) made.loads_S = loads(made.slots_S.data());
    return made;
  }

  double seconds(const CostModel& costs, const Replicas& replicas,
                 const std::vector<int64_t>& loads_S) const {
    return layer_seconds(shape, costs, totals(shape, counts, replicas, loads_S.data()));
  }
};

void take(Decision& decision, std::vector<int16_t> fresh_S, std::vector<int64_t> loads_S) {
  decision.fresh_S = std::move(fresh_S);
  decision.kept_loads_S = std::move(decision.loads_S);
  decision.loads_S = std::move(loads_S);
}

void by_cost(const Microbatch& microbatch, const CostModel& costs, const int16_t* planned_S,
             Decision& decision) {
  const Shape& shape = microbatch.shape;
  const Replicas planned(shape, planned_S);
  decision.loads_S = slot_loads(shape, microbatch.counts, planned);
  const double kept_s = microbatch.seconds(costs, planned, decision.loads_S);
  // Fresh replicas of home experts are placed by the rules of the planned ones, so that little but
  // balance is left to gain: a bound over all layouts would hope for exchanges that none reaches.
  double least_s = kept_s;
  if (shape.home == 0) {
    least_s = least_layer_seconds(shape, costs, microbatch.counts,
                                  microbatch.counts.sums().node_counts_QE.data());
  } else {
    const int64_t ideal = ideal_load(shape, microbatch.counts.sums());
    if (!is_hidden_by_host(costs, largest_load(shape, decision.loads_S), ideal, kept_s)) {
      least_s -= unbalanced_seconds(shape, costs, ideal, decision.loads_S);
    }
  }
  // Next to a layer that takes as little as this one could. One hop takes as long for all layouts.
  const auto exposed_s = [&](const int16_t* slots_S) {
    if (shape.home == 0 && costs.ways.front().way.links.size() == 1) return 0.0;
    const Exchanges exchanges = exchange_seconds(costs, slots_S);
    return exposed_backward_seconds(costs, exchanges, least_s) +
           replica_host_seconds(shape, costs, slots_S, least_s);
  };
  const double kept_exposed_s = exposed_s(planned_S);
  // Gain at most, cost at least: leaving here never changes the choice of rows.
  decision.gain_s = kept_s - least_s + (shape.home > 0 ? 0.0 : kept_exposed_s);
  decision.cost_s = costs.least_change_s;
  decision.is_priced = true;
  if (decision.gain_s <= decision.cost_s) return;
  auto [fresh_S, loads_S] = microbatch.fresh(&costs, planned_S);
  decision.solved = true;
  if (std::equal(fresh_S.begin(), fresh_S.end(), planned_S)) {
    decision.is_priced = false;
    return;
  }
  const Replicas fresh(shape, fresh_S.data());
  decision.gain_s = kept_s - microbatch.seconds(costs, fresh, loads_S) +
                    (kept_exposed_s - exposed_s(fresh_S.data()));
  decision.cost_s = change_seconds(costs, planned_S, fresh_S.data());
  if (decision.gain_s > decision.cost_s) {
    take(decision, std::move(fresh_S), std::move(loads_S));
  }
}

void by_tolerance(const Microbatch& microbatch, double tolerance, const int16_t* planned_S,
                  Decision& decision) {
  const int ranks = microbatch.shape.ranks;
  decision.loads_S = microbatch.loads(planned_S);
  const int64_t largest = largest_load(microbatch.shape, decision.loads_S);
  const int64_t total =
      std::accumulate(decision.loads_S.begin(), decision.loads_S.end(), int64_t{0});
  // At the bound no layout is better, whatever the tolerance; one token is N times the mean.
  if (largest == (total + ranks - 1) / ranks) return;
  if (static_cast<double>(largest * ranks) / static_cast<double>(total) <= 1.0 + tolerance) return;
  auto [fresh_S, loads_S] = microbatch.fresh(nullptr, planned_S);
  decision.solved = true;
  if (largest_load(microbatch.shape, loads_S) < largest) {
    take(decision, std::move(fresh_S), std::move(loads_S));
  }
}

}  // namespace

Decision decide(const Shape& shape, Mode mode, const CostModel& costs, double tolerance,
                const Counts& counts, const int16_t* planned_S) {
  const Microbatch microbatch{shape, counts};
  Decision decision;
  switch (mode) {
    case Mode::kForecast:
      decision.loads_S = microbatch.loads(planned_S);
      break;
    case Mode::kExact: {
      auto [fresh_S, loads_S] = microbatch.fresh(&costs, planned_S);
      decision.solved = true;
      decision.fresh_S = std::move(fresh_S);
      decision.loads_S = std::move(loads_S);
      if (std::equal(decision.fresh_S.begin(), decision.fresh_S.end(), planned_S)) {
        decision.fresh_S.clear();
      }
      break;
    }
    case Mode::kByCost:
      by_cost(microbatch, costs, planned_S, decision);
      break;
    case Mode::kByTolerance:
      by_tolerance(microbatch, tolerance, planned_S, decision);
      break;
  }
  return decision;
}

}  // namespace laer
