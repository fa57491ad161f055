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

// Rows of one end of a hop on a rank, in the order of the wire.
struct End {
  std::vector<int64_t> row, size, of_peer;
};

// A matrix in row blocks, and the first row of each of a rank's blocks in a holding.
class Blocks {
 public:
  Blocks(const Way& way, int rank, int64_t rows) : way_(way), rank_(rank), rows_(rows) {}

  int64_t first(int block) const { return block * rows_ / way_.blocks; }
  int64_t size(int block) const { return first(block + 1) - first(block); }

  std::vector<int64_t> of_matrices(int number) const {
    std::vector<int64_t> row;
    for (int at = 0; at < number; ++at) {
      for (int block = 0; block < way_.blocks; ++block) row.push_back(at * rows_ + first(block));
    }
    return row;
  }

  std::vector<int64_t> of_slices(int number) const {
    std::vector<int64_t> row(number);
    for (int at = 0; at < number; ++at) row[at] = at * size(rank_);
    return row;
  }

  // One end of a hop. `row` has the holding's rows; with `arrives` rows lie as they arrive, from
  // `end` on, and are added to it.
  End end_of(const Hop& hop, bool sends, std::vector<int64_t>& row, bool arrives,
             int64_t& end) const {
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
      const int64_t rows = size(piece.block);
      if (arrives) {
        if (row.size() <= static_cast<size_t>(piece.number)) row.resize(piece.number + 1);
        row[piece.number] = end;
        end += rows;
      }
      found.row.push_back(row[piece.number]);
      found.size.push_back(rows);
      found.of_peer[hop.link == kBetween ? piece.peer / node_size : piece.peer % peers] += rows;
    }
    return found;
  }

 private:
  const Way& way_;
  int rank_;
  int64_t rows_;
};

std::vector<int64_t> starts(const std::vector<int64_t>& size) {
  std::vector<int64_t> before(size.size(), 0);
  for (size_t i = 1; i < size.size(); ++i) before[i] = before[i - 1] + size[i - 1];
  return before;
}

Segments segments(const End& held, const std::vector<int64_t>& wire, int64_t tensor_rows,
                  std::vector<int64_t>& table) {
  std::vector<size_t> order;
  for (size_t i = 0; i < held.row.size(); ++i) {
    if (held.size[i] > 0) order.push_back(i);
  }
  const int64_t at = static_cast<int64_t>(table.size()), count = static_cast<int64_t>(order.size());
  Segments made{at, count, 0, 0, 0, -1, tensor_rows, {}};
  const auto tensor_of = [&](size_t i) { return held.row[i] / tensor_rows; };
  const auto is_shifted = [&](size_t i) {
    return held.row[i] - wire[i] != held.row[order[0]] - wire[order[0]];
  };
  if (count > 0 && tensor_of(order.front()) == tensor_of(order.back()) &&
      std::none_of(order.begin(), order.end(), is_shifted)) {
    made.in_place = held.row[order[0]] - wire[order[0]];
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return held.row[a] < held.row[b]; });
  std::vector<int64_t> first_T1;
  for (int64_t segment = 0; segment < count; ++segment) {
    const size_t i = order[segment];
    const bool is_sum = segment == 0 || held.row[i] != held.row[order[segment - 1]];
    if (segment == 0 || tensor_of(i) != made.parts.back().tensor) {
      made.parts.push_back({tensor_of(i), segment, 0, static_cast<int64_t>(first_T1.size()), 0});
    }
    ++made.parts.back().count;
    made.parts.back().sums += is_sum;
    if (is_sum) first_T1.push_back(segment);
    table.insert(table.end(), {held.row[i], wire[i], held.size[i]});
    made.rows += held.size[i];
    made.most_rows = std::max(made.most_rows, held.size[i]);
    made.end = held.row[i] + held.size[i];
  }
  first_T1.push_back(count);
  table.insert(table.end(), first_T1.begin(), first_T1.end());
  return made;
}

}  // namespace

Moves rank_moves(const Way& way, const std::vector<Hop>& hops, int rank, int64_t rows) {
  constexpr int64_t kOneTensor = std::numeric_limits<int64_t>::max();
  const Shape& shape = way.shape;
  const Blocks blocks(way, rank, rows);
  std::vector<int64_t> slots = blocks.of_matrices(shape.capacity - shape.home);
  std::vector<int64_t> held = shape.home > 0 ? blocks.of_matrices(shape.home)
                                             : blocks.of_slices(shape.experts);
  std::vector<int64_t> arrived;
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
    const int64_t tensor_rows = shape.home > 0 && is_first ? rows : kOneTensor;
    const auto wire = on_wire ? starts(sent.size) : received.row;
    Segments leaves = segments(sent, wire, tensor_rows, made.table);
    Segments arrives =
        segments(received, on_wire ? starts(received.size) : sent.row, kOneTensor, made.table);
    made.moves.push_back({hop.link, hop.is_kept, is_first, is_last, sent.of_peer, received.of_peer,
                          std::move(leaves), std::move(arrives)});
  }
  return made;
}

}  // namespace laer
