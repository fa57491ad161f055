// The native planner as a Python module: arrays in, arrays out, all work without the GIL. What the
// core relies on is checked here; the callers in planner/*.py say more of what does not fit.
//
// Over 400 lines: one table of functions, each with its checks.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>

#include "construct.hpp"
#include "costs.hpp"
#include "crossings.hpp"
#include "greedy.hpp"
#include "guard.hpp"
#include "home.hpp"
#include "hops.hpp"
#include "match_previous.hpp"
#include "node_experts.hpp"
#include "proportional.hpp"
#include "quotas.hpp"
#include "shape.hpp"
#include "token_runs.hpp"

namespace py = pybind11;

namespace {

constexpr int kDense = py::array::c_style | py::array::forcecast;
using Counts = py::array_t<int64_t, kDense>;
using Doubles = py::array_t<double, kDense>;
using Slots = py::array_t<int16_t, kDense>;

template <typename Number>
py::array_t<Number> to_array(const std::vector<Number>& values) {
  return py::array_t<Number>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename Number>
std::vector<Number> to_vector(const py::array_t<Number, kDense>& array) {
  return {array.data(), array.data() + array.size()};
}

void check_experts(const Slots& slots_S, int num_experts, bool has_empty_slots) {
  const int least = has_empty_slots ? laer::kEmpty : 0;
  for (py::ssize_t slot = 0; slot < slots_S.size(); ++slot) {
    const int16_t expert = slots_S.data()[slot];
    if (expert < least || expert >= num_experts) throw py::value_error("a slot holds no expert");
  }
}

// Home slots are none, or E/N of a rank with a replica slot besides.
void check_home(int64_t ranks, int64_t experts, int64_t capacity, int home) {
  if (home != 0 && (home < 0 || ranks * home != experts || capacity <= home)) {
    throw py::value_error("home slots must be E/N, and fewer than the slots");
  }
}

// The shape, if these sizes have one and every expert has a slot: the core relies on it. Negative
// counts are refused where they are added up.
laer::Shape shape_of(const Counts& counts_NE, const Slots& slots_S, int node_size, int home,
                     bool has_empty_slots) {
  if (counts_NE.ndim() != 2 || slots_S.ndim() != 1 || counts_NE.size() == 0) {
    throw py::value_error("counts must be [N, E] and slots [S]");
  }
  const auto ranks = counts_NE.shape(0), experts = counts_NE.shape(1);
  if (node_size < 1 || ranks % node_size != 0 || slots_S.size() % ranks != 0) {
    throw py::value_error("ranks must divide the slots, and a node's ranks all ranks");
  }
  check_home(ranks, experts, slots_S.size() / ranks, home);
  check_experts(slots_S, static_cast<int>(experts), has_empty_slots);
  std::vector<char> is_held_E(experts, 0);
  for (py::ssize_t slot = 0; slot < slots_S.size(); ++slot) {
    if (slots_S.data()[slot] != laer::kEmpty) is_held_E[slots_S.data()[slot]] = 1;
  }
  if (slots_S.size() / ranks > experts ||
      std::count(is_held_E.begin(), is_held_E.end(), 1) != experts) {
    throw py::value_error("every expert must have a slot, and a rank no more slots than experts");
  }
  return {static_cast<int>(ranks), static_cast<int>(experts),
          static_cast<int>(slots_S.size() / ranks), node_size, home};
}

// For quotas, which need not know which slots are at home.
laer::Shape quota_shape(const Counts& counts_NE, const Slots& slots_S, int node_size) {
  return shape_of(counts_NE, slots_S, node_size, 0, true);
}

// For a new layout: slots of the one in use may be empty where experts have a home.
laer::Shape shape_of(const Counts& counts_NE, const Slots& slots_S, int node_size, int home) {
  return shape_of(counts_NE, slots_S, node_size, home, home > 0);
}

void check_size(const py::array& array, int64_t size, const char* what) {
  if (array.size() != size) throw py::value_error(std::string("wrong size of ") + what);
}

void check_rank(const laer::Shape& shape, int rank) {
  if (rank < 0 || rank >= shape.ranks) throw py::value_error("rank must be in 0..N-1");
}

void check_costs(const laer::Shape& shape, const laer::CostModel& costs) {
  const laer::Shape& priced = costs.shape();
  if (priced.ranks != shape.ranks || priced.experts != shape.experts ||
      priced.capacity != shape.capacity || priced.node_size != shape.node_size ||
      priced.home != shape.home) {
    throw py::value_error("the cost model is for another shape");
  }
}

// Calls compute(counts, replicas) without the GIL.
template <typename Compute>
void on_layout(const laer::Shape& shape, const Counts& counts_NE, const Slots& slots_S,
               Compute compute) {
  const int64_t* counts = counts_NE.data();
  const int16_t* slots = slots_S.data();
  py::gil_scoped_release release;
  const laer::Sums sums = laer::sums_of(shape, counts);
  compute(laer::Counts(shape, counts, sums), laer::Replicas(shape, slots));
}

// Counts of gathered rows, [N, E + W + X], of which each ends in X tags; none where a rank has other
// tags. The second value is the first rank and word of its map, of W, that contradict the counts.
py::tuple agreed_counts(const Counts& rows, int words, int tags) {
  const auto experts = rows.ndim() == 2 ? rows.shape(1) - words - tags : 0;
  if (experts < 1 || rows.shape(0) == 0 || words < 1 || tags < 1 || experts % words) {
    throw py::value_error("rows must be [N, E + words + tags], of equal words");
  }
  py::array_t<int64_t> counts_NE({rows.shape(0), experts});
  py::object wrong = py::none();
  for (py::ssize_t rank = rows.shape(0) - 1; rank >= 0; --rank) {
    const int64_t *row = rows.data(rank, 0), *sums = row + experts, *end = sums + words;
    if (!std::equal(end, end + tags, rows.data(0, experts + words))) {
      return py::make_tuple(py::none(), py::none());
    }
    std::copy(row, sums, counts_NE.mutable_data(rank, 0));
    for (int word = words - 1; word >= 0; --word) {
      uint64_t sum = 0;
      for (auto expert = experts / words - 1; expert >= 0; --expert) {
        sum = (sum << 8) + static_cast<uint64_t>(row[word * (experts / words) + expert]);
      }
      if (sum != static_cast<uint64_t>(sums[word])) wrong = py::make_tuple(rank, word);
    }
  }
  return py::make_tuple(counts_NE, wrong);
}

py::array_t<int64_t> slot_loads(const Counts& counts_NE, const Slots& slots_S, int node_size) {
  const laer::Shape shape = quota_shape(counts_NE, slots_S, node_size);
  std::vector<int64_t> loads_S;
  on_layout(shape, counts_NE, slots_S, [&](const auto& counts, const auto& replicas) {
    loads_S = laer::slot_loads(shape, counts, replicas);
  });
  return to_array(loads_S);
}

// A rank's row, [S], or its columns, [N, C].
template <bool is_row>
py::array_t<int64_t> rank_part(const Counts& counts_NE, const Slots& slots_S,
                               const Counts& loads_S, int node_size, int rank) {
  const laer::Shape shape = quota_shape(counts_NE, slots_S, node_size);
  check_size(loads_S, shape.slots(), "loads");
  check_rank(shape, rank);
  using Sizes = std::vector<py::ssize_t>;
  py::array_t<int64_t> part(is_row ? Sizes{shape.slots()} : Sizes{shape.ranks, shape.capacity});
  int64_t* numbers = part.mutable_data();
  const int64_t* loads = loads_S.data();
  on_layout(shape, counts_NE, slots_S, [&](const auto& counts, const auto& replicas) {
    const auto compute = is_row ? laer::rank_row : laer::rank_columns;
    compute(shape, counts, replicas, loads, rank, numbers);
  });
  return part;
}

py::tuple totals(const Counts& counts_NE, const Slots& slots_S, const Counts& loads_S,
                 int node_size) {
  const laer::Shape shape = quota_shape(counts_NE, slots_S, node_size);
  check_size(loads_S, shape.slots(), "loads");
  const int64_t* loads = loads_S.data();
  laer::Totals sums;
  on_layout(shape, counts_NE, slots_S, [&](const auto& counts, const auto& replicas) {
    sums = laer::totals(shape, counts, replicas, loads);
  });
  return py::make_tuple(to_array(sums.near_S), to_array(sums.far_S), to_array(sums.sent_near_N),
                        to_array(sums.sent_far_N), to_array(sums.own_N));
}

laer::CostModel cost_model(const Counts& tokens_P, const Doubles& seconds_P,
                           const Doubles& slope_P, const Doubles& limit_P, const Doubles& best_P,
                           double expert_flops, double forward_share,
                           double token_passes, double intra_pair_bytes, double inter_pair_bytes,
                           bool tokens_in_stages, double intra_bytes_per_s, double inter_bytes_per_s,
                           double latency_s, double host_s, double host_forward_s, double host_slot_s,
                           double replicas_host_s, double hidden_s, double hidden_over_mean,
                           const std::vector<std::pair<laer::Way, double>>& ways, double solve_s,
                           double least_change_s, double hidden_share, int64_t pairs,
                           laer::Carried weights, laer::Carried grads, int backward_restores) {
  for (const auto& column_P : {seconds_P, slope_P, limit_P, best_P}) {
    check_size(column_P, tokens_P.size(), "the GEMM curve");
  }
  if (tokens_P.size() == 0) throw py::value_error("the GEMM curve is empty");
  if (ways.empty()) throw py::value_error("there is no way to move experts");
  std::vector<laer::PricedWay> priced;
  for (const auto& [way, latency_s] : ways) priced.push_back({way, latency_s});
  for (const laer::Carried& carried : {weights, grads}) {
    if (carried.held_N.size() != static_cast<size_t>(priced[0].way.shape.ranks)) {
      throw py::value_error("ways, weights and gradients must be of as many ranks");
    }
  }
  const bool is_alike = weights == grads;
  return {{to_vector(tokens_P), to_vector(seconds_P), to_vector(slope_P), to_vector(limit_P),
           to_vector(best_P)},
          expert_flops, forward_share, token_passes, intra_pair_bytes, inter_pair_bytes,
          tokens_in_stages, intra_bytes_per_s, inter_bytes_per_s, latency_s, host_s, host_forward_s,
          host_slot_s, replicas_host_s, hidden_s, hidden_over_mean, std::move(priced), solve_s,
          least_change_s, hidden_share, pairs, std::move(weights), std::move(grads), is_alike,
          backward_restores};
}

void check_layout(const laer::Shape& shape, const Slots& slots_S) {
  check_size(slots_S, shape.slots(), "the slots");
  check_experts(slots_S, shape.experts, shape.home > 0);
}

double layer_seconds(const laer::CostModel& costs, const Counts& near_S, const Counts& far_S,
                     const Counts& sent_near_N, const Counts& sent_far_N, const Counts& own_N) {
  const laer::Shape& shape = costs.shape();
  for (const auto& tokens_S : {near_S, far_S}) check_size(tokens_S, shape.slots(), "the slots");
  for (const auto& sums_N : {sent_near_N, sent_far_N, own_N}) {
    check_size(sums_N, shape.ranks, "the ranks");
  }
  return laer::layer_seconds(shape, costs,
                             {to_vector(near_S), to_vector(far_S), to_vector(sent_near_N),
                              to_vector(sent_far_N), to_vector(own_N)});
}

double least_layer_seconds(const laer::CostModel& costs, const Counts& counts_NE) {
  const laer::Shape& shape = costs.shape();
  check_size(counts_NE, static_cast<int64_t>(shape.ranks) * shape.experts, "counts");
  const laer::Sums sums = laer::sums_of(shape, counts_NE.data());
  return laer::least_layer_seconds(shape, costs, laer::Counts(shape, counts_NE.data(), sums),
                                   sums.node_counts_QE.data());
}

// Of one exchange in this way that nothing hides.
double exchange_seconds(const laer::Way& way, double latency_s, const laer::Carried& carried,
                        const Slots& slots_S) {
  check_size(slots_S, way.shape.slots(), "the slots");
  check_experts(slots_S, way.shape.experts, true);
  if (carried.held_N.size() != static_cast<size_t>(way.shape.ranks)) {
    throw py::value_error("wrong size of the ranks");
  }
  return laer::exchange_seconds({way, latency_s}, carried,
                                laer::hops(way, slots_S.data(), nullptr));
}

double change_seconds(const laer::CostModel& costs, const Slots& before_S, const Slots& after_S) {
  for (const auto& layout_S : {before_S, after_S}) check_layout(costs.shape(), layout_S);
  return laer::change_seconds(costs, before_S.data(), after_S.data());
}

// Of a layout's exchanges: the position of their way, and the seconds that a layer of `beside_s`
// does not hide in forward and in backward, and that the host's work for replicas adds.
py::tuple exposed(const laer::CostModel& costs, const Slots& slots_S, double beside_s) {
  const laer::Shape& shape = costs.shape();
  check_layout(shape, slots_S);
  const laer::Exchanges exchanges = laer::exchange_seconds(costs, slots_S.data());
  return py::make_tuple(exchanges.by - costs.ways.data(),
                        laer::exposed_forward_seconds(costs, exchanges, beside_s),
                        laer::exposed_backward_seconds(costs, exchanges, beside_s),
                        laer::replica_host_seconds(shape, costs, slots_S.data(), beside_s));
}

// A rank's sums and runs, with the GIL but next to no work: what is sent to and received from each
// rank, the tokens of its slots, and the packed runs.
struct RankSums {
  py::list sent_N, received_N, tokens_C;
  py::array_t<int32_t> runs;
};

RankSums rank_sums(const laer::Shape& shape, const int16_t* slots_S, const int64_t* row_S,
                    const int64_t* columns_NC) {
  py::list sent_N(shape.ranks), received_N(shape.ranks), tokens_C(shape.capacity);
  std::vector<int64_t> sums_C(shape.capacity, 0);
  for (int rank = 0; rank < shape.ranks; ++rank) {
    int64_t sent = 0, received = 0;
    for (int c = 0; c < shape.capacity; ++c) {
      const int64_t column = columns_NC[rank * shape.capacity + c];
      sent += row_S[rank * shape.capacity + c];
      received += column;
      sums_C[c] += column;
    }
    sent_N[rank] = py::int_(sent);
    received_N[rank] = py::int_(received);
  }
  for (int c = 0; c < shape.capacity; ++c) tokens_C[c] = py::int_(sums_C[c]);
  py::array_t<int32_t> runs(laer::TokenRuns(shape).size);
  laer::token_runs(shape, slots_S, row_S, columns_NC, runs.mutable_data());
  return {sent_N, received_N, tokens_C, runs};
}

py::tuple rank_quotas(const Slots& slots_S, const Counts& row_S, const Counts& columns_NC,
                       int num_experts) {
  if (columns_NC.ndim() != 2) throw py::value_error("columns must be [N, C]");
  check_size(row_S, slots_S.size(), "the row");
  check_size(columns_NC, slots_S.size(), "the columns");
  check_experts(slots_S, num_experts, true);
  const laer::Shape shape{static_cast<int>(columns_NC.shape(0)), num_experts,
                          static_cast<int>(columns_NC.shape(1)), 1};
  const RankSums sums = rank_sums(shape, slots_S.data(), row_S.data(), columns_NC.data());
  return py::make_tuple(row_S, columns_NC, sums.sent_N, sums.received_N, sums.tokens_C, sums.runs);
}

// One microbatch for one rank, from counts to all that it must know: planner/guard.py and
// planner/splits.py name what is returned.
py::tuple decide(const std::string& mode, const laer::CostModel& costs,
                 std::optional<double> tolerance, const Counts& counts_NE, const Slots& planned_S,
                 int node_size, int home, int rank) {
  const laer::Shape shape = shape_of(counts_NE, planned_S, node_size, home);
  check_rank(shape, rank);
  if (mode != "forecast" && mode != "exact" && mode != "adaptive") {
    throw py::value_error("no such mode: " + mode);
  }
  check_costs(shape, costs);
  const laer::Mode way = mode == "forecast" ? laer::Mode::kForecast
                         : mode == "exact"  ? laer::Mode::kExact
                         : tolerance        ? laer::Mode::kByTolerance
                                            : laer::Mode::kByCost;
  py::array_t<int64_t> row_S(shape.slots()), columns_NC({shape.ranks, shape.capacity});
  laer::Decision made;
  const int16_t* slots = planned_S.data();
  {
    const int64_t* matrix = counts_NE.data();
    int64_t *row = row_S.mutable_data(), *columns = columns_NC.mutable_data();
    py::gil_scoped_release release;
    const laer::Sums sums = laer::sums_of(shape, matrix);
    const laer::Counts counts(shape, matrix, sums);
    made = laer::decide(shape, way, costs, tolerance.value_or(0.0), counts, slots);
    if (!made.fresh_S.empty()) slots = made.fresh_S.data();
    const laer::Replicas replicas(shape, slots);
    laer::rank_row(shape, counts, replicas, made.loads_S.data(), rank, row);
    laer::rank_columns(shape, counts, replicas, made.loads_S.data(), rank, columns);
  }
  py::object fresh_S = py::none(), kept_loads_S = py::none();
  py::object gain_s = py::none(), cost_s = py::none();
  if (!made.fresh_S.empty()) fresh_S = to_array(made.fresh_S);
  if (!made.kept_loads_S.empty()) kept_loads_S = to_array(made.kept_loads_S);
  if (made.is_priced) {
    gain_s = py::float_(made.gain_s);
    cost_s = py::float_(made.cost_s);
  }
  const RankSums sums = rank_sums(shape, slots, row_S.data(), columns_NC.data());
  return py::make_tuple(fresh_S, to_array(made.loads_S), kept_loads_S, made.solved, gain_s, cost_s,
                        py::make_tuple(row_S, columns_NC, sums.sent_N, sums.received_N,
                                       sums.tokens_C, sums.runs));
}

// Experts that a layout shares with `current` stay where they are. Those of replica slots beside home
// experts ascend instead, as they are received in that order.
void keep_in_place(const laer::Shape& shape, const int16_t* current_S,
                   std::vector<int16_t>& slots_S) {
  if (shape.home == 0) laer::match_previous(shape, current_S, slots_S);
}

// A layout made from counts and their sums, with what it shares with `current` left in place.
template <typename Make>
py::array_t<int16_t> make_layout(const laer::Shape& shape, const Counts& counts_NE,
                                 const Slots& current_S, Make make) {
  std::vector<int16_t> slots_S;
  {
    const int64_t* counts = counts_NE.data();
    const int16_t* current = current_S.data();
    py::gil_scoped_release release;
    slots_S = make(counts, laer::sums_of(shape, counts));
    keep_in_place(shape, current, slots_S);
  }
  return to_array(slots_S);
}

py::array_t<int16_t> construct(const Counts& counts_NE, const Slots& current_S, int node_size,
                               int home) {
  const laer::Shape shape = shape_of(counts_NE, current_S, node_size, home);
  return make_layout(shape, counts_NE, current_S, [&](auto counts, const auto& sums) {
    return laer::fresh(shape, nullptr, laer::Counts(shape, counts, sums)).slots_S;
  });
}

// Replicas beside home experts that bring the largest load down to `level`, the loads that they are
// made for, and whether the largest is the ideal.
py::tuple replicate(const Counts& counts_NE, int capacity, int node_size, int64_t level) {
  if (counts_NE.ndim() != 2 || counts_NE.size() == 0 || capacity < 1) {
    throw py::value_error("counts must be [N, E], and ranks have slots");
  }
  const auto ranks = static_cast<int>(counts_NE.shape(0));
  const auto experts = static_cast<int>(counts_NE.shape(1));
  const laer::Shape stock{ranks, experts, capacity, ranks, std::max(experts / ranks, 1)};
  check_home(ranks, experts, capacity, stock.home);
  const std::vector<int16_t> slots = laer::at_home(stock);
  const laer::Shape shape = shape_of(counts_NE, Slots(slots.size(), slots.data()), node_size,
                                     stock.home);
  laer::HomeLayout made;
  {
    const int64_t* counts = counts_NE.data();
    py::gil_scoped_release release;
    made = laer::replicate(shape, laer::sums_of(shape, counts), level);
  }
  return py::make_tuple(to_array(made.slots_S), to_array(made.loads_S), made.is_ideal);
}

py::array_t<int16_t> proportional_by_node(const Counts& counts_NE, int capacity, int node_size,
                                          int most_experts) {
  Slots filled(counts_NE.ndim() == 2 ? counts_NE.shape(0) * capacity : 0);
  for (py::ssize_t s = 0; s < filled.size(); ++s) {
    filled.mutable_data()[s] = static_cast<int16_t>(s % counts_NE.shape(1));
  }
  const laer::Shape shape = shape_of(counts_NE, filled, node_size, 0);
  if (most_experts < 1 || most_experts > node_size * capacity ||
      static_cast<int64_t>(most_experts) * shape.nodes() < shape.experts) {
    throw py::value_error("nodes have too few places, or fewer slots than places");
  }
  const laer::Sums sums = laer::sums_of(shape, counts_NE.data());
  return to_array(laer::proportional_by_node(shape, sums, most_experts));
}

py::array_t<int16_t> greedy(const Counts& counts_NE, const Slots& current_S, int node_size,
                            int home, const laer::CostModel* costs) {
  const laer::Shape shape = shape_of(counts_NE, current_S, node_size, home);
  if (costs != nullptr) check_costs(shape, *costs);
  return make_layout(shape, counts_NE, current_S, [&](auto counts, const auto& sums) {
    return costs == nullptr ? laer::for_drift(shape, sums)
                            : laer::greedy(shape, *costs, counts, sums);
  });
}

laer::Way way_of(int ranks, int experts, int capacity, int node_size, int home,
                 std::vector<int> widths, std::vector<int> links, int blocks) {
  const auto divides = [&](int width) {
    return width >= 1 && ranks % width == 0 &&
           std::max(width, node_size) % std::min(width, node_size) == 0;
  };
  if (ranks < 1 || node_size < 1 || !divides(node_size) || links.empty() ||
      widths.size() != links.size() + 1 || !std::all_of(widths.begin(), widths.end(), divides)) {
    throw py::value_error(
        "nodes and places must divide the ranks, and one the other, and a hop follows each but the last");
  }
  check_home(ranks, experts, capacity, home);
  return {{ranks, experts, capacity, node_size, home}, std::move(widths), std::move(links), blocks};
}

std::vector<laer::Hop> hops_of(const laer::Way& way, const Slots& slots_S,
                               const std::optional<Slots>& before_S) {
  for (const Slots* layout_S : {&slots_S, before_S ? &*before_S : &slots_S}) {
    check_size(*layout_S, way.shape.slots(), "the slots");
    check_experts(*layout_S, way.shape.experts, true);
  }
  return laer::hops(way, slots_S.data(), before_S ? before_S->data() : nullptr);
}

// Elements that each rank receives in its node and beyond it, and sends.
py::tuple traffic(const laer::Way& way, const Slots& slots_S, const std::optional<Slots>& before_S,
                  const Counts& held_N) {
  check_size(held_N, way.shape.ranks, "the ranks");
  const laer::Traffic moved = laer::traffic(hops_of(way, slots_S, before_S), way.shape.node_size,
                                            to_vector(held_N));
  return py::make_tuple(to_array(moved.near_N), to_array(moved.far_N), to_array(moved.sent_near_N),
                        to_array(moved.sent_far_N));
}

py::tuple to_tuple(const laer::Segments& made) {
  py::object in_place = py::none();
  if (made.in_place >= 0) in_place = py::int_(made.in_place);
  return py::make_tuple(made.at, made.count, made.sums, made.rows, made.most_rows, in_place);
}

// A rank's table of segments, the owned tensors that they are of, rows of holdings, and moves:
// runtime/comm/segments.py names their parts. Matrices are (rows, rows of the table for each).
py::tuple rank_moves(const laer::Way& way, const Slots& slots_S,
                     const std::optional<Slots>& before_S, int rank,
                     const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  check_rank(way.shape, rank);
  std::vector<laer::Matrix> matrices;
  for (const auto& [rows, width] : sizes) matrices.push_back({rows, width});
  const laer::Moves made = laer::rank_moves(way, hops_of(way, slots_S, before_S), rank, matrices);
  py::list moves;
  for (const laer::Move& move : made.moves) {
    moves.append(py::make_tuple(move.link, move.holding, move.is_kept, move.is_first,
                                move.is_last, move.sent_P, move.received_P,
                                to_tuple(move.leaves), to_tuple(move.arrives)));
  }
  return py::make_tuple(to_array(made.table), made.owned, made.held_rows, moves);
}

laer::Pairs pairs_of(const Counts& pairs_EE, int nodes, int top_k) {
  if (pairs_EE.ndim() != 2 || pairs_EE.shape(0) != pairs_EE.shape(1) || pairs_EE.size() == 0) {
    throw py::value_error("pairs must be [E, E]");
  }
  if (nodes < 1 || top_k < 1) throw py::value_error("nodes and top_k must be 1 or more");
  return {static_cast<int>(pairs_EE.shape(0)), nodes, top_k,
          {pairs_EE.data(), pairs_EE.data() + pairs_EE.size()}};
}

// The rows that are expected with these nodes of the experts.
double crossing_rows(const Counts& pairs_EE, const Counts& node_E, int nodes, int top_k) {
  const laer::Pairs pairs = pairs_of(pairs_EE, nodes, top_k);
  check_size(node_E, pairs.experts, "the nodes of experts");
  const std::vector<int> nodes_E(node_E.data(), node_E.data() + pairs.experts);
  if (std::any_of(nodes_E.begin(), nodes_E.end(), [&](int of) { return of < 0 || of >= nodes; })) {
    throw py::value_error("nodes of experts must be in 0..Q-1");
  }
  return laer::Crossings(pairs, nodes_E).rows();
}

// The node of each expert.
py::array_t<int64_t> together(const Counts& pairs_EE, int nodes, int top_k, int steps,
                              uint64_t seed) {
  const laer::Pairs pairs = pairs_of(pairs_EE, nodes, top_k);
  if (pairs.experts % nodes != 0) throw py::value_error("nodes must divide the experts");
  std::vector<int> node_E;
  {
    py::gil_scoped_release release;
    node_E = laer::choose_nodes(pairs, steps, seed);
  }
  return to_array(std::vector<int64_t>(node_E.begin(), node_E.end()));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  // Compared with the sources that a checkout has, see planner/native_core.py.
  module.attr("sources") = LAER_SOURCES;
  const auto counts = py::arg("counts_NE"), slots = py::arg("slots_S"), loads = py::arg("loads_S");
  const auto node_size = py::arg("node_size"), home = py::arg("home"), rank = py::arg("rank");
  module.def("agreed_counts", &agreed_counts);
  module.def("slot_loads", &slot_loads, counts, slots, node_size);
  module.def("rank_row", &rank_part<true>, counts, slots, loads, node_size, rank);
  module.def("rank_columns", &rank_part<false>, counts, slots, loads, node_size, rank);
  module.def("totals", &totals, counts, slots, loads, node_size);
  py::class_<laer::Way>(module, "Way").def(py::init(&way_of));
  py::class_<laer::Carried>(module, "Carried")
      .def(py::init([](double intra_s, double inter_s, const Counts& held_N) {
        return laer::Carried{intra_s, inter_s, to_vector(held_N)};
      }));
  py::class_<laer::CostModel>(module, "CostModel").def(py::init(&cost_model));
  module.def("layer_seconds", &layer_seconds);
  module.def("least_layer_seconds", &least_layer_seconds);
  module.def("exchange_seconds", &exchange_seconds);
  module.def("change_seconds", &change_seconds);
  module.def("exposed", &exposed);
  module.def("decide", &decide, py::arg("mode"), py::arg("costs"), py::arg("tolerance"), counts,
             py::arg("planned_S"), node_size, home, rank);
  module.def("rank_quotas", &rank_quotas);
  module.def("construct", &construct);
  module.def("replicate", &replicate);
  module.def("proportional_by_node", &proportional_by_node);
  module.def("greedy", &greedy, py::arg("counts_NE"), py::arg("current_S"), py::arg("node_size"),
             py::arg("home"), py::arg("costs") = nullptr);
  module.def("traffic", &traffic);
  module.def("rank_moves", &rank_moves);
  module.def("crossing_rows", &crossing_rows);
  module.def("together", &together);
}
