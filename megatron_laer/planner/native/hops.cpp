// See hops.hpp. Orders are part of the result: sums over replicas follow them.
#include "hops.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace laer {

namespace {

constexpr int kNone = -1;

struct Wanted {
  Spot spot;
  int expert;
};

// Calls visit(slot, spot) for every replica.
template <typename Visit>
void for_replicas(const Shape& shape, const int16_t* slots_S, Visit visit) {
  for (int rank = 0; rank < shape.ranks; ++rank) {
    const int first = rank * shape.capacity + shape.home;
    for (int at = 0; at < shape.capacity - shape.home; ++at) {
      if (slots_S[first + at] != kEmpty) visit(first + at, Spot{rank, at});
    }
  }
}

// A spot of `kept_S` for each node and expert. It is not always the first of an expert's slots, or
// the first rank of a node would hand out most.
std::vector<Spot> kept_spots(const Shape& shape, const int16_t* kept_S, int node_size) {
  const auto pair = [&](int slot, const Spot& spot) {
    return spot.place / node_size * shape.experts + kept_S[slot];
  };
  std::vector<int> count(shape.ranks / node_size * shape.experts, 0), turn(count);
  std::vector<Spot> found(count.size(), Spot{kNone, kNone});
  for_replicas(shape, kept_S, [&](int slot, const Spot& spot) { ++count[pair(slot, spot)]; });
  for_replicas(shape, kept_S, [&](int slot, const Spot& spot) {
    const int at = pair(slot, spot);
    if (turn[at]++ == kept_S[slot] % count[at]) found[at] = spot;
  });
  return found;
}

// Positions of those wanted, by expert and then in their order.
std::vector<int> by_expert(const std::vector<Wanted>& wanted, int experts) {
  std::vector<int> next_E(experts + 1, 0), order(wanted.size());
  for (const Wanted& one : wanted) ++next_E[one.expert + 1];
  std::partial_sum(next_E.begin(), next_E.end(), next_E.begin());
  for (size_t i = 0; i < wanted.size(); ++i) order[next_E[wanted[i].expert]++] = i;
  return order;
}

}  // namespace

std::vector<Hop> hops(const Way& way, const int16_t* slots_S, const int16_t* before_S) {
  const Shape& shape = way.shape;
  std::vector<Wanted> wanted;
  wanted.reserve(shape.slots());
  for_replicas(shape, slots_S, [&](int slot, const Spot& spot) {
    if (before_S != nullptr && before_S[slot] == slots_S[slot]) return;
    wanted.push_back({spot, slots_S[slot]});
  });
  std::vector<Hop> found;
  for (size_t i = way.widths.size() - 2; i > 0; --i) {
    const int width = way.widths[i], inner = way.widths[i + 1], places = shape.ranks / width;
    const bool is_spread = shape.home > 0 && i == 1;
    std::vector<int> place_W;  // of the expert's home, or of the place that wants it
    place_W.reserve(wanted.size());
    for (const Wanted& one : wanted) {
      place_W.push_back(is_spread ? one.expert / shape.home / width : one.spot.place * inner / width);
    }
    const std::vector<int> order = by_expert(wanted, shape.experts);
    // Each place holds its experts once, in their order.
    std::vector<int> begin_P(places + 1, 0), held_at(wanted.size());
    int last = kNone;
    for (int at : order) {
      int& count = begin_P[place_W[at] + 1];
      const bool is_held = last != kNone && wanted[last].expert == wanted[at].expert &&
                           place_W[last] == place_W[at];
      held_at[at] = is_held ? count - 1 : count++;
      last = at;
    }
    std::partial_sum(begin_P.begin(), begin_P.end(), begin_P.begin());
    std::vector<Wanted> held(begin_P.back());
    Hop hop{way.links[i], width, inner, false, {}};
    hop.transfers.reserve(wanted.size());
    for (size_t at = 0; at < wanted.size(); ++at) {
      const Spot spot{place_W[at], held_at[at]};
      held[begin_P[spot.place] + spot.at] = {spot, wanted[at].expert};
      hop.transfers.push_back({spot, wanted[at].spot});
    }
    found.push_back(std::move(hop));
    wanted = std::move(held);
    if (before_S == nullptr || is_spread) continue;
    const std::vector<Spot> spot_PE = kept_spots(shape, before_S, width);
    const int link = shape.node_size % width == 0 ? kInside : kAll;
    Hop kept{link, 1, width, true, {}};
    std::vector<Wanted> others;
    for (const Wanted& one : wanted) {
      const Spot& spot = spot_PE[one.spot.place * shape.experts + one.expert];
      if (spot.place == kNone) others.push_back(one);
      else kept.transfers.push_back({spot, one.spot});
    }
    found.push_back(std::move(kept));
    wanted = std::move(others);
  }
  Hop first{way.links[0], way.widths[0], way.widths[1], false, {}};
  first.transfers.reserve(wanted.size());
  const int owned = shape.home > 0 ? shape.home : shape.experts;
  for (const Wanted& one : wanted) {
    first.transfers.push_back({{one.expert / owned, one.expert % owned}, one.spot});
  }
  found.push_back(std::move(first));
  std::reverse(found.begin(), found.end());
  return found;
}

namespace {

// Sums of every width-th number, from each of the first on.
std::vector<int64_t> strided(const std::vector<int64_t>& number_N, int width) {
  std::vector<int64_t> sums(width, 0);
  for (auto first = number_N.begin(); first != number_N.end(); first += width) {
    for (int i = 0; i < width; ++i) sums[i] += first[i];
  }
  return sums;
}

// The place of a rank among those of a width, and its position there: divisions of each rank would
// take most of the time.
struct Place {
  int width, place = 0, at = 0;

  void step() {
    if (++at == width) at = 0, ++place;
  }
};

// Adds the elements that ranks send in a hop, or those that they receive. For each expert of its
// place a rank exchanges its blocks, each with one rank of the other place. Widths and nodes divide
// each other, so that a place lies in one node or has whole nodes.
void add_elements(const Hop& hop, bool sends, int node_size, const std::vector<int>& node_N,
                  const std::vector<int64_t>& held_N, std::vector<int64_t>& near_N,
                  std::vector<int64_t>& far_N) {
  const int mine = sends ? hop.source_width : hop.target_width;
  const int other = sends ? hop.target_width : hop.source_width;
  const int narrow = std::min(mine, other), wide = std::max(mine, other);
  const int inside = std::min(mine, node_size), ranks = static_cast<int>(held_N.size());
  // Experts of each place, those that each part in one node exchanges there, and those of which a
  // rank's own blocks stay.
  std::vector<int64_t> all_P(ranks / mine, 0), near_P(ranks / inside, 0), own_P(ranks / narrow, 0);
  for (const Transfer& transfer : hop.transfers) {
    const int place = (sends ? transfer.source : transfer.target).place;
    const int to = (sends ? transfer.target : transfer.source).place;
    const int in_narrow = mine == narrow ? place : to, in_wide = mine == narrow ? to : place;
    ++all_P[place];
    const int ahead = in_narrow * narrow - in_wide * wide;
    if (ahead >= 0 && ahead < wide) ++own_P[in_narrow];
    const int first = std::max(node_N[place * mine], node_N[to * other]);
    const int last = std::min(node_N[(place + 1) * mine - 1], node_N[(to + 1) * other - 1]);
    for (int node = first; node <= last; ++node) ++near_P[mine > node_size ? node : place];
  }
  const std::vector<int64_t> of_mine = strided(held_N, mine), of_wide = strided(held_N, wide);
  Place by_mine{mine}, by_inside{inside}, by_narrow{narrow}, by_wide{wide};
  for (int rank = 0; rank < ranks; ++rank) {
    int64_t blocks = of_mine[by_mine.at];
    const int64_t all = all_P[by_mine.place] * blocks;
    if (other > node_size && other > mine) {  // only these blocks go to ranks in the node
      blocks = 0;
      const int first = (rank - rank % node_size) % wide;
      for (int at = by_inside.at; at < node_size; at += inside) blocks += of_wide[first + at];
    }
    const int64_t near = near_P[by_inside.place] * blocks;
    near_N[rank] += near - own_P[by_narrow.place] * of_wide[by_wide.at];
    far_N[rank] += all - near;
    for (Place* place : {&by_mine, &by_inside, &by_narrow, &by_wide}) place->step();
  }
}

}  // namespace

Traffic traffic(const std::vector<Hop>& hops, int node_size, const std::vector<int64_t>& held_N) {
  Traffic found(static_cast<int>(held_N.size()));
  std::vector<int> node_N(held_N.size());
  for (size_t rank = 0; rank < node_N.size(); ++rank) node_N[rank] = rank / node_size;
  for (const Hop& hop : hops) {
    add_elements(hop, false, node_size, node_N, held_N, found.near_N, found.far_N);
    add_elements(hop, true, node_size, node_N, held_N, found.sent_near_N, found.sent_far_N);
  }
  return found;
}

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
