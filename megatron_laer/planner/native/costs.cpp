// Predicted seconds. Only the largest rank counts, so no sum of floats runs over ranks.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node, P points
// of the GEMM curve.
#include "costs.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

namespace laer {
namespace {

constexpr double kBelowRounding = 1.0 - 1e-9;

// The sum of the `kept` largest of `size` numbers.
template <typename Row>
int64_t largest_sum(Row row, int size, int kept, std::vector<int64_t>& scratch) {
  if (kept > 16) {
    scratch.resize(size);
    for (int i = 0; i < size; ++i) scratch[i] = row(i);
    std::nth_element(scratch.begin(), scratch.begin() + kept, scratch.end(),
                     std::greater<int64_t>());
    return std::accumulate(scratch.begin(), scratch.begin() + kept, int64_t{0});
  }
  scratch.assign(kept, 0);  // ascending; counts are not negative
  for (int i = 0; i < size; ++i) {
    const int64_t number = row(i);
    if (number <= scratch[0]) continue;
    int at = 0;
    for (; at + 1 < kept && scratch[at + 1] < number; ++at) scratch[at] = scratch[at + 1];
    scratch[at] = number;
  }
  return std::accumulate(scratch.begin(), scratch.end(), int64_t{0});
}

// Tokens that leave the row that keeps fewest, if rows keep their largest counts.
int64_t least_leaving(const Counts& counts, int rows, int experts, int kept) {
  if (kept >= experts) return 0;
  std::vector<int64_t> scratch;
  int64_t most = 0;
  for (int row = 0; row < rows; ++row) {
    const auto count = [&](int expert) { return counts(row, expert); };
    most = std::max(most, counts.sum(row) - largest_sum(count, experts, kept, scratch));
  }
  return most;
}

}  // namespace

double GemmCurve::unit_seconds(int64_t tokens) const {
  if (tokens <= 0) return 0.0;
  const auto above_P = std::upper_bound(tokens_P.begin(), tokens_P.end(), tokens);
  const auto point = std::max<std::ptrdiff_t>(above_P - tokens_P.begin() - 1, 0);
  const double above = static_cast<double>(std::max<int64_t>(tokens - tokens_P[point], 0));
  return std::min(seconds_P[point] + above * slope_P[point], limit_P[point]);
}

double GemmCurve::least_unit_seconds(int64_t tokens) const {
  const auto point = std::upper_bound(tokens_P.begin(), tokens_P.end(), tokens) - tokens_P.begin();
  const double at_best = point > 0 ? static_cast<double>(tokens) / best_P[point - 1]
                                   : std::numeric_limits<double>::infinity();
  return std::min(unit_seconds(tokens), at_best);
}

// The busiest rank's expert compute, one GEMM per slot and matrix, and the token exchange of the
// rank that takes longest: per link class the slower of send and receive (links are full duplex),
// and of the classes the slower, as one collective drives both. Tokens for a rank's own slots travel
// nowhere. In stages the classes add up, inside nodes travels all that a rank computes for others,
// and between nodes rows reach the rank in their source's place, so a node's ranks receive alike. The
// paper adds up communication over all devices but takes the maximum of compute; here
// both are the time of one device, so that their sum has a meaning.
double layer_seconds(const Shape& shape, const CostModel& costs, const Totals& totals) {
  int64_t intra = 0, inter = 0, far_of_node = 0;
  double expert_s = 0.0;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    int64_t near = 0, far = 0;
    if (rank % shape.node_size == 0) far_of_node = 0;
    double rank_s = 0.0;
    for (int slot = rank * shape.capacity; slot < (rank + 1) * shape.capacity; ++slot) {
      near += totals.near_S[slot];
      far += totals.far_S[slot];
      rank_s += costs.gemm.unit_seconds(totals.near_S[slot] + totals.far_S[slot]);
    }
    const int64_t inside =
        costs.tokens_in_stages ? near + far : std::max(totals.sent_near_N[rank], near);
    intra = std::max(intra, inside - totals.own_N[rank]);
    far_of_node += far;
    const int64_t arriving = costs.tokens_in_stages
                                 ? (far_of_node + shape.node_size - 1) / shape.node_size
                                 : far;
    inter = std::max({inter, totals.sent_far_N[rank], arriving});
    expert_s = std::max(expert_s, rank_s);
  }
  const double intra_s =
      static_cast<double>(intra) * (costs.intra_pair_bytes / costs.intra_bytes_per_s);
  const double inter_s =
      static_cast<double>(inter) * (costs.inter_pair_bytes / costs.inter_bytes_per_s);
  const double pass_s = costs.tokens_in_stages ? intra_s + inter_s : std::max(intra_s, inter_s);
  return costs.expert_flops * expert_s + costs.token_passes * (pass_s + costs.latency_s) +
         costs.host_s;
}

double expert_seconds(const Shape& shape, const CostModel& costs,
                      const std::vector<int64_t>& loads_S) {
  double most_s = 0.0;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    double rank_s = 0.0;
    for (int slot = rank * shape.capacity; slot < (rank + 1) * shape.capacity; ++slot) {
      rank_s += costs.gemm.unit_seconds(loads_S[slot]);
    }
    most_s = std::max(most_s, rank_s);
  }
  return costs.expert_flops * most_s;
}

// Compute: the busiest rank has at least the mean load, and no less than the mean of all ranks'
// times, with each expert in as few GEMMs as are fastest. Tokens: a rank keeps at most those of its
// own C most wanted experts, and the others leave it over all its links at once; a node keeps at
// most those of its G*C most wanted, and the others leave over its ranks' links to other nodes. In
// stages only the latter bounds: the rows inside a node do not follow from counts.
double least_layer_seconds(const Shape& shape, const CostModel& costs, const Counts& counts,
                           const int64_t* node_counts_QE) {
  int64_t total = 0;
  double experts_s = 0.0;
  for (int64_t load : expert_loads(shape, node_counts_QE)) {
    total += load;
    experts_s += costs.gemm.least_unit_seconds(load);
  }
  const double largest_s =
      costs.gemm.least_unit_seconds((total + shape.ranks - 1) / shape.ranks);
  const double expert_s = costs.expert_flops * std::max(experts_s / shape.ranks, largest_s);

  double pass_s = 0.0;
  if (shape.ranks > 1 && !costs.tokens_in_stages) {
    const int64_t leaving = least_leaving(counts, shape.ranks, shape.experts, shape.capacity);
    const double near_bytes_per_s = shape.node_size > 1 ? costs.intra_bytes_per_s : 0.0;
    const double far_bytes_per_s = shape.nodes() > 1 ? costs.inter_bytes_per_s : 0.0;
    pass_s = static_cast<double>(leaving) / (near_bytes_per_s + far_bytes_per_s);
  }
  if (shape.nodes() > 1) {
    const int64_t leaving = least_leaving(Counts(shape, node_counts_QE), shape.nodes(),
                                          shape.experts, shape.node_size * shape.capacity);
    pass_s = std::max(
        pass_s, static_cast<double>(leaving) / shape.node_size / costs.inter_bytes_per_s);
  }
  pass_s = pass_s * costs.inter_pair_bytes + costs.latency_s;
  return (expert_s + costs.token_passes * pass_s + costs.host_s) * kBelowRounding;
}

// Where experts are at home, an exchange without any is left out.
double exchange_seconds(const PricedWay& of, const Carried& carried, const std::vector<Hop>& hops) {
  const Shape& shape = of.way.shape;
  if (shape.home > 0 && hops.back().transfers.empty()) return 0.0;
  const Traffic moved = traffic(hops, shape.node_size, carried.held_N);
  const auto most = [](const std::vector<int64_t>& received_N, const std::vector<int64_t>& sent_N) {
    return static_cast<double>(std::max(*std::max_element(received_N.begin(), received_N.end()),
                                        *std::max_element(sent_N.begin(), sent_N.end())));
  };
  const double intra_s = most(moved.near_N, moved.sent_near_N) * carried.intra_element_s;
  const double inter_s = most(moved.far_N, moved.sent_far_N) * carried.inter_element_s;
  // One hop drives both classes of links at once.
  return (of.way.links.size() == 1 ? std::max(intra_s, inter_s) : intra_s + inter_s) +
         of.latency_s;
}

double least_fetch_seconds(const CostModel& costs) {
  double least_s = std::numeric_limits<double>::infinity();
  for (const PricedWay& of : costs.ways) least_s = std::min(least_s, of.latency_s);
  return least_s;
}

namespace {

// Whether ranks send at most as many experts in a hop as they have homes, or as a rank fetches: their
// buffers have a copy of each, and those of a relay over all ranks are as large in any case.
bool has_room(const Shape& shape, const std::vector<Hop>& hops) {
  if (shape.home == 0) return true;
  const int most = std::max(shape.home, shape.capacity - shape.home);
  return std::all_of(hops.begin(), hops.end(), [&](const Hop& hop) {
    std::vector<int> sent_P(shape.ranks / hop.source_width, 0);
    for (const Transfer& transfer : hop.transfers) ++sent_P[transfer.source.place];
    return *std::max_element(sent_P.begin(), sent_P.end()) <= most * hop.source_width;
  });
}

}  // namespace

// Of several ways the fastest with room, of equally fast ones the first.
Exchanges exchange_seconds(const CostModel& costs, const int16_t* slots_S) {
  Exchanges fastest{};
  for (const PricedWay& of : costs.ways) {
    const std::vector<Hop> found = hops(of.way, slots_S, nullptr);
    if (costs.ways.size() > 1 && !has_room(of.way.shape, found)) continue;
    const double restore_s = exchange_seconds(of, costs.weights, found);
    const double reduce_s =
        costs.is_alike ? restore_s : exchange_seconds(of, costs.grads, found);
    const Exchanges exchanges{restore_s, reduce_s, costs.backward_restores, &of};
    if (fastest.by == nullptr || exchanges.all_s() < fastest.all_s()) fastest = exchanges;
  }
  return fastest;
}

// The solve, and in forward the fetch of the changed slots, which starts after the gate and which
// the experts wait for. The other slots were restored ahead for the planned layout. The way is that
// of the whole layout.
double change_seconds(const CostModel& costs, const int16_t* before_S, const int16_t* after_S) {
  const PricedWay& of =
      costs.ways.size() == 1 ? costs.ways.front() : *exchange_seconds(costs, after_S).by;
  std::vector<int16_t> changed_S(after_S, after_S + of.way.shape.slots());
  for (size_t slot = 0; slot < changed_S.size(); ++slot) {
    if (before_S[slot] == after_S[slot]) changed_S[slot] = kEmpty;
  }
  return exchange_seconds(of, costs.weights, hops(of.way, changed_S.data(), nullptr)) +
         costs.solve_s;
}

// Each exchange is scheduled under the layer before, in the order of the pass; attention between
// MoE layers hides more, which is not counted.
double exposed_forward_seconds(const CostModel& costs, const Exchanges& exchanges,
                               double beside_s) {
  return std::max(exchanges.restore_s - beside_s * costs.forward_share, 0.0);
}

double exposed_backward_seconds(const CostModel& costs, const Exchanges& exchanges,
                                double beside_s) {
  return std::max(exchanges.backward_s() - (beside_s - beside_s * costs.forward_share), 0.0);
}

int most_replicas(const Shape& shape, const int16_t* slots_S) {
  int most = 0;
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const int16_t* first = slots_S + static_cast<int64_t>(rank) * shape.capacity;
    const auto empty = std::count(first + shape.home, first + shape.capacity, kEmpty);
    most = std::max(most, shape.capacity - shape.home - static_cast<int>(empty));
  }
  return most;
}

// The host starts anew at each gate, and is hidden as far as the device takes longer. All layouts of
// rows have as many slots.
double replica_host_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                            double beside_s) {
  const int most = most_replicas(shape, slots_S);
  if (most == 0) return 0.0;
  const double more_s =
      costs.replicas_host_s + (shape.home > 0 ? most * costs.host_slot_s : 0.0);
  const double over_s = costs.host_forward_s + more_s - beside_s * costs.forward_share;
  return std::min(std::max(over_s, 0.0), more_s);
}

}  // namespace laer
