// Which replicas beside home experts are worth their exchange, by predicted time. home.cpp makes the
// layouts that are compared.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "costs.hpp"
#include "home.hpp"
#include "shape.hpp"

namespace laer {

// Seconds of a layout's exchanges of weights and gradients, all passes, beside a layer of `beside_s`
// seconds, and of the host for replicas. After the gate nothing hides the fetch of forward. 0 without
// replicas.
double replica_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                       double beside_s, bool is_after_gate);

// Whether stock's placement balances these counts so well that no replica is worth an exchange.
bool is_nearly_balanced(const Shape& shape, const int64_t* node_counts_QE);

// Layouts between stock's placement and the best balanced one, each with more replicas than the one
// before, for these counts or with headroom for others.
std::vector<std::vector<int16_t>> replica_steps(const Shape& shape, const int64_t* node_counts_QE);

// The fastest layout that is found for these counts, fetched after the gate. Where it is ideal, and
// with several nodes, its loads are those of exact quotas.
HomeLayout choose_replicas(const Shape& shape, const CostModel& costs, const int64_t* counts_NE,
                           const int64_t* node_counts_QE);

// Fills free slots for locality, one more of each rank at a time, while `seconds`, which is `best_s`
// for `slots_S`, becomes less.
void fill_while_faster(const Shape& shape, const int64_t* node_counts_QE,
                       const std::function<double(const std::vector<int16_t>&)>& seconds,
                       double best_s, std::vector<int16_t>& slots_S);

}  // namespace laer
