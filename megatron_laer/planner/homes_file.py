"""File of `--fsep-homes`: the homes of all layers' experts.

One line of JSON; `files.records` defines its checksum:

    {"format":"megatron_laer-homes","version":3,"num_ranks":N,"num_experts":E,
     "layers":["layer 1",...],"experts":[[expert at home position 0, ...], ... of the last layer],
     "crc":...}\\n

Layers have the names of `--fsep-record DIR trace`. People who write a file leave `crc` out.

Legend: N ranks, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_laer.arrays import Int64
from megatron_laer.files.checks import quoted, read_bytes
from megatron_laer.files.records import MAX_RANKS, check_shape, header_line, read_header
from megatron_laer.files.writing import write_file
from megatron_laer.planner.home_order import HomeOrder
from megatron_laer.planner.layout import MAX_EXPERTS

FORMAT = "megatron_laer-homes"

# Far above 128 layers with 512 experts.
_MAX_BYTES = 2**24


@dataclass(frozen=True, eq=False)
class ModelHomes:
    """Homes of all experts of a model, by the layers' names."""

    num_ranks: int
    num_experts: int
    by_layer: Mapping[str, HomeOrder]

    @property
    def digest(self) -> str:
        """Name the content: sizes, layers' names and all experts' homes."""
        orders = [(name, home.expert_E.tolist()) for name, home in sorted(self.by_layer.items())]
        content = repr((self.num_ranks, self.num_experts, orders)).encode()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def check_fits(self, num_ranks: int, num_experts: int) -> None:
        if (self.num_ranks, self.num_experts) != (num_ranks, num_experts):
            raise ValueError(
                f"has homes for {self.num_ranks} ranks and {self.num_experts} experts, but this "
                f"run has {num_ranks} ranks and {num_experts} experts; make a file for these"
            )

    def missing(self, layers: Sequence[str]) -> str | None:
        """Describe layers without homes; None if all have them."""
        without = [layer for layer in layers if layer not in self.by_layer]
        if not without:
            return None
        there = quoted(_listed([*self.by_layer]))
        return (
            f"has no homes for {_listed(without)}; it has {there}; give a file with all layers, as "
            "`megatron_laer plan --homes` makes from a trace of this model"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_homes(path: Path) -> ModelHomes:
    """Read a file of homes; raise ValueError that names the file for anything else."""
    content = read_bytes(path, _MAX_BYTES)
    try:
        fields = read_header(content, FORMAT, "file of homes", may_lack_checksum=True)
        sizes = {
            name: (fields.get(name), most)
            for name, most in (("num_ranks", MAX_RANKS), ("num_experts", MAX_EXPERTS))
        }
        check_shape(sizes, fields.get("layers"))
        layers, experts = fields["layers"], fields.get("experts")
        if not isinstance(experts, list) or len(experts) != len(layers):
            raise ValueError(f"experts must be a list for each of {len(layers)} layers")
        by_layer = {
            name: _order(name, of_layer, fields["num_experts"])
            for name, of_layer in zip(layers, experts, strict=True)
        }
    except ValueError as error:
        raise ValueError(f"{quoted(path)} must be a file of homes: {error}") from error
    return ModelHomes(fields["num_ranks"], fields["num_experts"], by_layer)


def write_homes(path: Path, num_ranks: int, home_slot_order_E: Mapping[str, Int64]) -> None:
    """Write the homes of each layer, by its name; a file that is there is replaced."""
    for order_E in home_slot_order_E.values():
        HomeOrder(order_E)
    (num_experts,) = {len(order_E) for order_E in home_slot_order_E.values()}
    line = header_line(
        FORMAT,
        {
            "num_ranks": num_ranks,
            "num_experts": num_experts,
            "layers": [*home_slot_order_E],
            "experts": [np.asarray(order_E).tolist() for order_E in home_slot_order_E.values()],
        },
    )
    write_file(path, line)


def _order(layer: str, experts: object, num_experts: int) -> HomeOrder:
    is_list = isinstance(experts, list) and all(type(expert) is int for expert in experts)
    if not is_list or len(experts) != num_experts:  # type: ignore[arg-type]
        raise ValueError(f"{layer}: homes must be {num_experts} integers, got {quoted(experts)}")
    try:
        return HomeOrder(np.array(experts))
    except ValueError as error:
        raise ValueError(f"{layer} must name each expert once: {error}") from error
