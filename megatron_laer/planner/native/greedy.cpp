// The layouts that are compared, the headroom that one of them is given, and what they are judged
// on.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "greedy.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
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
Sums with_headroom(const Shape& shape, const Sums& sums) {
  const int nodes = shape.nodes(), experts = shape.experts;
  const std::vector<int64_t>& loads_E = sums.loads_E;
  const int64_t total = std::accumulate(loads_E.begin(), loads_E.end(), int64_t{0});
  Sums raised;
  raised.node_counts_QE.resize(sums.node_counts_QE.size());
  for (int node = 0; node < nodes; ++node) {
    for (int e = 0; e < experts; ++e) {
      const size_t at = static_cast<size_t>(node) * experts + e;
      const int64_t tokens = sums.node_counts_QE[at];
      const int64_t room = std::min(loads_E[e], total / shape.ranks) / 8;
      const int64_t load = std::max<int64_t>(loads_E[e], 1);
      // A division of 128 bits takes several times as long.
      const bool is_small = (tokens | room) < int64_t{1} << 31;
      raised.node_counts_QE[at] = tokens + (is_small ? tokens * room / load
                                         : static_cast<int64_t>(
                                               static_cast<__int128>(tokens) * room / load));
    }
  }
  raised.loads_E = expert_loads(shape, raised.node_counts_QE.data());
  return raised;
}

// Any fixed number: the same forecast gives the same layout.
constexpr uint64_t kSeed = 2602;
constexpr int kDisturbed = 4;
constexpr double kAny = std::numeric_limits<double>::infinity();

// The forecast, as of a microbatch (a forecast has no unit; where the microbatch's size is not known,
// each slot has as many tokens on average as make GEMMs fastest), and disturbed copies of it: a layout
// that balances nothing but the forecast itself must not look better than it will be.
class Judge {
 public:
  Judge(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
        const Sums& forecast, int disturbed = kDisturbed)
      : shape_(shape), costs_(costs), counts_NE_(counts_NE), scenarios_(1 + disturbed) {
    const int64_t total = std::max<int64_t>(
        std::accumulate(forecast.loads_E.begin(), forecast.loads_E.end(), int64_t{0}), 1);
    const __int128 wanted = costs.pairs > 0 ? shape.ranks * costs.pairs
                                            : shape.slots() * costs.gemm.tokens_P.back();
    // Rounded up, so that what divides without a rest stays so.
    const auto scale = [&](int64_t parts, int64_t of) {
      const __int128 divisor = static_cast<__int128>(total) * of;
      return static_cast<int64_t>(((wanted * parts << shift_) + divisor - 1) / divisor);
    };
    while (scale(1, 1) < kPrecision) ++shift_;
    Random random(kSeed);
    std::array<int64_t, kNumFactors> disturbed_factors;
    for (int i = 0; i < kNumFactors; ++i) {
      disturbed_factors[i] = scale(kParts * (256 + kFactors[i]), 512);
    }
    for (Scenario& of : scenarios_) {
      of.factor_E.assign(shape.experts, scale(kParts, 1));
      if (&of == &scenarios_.front()) continue;
      for (int64_t& factor : of.factor_E) factor = disturbed_factors[random.below(kNumFactors)];
    }
    add_sums();
    for (Scenario& of : scenarios_) {
      of.sums.node_counts_QE = forecast.node_counts_QE;
      int64_t* tokens = of.sums.node_counts_QE.data();
      for (int node = 0; node < shape.nodes(); ++node) {
        for (int e = 0; e < shape.experts; ++e, ++tokens) {
          *tokens = counts(of).times_factor(*tokens, e);
        }
      }
      of.sums.loads_E = expert_loads(shape, of.sums.node_counts_QE.data());
    }
    if (shape.home == 0) {
      const std::vector<int64_t> factor_E(shape.experts, scale(1, 1));
      Sums tokens = scenarios_.front().sums;
      to_tokens(tokens.node_counts_QE);
      to_tokens(tokens.tokens_N);
      beside_s_ = least_layer_seconds(shape, costs,
                                      Counts(shape, counts_NE, tokens, factor_E.data(), shift_),
                                      tokens.node_counts_QE.data());
    }
  }

  // Seconds over all scenarios, or any number from `limit` on if they are not fewer.
  double seconds(const std::vector<int16_t>& slots_S, double limit) const {
    const Replicas replicas(shape_, slots_S.data());
    const Exchanges exchanges = exchange_seconds(costs_, slots_S.data());
    double sum = 0;
    for (const Scenario& of : scenarios_) {
      sum += priced(of, replicas, exchanges, slot_loads(shape_, counts(of), replicas, false));
      if (sum >= limit) break;
    }
    return sum;
  }

  // Seconds for the forecast itself, under the loads that a layout of home experts is made for.
  double assigned_seconds(const HomeLayout& layout) const {
    const Scenario& forecast = scenarios_.front();
    std::vector<int64_t> loads_S(layout.loads_S);
    for (int64_t& load : loads_S) load = counts(forecast).times_factor(load, 0);
    return priced(forecast, Replicas(shape_, layout.slots_S.data()),
                  exchange_seconds(costs_, layout.slots_S.data()), loads_S);
  }

 private:
  // Loads are counted in parts of a token, as each rank's are rounded down.
  static constexpr int64_t kParts = 16, kPrecision = int64_t{1} << 40;

  // Each expert's tokens times a factor.
  struct Scenario {
    std::vector<int64_t> factor_E;
    Sums sums;
  };

  double priced(const Scenario& of, const Replicas& replicas, const Exchanges& exchanges,
                const std::vector<int64_t>& loads_S) const {
    Totals sums = totals(shape_, counts(of), replicas, loads_S.data());
    for (std::vector<int64_t>* parts :
         {&sums.near_S, &sums.far_S, &sums.sent_near_N, &sums.sent_far_N, &sums.own_N}) {
      // Rounded up, so that no layout gains by small parts.
      for (int64_t& number : *parts) number = (number + kParts - 1) / kParts;
    }
    const double layer_s = layer_seconds(shape_, costs_, sums);
    // Home experts' layers differ little in time, so the neighbours take as long.
    return layer_s +
           (shape_.home > 0
                ? replica_seconds(shape_, costs_, replicas.slots_S, exchanges, layer_s, false)
                : exposed_forward_seconds(costs_, exchanges, beside_s_) +
                      exposed_backward_seconds(costs_, exchanges, beside_s_));
  }

  static void to_tokens(std::vector<int64_t>& parts) {
    for (int64_t& number : parts) number /= kParts;
  }

  Counts counts(const Scenario& of) const {
    return {shape_, counts_NE_, of.sums, of.factor_E.data(), shift_};
  }

  // Sums over each rank, of all scenarios in one pass over the forecast.
  void add_sums() {
    const int scenarios = static_cast<int>(scenarios_.size());
    const double unit = std::ldexp(1.0, -shift_);
    std::vector<std::array<double, 1 + kDisturbed>> factors(shape_.experts);
    for (int k = 0; k < scenarios; ++k) {
      scenarios_[k].sums.tokens_N.resize(shape_.ranks);
      for (int e = 0; e < shape_.experts; ++e) {
        factors[e][k] = static_cast<double>(scenarios_[k].factor_E[e]) * unit;
      }
    }
    for (int rank = 0; rank < shape_.ranks; ++rank) {
      const int64_t* counts_E = counts_NE_ + static_cast<int64_t>(rank) * shape_.experts;
      std::array<double, 1 + kDisturbed> sums{};
      for (int e = 0; e < shape_.experts; ++e) {
        const auto tokens = static_cast<double>(counts_E[e]);
        for (int k = 0; k < scenarios; ++k) sums[k] += tokens * factors[e][k];
      }
      for (int k = 0; k < scenarios; ++k) {
        scenarios_[k].sums.tokens_N[rank] = static_cast<int64_t>(sums[k]);
      }
    }
  }

  const Shape& shape_;
  const CostModel& costs_;
  const int64_t* counts_NE_;
  int shift_ = 0;
  std::vector<Scenario> scenarios_;  // the first is the forecast itself
  double beside_s_ = 0.0;  // of the layers beside, whose layouts are not at choice here
};

// Home experts: replicas for balance, or each rank's slots filled for drift and for tokens that stay
// in their node. Where stock's placement is nearly balanced, loads are taken to stay so. None where the
// host hides imbalance.
std::vector<int16_t> replicas_by_time(const Shape& shape, const CostModel& costs,
                                      const int64_t* counts_NE, const Sums& sums) {
  const bool is_balanced =
      is_nearly_balanced(stock_placement(shape, sums), ideal_load(shape, sums));
  if (is_balanced && shape.nodes() == 1) return at_home(shape);
  const Judge judge(shape, costs, counts_NE, sums, is_balanced ? 0 : kDisturbed);
  const auto seconds = [&](const HomeLayout& layout, double) { return judge.assigned_seconds(layout); };
  HomeLayout layout = balance_by_time(shape, sums, costs, 0.0, seconds);
  std::vector<int16_t> best = std::move(layout.slots_S);
  if (layout.is_hidden) return best;
  double best_s = judge.seconds(best, kAny);
  for (std::vector<int16_t>& slots_S : filled_layouts(shape, sums, best)) {
    const double filled_s = judge.seconds(slots_S, best_s);
    if (filled_s >= best_s) continue;
    best_s = filled_s;
    best = std::move(slots_S);
  }
  return best;
}

}  // namespace

std::vector<int16_t> for_drift(const Shape& shape, const Sums& sums) {
  if (shape.home > 0) {
    return replicate(shape, with_headroom(shape, sums), 0).slots_S;
  }
  if (!is_scarce(shape) || !can_balance(shape)) {
    return proportional(shape, sums, Purpose::kForecast);
  }
  return construct(shape, with_headroom(shape, sums), Purpose::kForecast);
}

std::vector<int16_t> greedy(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
                            const Sums& sums) {
  if (shape.home > 0) return replicas_by_time(shape, costs, counts_NE, sums);
  std::vector<int16_t> best = for_drift(shape, sums);
  // The most experts beside which every rank of a node can have a replica more.
  const int most_experts = shape.node_size * (shape.capacity - 1);
  if (shape.nodes() == 1 || shape.experts <= most_experts || !can_balance(shape)) return best;
  const Judge judge(shape, costs, counts_NE, sums);
  double best_s = judge.seconds(best, kAny);
  auto compete = [&](std::vector<int16_t> slots_S) {
    const double seconds = judge.seconds(slots_S, best_s);
    if (seconds >= best_s) return;
    best_s = seconds;
    best = std::move(slots_S);
  };
  // With slots to spare it leaves load fewer ways to flow off than the others have.
  if (is_scarce(shape)) compete(construct(shape, sums, Purpose::kNow));
  if (static_cast<int64_t>(shape.nodes()) * most_experts >= shape.experts) {
    compete(proportional_by_node(shape, sums, most_experts));
  }
  return best;
}

}  // namespace laer
