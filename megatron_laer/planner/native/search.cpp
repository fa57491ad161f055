// Candidates are judged by their largest load after exact quotas in every disturbed copy; the best
// one is changed by single exchanges as long as tries are left.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "search.hpp"

#include <algorithm>
#include <numeric>

#include "construct.hpp"
#include "disturb.hpp"
#include "flow.hpp"
#include "greedy.hpp"
#include "home.hpp"
#include "home_choice.hpp"
#include "proportional.hpp"

namespace laer {
namespace {

// What all tokens off their node would cost, in percent of the mean load.
constexpr int64_t kOffNodePercent = 8;

// What a replica slot of every rank costs, in thousandths of the mean load, on one node and on several:
// one that makes next to no difference stays empty. Between nodes it is about what one slot of every
// rank saves by locality if loads are balanced, so that these alone bring no replicas.
constexpr int64_t kReplicaPermille = 2, kReplicaPermilleOfNodes = 25;

// What a scenario scores in which all ranks carry the mean load.
constexpr int64_t kPerfect = int64_t{1} << 20;

// The largest load after exact quotas in parts of the mean load, summed over all scenarios, and for
// each the tokens whose node lacks their expert, at a price per token.
class Judge {
 public:
  Judge(const Shape& shape, const int64_t* node_counts_QE,
        std::vector<std::vector<int64_t>> scenarios)
      : shape_(shape), node_counts_QE_(node_counts_QE), scenarios_(std::move(scenarios)) {
    total_ = std::accumulate(scenarios_[0].begin(), scenarios_[0].end(), int64_t{0});
    graph_.ranks = shape.ranks;
    graph_.group_begin.resize(shape.experts + 1);
    for (int e = 0; e <= shape.experts; ++e) graph_.group_begin[e] = e;
    graph_.own.assign(shape.experts, 0);
    graph_.supply.assign(shape.experts, 0);
    order_.resize(scenarios_.size());
    std::iota(order_.begin(), order_.end(), 0);
    largest_.resize(scenarios_.size());
  }

  // Later layouts are tried on the scenarios first that the last one scored in full did worst on.
  void reorder() {
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return largest_[a] > largest_[b]; });
  }

  // Stops early, with any value of at least `limit`, once that is sure to be reached.
  int64_t score(const std::vector<int16_t>& slots_S, int64_t limit) {
    std::vector<int>& begin = graph_.pair_begin;
    begin.assign(shape_.experts + 1, 0);
    for (int16_t e : slots_S) begin[e + 1] += e != kEmpty;
    for (int e = 0; e < shape_.experts; ++e) begin[e + 1] += begin[e];
    place_.assign(begin.begin(), begin.end() - 1);
    graph_.pair_rank.resize(begin[shape_.experts]);
    for (size_t s = 0; s < slots_S.size(); ++s) {
      if (slots_S[s] == kEmpty) continue;
      graph_.pair_rank[place_[slots_S[s]]++] = static_cast<int>(s) / shape_.capacity;
    }
    graph_.index();
    // From a perfect score upwards.
    const int64_t count = static_cast<int64_t>(scenarios_.size());
    int64_t sum = price_off_node(slots_S) + kPerfect * count;
    if (shape_.home > 0) {
      const int64_t replicas = graph_.pairs() - shape_.experts;
      const int64_t permille = shape_.nodes() == 1 ? kReplicaPermille : kReplicaPermilleOfNodes;
      sum += replicas * permille * kPerfect * count / 1000 / shape_.ranks;
    }
    for (int i : order_) {
      if (sum >= limit) return sum;
      largest_[i] = largest(scenarios_[i]);
      sum += largest_[i] - kPerfect;
    }
    return sum;
  }

 private:
  int64_t price_off_node(const std::vector<int16_t>& slots_S) {
    if (shape_.nodes() == 1 || total_ == 0) return 0;
    int64_t tokens = total_;
    const size_t slots_per_node = static_cast<size_t>(shape_.node_size) * shape_.capacity;
    served_.assign(shape_.experts, -1);
    for (size_t s = 0; s < slots_S.size(); ++s) {
      const int node = static_cast<int>(s / slots_per_node);
      if (slots_S[s] == kEmpty || served_[slots_S[s]] == node) continue;
      served_[slots_S[s]] = node;
      tokens -= node_counts_QE_[static_cast<int64_t>(node) * shape_.experts + slots_S[s]];
    }
    const auto weighted = static_cast<__int128>(tokens) * kOffNodePercent * kPerfect;
    return static_cast<int64_t>(weighted * static_cast<int64_t>(scenarios_.size()) / 100 / total_);
  }

  int64_t largest(const std::vector<int64_t>& loads_E) {
    int64_t total = 0, cap = 0;
    for (int e = 0; e < shape_.experts; ++e) {
      const int64_t pairs = graph_.pair_begin[e + 1] - graph_.pair_begin[e];
      total += loads_E[e];
      cap = std::max(cap, (loads_E[e] + pairs - 1) / pairs);
    }
    if (total == 0) return kPerfect;
    cap = std::max(cap, (total + shape_.ranks - 1) / shape_.ranks);
    graph_.supply = loads_E;
    flow_.assign(graph_.pairs(), 0);
    room_.assign(shape_.ranks, cap);
    for (int e = 0; e < shape_.experts; ++e) {
      int64_t left = loads_E[e];
      for (int pair = graph_.pair_begin[e]; left > 0 && pair < graph_.pair_begin[e + 1]; ++pair) {
        flow_[pair] = std::min(left, room_[graph_.pair_rank[pair]]);
        room_[graph_.pair_rank[pair]] -= flow_[pair];
        left -= flow_[pair];
      }
    }
    cap = minimise_largest_load(graph_, cap, flow_);
    return static_cast<int64_t>((static_cast<__int128>(cap) * kPerfect) * shape_.ranks / total);
  }

  const Shape& shape_;
  const int64_t* node_counts_QE_;
  std::vector<std::vector<int64_t>> scenarios_;
  int64_t total_;
  std::vector<int> served_;
  FlowGraph graph_;
  std::vector<int> place_;
  std::vector<int64_t> flow_, room_;
  std::vector<int> order_;
  std::vector<int64_t> largest_;  // by scenario, of the last layout scored in full
};

bool holds(const Shape& shape, const std::vector<int16_t>& slots_S, int rank, int expert) {
  const auto first = slots_S.begin() + static_cast<int64_t>(rank) * shape.capacity;
  return std::find(first, first + shape.capacity, expert) != first + shape.capacity;
}

// Another expert in one slot, or two slots exchanged; false where that would leave an expert
// without a slot or put one on a rank twice.
bool exchange(const Shape& shape, std::vector<int16_t>& slots_S, std::vector<int>& replicas_E,
              Random& random) {
  const int a = random.below(shape.slots());
  if (random.below(2) == 0) {
    const int e = random.below(shape.experts);
    if (replicas_E[slots_S[a]] < 2 || holds(shape, slots_S, a / shape.capacity, e)) return false;
    --replicas_E[slots_S[a]];
    ++replicas_E[e];
    slots_S[a] = static_cast<int16_t>(e);
    return true;
  }
  const int b = random.below(shape.slots());
  if (holds(shape, slots_S, a / shape.capacity, slots_S[b]) ||
      holds(shape, slots_S, b / shape.capacity, slots_S[a])) {
    return false;
  }
  std::swap(slots_S[a], slots_S[b]);
  return true;
}

// The same beside home experts: another replica in one slot, or none, or two slots exchanged; false
// where that would put an expert on a rank twice, or change nothing.
bool exchange_replicas(const Shape& shape, std::vector<int16_t>& slots_S, Random& random) {
  const auto any_slot = [&] {
    const int rank = random.below(shape.ranks);
    return rank * shape.capacity + shape.home + random.below(shape.capacity - shape.home);
  };
  const auto can_take = [&](int slot, int expert) {
    return expert == kEmpty || !holds(shape, slots_S, slot / shape.capacity, expert);
  };
  const int a = any_slot();
  switch (random.below(4)) {
    case 0:
      if (slots_S[a] == kEmpty) return false;
      slots_S[a] = kEmpty;
      return true;
    case 1: {
      const int b = any_slot();
      if (slots_S[a] == slots_S[b] || !can_take(a, slots_S[b]) || !can_take(b, slots_S[a])) {
        return false;
      }
      std::swap(slots_S[a], slots_S[b]);
      return true;
    }
    default: {
      const int e = random.below(shape.experts);
      if (!can_take(a, e)) return false;
      slots_S[a] = static_cast<int16_t>(e);
      return true;
    }
  }
}

}  // namespace

std::vector<int16_t> search(const Shape& shape, const int64_t* node_counts_QE,
                            const int16_t* current_S, const Effort& effort, uint64_t seed) {
  // What disturbed copies would gain is not worth an exchange.
  if (shape.home > 0 && is_nearly_balanced(shape, node_counts_QE)) return at_home(shape);
  Random random(seed);
  const int64_t size = static_cast<int64_t>(shape.nodes()) * shape.experts;
  const std::vector<int64_t> forecast_QE(node_counts_QE, node_counts_QE + size);
  std::vector<std::vector<int64_t>> scenarios;
  for (int i = 0; i < effort.scenarios; ++i) {
    // The first one is the forecast itself.
    const std::vector<int64_t> counts_QE =
        i == 0 ? forecast_QE : disturb(node_counts_QE, shape.nodes(), shape.experts, random);
    std::vector<int64_t> loads_E(shape.experts, 0);
    for (size_t at = 0; at < counts_QE.size(); ++at) loads_E[at % shape.experts] += counts_QE[at];
    scenarios.push_back(std::move(loads_E));
  }
  Judge judge(shape, node_counts_QE, std::move(scenarios));

  std::vector<int16_t> best(current_S, current_S + shape.slots());
  int64_t best_score = judge.score(best, INT64_MAX);
  auto compete = [&](const std::vector<int16_t>& slots_S) {
    const int64_t score = judge.score(slots_S, best_score);
    if (score >= best_score) return false;
    judge.reorder();
    best_score = score;
    best = slots_S;
    return true;
  };
  compete(for_drift(shape, node_counts_QE));
  if (shape.home > 0) {
    compete(at_home(shape));
    for (const auto& slots_S : replica_steps(shape, node_counts_QE)) compete(slots_S);
    for (int i = 0; i < effort.candidates; ++i) {
      const std::vector<int64_t> counts_QE =
          disturb(node_counts_QE, shape.nodes(), shape.experts, random);
      compete(replicate(shape, counts_QE.data(), 0).slots_S);
    }
    std::vector<int16_t> filled_S = best;
    while (fill_for_locality(shape, node_counts_QE, 1, filled_S) && compete(filled_S)) {
    }
  } else {
    compete(proportional(shape, node_counts_QE, Purpose::kForecast));
  }
  if (shape.home == 0 && can_balance(shape)) {
    compete(construct(shape, node_counts_QE, Purpose::kForecast));
    for (int i = 0; i < effort.candidates; ++i) {
      const std::vector<int64_t> counts_QE =
          disturb(node_counts_QE, shape.nodes(), shape.experts, random);
      compete(construct(shape, counts_QE.data(), Purpose::kForecast));
    }
  }

  // Nothing to gain from here on, up to rounding.
  const int64_t perfect = (kPerfect + 1) * effort.scenarios;
  std::vector<int> replicas_E(shape.experts, 0);
  for (int16_t e : best) {
    if (e != kEmpty) ++replicas_E[e];
  }
  for (int i = 0; i < effort.exchanges && best_score > perfect; ++i) {
    std::vector<int16_t> changed = best;
    std::vector<int> changed_replicas_E = replicas_E;
    const bool is_changed = shape.home > 0
                                ? exchange_replicas(shape, changed, random)
                                : exchange(shape, changed, changed_replicas_E, random);
    if (is_changed && compete(changed)) {
      replicas_E = changed_replicas_E;
    }
  }
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const auto first = best.begin() + static_cast<int64_t>(rank) * shape.capacity;
    // As unsigned numbers, in which an empty slot is the largest.
    std::sort(first + shape.home, first + shape.capacity, [](int16_t a, int16_t b) {
      return static_cast<uint16_t>(a) < static_cast<uint16_t>(b);
    });
  }
  return best;
}

}  // namespace laer
