"""Settings of the predictions of `plan` and `report`: of flags, else recorded, else defaults.

Both commands share them, so that they print the same rows. A note names unusable settings of a
recording, and their replacements.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_laer.choices import (
    Auto,
    ExchangeAlgorithm,
    Fp8Recipe,
    Recompute,
    Sharding,
    TokenExchange,
)
from megatron_laer.files.checks import quoted
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.geometry import Geometry, resolve_geometry
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.planner.token_exchange import with_token_exchange
from megatron_laer.telemetry.metrics_file import Shape
from megatron_laer.tools.cli.argument_types import MOST_RANKS, between, named, number
from megatron_laer.tools.cli.fp8_flags import ROWS_IN_FP8
from megatron_laer.tools.model_flags import DEFAULT_SIZES, MAX_WIDTH, ExpertSizes, model_sizes
from megatron_laer.tools.report.metrics_recording import MetricsRecording, read_metrics
from megatron_laer.tools.report.run_files import naming
from megatron_laer.tools.simulator.comparison import mean_tokens
from megatron_laer.tools.traces.records import Trace

DEFAULT_CLUSTER = "a100-4x8-ib800"
# Bytes per element: default (bf16) and maximum.
_BYTES_PER_ELEMENT, _MOST_BYTES = 2, 8


@dataclass(frozen=True)
class PredictionSettings:
    """Settings of predictions, whose `costs` assume tokens that travel by rank.

    `tolerance` is the recorded one if no flag gives it, and None without both. `recorded` and
    `defaults` name the settings from the recording, and from neither it nor flags. `note` names
    unusable recorded settings and their replacements; "" for none.
    """

    sizes: ExpertSizes
    costs: CostModel
    token_exchange: TokenExchange | Auto
    sharding: Sharding
    tolerance: float | None
    has_flag_cluster: bool
    shape: Shape | None
    recorded: tuple[str, ...]
    defaults: tuple[str, ...]
    note: str

    def words(self) -> str:
        sent = "" if self.token_exchange == TokenExchange.RANK else ", tokens sent by node"
        home = ", experts at home" if self.sharding == Sharding.EXPERTS else ""
        numbers = f"{self.costs.bytes_per_element} bytes per number"
        if self.costs.fp8 is not None:
            numbers += f", {self.costs.fp8} fp8"
        on = self.costs.cluster.name
        return f"experts of {self.sizes.widths}, {numbers}{sent}{home}, on {on}"

    def priced(self, trace: Trace, geometry: Geometry) -> CostModel:
        """Return the cost model with tokens that travel as the run sent them."""
        top_k = min(self.sizes.top_k, trace.num_experts)
        exchange = TokenExchange(self.token_exchange)
        return with_token_exchange(self.costs, exchange, geometry, top_k, mean_tokens(trace, top_k))

    def geometries(
        self, num_ranks: int, num_experts: int, capacities: Sequence[int], node_size: int | None
    ) -> tuple[list[Geometry], tuple[str, ...]]:
        """Return the shapes, one per capacity, and the names of the sizes that were recorded.

        For the recorded number of ranks, sizes that were not given are the recorded ones. The node
        size is not, if a flag names the cluster.
        """
        shape = self.shape if self.shape and self.shape.num_ranks == num_ranks else None
        recorded, flag = [], "--node-size"
        cluster = self.costs.cluster
        if node_size is None and shape is not None and not self.has_flag_cluster:
            node_size = shape.node_size
            recorded.append("node_size")
        elif node_size is None:
            node_size = min(cluster.ranks_per_node, num_ranks)
            flag = f"--node-size is not given, and {cluster.name}'s"
        if not capacities and shape is not None:
            capacities = [shape.capacity]
            recorded.append("capacity")
        flags = "--capacity", flag
        slots: list[int | None] = [*capacities] or [None]
        shapes = [
            resolve_geometry(
                num_experts, num_ranks, one, node_size, sharding=self.sharding, flags=flags
            )
            for one in slots
        ]
        return shapes, tuple(recorded)


def recording_of(path: Path | None) -> MetricsRecording | None:
    if path is None:
        return None
    with naming(path):
        return read_metrics(path)


def prediction_settings(
    flags: Mapping[str, Any], recording: MetricsRecording | None, path: Path | None
) -> PredictionSettings:
    """Return the settings of predictions by a command's flags, which are None if not given.

    `path` names the recording in the note.
    """
    config, cluster = flags["config"], flags["cluster"]
    model = None if config is None else named("--config", config, model_sizes)
    noted = _Noted(flags, model, recording)
    width = between(1, MAX_WIDTH)
    sizes = ExpertSizes(
        noted.value("hidden", width, DEFAULT_SIZES.hidden),
        noted.value("ffn", width, DEFAULT_SIZES.ffn),
        noted.value("gated", _boolean, DEFAULT_SIZES.gated),
        None if model is None else model.num_experts,
        noted.value("top_k", between(1, MAX_EXPERTS), DEFAULT_SIZES.top_k),
        noted.value("fp8_recipe", Fp8Recipe, None),
    )
    usual = Sharding.ROWS if sizes.fp8_recipe is None else Sharding.EXPERTS
    sharding = Sharding(noted.value("sharding", Sharding, usual))
    if sizes.fp8_recipe is not None and sharding == Sharding.ROWS:
        raise ValueError(ROWS_IN_FP8)
    costs = CostModel(
        cluster=_cluster(cluster, recording, noted),
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=noted.value(
            "bytes_per_element", between(1, _MOST_BYTES), _BYTES_PER_ELEMENT
        ),
        recompute=noted.value("recompute", Recompute, Recompute.NONE),
        restore_algorithm=noted.value(
            "restore_algorithm", ExchangeAlgorithm, ExchangeAlgorithm.FLAT
        ),
        fp8=sizes.fp8_recipe,
    )
    exchange = noted.value("token_exchange", TokenExchange, TokenExchange.RANK)
    note = ""
    if noted.replaced:
        note = (
            f"{path} does not say all that predictions need; taken instead: "
            f"{'; '.join(noted.replaced)}"
        )
    return PredictionSettings(
        sizes,
        costs,
        exchange,
        sharding,
        noted.value("imbalance_tolerance", number(0, MOST_RANKS), None),
        cluster is not None,
        None if recording is None else recording.shape,
        tuple(noted.recorded),
        tuple(noted.defaults),
        note,
    )


class _Noted:
    """Settings of flags, else of the start of the recording's last run, with their origins."""

    def __init__(
        self,
        flags: Mapping[str, Any],
        model: ExpertSizes | None,
        recording: MetricsRecording | None,
    ) -> None:
        # Another model is assumed to be in bf16, regardless of this run's dtype.
        self._given: dict[str, Any] = (
            {} if model is None else asdict(model) | {"bytes_per_element": _BYTES_PER_ELEMENT}
        )
        self._given |= {name: value for name, value in flags.items() if value is not None}
        self._has_recording = recording is not None
        self._texts = recording.runs[-1][1] if recording is not None and recording.runs else {}
        self.recorded: list[str] = []
        self.defaults: list[str] = []
        self.replaced: list[str] = []

    def value[T](self, name: str, read: Callable[[str], T], otherwise: T) -> T:
        """Return a flag's value, else the recorded text parsed by `read`, else `otherwise`."""
        if name in self._given:
            given: T = self._given[name]
            return given
        text = self._texts.get(name)
        if text is not None:
            try:
                found = read(text)
            except (ValueError, OSError, argparse.ArgumentTypeError):
                self.replaced.append(f"{otherwise} for {name} {quoted(text)}")
            else:
                self.recorded.append(name)
                return found
        elif self._has_recording and otherwise is not None:
            self.replaced.append(f"{otherwise} for {name}, which is missing")
        self.defaults.append(name)
        return otherwise


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} must be True or False")
    return text == "True"


def _cluster(given: str | None, recording: MetricsRecording | None, noted: _Noted) -> Cluster:
    if given is not None:
        return named("--cluster", given, load_cluster)
    if recording is not None and recording.clusters:
        noted.recorded.append("cluster")
        return recording.clusters[-1]
    return load_cluster(noted.value("cluster", str, DEFAULT_CLUSTER))
