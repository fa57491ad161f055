// The shape of a layout and the purpose that one is made for, used by every file of the native
// planner. No algorithm is in here.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#pragma once

namespace laer {

struct Shape {
  int ranks;
  int experts;
  int capacity;
  int node_size;

  int slots() const { return ranks * capacity; }
  int nodes() const { return ranks / node_size; }
};

// A layout is made for the counts at hand, or for ones that will differ from them somewhat.
enum class Purpose { kNow, kForecast };

}  // namespace laer
