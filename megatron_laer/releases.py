"""Supported and tested releases of Megatron, and their differences.

This is the one place for such facts: code imports it, and tests compare other files with it.
`docs/internals/releasing.md` lists the steps for a new release. The module imports the standard
library alone, since `doctor` and scripts read it where Megatron or torch is missing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """Release of Megatron, all of whose patch versions are supported.

    `number` is in the names of Megatron's branches and of our folders in patches/. The tests passed
    with the versions in `tested`, oldest first. `limits` are features that the release lacks, for
    docs/support.md.
    """

    number: str
    tested: tuple[str, ...]
    limits: str = ""


# Oldest first, without gaps.
RELEASES = (
    Release(
        "0.18",
        tested=("0.18.0", "0.18.2"),
        limits="has no quantile balancing and writes no routing traces, and stock's own log of MoE "
        "losses differs with context parallelism from that without",
    ),
    Release("0.19", tested=("0.19.0", "0.19.2")),
)

# Megatron's main branch. It may change until its release, so it needs a request.
NEXT = Release("0.20", tested=("0.20.0+d98e8a6",))

NUMBERS = tuple(release.number for release in RELEASES)
TESTED = tuple(version for release in RELEASES for version in release.tested)
TESTED_RANGE = f"{TESTED[0]} to {TESTED[-1]}"


def release_after(number: str) -> str:
    """Return the number of the release that follows, with the same major number."""
    major, minor = number.split(".")
    return f"{major}.{int(minor) + 1}"


# In pip's form; `<` also excludes the pre-releases of its version.
SUPPORTED = f">={NUMBERS[0]},<{release_after(NUMBERS[-1])}"


@dataclass(frozen=True)
class Difference:
    """Attribute or parameter of Megatron that newer releases have, from `since` on.

    Code asks `is_in`, not for the release, because a fork or a checkout may be between two
    releases. A test compares the answers with `since` in each release. `owner` is the dotted name
    of a module, class or function, and `before` the behaviour without.
    """

    owner: str
    name: str
    since: str
    before: str

    def is_in(self, owner: object) -> bool:
        """Return True if this object, which `owner` names, has the attribute or the parameter."""
        if inspect.isfunction(owner):
            return self.name in inspect.signature(owner).parameters
        return hasattr(owner, self.name)

    def lacked_by(self) -> tuple[str, ...]:
        return NUMBERS[: (*NUMBERS, NEXT.number).index(self.since)]


GPT_FROM_CONFIG = Difference(
    "megatron.training.argument_utils",
    "gpt_config_from_args",
    since="0.19",
    before="plugin/pretraining.py builds GPT models",
)
PACKED_SEQUENCES = Difference(
    "megatron.core.utils.get_batch_on_this_tp_rank",
    "has_cu_seqlens",
    since="0.19",
    before="the parameter is called is_sft",
)
CHECKPOINT_STORAGE = Difference(
    "megatron.core.msc_utils",
    "maybe_msc",
    since="0.19",
    before="plugin/checkpoints.py asks itself whether the object store is on",
)
INFERENCE_LINEARS = Difference(
    "megatron.core.tensor_parallel.inference_layers",
    "is_inference_column_parallel_linear",
    since="0.20",
    before="nothing asks for classes that only Transformer Engine has",
)

DIFFERENCES = (
    GPT_FROM_CONFIG,
    PACKED_SEQUENCES,
    CHECKPOINT_STORAGE,
    INFERENCE_LINEARS,
)
