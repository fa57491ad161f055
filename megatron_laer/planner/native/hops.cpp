// See hops.hpp. Orders are part of the result: sums over replicas follow them.
#include "hops.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

namespace laer {

namespace {

constexpr int kNone = -1;

struct Wanted {
  Spot spot;
  int expert;
};

bool is_replica(const Shape& shape, const int16_t* slots_S, int slot) {
  return !shape.is_home(slot) && slots_S[slot] != kEmpty;
}

Spot spot_of(const Shape& shape, int slot) {
  return {slot / shape.capacity, slot % shape.capacity - shape.home};
}

// A slot of `kept_S` for each node and expert. It is not always the first of an expert's slots, or
// the first rank of a node would hand out most.
std::vector<int> kept_slots(const Shape& shape, const int16_t* kept_S, int node_size) {
  const auto pair = [&](int slot) {
    return slot / shape.capacity / node_size * shape.experts + kept_S[slot];
  };
  std::vector<int> count(shape.ranks / node_size * shape.experts, 0), turn(count), found(count);
  std::fill(found.begin(), found.end(), kNone);
  for (int slot = 0; slot < shape.slots(); ++slot) {
    if (is_replica(shape, kept_S, slot)) ++count[pair(slot)];
  }
  for (int slot = 0; slot < shape.slots(); ++slot) {
    if (!is_replica(shape, kept_S, slot)) continue;
    const int at = pair(slot);
    if (turn[at]++ == kept_S[slot] % count[at]) found[at] = slot;
  }
  return found;
}

}  // namespace

std::vector<Hop> hops(const Way& way, const int16_t* slots_S, const int16_t* before_S) {
  const Shape& shape = way.shape;
  std::vector<Wanted> wanted;
  for (int slot = 0; slot < shape.slots(); ++slot) {
    if (!is_replica(shape, slots_S, slot)) continue;
    if (before_S != nullptr && before_S[slot] == slots_S[slot]) continue;
    wanted.push_back({spot_of(shape, slot), slots_S[slot]});
  }
  std::vector<Hop> found;
  for (size_t i = way.widths.size() - 2; i > 0; --i) {
    const int width = way.widths[i], inner = way.widths[i + 1], places = shape.ranks / width;
    std::vector<int> at_PE(places * shape.experts, kNone), place_of(shape.ranks / inner);
    for (size_t at = 0; at < place_of.size(); ++at) place_of[at] = at * inner / width;
    for (const Wanted& one : wanted) {
      at_PE[place_of[one.spot.place] * shape.experts + one.expert] = 0;
    }
    std::vector<Wanted> held;
    for (int place = 0; place < places; ++place) {
      int count = 0;
      for (int expert = 0; expert < shape.experts; ++expert) {
        int& at = at_PE[place * shape.experts + expert];
        if (at == kNone) continue;
        at = count++;
        held.push_back({{place, at}, expert});
      }
    }
    Hop hop{way.links[i], width, inner, false, {}};
    hop.transfers.reserve(wanted.size());
    for (const Wanted& one : wanted) {
      const int place = place_of[one.spot.place];
      hop.transfers.push_back({{place, at_PE[place * shape.experts + one.expert]}, one.spot});
    }
    found.push_back(std::move(hop));
    wanted = std::move(held);
    if (before_S == nullptr || width == shape.ranks) continue;
    const std::vector<int> slot_PE = kept_slots(shape, before_S, width);
    Hop kept{kInside, 1, width, true, {}};
    std::vector<Wanted> others;
    for (const Wanted& one : wanted) {
      const int slot = slot_PE[one.spot.place * shape.experts + one.expert];
      if (slot == kNone) others.push_back(one);
      else kept.transfers.push_back({spot_of(shape, slot), one.spot});
    }
    found.push_back(std::move(kept));
    wanted = std::move(others);
  }
  Hop first{way.links[0], way.widths[0], way.widths[1], false, {}};
  first.transfers.reserve(wanted.size());
  for (const Wanted& one : wanted) {
    const int expert = one.expert;
    const Spot owner = shape.home > 0 ? Spot{expert / shape.home, expert % shape.home}
                                      : Spot{0, expert};
    first.transfers.push_back({owner, one.spot});
  }
  found.push_back(std::move(first));
  std::reverse(found.begin(), found.end());
  return found;
}

namespace {

// Sums of every width-th number, from each of the first on.
std::vector<int64_t> strided(const std::vector<int64_t>& number_N, int width) {
  std::vector<int64_t> sums(width, 0);
  for (size_t i = 0; i < number_N.size(); ++i) sums[i % width] += number_N[i];
  return sums;
}

// Adds the elements that ranks send in a hop, or those that they receive. For each expert of its
// place a rank exchanges its blocks, each with one rank of the other place. A place lies in one node
// or has all ranks.
void add_elements(const Hop& hop, bool sends, int node_size, const std::vector<int64_t>& held_N,
                  std::vector<int64_t>& near_N, std::vector<int64_t>& far_N) {
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
    if (in_narrow * narrow / wide == in_wide) ++own_P[in_narrow];
    const int node = to * other / node_size;
    if (mine > node_size) ++near_P[node];
    else if (other > node_size || place * mine / node_size == node) ++near_P[place];
  }
  const std::vector<int64_t> of_mine = strided(held_N, mine), of_wide = strided(held_N, wide);
  for (int rank = 0; rank < ranks; ++rank) {
    int64_t blocks = of_mine[rank % mine];
    const int64_t all = all_P[rank / mine] * blocks;
    if (other > node_size) {  // only these blocks go to ranks in the node
      blocks = 0;
      const int first = rank - rank % node_size;
      for (int at = rank % mine; at < node_size; at += mine) blocks += held_N[first + at];
    }
    const int64_t near = near_P[rank / inside] * blocks;
    near_N[rank] += near - own_P[rank / narrow] * of_wide[rank % wide];
    far_N[rank] += all - near;
  }
}

}  // namespace

Traffic traffic(const std::vector<Hop>& hops, int node_size, const std::vector<int64_t>& held_N) {
  Traffic found(static_cast<int>(held_N.size()));
  for (const Hop& hop : hops) {
    add_elements(hop, false, node_size, held_N, found.near_N, found.far_N);
    add_elements(hop, true, node_size, held_N, found.sent_near_N, found.sent_far_N);
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
      size_t at = piece.number * matrices_.size();
      if (arrives && row.size() <= at) row.resize(at + matrices_.size());
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
  Segments made{at, count, 0, 0, 0, 0, -1, {}};
  const auto is_elsewhere = [&](size_t i) {
    const Row &row = held.row[i], &first = held.row[order[0]];
    return row.tensor != first.tensor || row.row - wire[i] != first.row - wire[order[0]];
  };
  if (count > 0 && std::none_of(order.begin(), order.end(), is_elsewhere)) {
    made.tensor = held.row[order[0]].tensor;
    made.in_place = held.row[order[0]].row - wire[order[0]];
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return held.row[a] < held.row[b]; });
  std::vector<int64_t> first_T1;
  for (int64_t segment = 0; segment < count; ++segment) {
    const size_t i = order[segment];
    const Row& row = held.row[i];
    const bool is_sum = segment == 0 || held.row[order[segment - 1]] < row;
    if (segment == 0 || row.tensor != made.parts.back().tensor) {
      made.parts.push_back({row.tensor, segment, 0, static_cast<int64_t>(first_T1.size()), 0});
    }
    ++made.parts.back().count;
    made.parts.back().sums += is_sum;
    if (is_sum) first_T1.push_back(segment);
    table.insert(table.end(), {row.row, wire[i], held.size[i]});
    made.rows += held.size[i];
    made.most_rows = std::max(made.most_rows, held.size[i]);
    made.end = row.row + held.size[i];
  }
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
  Moves made;
  for (size_t i = 0; i < hops.size(); ++i) {
    const Hop& hop = hops[i];
    const bool is_first = i == 0, is_last = i + 1 == hops.size();
    const End sent = blocks.end_of(hop, true, hop.is_kept ? slots : held, false, end);
    const End received = blocks.end_of(hop, false, is_last ? slots : arrived, !is_last, end);
    if (!is_last && !hops[i + 1].is_kept) {
      held = std::move(arrived);
      arrived.clear();
      end = 0;
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
    made.moves.push_back({hop.link, hop.is_kept, is_first, is_last, sent.of_peer, received.of_peer,
                          std::move(leaves), std::move(arrives)});
  }
  return made;
}

}  // namespace laer
