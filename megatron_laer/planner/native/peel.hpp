// The construction over all ranks at once, for scarce slots.
#pragma once

#include <cstdint>

#include "hosts.hpp"
#include "quotas.hpp"

namespace laer {

// How a peel weighs its choices, in percent of a token off its node.
struct Taste {
  // For a token left behind in a node that is unlikely to come back for it.
  int64_t stranded_percent;
  // A rank's filling should be this part of what the rank takes whole, so that load can flow off
  // when the rank's own experts grow; a missing token costs as much as one off its node.
  int64_t slack_percent;
};

// Fills `hosts` so that no rank needs more than `cap`; returns the tokens that leave their node.
int64_t peel(const Shape& shape, const int64_t* node_counts_QE, int64_t cap, const Taste& taste,
             Hosts& hosts);

}  // namespace laer
