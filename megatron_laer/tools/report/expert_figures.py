"""Sections of the page on experts and their replicas.

Legend: B bins of steps, L MoE layers, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_laer.choices import Fp8Recipe
from megatron_laer.planner.geometry import Geometry
from megatron_laer.planner.layout import ExpertLayout
from megatron_laer.planner.wire_form import weights_form
from megatron_laer.tools.model_flags import ExpertSizes
from megatron_laer.tools.report import plots
from megatron_laer.tools.report.bins import (
    Bins,
    binned,
    bins_of,
    edges_by_layer,
    in_unit,
    largest,
    over_mean,
    text_of,
)
from megatron_laer.tools.report.plots import (
    BLUE,
    GREEN,
    OVER_MEAN,
    RED,
    Chart,
    Section,
    Table,
    rounded,
)
from megatron_laer.tools.report.run_data import Float64, RunData


def experts(run: RunData) -> Section:
    """Show each expert's share of tokens over an even share, by layer and bin."""
    assert run.experts_TLE is not None
    edges, layers = edges_by_layer(run), run.shape.layers
    share_BLE = over_mean(np.add.reduceat(run.experts_TLE, np.array(edges[:-1]), axis=0))
    total_LE = run.experts_TLE.sum(axis=0)
    orders = [np.argsort(-total_E, kind="stable") for total_E in total_LE]
    figure = plots.heat_map(
        "Tokens of each expert, over an even share",
        "Of the chosen layer; the experts with the most tokens first.",
        [share_BLE[:, layer, order_E].T for layer, order_E in enumerate(orders)],
        x=plots.steps_axis(bins_of(run, edges)),
        y=[
            plots.names_axis("expert", list(map(str, order_E.tolist())), "expert ")
            for order_E in orders
        ],
        unit=OVER_MEAN,
        bounds=(0.0, max(1.01, largest(share_BLE))),
        choices=layers,
    )
    drifts = _drift(share_BLE)
    table = Table(
        "Experts without tokens, Gini coefficient and drift by layer",
        ("layer", "experts without a token", "Gini coefficient", "cosine of neighbouring columns"),
        [
            (name, str(int((total_E == 0).sum())), text_of(_gini(total_E)), text_of(drift))
            for name, total_E, drift in zip(layers, total_LE, drifts, strict=True)
        ],
    )
    return Section("experts", "Experts", [figure], tables=[table])


def _gini(tokens_E: npt.NDArray[np.int64]) -> float:
    """Return the Gini coefficient: 0 for equal shares, near 1 for a single expert."""
    ordered_E = np.sort(tokens_E)
    total = float(ordered_E.sum())
    if total == 0:
        return math.nan
    number = len(ordered_E)
    place_E = np.arange(1, number + 1)
    return float(2 * (place_E * ordered_E).sum() / (number * total) - (number + 1) / number)


def _drift(share_BLE: Float64) -> list[float]:
    """Return the mean cosine between experts' shares in neighbouring bins, by layer."""
    share_BLE = np.nan_to_num(share_BLE)
    found = []
    for layer in range(share_BLE.shape[1]):
        one, other = share_BLE[:-1, layer], share_BLE[1:, layer]
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        products = (one * other).sum(axis=1)
        found.append(float(np.mean(products[norms > 0] / norms[norms > 0])) if norms.any() else 1.0)
    return found


def replicas(run: RunData, edges: Sequence[int]) -> Section | None:
    """Show replicas and the weights moved for them; None for a recording with neither."""
    figures, text = _in_use(run, edges), ""
    if figures:
        of = {name: np.nansum(run.of_layers[name]) for name in ("passes", "without_replicas")}
        share = of["without_replicas"] / of["passes"] if of["passes"] else math.nan
        text = f"{text_of(100 * share)} % of microbatches had no replica."
    if run.layouts:
        figures += _planned(run)
    return Section("replicas", "Replicas", figures, text) if figures else None


def _in_use(run: RunData, edges: Sequence[int]) -> list[Chart]:
    """Draw replicas as they were in use, and received weights."""
    replicas_TL = run.of_layers["replicas"]
    if not np.isfinite(replicas_TL).any():
        return []
    x = plots.steps_axis(bins_of(run, edges))
    figures = [
        plots.heat_map(
            "Replicas per rank",
            "Slots in use without each expert's first, mean of microbatches and ranks.",
            [binned(replicas_TL, edges).T],
            x=x,
            y=[plots.names_axis("MoE layer", run.shape.layers)],
            unit="replicas per rank",
            bounds=(0.0, max(1.0, largest(replicas_TL))),
        )
    ]
    if run.is_measured:
        series, unit = in_unit({"received": binned(run.of_steps["weight_bytes"], edges)})
        figures.append(
            plots.lines(
                "Weights moved",
                "Weights and gradients that the planner rank received in a step.",
                {name: rounded(values) for name, values in series.items()},
                x=x,
                y=unit,
                colours=(GREEN,),
            )
        )
    return figures


def _planned(run: RunData) -> list[Chart]:
    """Draw replicas of each expert by layer and bin, from the bin's last layouts."""
    edges, layers = edges_by_layer(run), run.shape.layers
    bins = bins_of(run, edges)
    replicas_BLE, planned_B = _layouts_by_bin(run, bins)
    fetched_B = [
        float(np.nansum(run.of_layers["changed_slots"][begin:end]))
        for begin, end in itertools.pairwise(edges)
    ]
    x = plots.steps_axis(bins)
    figure = plots.heat_map(
        "Slots of each expert in the planned layouts",
        "Of the chosen layer.",
        [replicas_BLE[:, layer].T for layer in range(len(layers))],
        x=x,
        y=[plots.numbers_axis("expert", run.shape.num_experts)] * len(layers),
        unit="slots",
        bounds=(1.0, max(2.0, largest(replicas_BLE))),
        choices=layers,
    )
    bytes_of_slot = _slot_bytes(run.settings)
    slots = {"planned": np.array(planned_B), "fetched after the gate": np.array(fetched_B)}
    series, unit = (
        (slots, "slots")
        if bytes_of_slot is None
        else in_unit({name: values * bytes_of_slot for name, values in slots.items()})
    )
    changed = plots.lines(
        "Slots that changed, all layers" if unit == "slots" else "Weights of changed slots",
        "Planned ones change between steps, and restores bring them at no extra cost; fetched ones "
        "changed after the gate. Of all layers and the steps of a column.",
        {name: rounded(values) for name, values in series.items()},
        x=x,
        y=unit,
        colours=(BLUE, RED),
    )
    return [figure, changed]


def _layouts_by_bin(run: RunData, bins: Bins) -> tuple[Float64, list[int]]:
    """Return the replicas at the end of each bin, and its number of changed slots."""
    num_layers, num_experts = len(run.shape.layers), run.shape.num_experts
    sizes = run.shape.num_ranks, num_experts, run.shape.capacity, run.shape.node_size
    static = Geometry(*sizes, run.sharding).static_layout
    # A run begins with static layouts, which are not recorded.
    layouts: Sequence[ExpertLayout] | None = [static] * num_layers if run.steps_T[0] == 0 else None
    coming = list(run.layouts)[::-1]
    replicas, changed_B = [], []
    for _, last in bins:
        changed = 0
        while coming and coming[-1][0] <= last:
            before, (_, layouts) = layouts, coming.pop()
            changed += sum(
                int(new.changed_from(one).sum())
                for one, new in zip(before or layouts, layouts, strict=True)
            )
        changed_B.append(changed)
        unknown = np.full((num_layers, num_experts), np.nan)
        replicas.append(unknown if layouts is None else [layout.replicas_E for layout in layouts])
    return np.array(replicas, dtype=np.float64), changed_B


def _slot_bytes(settings: Sequence[tuple[str, str]]) -> int | None:
    of = dict(settings)
    try:
        hidden, ffn, each = (int(of[name]) for name in ("hidden", "ffn", "bytes_per_element"))
        recipe = Fp8Recipe(of["fp8_recipe"]) if "fp8_recipe" in of else None
    except (KeyError, ValueError):
        return None
    sizes = ExpertSizes(hidden, ffn, of.get("gated") == "True")
    return weights_form(recipe, sizes.matrices, each).expert_bytes
