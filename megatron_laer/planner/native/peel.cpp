#include "peel.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

namespace laer {
namespace {

constexpr int64_t kMany = std::numeric_limits<int64_t>::max() / 4;

// With more pieces, only the two largest shares are tried to fill up with.
constexpr int kFewPieces = 64, kMostFillings = 8;

// With more pieces, not all pairs of them are tried.
constexpr int kFewForPairs = 48;

// An expert that a rank fills up with comes back as the rest of another rank, often in another
// node, so one split serves both balance and locality. Nodes take turns; each rank takes what is
// cheapest in tokens off their node.
class Peel {
 public:
  Peel(const Shape& shape, const int64_t* node_counts_QE, int64_t cap, const Taste& taste)
      : shape_(shape),
        counts_QE_(node_counts_QE),
        cap_(cap),
        whole_(shape.capacity - 1),
        taste_(taste) {}

  // Returns the tokens that leave their node.
  int64_t run(Hosts& hosts) {
    begin();
    for (int local = 0; local < shape_.node_size; ++local) {
      for (int node = 0; node < shape_.nodes(); ++node) {
        step(node, node * shape_.node_size + local, hosts);
      }
    }
    return foreign_;
  }

 private:
  struct Piece {
    int64_t rest;
    int expert;
    int home;  // the one node whose tokens these are, or -1
  };

  struct Choice {
    int64_t cost = kMany;
    int64_t amount = 0;
    int filling = -1;
    int one = -1, two = -1;     // of the finished pieces, those that were searched for
    std::vector<int> finished;  // all of them
  };

  // A piece that a rank may be filled up with.
  struct Filling {
    int index;
    int64_t rest, local;
    bool mixed;
  };

  static bool smaller(const Piece& a, const Piece& b) {
    if (a.rest != b.rest) return a.rest < b.rest;
    return a.expert != b.expert ? a.expert < b.expert : a.home < b.home;
  }

  void begin() {
    const int nodes = shape_.nodes(), experts = shape_.experts;
    local_QE_.assign(counts_QE_, counts_QE_ + static_cast<int64_t>(nodes) * experts);
    pure_.assign(nodes, {});
    open_ranks_ = shape_.ranks;
    split_ahead();
    std::vector<int64_t> rest_E(experts, 0);
    for (int node = 0; node < nodes; ++node) {
      for (int e = 0; e < experts; ++e) rest_E[e] += local_QE_[index(node, e)];
    }
    for (int e = 0; e < experts; ++e) {
      mixed_.push_back({rest_E[e], e, -1});
      total_rest_ += rest_E[e];
    }
    std::sort(mixed_.begin(), mixed_.end(), smaller);
    open_items_ += experts;
  }

  // Spare splits go to the largest shares that are not their expert's largest.
  void split_ahead() {
    const int64_t spare =
        static_cast<int64_t>(shape_.ranks) * whole_ + 1 - shape_.experts;
    if (spare <= 0 || shape_.nodes() == 1) return;
    std::vector<int> largest_E(shape_.experts, 0);
    std::vector<int64_t> most_E(counts_QE_, counts_QE_ + shape_.experts);
    for (int node = 1; node < shape_.nodes(); ++node) {
      const int64_t* counts_E = counts_QE_ + index(node, 0);
      for (int e = 0; e < shape_.experts; ++e) {
        if (counts_E[e] > most_E[e]) largest_E[e] = node;
        most_E[e] = std::max(most_E[e], counts_E[e]);
      }
    }
    // Only the largest are kept, in a heap with the least of them in front.
    std::vector<Piece> shares;
    auto larger = [](const Piece& a, const Piece& b) { return smaller(b, a); };
    for (int node = 0; node < shape_.nodes(); ++node) {
      for (int e = 0; e < shape_.experts; ++e) {
        const Piece share{counts_QE_[index(node, e)], e, node};
        if (node == largest_E[e] || share.rest == 0) continue;
        if (static_cast<int64_t>(shares.size()) == spare) {
          if (!smaller(shares.front(), share)) continue;
          std::pop_heap(shares.begin(), shares.end(), larger);
          shares.pop_back();
        }
        shares.push_back(share);
        std::push_heap(shares.begin(), shares.end(), larger);
      }
    }
    for (const Piece& share : shares) {
      local_QE_[index(share.home, share.expert)] = 0;
      add(share);
    }
  }

  size_t index(int node, int expert) const {
    return static_cast<size_t>(node) * shape_.experts + expert;
  }

  static void insert(std::vector<Piece>& list, const Piece& piece) {
    list.insert(std::lower_bound(list.begin(), list.end(), piece, smaller), piece);
  }

  static void erase(std::vector<Piece>& list, const Piece& piece) {
    list.erase(std::lower_bound(list.begin(), list.end(), piece, smaller));
  }

  void add(const Piece& piece) {
    if (piece.home < 0) {
      insert(mixed_, piece);
    } else {
      insert(pure_[piece.home], piece);
      insert(all_pure_, piece);
    }
    total_rest_ += piece.rest;
    ++open_items_;
  }

  void remove(const Piece& piece) {
    if (piece.home < 0) {
      erase(mixed_, piece);
    } else {
      erase(pure_[piece.home], piece);
      erase(all_pure_, piece);
    }
    total_rest_ -= piece.rest;
    --open_items_;
  }

  int64_t local(int node, const Piece& piece) const {
    if (piece.home < 0) return local_QE_[index(node, piece.expert)];
    return piece.home == node ? piece.rest : 0;
  }

  void step(int node, int rank, Hosts& hosts) {
    if (open_items_ > 0) {
      // The least that this rank must take so that the others can carry the rest.
      least_ = std::max<int64_t>(total_rest_ - (open_ranks_ - 1) * cap_, 0);
      Choice choice = choose(node);
      if (choice.cost == kMany) {
        merge(all_pure_);
        choice = choose_anything();
      }
      take(node, rank, choice, hosts);
    }
    --open_ranks_;
  }

  // Pieces to choose from: those that belong to no node, and the given ones, ascending.
  void merge(const std::vector<Piece>& pure) {
    if (pure.empty()) {
      pieces_ = mixed_;
      return;
    }
    pieces_.resize(pure.size() + mixed_.size());
    std::merge(pure.begin(), pure.end(), mixed_.begin(), mixed_.end(), pieces_.begin(), smaller);
  }

  Choice choose(int node) {
    Choice best;
    merge(pure_[node]);
    const int size = static_cast<int>(pieces_.size());
    // Ranks may leave out as many finished pieces as the argument could still add empty ones.
    spare_ = std::min<int64_t>(whole_, open_ranks_ * whole_ + 1 - open_items_);
    if (size + spare_ < whole_ + 1) return best;
    price_.resize(size);
    local_.resize(size);
    const int64_t* local_E = local_QE_.data() + index(node, 0);
    for (int i = 0; i < size; ++i) {
      const Piece& piece = pieces_[i];
      local_[i] = piece.home < 0 ? local_E[piece.expert] : piece.rest;
      price_[i] = piece.rest - local_[i];
    }
    find_fillings();
    for (int i = 0; i < num_fillings_; ++i) try_filling(fillings_[i], best);
    return best;
  }

  // Candidates to fill up with: the largest shares of the node, of equal ones the larger piece.
  void find_fillings() {
    const int size = static_cast<int>(pieces_.size());
    const int most = size > kFewPieces ? 2 : kMostFillings;
    num_fillings_ = 0;
    int64_t least = -1;
    for (int i = size - 1; i >= 0; --i) {
      const int64_t share = local_[i];
      if (share <= least) continue;
      int at = num_fillings_ < most ? num_fillings_++ : most - 1;
      for (; at > 0 && local_[fillings_[at - 1]] < share; --at) fillings_[at] = fillings_[at - 1];
      fillings_[at] = i;
      if (num_fillings_ == most) least = local_[fillings_[most - 1]];
    }
  }

  void try_filling(int filling, Choice& best) {
    const int size = static_cast<int>(pieces_.size());
    // All but two of the finished pieces are the smallest ones.
    const int searched = std::min(whole_, 2);
    const Filling fill{filling, pieces_[filling].rest, local_[filling], pieces_[filling].home < 0};
    const int64_t cost_before = best.cost;
    finished_.clear();
    int64_t sum = 0, price = 0;
    int64_t spare = spare_;
    int first = 0;
    for (int taken = 0; taken < whole_ - searched; ++taken) {
      if (first == filling) ++first;
      if (spare > 0 && (first >= size || price_[first] > 0)) {
        --spare;
        continue;
      }
      if (first >= size) return;
      finished_.push_back(first);
      sum += pieces_[first].rest;
      price += price_[first];
      ++first;
    }
    if (searched == 0 || spare >= searched) consider(fill, sum, price, -1, -1, best);
    if (searched == 1 || (searched == 2 && spare > 0)) {
      // A smaller piece would leave more to fill than the filling has.
      const int64_t enough = least_ - sum - fill.rest;
      const auto start = std::lower_bound(
          pieces_.begin() + first, pieces_.end(), enough,
          [](const Piece& piece, int64_t rest) { return piece.rest < rest; });
      for (int i = static_cast<int>(start - pieces_.begin()); i < size; ++i) {
        if (sum + pieces_[i].rest > cap_) break;
        if (i == filling) continue;
        consider(fill, sum + pieces_[i].rest, price + price_[i], i, -1, best);
      }
    }
    if (searched == 2) search_pairs(fill, first, sum, price, best);
    if (best.cost < cost_before) {
      best.finished = finished_;
      if (best.one >= 0) best.finished.push_back(best.one);
      if (best.two >= 0) best.finished.push_back(best.two);
    }
  }

  // Two more finished pieces from `first` on, beside ones with this sum and price.
  void search_pairs(const Filling& fill, int first, int64_t sum, int64_t price, Choice& best) {
    const int size = static_cast<int>(pieces_.size());
    if (size <= kFewForPairs) {
      for (int i = first; i < size; ++i) {
        if (i == fill.index || price + price_[i] >= best.cost) continue;
        for (int j = i + 1; j < size; ++j) {
          if (j == fill.index) continue;
          const int64_t both = sum + pieces_[i].rest + pieces_[j].rest;
          if (both > cap_) break;
          consider(fill, both, price + price_[i] + price_[j], i, j, best);
        }
      }
      return;
    }
    // Two pointers towards the sum that leaves the filling just its local tokens.
    const int64_t wanted = cap_ - std::min(cap_, fill.local);
    int i = first, j = size - 1;
    while (i < j) {
      if (i == fill.index) {
        ++i;
        continue;
      }
      if (j == fill.index) {
        --j;
        continue;
      }
      const int64_t both = sum + pieces_[i].rest + pieces_[j].rest;
      consider(fill, both, price + price_[i] + price_[j], i, j, best);
      if (both < wanted) {
        ++i;
      } else {
        --j;
      }
    }
  }

  // The best amount of the filling beside finished pieces with this sum and price.
  void consider(const Filling& fill, int64_t sum, int64_t price, int one, int two,
                Choice& best) const {
    const int64_t low = std::max<int64_t>(least_ - sum, 0);
    // No amount costs less than this; most choices end here.
    if (sum > cap_ || price + std::max<int64_t>(low - fill.local, 0) >= best.cost) return;
    const int64_t high = std::min(fill.rest, cap_ - sum);
    if (low > high) return;
    const int64_t amount = std::min(std::max(fill.local, low), high);
    price += std::max<int64_t>(amount - fill.local, 0);
    const int64_t left = fill.local - amount;
    if (left > 0 && fill.mixed && left * 2 < cap_) {
      price += left * taste_.stranded_percent / 100;
    }
    price += std::max<int64_t>(sum * taste_.slack_percent / 100 - amount, 0);
    if (price >= best.cost) return;
    best.cost = price;
    best.amount = amount;
    best.filling = fill.index;
    best.one = one;
    best.two = two;
  }

  // Whatever the window argument gives over all open pieces.
  Choice choose_anything() const {
    Choice choice;
    const Window window = find_window(pieces_, whole_, open_ranks_, cap_);
    for (int i = window.first; i < window.filling; ++i) choice.finished.push_back(i);
    choice.filling = window.filling;
    choice.amount = std::min(pieces_[choice.filling].rest, cap_ - window.sum);
    return choice;
  }

  void take(int node, int rank, const Choice& choice, Hosts& hosts) {
    for (int i : choice.finished) {
      const Piece piece = pieces_[i];
      foreign_ += piece.rest - local(node, piece);
      remove(piece);
      hosts.add(rank, piece.expert);
    }
    Piece piece = pieces_[choice.filling];
    remove(piece);
    hosts.add(rank, piece.expert);
    const int64_t served = std::min(choice.amount, local(node, piece));
    foreign_ += choice.amount - served;
    piece.rest -= choice.amount;
    if (piece.home < 0) {
      local_QE_[index(node, piece.expert)] -= served;
      // Foreign tokens come from the nodes with most of them.
      for (int64_t more = choice.amount - served; more > 0;) {
        int from = 0;
        for (int other = 1; other < shape_.nodes(); ++other) {
          if (local_QE_[index(other, piece.expert)] > local_QE_[index(from, piece.expert)]) {
            from = other;
          }
        }
        const int64_t part = std::min(more, local_QE_[index(from, piece.expert)]);
        local_QE_[index(from, piece.expert)] -= part;
        more -= part;
      }
    }
    if (piece.rest > 0) add(piece);
  }

  const Shape& shape_;
  const int64_t* counts_QE_;
  const int64_t cap_;
  const int whole_;
  const Taste taste_;
  std::vector<int64_t> local_QE_;
  std::vector<std::vector<Piece>> pure_;  // by home, ascending
  std::vector<Piece> mixed_, all_pure_;
  int64_t total_rest_ = 0, least_ = 0, foreign_ = 0;
  int64_t open_items_ = 0, open_ranks_ = 0, spare_ = 0;
  std::vector<Piece> pieces_;
  std::vector<int64_t> price_, local_;
  std::array<int, kMostFillings> fillings_{};
  int num_fillings_ = 0;
  std::vector<int> finished_;
};

}  // namespace

int64_t peel(const Shape& shape, const int64_t* node_counts_QE, int64_t cap, const Taste& taste,
             Hosts& hosts) {
  return Peel(shape, node_counts_QE, cap, taste).run(hosts);
}

}  // namespace laer
