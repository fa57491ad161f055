// See hops.hpp. Orders are part of the result: sums over replicas follow them.
#include "hops.hpp"

#include <algorithm>
#include <numeric>

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

}  // namespace laer
