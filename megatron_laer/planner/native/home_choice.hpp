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

// Seconds of a layout's `exchanges` of weights and gradients, all passes, next to a layer of `beside_s`
// seconds, and of the host for replicas. After the gate nothing hides the fetch of forward. 0 without
// replicas.
double replica_seconds(const Shape& shape, const CostModel& costs, const int16_t* slots_S,
                       const Exchanges& exchanges, double beside_s, bool is_after_gate);

// Seconds that perfect balance would save of the experts' compute under these loads of slots.
double unbalanced_seconds(const Shape& shape, const CostModel& costs, int64_t ideal,
                          const std::vector<int64_t>& loads_S);

// Whether no rank is above the mean by much under stock's placement: the cost model is not exact
// enough to tell if less is worth an exchange.
bool is_nearly_balanced(const HomeLayout& stock, int64_t ideal);

// Whether the host takes so long for a layer of `layer_s` seconds that replicas make none faster, and
// memory has room for the rows of the largest load.
bool is_hidden_by_host(const CostModel& costs, int64_t largest, int64_t ideal, double layer_s);

// Stock's placement, or the fastest of layouts between that and the best balanced one, each with
// more replicas than the one before. Stock's where it is nearly balanced, where balance would save
// less than `least_gain_s`, or where the host hides its imbalance. `seconds` prices a layout, with
// exchanges, by its loads, or returns any number from the limit on if they are not fewer.
HomeLayout balance_by_time(const Shape& shape, const Sums& sums, const CostModel& costs,
                           double least_gain_s,
                           const std::function<double(const HomeLayout&, double)>& seconds);

// Layouts that fill one slot of each rank, two, four and so on up to all: those that are free under
// stock's placement, also for nodes alone, and those that are free in `balanced_S`.
std::vector<std::vector<int16_t>> filled_layouts(const Shape& shape, const Sums& sums,
                                                 const std::vector<int16_t>& balanced_S);

// The fastest layout that is found for these counts, fetched after the gate. Where it is ideal, and
// with several nodes, its loads are those of exact quotas.
HomeLayout choose_replicas(const Shape& shape, const CostModel& costs, const Counts& counts);

}  // namespace laer
