// The same layout with as much as possible where it was: ranks of a node trade places, slots of a
// rank too. Neither loads nor tokens between nodes change.
#pragma once

#include <cstdint>
#include <vector>

#include "quotas.hpp"

namespace laer {

void settle(const Shape& shape, const int16_t* current_S, std::vector<int16_t>& slots_S);

}  // namespace laer
