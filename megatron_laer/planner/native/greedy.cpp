// The layouts that are compared, the headroom that one of them is given, and what they are judged
// on.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "greedy.hpp"

#include <algorithm>
#include <numeric>

#include "construct.hpp"
#include "disturb.hpp"
#include "home.hpp"
#include "home_choice.hpp"
#include "proportional.hpp"
#include "quotas.hpp"

namespace laer {
namespace {

bool is_scarce(const Shape& shape) {
  return shape.slots() - shape.experts < 2 * static_cast<int64_t>(shape.ranks);
}

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

// Any fixed number: the same forecast gives the same layout.
constexpr uint64_t kSeed = 2602;
constexpr int kDisturbed = 4;

// The forecast, as of a microbatch (a forecast has no unit; where the microbatch's size is not known,
// each slot has as many tokens on average as make GEMMs fastest), and copies of it that are disturbed
// half as much as those of the search: a layout that balances nothing but the forecast itself must
// not look better than it will be.
class Judge {
 public:
  Judge(const Shape& shape, const CostModel& costs, const int64_t* counts_NE)
      : shape_(shape), costs_(costs) {
    const int64_t size = static_cast<int64_t>(shape.ranks) * shape.experts;
    const int64_t total = std::accumulate(counts_NE, counts_NE + size, int64_t{0});
    const int64_t wanted = costs.pairs > 0 ? shape.ranks * costs.pairs
                                           : shape.slots() * costs.gemm.tokens_P.back();
    std::vector<int64_t> scaled_NE(size);
    for (int64_t i = 0; i < size; ++i) {
      const auto tokens =
          static_cast<__int128>(counts_NE[i]) * wanted / std::max<int64_t>(total, 1);
      scaled_NE[i] = static_cast<int64_t>(tokens);
    }
    Random random(kSeed);
    for (int copy = 0; copy < kDisturbed; ++copy) {
      std::vector<int64_t> counts = disturb(scaled_NE.data(), shape.ranks, shape.experts, random);
      for (int64_t i = 0; i < size; ++i) counts[i] = (counts[i] + scaled_NE[i]) / 2;
      add(std::move(counts));
    }
    add(std::move(scaled_NE));
  }

  double seconds(const std::vector<int16_t>& slots_S) const {
    const Replicas replicas(shape_, slots_S.data());
    std::vector<int64_t> loads_S(shape_.slots());
    double sum = 0;
    for (const Scenario& of : scenarios_) {
      slot_loads(shape_, of.counts_NE.data(), of.node_counts_QE.data(), replicas, loads_S.data());
      const double layer_s = layer_seconds(
          shape_, costs_,
          totals(shape_, of.counts_NE.data(), of.node_counts_QE.data(), replicas, loads_S.data()));
      sum += layer_s;
      // Home experts' layers differ little in time, so the neighbours take as long.
      sum += shape_.home > 0 ? replica_seconds(shape_, costs_, slots_S.data(), layer_s, false)
                             : exposed_seconds(shape_, costs_, slots_S.data(), of.beside_s);
    }
    return sum;
  }

 private:
  struct Scenario {
    std::vector<int64_t> counts_NE, node_counts_QE;
    double beside_s;  // of the layers beside, whose layouts are not at choice here
  };

  void add(std::vector<int64_t> counts_NE) {
    std::vector<int64_t> node_counts_QE(static_cast<size_t>(shape_.nodes()) * shape_.experts);
    node_counts(shape_, counts_NE.data(), node_counts_QE.data());
    const double beside_s =
        least_layer_seconds(shape_, costs_, counts_NE.data(), node_counts_QE.data());
    scenarios_.push_back({std::move(counts_NE), std::move(node_counts_QE), beside_s});
  }

  const Shape& shape_;
  const CostModel& costs_;
  std::vector<Scenario> scenarios_;
};

// Home experts: stock's placement, replicas for balance with and without headroom, and then for
// locality.
std::vector<int16_t> replicas_by_time(const Shape& shape, const CostModel& costs,
                                      const int64_t* counts_NE, const int64_t* node_counts_QE) {
  const Judge judge(shape, costs, counts_NE);
  std::vector<int16_t> best = at_home(shape);
  double best_s = judge.seconds(best);
  std::vector<std::vector<int64_t>> wanted;
  if (!is_nearly_balanced(shape, node_counts_QE)) {
    wanted.push_back(with_headroom(shape, node_counts_QE));
    wanted.emplace_back(node_counts_QE, node_counts_QE + shape.nodes() * shape.experts);
  }
  for (const std::vector<int64_t>& counts_QE : wanted) {
    for (std::vector<int16_t>& slots_S : replica_steps(shape, counts_QE.data())) {
      const double seconds = judge.seconds(slots_S);
      if (seconds >= best_s) continue;
      best_s = seconds;
      best = std::move(slots_S);
    }
  }
  if (shape.nodes() > 1) {
    fill_while_faster(shape, node_counts_QE,
                      [&](const std::vector<int16_t>& slots_S) { return judge.seconds(slots_S); },
                      best_s, best);
  }
  return best;
}

}  // namespace

std::vector<int16_t> for_drift(const Shape& shape, const int64_t* node_counts_QE) {
  if (shape.home > 0) {
    return replicate(shape, with_headroom(shape, node_counts_QE).data(), 0).slots_S;
  }
  if (!is_scarce(shape) || !can_balance(shape)) {
    return proportional(shape, node_counts_QE, Purpose::kForecast);
  }
  return construct(shape, with_headroom(shape, node_counts_QE).data(), Purpose::kForecast);
}

std::vector<int16_t> greedy(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
                            const int64_t* node_counts_QE) {
  if (shape.home > 0) return replicas_by_time(shape, costs, counts_NE, node_counts_QE);
  std::vector<int16_t> best = for_drift(shape, node_counts_QE);
  // The most experts beside which every rank of a node can have a replica more.
  const int most_experts = shape.node_size * (shape.capacity - 1);
  if (shape.nodes() == 1 || shape.experts <= most_experts || !can_balance(shape)) return best;
  const Judge judge(shape, costs, counts_NE);
  double best_s = judge.seconds(best);
  auto compete = [&](std::vector<int16_t> slots_S) {
    const double seconds = judge.seconds(slots_S);
    if (seconds >= best_s) return;
    best_s = seconds;
    best = std::move(slots_S);
  };
  // With slots to spare it leaves load fewer ways to flow off than the others have.
  if (is_scarce(shape)) compete(construct(shape, node_counts_QE, Purpose::kNow));
  if (static_cast<int64_t>(shape.nodes()) * most_experts >= shape.experts) {
    compete(proportional_by_node(shape, node_counts_QE, most_experts));
  }
  return best;
}

}  // namespace laer
