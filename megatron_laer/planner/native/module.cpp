// The native planner as a Python module: arrays in, arrays out, all work without the GIL. Values
// are not checked here, only sizes; the callers in planner/*.py do that.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "construct.hpp"
#include "greedy.hpp"
#include "match_previous.hpp"
#include "proportional.hpp"
#include "quotas.hpp"
#include "search.hpp"
#include "shape.hpp"

namespace py = pybind11;

namespace {

using Counts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Slots = py::array_t<int16_t, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> to_array(const std::vector<int64_t>& values) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

laer::Shape shape_of(const Counts& counts_NE, const Slots& slots_S, int node_size) {
  if (counts_NE.ndim() != 2 || slots_S.ndim() != 1 || counts_NE.shape(0) == 0) {
    throw py::value_error("counts must be [N, E] and slots [S]");
  }
  const int ranks = static_cast<int>(counts_NE.shape(0));
  return {ranks, static_cast<int>(counts_NE.shape(1)), static_cast<int>(slots_S.size()) / ranks,
          node_size};
}

// Solved quotas as plain pointers, to be read without the GIL.
struct Inputs {
  const int64_t* counts;
  const int64_t* node_counts;
  const int16_t* slots;
  const int64_t* loads;

  Inputs(const Counts& counts_NE, const Counts& node_counts_QE, const Slots& slots_S,
         const Counts& loads_S)
      : counts(counts_NE.data()),
        node_counts(node_counts_QE.data()),
        slots(slots_S.data()),
        loads(loads_S.data()) {}
};

py::tuple slot_loads(const Counts& counts_NE, const Slots& slots_S, int node_size) {
  const laer::Shape shape = shape_of(counts_NE, slots_S, node_size);
  py::array_t<int64_t> node_counts_QE({shape.nodes(), shape.experts});
  py::array_t<int64_t> loads_S(shape.slots());
  {
    const int64_t* counts = counts_NE.data();
    const int16_t* slots = slots_S.data();
    int64_t* node_counts = node_counts_QE.mutable_data();
    int64_t* loads = loads_S.mutable_data();
    py::gil_scoped_release release;
    laer::node_counts(shape, counts, node_counts);
    laer::slot_loads(shape, counts, node_counts, slots, loads);
  }
  return py::make_tuple(loads_S, node_counts_QE);
}

py::array_t<int64_t> rank_row(const Counts& counts_NE, const Counts& node_counts_QE,
                              const Slots& slots_S, const Counts& loads_S, int node_size,
                              int rank) {
  const laer::Shape shape = shape_of(counts_NE, slots_S, node_size);
  py::array_t<int64_t> row_S(shape.slots());
  {
    const Inputs in(counts_NE, node_counts_QE, slots_S, loads_S);
    int64_t* row = row_S.mutable_data();
    py::gil_scoped_release release;
    laer::rank_row(shape, in.counts, in.node_counts, in.slots, in.loads, rank, row);
  }
  return row_S;
}

py::array_t<int64_t> rank_columns(const Counts& counts_NE, const Counts& node_counts_QE,
                                  const Slots& slots_S, const Counts& loads_S, int node_size,
                                  int rank) {
  const laer::Shape shape = shape_of(counts_NE, slots_S, node_size);
  py::array_t<int64_t> columns_NC({shape.ranks, shape.capacity});
  {
    const Inputs in(counts_NE, node_counts_QE, slots_S, loads_S);
    int64_t* columns = columns_NC.mutable_data();
    py::gil_scoped_release release;
    laer::rank_columns(shape, in.counts, in.node_counts, in.slots, in.loads, rank, columns);
  }
  return columns_NC;
}

py::tuple totals(const Counts& counts_NE, const Counts& node_counts_QE, const Slots& slots_S,
                 const Counts& loads_S, int node_size) {
  const laer::Shape shape = shape_of(counts_NE, slots_S, node_size);
  laer::Totals sums;
  {
    const Inputs in(counts_NE, node_counts_QE, slots_S, loads_S);
    py::gil_scoped_release release;
    sums = laer::totals(shape, in.counts, in.node_counts, in.slots, in.loads);
  }
  return py::make_tuple(to_array(sums.near_S), to_array(sums.far_S), to_array(sums.sent_near_N),
                        to_array(sums.sent_far_N), to_array(sums.own_N));
}

using Maker = std::vector<int16_t> (*)(const laer::Shape&, const int64_t*);

// A layout for counts, with what it shares with `current` left in place.
template <Maker make>
py::array_t<int16_t> make_layout(const Counts& counts_NE, const Slots& current_S, int node_size) {
  const laer::Shape shape = shape_of(counts_NE, current_S, node_size);
  std::vector<int16_t> slots_S;
  {
    const int64_t* counts = counts_NE.data();
    const int16_t* current = current_S.data();
    py::gil_scoped_release release;
    std::vector<int64_t> node_counts_QE(static_cast<size_t>(shape.nodes()) * shape.experts);
    laer::node_counts(shape, counts, node_counts_QE.data());
    slots_S = make(shape, node_counts_QE.data());
    laer::match_previous(shape, current, slots_S);
  }
  return py::array_t<int16_t>(static_cast<py::ssize_t>(slots_S.size()), slots_S.data());
}

std::vector<int16_t> proportional(const laer::Shape& shape, const int64_t* node_counts_QE) {
  return laer::proportional(shape, node_counts_QE, laer::Purpose::kForecast);
}

py::array_t<int16_t> search(const Counts& counts_NE, const Slots& current_S, int node_size,
                            int scenarios, int candidates, int exchanges, uint64_t seed) {
  const laer::Shape shape = shape_of(counts_NE, current_S, node_size);
  std::vector<int16_t> slots_S;
  {
    const int64_t* counts = counts_NE.data();
    const int16_t* current = current_S.data();
    py::gil_scoped_release release;
    std::vector<int64_t> node_counts_QE(static_cast<size_t>(shape.nodes()) * shape.experts);
    laer::node_counts(shape, counts, node_counts_QE.data());
    slots_S = laer::search(shape, node_counts_QE.data(), current,
                           {scenarios, candidates, exchanges}, seed);
    laer::match_previous(shape, current, slots_S);
  }
  return py::array_t<int16_t>(static_cast<py::ssize_t>(slots_S.size()), slots_S.data());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  // Compared with the sources that a checkout has, see planner/native_core.py.
  module.attr("sources") = LAER_SOURCES;
  module.def("slot_loads", &slot_loads);
  module.def("rank_row", &rank_row);
  module.def("rank_columns", &rank_columns);
  module.def("totals", &totals);
  module.def("construct", &make_layout<laer::fresh>);
  module.def("proportional", &make_layout<proportional>);
  module.def("greedy", &make_layout<laer::greedy>);
  module.def("search", &search);
}
