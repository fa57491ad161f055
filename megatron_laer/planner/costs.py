"""Predicted seconds of one MoE layer under a layout, and the hardware constants that this needs.

It prices what a layout changes at dispatch time: expert compute and token All-to-All. Not in here:
the exchange of parameters and gradients, which is scheduled under computation and in a flat restore
does not depend on the layout, and the solve itself.

Shape suffixes: N ranks, E experts, C slots per rank, S = N*C slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml  # type: ignore[import-untyped]

from megatron_laer.layout import ExpertLayout
from megatron_laer.planner.quotas import even_split

# Dispatch and combine, forward and backward.
_ALL_TO_ALL_PASSES = 4
# Forward, and two GEMMs of the same size for each in backward; recompute runs forward once more.
_EXPERT_PASSES = 3
_EXPERT_PASSES_RECOMPUTE = 4


@dataclass(frozen=True)
class CostModel:
    """Speeds of one device, and what they make of a layout.

    Attributes:
        expert_s_per_token: seconds that one expert needs for the forward pass of one token.
        token_bytes: bytes of one token's hidden state on the wire.
        intra_bytes_per_s: what one rank sends (and, at the same time, receives) inside its node.
        inter_bytes_per_s: the same to other nodes; the share of one rank, not the node's total.
        recompute: whether backward runs the experts' forward again.

    Raises:
        ValueError: a value that is not positive. Infinite bandwidths are allowed and make transfers
            free.
    """

    expert_s_per_token: float
    token_bytes: int
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("expert_s_per_token", "token_bytes", "intra_bytes_per_s", "inter_bytes_per_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")

    @classmethod
    def from_shapes(
        cls,
        hidden: int,
        ffn: int,
        gated: bool,
        bytes_per_element: int,
        flops_per_s: float,
        intra_bytes_per_s: float,
        inter_bytes_per_s: float,
        recompute: bool = False,
    ) -> CostModel:
        """Derive the constants from an expert's shape and a device's achieved speed.

        Args:
            hidden: H, width of a token.
            ffn: F, width of one expert.
            gated: whether the first matrix is [2F, H] (SwiGLU and its kin) or [F, H].
            bytes_per_element: of a token on the wire; 2 for bf16.
            flops_per_s: achieved in the experts' GEMMs, not the data sheet's peak.
            intra_bytes_per_s: see the class; so for `inter_bytes_per_s` and `recompute`.

        Raises:
            ValueError: a value that is not positive.
        """
        if not flops_per_s > 0:
            raise ValueError(f"flops_per_s must be positive, got {flops_per_s!r}")
        flops_per_token = 2 * hidden * ffn * (3 if gated else 2)
        return cls(
            expert_s_per_token=flops_per_token / flops_per_s,
            token_bytes=hidden * bytes_per_element,
            intra_bytes_per_s=intra_bytes_per_s,
            inter_bytes_per_s=inter_bytes_per_s,
            recompute=recompute,
        )

    def layer_seconds(
        self, counts_NE: npt.NDArray[np.int64], layout: ExpertLayout, node_size: int
    ) -> float:
        """Forward and backward of one MoE layer and microbatch under the even split, in seconds.

        The busiest rank's expert compute, plus the All-to-All of the rank that takes longest: per
        link class the slower of send and receive (links are full duplex), the classes one after the
        other, which is an upper bound where hardware overlaps them. Tokens for a rank's own slots
        travel nowhere.

        The paper adds up communication over all devices but takes the maximum of compute; here both
        are the time of one device, so their sum means something.

        Args:
            counts_NE: tokens on each source rank for each expert, int64 [N, E].

        Raises:
            ValueError: counts of another shape, or a node size that does not divide N.
        """
        totals = even_split(layout, node_size).totals(counts_NE)
        near_N = totals.near_S.reshape(layout.num_ranks, layout.capacity).sum(axis=1)
        far_N = totals.far_S.reshape(layout.num_ranks, layout.capacity).sum(axis=1)

        intra_N = np.maximum(totals.sent_near_N, near_N) - totals.own_N
        inter_N = np.maximum(totals.sent_far_N, far_N)
        pass_s_N = self.token_bytes * (
            intra_N / self.intra_bytes_per_s + inter_N / self.inter_bytes_per_s
        )
        expert_passes = _EXPERT_PASSES_RECOMPUTE if self.recompute else _EXPERT_PASSES
        expert_s = expert_passes * self.expert_s_per_token * int((near_N + far_N).max())
        return float(expert_s + _ALL_TO_ALL_PASSES * pass_s_N.max())


@dataclass(frozen=True)
class Cluster:
    """Hardware constants with their name and origin, as kept in `configs/clusters/*.yaml`.

    Attributes:
        name: of the hardware; for the files we ship, also the name of the file.
        source: who measured or published the numbers, and how.
        nodes: number of nodes.
        ranks_per_node: G.
        flops_per_s: achieved per rank in the experts' GEMMs.
        intra_bytes_per_s: per rank and direction, inside a node.
        inter_bytes_per_s: per rank and direction, between nodes.
    """

    name: str
    source: str
    nodes: int
    ranks_per_node: int
    flops_per_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float


def load_cluster(path_or_name: str | Path) -> Cluster:
    """Read a cluster's constants, by path to a YAML file or by the name of one we ship.

    Raises:
        ValueError: an unknown name, or a file whose content does not fit; the message says what
            would.
        OSError: a path that cannot be read.
    """
    given = str(path_or_name)
    is_path = isinstance(path_or_name, Path) or given.endswith((".yaml", ".yml")) or "/" in given
    path = Path(path_or_name) if is_path else cluster_file(given)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return _parse_cluster(content, path)


def cluster_file(name: str) -> Path:
    """The shipped YAML file of a cluster, from the installed package or from a source checkout.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    # The package's own data first: beside an installed package, `configs` may be somebody else's.
    package = Path(__file__).resolve().parents[1]
    folders = (package / "configs" / "clusters", package.parent / "configs" / "clusters")
    known = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if name not in known:
        raise ValueError(
            f"unknown cluster {name!r}; known are {sorted(known)}, or pass a path to a YAML file"
        )
    return known[name]


def _parse_cluster(content: object, path: Path) -> Cluster:
    keys = [field.name for field in fields(Cluster)]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {content!r}, expected a mapping with the keys {keys}")
    missing = [key for key in keys if key not in content]
    unknown = [key for key in content if key not in keys]
    if missing or unknown:
        raise ValueError(
            f"{path} lacks the keys {missing} and has the unknown keys {unknown}; "
            f"expected exactly {keys}"
        )
    return Cluster(
        name=_text(content, "name", path),
        source=_text(content, "source", path),
        nodes=_count(content, "nodes", path),
        ranks_per_node=_count(content, "ranks_per_node", path),
        flops_per_s=_rate(content, "flops_per_s", path),
        intra_bytes_per_s=_rate(content, "intra_bytes_per_s", path),
        inter_bytes_per_s=_rate(content, "inter_bytes_per_s", path),
    )


def _text(content: Mapping[str, object], key: str, path: Path) -> str:
    value = content[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: {key} must be a text that is not empty, got {value!r}")
    return value


def _count(content: Mapping[str, object], key: str, path: Path) -> int:
    value = content[key]
    # bool is an int in Python, and `yes` is a bool in YAML.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {key} must be an integer of at least 1, got {value!r}")
    return value


def _rate(content: Mapping[str, object], key: str, path: Path) -> float:
    value = content[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        # PyYAML reads YAML 1.1, where 237e12 is text: a number has a point and a signed exponent.
        raise ValueError(f"{path}: {key} must be positive and written like 2.37e+14, got {value!r}")
    return float(value)
