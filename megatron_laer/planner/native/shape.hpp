// The shape of a layout and the purpose that one is made for, used by every file of the native
// planner. No algorithm is in here.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

#include <cstdint>

namespace laer {

// Content of a slot without an expert.
constexpr int16_t kEmpty = -1;

// The first `home` slots of a rank have its home experts, E/N in stock's placement, and a replica
// slot has an expert of another rank or is empty. With `home` 0 every slot is a replica slot, and
// none is empty.
struct Shape {
  int ranks;
  int experts;
  int capacity;
  int node_size;
  int home = 0;

  int slots() const { return ranks * capacity; }
  int nodes() const { return ranks / node_size; }
  bool is_home(int slot) const { return slot % capacity < home; }
};

// A layout is made for the counts at hand, or for ones that will differ from them somewhat.
enum class Purpose { kNow, kForecast };

}  // namespace laer
