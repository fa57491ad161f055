// The rows that one rank sends and receives in each hop: see hops.hpp.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "hops.hpp"

namespace laer {

namespace {

// A row of one of a holding's tensors.
struct Row {
  int64_t tensor, row;

  bool operator<(const Row& other) const {
    return tensor < other.tensor || (tensor == other.tensor && row < other.row);
  }
};

// Rows of one end of a hop on a rank, in the order of the wire.
struct End {
  std::vector<Row> row;
  std::vector<int64_t> size, of_peer;
};

// An expert's matrices in row blocks, and the first row of each of a rank's blocks in a holding: for
// each expert and block of all matrices.
class Blocks {
 public:
  Blocks(const Way& way, int rank, const std::vector<Matrix>& matrices)
      : way_(way), rank_(rank), matrices_(matrices) {}

  // Experts one after the other in one tensor.
  std::vector<Row> of_slots(int number) const {
    std::vector<Row> row;
    int64_t begin = 0;
    for (int at = 0; at < number; ++at) {
      for (int block = 0; block < way_.blocks; ++block) {
        int64_t matrix = begin;
        for (const Matrix& of : matrices_) {
          row.push_back({0, matrix + first(of, block)});
          matrix += of.rows * of.width;
        }
      }
      for (const Matrix& of : matrices_) begin += of.rows * of.width;
    }
    return row;
  }

  // A tensor for each matrix and expert.
  std::vector<Row> of_homes(int number) const {
    std::vector<Row> row;
    for (int at = 0; at < number; ++at) {
      for (int block = 0; block < way_.blocks; ++block) {
        int64_t tensor = at;
        for (const Matrix& of : matrices_) {
          row.push_back({tensor, first(of, block)});
          tensor += number;
        }
      }
    }
    return row;
  }

  // A tensor for each matrix, with one block of all experts.
  std::vector<Row> of_slices(int number) const {
    std::vector<Row> row;
    for (int at = 0; at < number; ++at) {
      int64_t tensor = 0;
      for (const Matrix& of : matrices_) row.push_back({tensor++, at * size(of, rank_)});
    }
    return row;
  }

  // One end of a hop. `row` has the holding's rows; with `arrives` rows lie as they arrive, from
  // `end` on, and are added to it.
  End end_of(const Hop& hop, bool sends, std::vector<Row>& row, bool arrives, int64_t& end) const {
    struct Piece {
      int peer, number, block;
    };
    const int mine = sends ? hop.source_width : hop.target_width;
    const int other = sends ? hop.target_width : hop.source_width;
    const int node_size = way_.shape.node_size;
    std::vector<Piece> pieces;
    for (const Transfer& transfer : hop.transfers) {
      const Spot& spot = sends ? transfer.source : transfer.target;
      const int first_peer = (sends ? transfer.target : transfer.source).place * other;
      if (spot.place != rank_ / mine) continue;
      // Blocks of a place are dealt to its ranks in turn.
      for (int block = rank_ % mine; block < way_.blocks; block += mine) {
        const int number = (spot.at * way_.blocks + block) / mine;
        pieces.push_back({first_peer + block % other, number, block});
      }
    }
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.peer < b.peer; });
    const int peers = hop.link == kInside    ? node_size
                      : hop.link == kBetween ? way_.shape.nodes()
                                             : way_.shape.ranks;
    End found{{}, {}, std::vector<int64_t>(peers, 0)};
    for (const Piece& piece : pieces) {
      check_link(hop.link, piece.peer);
      size_t at = piece.number * matrices_.size();
      if (arrives && row.size() <= at) row.resize(at + matrices_.size());
      if (row.size() < at + matrices_.size()) {
        throw std::out_of_range("a hop needs rows of expert " + std::to_string(piece.number) +
                                " of a holding that has fewer on rank " + std::to_string(rank_));
      }
      for (const Matrix& of : matrices_) {
        const int64_t rows = size(of, piece.block);
        if (arrives) {
          row[at] = {0, end};
          end += rows;
        }
        found.row.push_back(row[at++]);
        found.size.push_back(rows);
        found.of_peer[hop.link == kBetween ? piece.peer / node_size : piece.peer % peers] += rows;
      }
    }
    return found;
  }

 private:
  int64_t first(const Matrix& of, int block) const {
    return block * of.rows / way_.blocks * of.width;
  }
  int64_t size(const Matrix& of, int block) const { return first(of, block + 1) - first(of, block); }

  void check_link(int link, int peer) const {
    const int size = way_.shape.node_size;
    if ((link == kInside && peer / size != rank_ / size) ||
        (link == kBetween && peer % size != rank_ % size)) {
      throw std::invalid_argument("link " + std::to_string(link) + " does not connect ranks " +
                                  std::to_string(rank_) + " and " + std::to_string(peer));
    }
  }

  const Way& way_;
  int rank_;
  const std::vector<Matrix>& matrices_;
};

std::vector<int64_t> starts(const std::vector<int64_t>& size) {
  std::vector<int64_t> before(size.size(), 0);
  for (size_t i = 1; i < size.size(); ++i) before[i] = before[i - 1] + size[i - 1];
  return before;
}

// Rows of an end in one tensor, as they are on the wire of a link with one rank.
std::vector<int64_t> rows_of(const End& end) {
  std::vector<int64_t> row;
  for (const Row& of : end.row) row.push_back(of.row);
  return row;
}

Segments segments(const End& held, const std::vector<int64_t>& wire, std::vector<int64_t>& table) {
  std::vector<size_t> order;
  for (size_t i = 0; i < held.row.size(); ++i) {
    if (held.size[i] > 0) order.push_back(i);
  }
  const int64_t at = static_cast<int64_t>(table.size()), count = static_cast<int64_t>(order.size());
  Segments made{at, count, 0, 0, 0, count > 0 ? -1 : 0, {}};
  const auto shift = [&](size_t i) { return held.row[i].row - wire[i]; };
  bool in_place = count > 0;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return held.row[a] < held.row[b]; });
  std::vector<int64_t> first_T1;
  for (int64_t segment = 0; segment < count; ++segment) {
    const size_t i = order[segment];
    const Row& row = held.row[i];
    if (segment == 0 || held.row[order[segment - 1]] < row) first_T1.push_back(segment);
    if (made.tensors.empty() || row.tensor != made.tensors.back()) made.tensors.push_back(row.tensor);
    const int64_t tensor = static_cast<int64_t>(made.tensors.size()) - 1;
    in_place &= tensor == 0 && shift(i) == shift(order[0]);
    table.insert(table.end(), {tensor, row.row, wire[i], held.size[i]});
    made.rows += held.size[i];
    made.most_rows = std::max(made.most_rows, held.size[i]);
  }
  if (in_place) made.in_place = shift(order[0]);
  made.sums = static_cast<int64_t>(first_T1.size());
  first_T1.push_back(count);
  table.insert(table.end(), first_T1.begin(), first_T1.end());
  return made;
}

}  // namespace

Moves rank_moves(const Way& way, const std::vector<Hop>& hops, int rank,
                 const std::vector<Matrix>& matrices) {
  const Shape& shape = way.shape;
  const Blocks blocks(way, rank, matrices);
  std::vector<Row> slots = blocks.of_slots(shape.capacity - shape.home);
  std::vector<Row> held = shape.home > 0 ? blocks.of_homes(shape.home)
                                         : blocks.of_slices(shape.experts);
  std::vector<Row> arrived;
  int64_t end = 0;
  int filled = 0;
  Moves made;
  for (size_t i = 0; i < hops.size(); ++i) {
    const Hop& hop = hops[i];
    const bool is_first = i == 0, is_last = i + 1 == hops.size();
    const int holding = filled;
    const End sent = blocks.end_of(hop, true, hop.is_kept ? slots : held, false, end);
    const End received = blocks.end_of(hop, false, is_last ? slots : arrived, !is_last, end);
    // A hop from the slots fills the holding further.
    if (!is_last && !hops[i + 1].is_kept) {
      held = std::move(arrived);
      arrived.clear();
      made.held_rows.push_back(end);
      end = 0;
      ++filled;
    }
    const bool moves = std::any_of(
        hop.transfers.begin(), hop.transfers.end(), [&](const Transfer& transfer) {
          return hop.link != kInside || transfer.target.place * hop.target_width /
                                                      shape.node_size == rank / shape.node_size;
        });
    if (!moves) continue;
    const bool on_wire = sent.of_peer.size() > 1;
    Segments leaves = segments(sent, on_wire ? starts(sent.size) : rows_of(received), made.table);
    Segments arrives =
        segments(received, on_wire ? starts(received.size) : rows_of(sent), made.table);
    if (is_first) made.owned = leaves.tensors;
    made.moves.push_back({hop.link, holding, hop.is_kept, is_first, is_last, sent.of_peer,
                          received.of_peer, std::move(leaves), std::move(arrives)});
  }
  return made;
}

}  // namespace laer
