// Layouts made for known counts: every rank can carry at most ceil(total / N) tokens wherever
// C >= ceil(E / N) + 1, and few tokens leave their node. Integers only, ties by index.
//
// Source of the window argument: with n open ranks and at most n * (C - 1) + 1 open experts whose
// tokens fill them, some C - 1 experts fit on a rank whole and one more fills it up; then n - 1
// ranks and C - 1 experts fewer remain. For E = N this is Walker's alias method.
#pragma once

#include <cstdint>
#include <vector>

#include "quotas.hpp"

namespace laer {

// Whether the window argument holds: E <= N * (C - 1) + 1.
bool can_balance(const Shape& shape);

// Slots for counts by node. Needs can_balance(shape).
std::vector<int16_t> construct(const Shape& shape, const int64_t* node_counts_QE,
                               Purpose purpose);

// For these very counts and any shape: with too few slots for the argument, replicas in proportion
// to load.
std::vector<int16_t> fresh(const Shape& shape, const int64_t* node_counts_QE);

}  // namespace laer
