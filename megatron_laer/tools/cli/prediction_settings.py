"""`RunSettings` of `plan` and `report`: of flags, else recorded, else defaults.

Both commands share them, so that they print the same rows.
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
from megatron_laer.tools.model_flags import DEFAULT_SIZES, MAX_WIDTH, ExpertSizes, model_sizes
from megatron_laer.tools.report.metrics_recording import MetricsRecording
from megatron_laer.tools.simulator.run_settings import RunSettings

DEFAULT_CLUSTER = "a100-4x8-ib800"
# Bytes per element: default (bf16) and maximum.
_BYTES_PER_ELEMENT, _MOST_BYTES = 2, 8
ROWS_IN_FP8 = (
    "--sharding rows: the model computes in fp8, and rows of experts are kept and moved without; "
    "give --sharding experts"
)


def prediction_settings(
    flags: Mapping[str, Any], recording: MetricsRecording | None, path: Path | None
) -> RunSettings:
    """Return the settings of predictions by a command's flags, which are None if not given.

    Raises ValueError for unusable settings of the recording at `path`.
    """
    model = None if flags["config"] is None else named("--config", flags["config"], model_sizes)
    # Another model is assumed to be in bf16, regardless of this run's dtype.
    given: dict[str, Any] = (
        {} if model is None else asdict(model) | {"bytes_per_element": _BYTES_PER_ELEMENT}
    )
    given |= {name: value for name, value in flags.items() if value is not None}
    recorded = recording.runs[-1][1] if recording is not None and recording.runs else {}

    def value[T](name: str, read: Callable[[str], T], otherwise: T) -> T:
        if name in given:
            found: T = given[name]
            return found
        if name not in recorded:
            return otherwise
        try:
            return read(recorded[name])
        except (ValueError, argparse.ArgumentTypeError) as error:
            of_run = f"the run's {name} {quoted(recorded[name])}"
            raise ValueError(f"{path}: {of_run} cannot be used: {error}") from error

    width = between(1, MAX_WIDTH)
    sizes = ExpertSizes(
        value("hidden", width, DEFAULT_SIZES.hidden),
        value("ffn", width, DEFAULT_SIZES.ffn),
        value("gated", _boolean, DEFAULT_SIZES.gated),
        None if model is None else model.num_experts,
        value("top_k", between(1, MAX_EXPERTS), DEFAULT_SIZES.top_k),
        value("precision", Precision, Precision.PARAMETERS),
    )
    usual = Sharding.EXPERTS if sizes.precision.is_quantised else Sharding.ROWS
    sharding = Sharding(value("sharding", Sharding, usual))
    if sizes.precision.is_quantised and sharding == Sharding.ROWS:
        raise ValueError(ROWS_IN_FP8)
    costs = CostModel(
        cluster=cluster_by(flags["cluster"], recording),
        hidden=sizes.hidden,
        ffn=sizes.ffn,
        gated=sizes.gated,
        bytes_per_element=value("bytes_per_element", between(1, _MOST_BYTES), _BYTES_PER_ELEMENT),
        recompute=value("recompute", Recompute, Recompute.NONE),
        precision=sizes.precision,
    )
    flat: ExchangeAlgorithm | Auto = ExchangeAlgorithm.FLAT
    return RunSettings(
        sizes,
        costs,
        value("restore_algorithm", _algorithm, flat),
        value("token_exchange", TokenExchange, TokenExchange.RANK),
        sharding,
        value("imbalance_tolerance", number(0, MOST_RANKS), None),
        flags["cluster"] is not None,
        None if recording is None else recording.shape,
    )


def cluster_by(flag: str | None, recording: MetricsRecording | None) -> Cluster:
    """Return the cluster of the flag, else of the run that was recorded, else the default."""
    if flag is None and recording is not None and recording.clusters:
        return recording.clusters[-1]
    return named("--cluster", flag or DEFAULT_CLUSTER, load_cluster)


def _algorithm(text: str) -> ExchangeAlgorithm | Auto:
    return Auto.AUTO if text == Auto.AUTO else ExchangeAlgorithm(text)


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} must be True or False")
    return text == "True"
