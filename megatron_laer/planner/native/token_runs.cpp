// Three passes over S numbers. Starts of runs are sums of all runs before them.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots.
#include "token_runs.hpp"

namespace laer {

void token_runs(const Shape& shape, const int16_t* slots_S, const int64_t* row_S,
                const int64_t* columns_NC, int32_t* runs) {
  const int slots = shape.slots(), experts = shape.experts;
  const TokenRuns parts(shape);
  auto narrow = [](int64_t number) { return static_cast<int32_t>(number); };

  // Slots: their share of their expert's tokens, their first row, and slots by expert, empty ones
  // first.
  int32_t *start_S = runs, *end_S = runs + slots, *first_row_S = runs + 2 * slots;
  int32_t *by_expert_S = runs + 3 * slots, *first_E1 = runs + 4 * slots;
  std::vector<int> place_E(experts + 1, 0);
  static_assert(kEmpty == -1, "empty slots count as before expert 0");
  for (int slot = 0; slot < slots; ++slot) ++place_E[slots_S[slot] + 1];
  for (int e = 0; e < experts; ++e) place_E[e + 1] += place_E[e];
  for (int e = 0; e <= experts; ++e) first_E1[e] = place_E[e];
  for (int slot = 0, empty = 0; slot < slots; ++slot) {
    by_expert_S[slots_S[slot] == kEmpty ? empty++ : place_E[slots_S[slot]]++] = slot;
  }

  // Sources: rows of the send buffer among pairs by expert.
  int32_t *source_shift_S = runs + parts.sources, *source_count_S = source_shift_S + slots;
  int64_t row = 0, pair = 0, before = 0;
  for (int slot = 0; slot < slots; ++slot) {
    first_row_S[slot] = narrow(row);
    source_count_S[slot] = narrow(row_S[slot]);
    row += row_S[slot];
  }
  for (int at = 0, last = -1; at < slots; ++at) {
    const int slot = by_expert_S[at];
    if (slots_S[slot] != last) before = pair;
    last = slots_S[slot];
    start_S[slot] = narrow(pair - before);
    source_shift_S[slot] = narrow(pair - first_row_S[slot]);
    pair += row_S[slot];
    end_S[slot] = narrow(pair - before);
  }

  // Arrivals: rows by (slot, rank) among those by (rank, slot), and the other way round.
  int32_t* arrived_shift_CN = runs + parts.arrivals;
  int32_t *sorted_shift_NC = arrived_shift_CN + slots, *count_CN = sorted_shift_NC + slots;
  int32_t* count_NC = count_CN + slots;
  int64_t arrived = 0, sorted = 0;
  for (int i = 0; i < slots; ++i) {
    const int transposed = i % shape.capacity * shape.ranks + i / shape.capacity;
    arrived_shift_CN[transposed] = narrow(arrived);
    count_NC[i] = count_CN[transposed] = narrow(columns_NC[i]);
    arrived += columns_NC[i];
  }
  for (int i = 0; i < slots; ++i) {
    const int transposed = i % shape.ranks * shape.capacity + i / shape.ranks;
    arrived_shift_CN[i] -= narrow(sorted);
    sorted_shift_NC[transposed] = narrow(-arrived_shift_CN[i] - arrived);
    sorted += count_CN[i];
  }
}

}  // namespace laer
