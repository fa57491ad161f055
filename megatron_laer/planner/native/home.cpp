// Home experts in stock's placement.
//
// Legend: N ranks, E experts, C slots per rank, S = N*C slots, Q nodes, G ranks per node.
#include "home.hpp"

namespace laer {

std::vector<int16_t> at_home(const Shape& shape) {
  std::vector<int16_t> slots_S(shape.slots(), kEmpty);
  for (int e = 0; e < shape.experts; ++e) {
    slots_S[e / shape.home * shape.capacity + e % shape.home] = static_cast<int16_t>(e);
  }
  return slots_S;
}

}  // namespace laer
