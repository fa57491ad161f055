"""`RunSettings` of `plan` and `report`: of flags, else recorded, else defaults.

Both commands share them, so that they print the same rows. A note names unusable settings of a
recording, and their replacements.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_laer.choices import (
    Auto,
    ExchangeAlgorithm,
    Recompute,
    Sharding,
    TokenExchange,
)
from megatron_laer.files.checks import quoted
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.precision import Precision
from megatron_laer.tools.cli.argument_types import MOST_RANKS, between, named, number
from megatron_laer.tools.cli.fp8_flags import ROWS_IN_FP8
from megatron_laer.tools.model_flags import DEFAULT_SIZES, MAX_WIDTH, ExpertSizes, model_sizes
from megatron_laer.tools.report.metrics_recording import MetricsRecording, read_metrics
from megatron_laer.tools.report.run_files import naming
from megatron_laer.tools.simulator.run_settings import RunSettings

DEFAULT_CLUSTER = "a100-4x8-ib800"
# Bytes per element: default (bf16) and maximum.
_BYTES_PER_ELEMENT, _MOST_BYTES = 2, 8


def recording_of(path: Path | None) -> MetricsRecording | None:
    if path is None:
        return None
    with naming(path):
        return read_metrics(path)


def prediction_settings(
    flags: Mapping[str, Any], recording: MetricsRecording | None, path: Path | None
) -> RunSettings:
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
        noted.value("precision", Precision, None) or Precision.PARAMETERS,
    )
    usual = Sharding.EXPERTS if sizes.precision.is_quantised else Sharding.ROWS
    sharding = Sharding(noted.value("sharding", Sharding, usual))
    if sizes.precision.is_quantised and sharding == Sharding.ROWS:
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
        precision=sizes.precision,
    )
    flat: ExchangeAlgorithm | Auto = ExchangeAlgorithm.FLAT
    algorithm = noted.value("restore_algorithm", _algorithm, flat)
    exchange = noted.value("token_exchange", TokenExchange, TokenExchange.RANK)
    note = ""
    if noted.replaced:
        note = (
            f"{path} does not say all that predictions need; taken instead: "
            f"{'; '.join(noted.replaced)}"
        )
    return RunSettings(
        sizes,
        costs,
        algorithm,
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


def _algorithm(text: str) -> ExchangeAlgorithm | Auto:
    return Auto.AUTO if text == Auto.AUTO else ExchangeAlgorithm(text)


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
