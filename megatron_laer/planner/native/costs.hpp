// The cost model. Every rank gets the same seconds, bit for bit: token counts are added as integers,
// floats slot after slot, and across ranks only the largest counts. Built without contraction of
// products and sums. tests/oracles/costs.py has the same formulas in NumPy.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node, P points
// of the GEMM curve.
#pragma once

#include <cstdint>
#include <vector>

#include "hops.hpp"
#include "quotas.hpp"
#include "shape.hpp"

namespace laer {

// Seconds of GEMMs that need one FLOP per token; planner/clusters.py has its table and says more.
struct GemmCurve {
  std::vector<int64_t> tokens_P;
  std::vector<double> seconds_P, slope_P, limit_P, best_P;

  double unit_seconds(int64_t tokens) const;
  double least_unit_seconds(int64_t tokens) const;
};

// Form of an expert in an exchange: elements that each rank holds, and seconds of one.
struct Carried {
  double intra_element_s, inter_element_s;  // with packing
  std::vector<int64_t> held_N;

  bool operator==(const Carried& other) const {
    return intra_element_s == other.intra_element_s && inter_element_s == other.inter_element_s &&
           held_N == other.held_N;
  }
};

struct PricedWay {
  Way way;
  double latency_s;  // of a fetch of all matrices
};

struct CostModel {
  GemmCurve gemm;
  double expert_flops;   // per token, over all passes
  double forward_share;  // of a layer's time, that hides a restore
  double token_passes;   // All-to-Alls of tokens, of all of a microbatch's passes
  double intra_pair_bytes, inter_pair_bytes;  // of hidden states, per (token, expert) pair
  bool tokens_in_stages;                      // inside nodes after between nodes
  double intra_bytes_per_s, inter_bytes_per_s;
  double latency_s;                    // of one pass of the token exchange
  double host_s;                       // of any microbatch, a constant of the shape
  // Of forward without replicas, of each slot more in it, and of any replicas.
  double host_forward_s, host_slot_s, replicas_host_s;
  // Of a layer without replicas that the host hides, and the busiest rank's rows over the mean that
  // memory has room for.
  double hidden_s, hidden_over_mean;
  std::vector<PricedWay> ways;  // at least one; each layout takes the fastest
  double solve_s, least_change_s;      // constants of the shape
  double hidden_share;  // of a hidden exchange, that the compute around it takes longer
  int64_t pairs;        // of a rank in a microbatch; 0 if not known
  Carried weights, grads;
  bool is_alike;        // whether a reduce takes as long as a restore
  int backward_restores;  // two where forward's re-run needs payloads of its own

  const Shape& shape() const { return ways.front().way.shape; }
};

// Seconds of one layer and microbatch, both passes, whose split is known.
double layer_seconds(const Shape& shape, const CostModel& costs, const Totals& totals);

// The part of these that the rank with most expert compute takes for it.
double expert_seconds(const Shape& shape, const CostModel& costs,
                      const std::vector<int64_t>& loads_S);

// What no layout and no split gets below.
double least_layer_seconds(const Shape& shape, const CostModel& costs, const Counts& counts,
                           const int64_t* node_counts_QE);

// Seconds that a fetch of home experts' replicas takes at least.
double least_fetch_seconds(const CostModel& costs);

// Seconds of one exchange of these hops that nothing hides.
double exchange_seconds(const PricedWay& of, const Carried& carried, const std::vector<Hop>& hops);

// Seconds of a layout's exchanges that nothing hides.
struct Exchanges {
  double restore_s, reduce_s;
  int backward_restores;
  const PricedWay* by;  // of the cost model

  double backward_s() const { return backward_restores * restore_s + reduce_s; }
  double all_s() const { return (1 + backward_restores) * restore_s + reduce_s; }
};

Exchanges exchange_seconds(const CostModel& costs, const int16_t* slots_S);

// Seconds of a change to a layout made after the gate.
double change_seconds(const CostModel& costs, const int16_t* before_S, const int16_t* after_S);

// Seconds of a layout's restores and reduce that a layer of `beside_s` seconds does not hide, in
// forward and in backward.
double exposed_forward_seconds(const CostModel& costs, const Exchanges& exchanges, double beside_s);
double exposed_backward_seconds(const CostModel& costs, const Exchanges& exchanges,
                                double beside_s);

// Slots after the home slots with an expert, the most of a rank.
int most_replicas(const Shape& shape, const int16_t* slots_S);

// Seconds that the host's work for fetched experts adds to the forward of such a layer.
double replica_host_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                            double beside_s);

}  // namespace laer
