"""Announced routing: layouts equal those of `exact`, decisions precede the gate, and errors.

The page's functions record routing without gradients, as a rollout does, and training replays it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest

from megatron_laer.cpu.ranks import RankPools
from tests.distributed.test_own_loop import HOMES, code_of, loaded, two_ranks
from tests.probes import running, watching

# Steps on one rollout: from the second on, routers would choose otherwise by themselves.
ROLLOUTS, UPDATES = 2, 3
STEPS = ROLLOUTS * UPDATES
LAYERS, EXPERTS, MICROBATCHES = 2, 8, 2
PASSES = STEPS * LAYERS * MICROBATCHES


@dataclass
class Seen:
    """Observations of a run on one rank.

    `solved_after_gate` counts decisions of the main thread; `restores_ahead` states per pass
    whether its restore started before its decision.
    """

    losses: list[float] = field(default_factory=list)
    misses: float | None = None
    changes: int = 0
    solved_after_gate: int = 0
    restores_ahead: list[bool] = field(default_factory=list)
    max_over_mean: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def page() -> Any:
    names: dict[str, Any] = {}
    exec(compile(code_of("rl.md", "RouterReplayAction"), "rl.md", "exec"), names)
    return SimpleNamespace(**names)


@contextlib.contextmanager
def started(
    module: ModuleType,
    mode: str | None,
    hook: Callable[[Any], None] | None = None,
    at_home: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Build the page's model and optimizer from the common weights; slime's hook sets the mode."""
    from megatron_laer.cpu.weights import load_common_weights

    settings = {"plan_mode": mode, "sharding": "rows"} | (HOMES if at_home else {})
    replaying = partial(module.TransformerConfig, moe_enable_routing_replay=True)
    with two_ranks(settings if mode else None):
        if hook is not None:
            hook(SimpleNamespace(seed=1))
        with mock.patch.object(module, "TransformerConfig", replaying):
            model = module.build_model()
        load_common_weights(model)
        adam = module.OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
        yield model, module.get_megatron_optimizer(adam, model)


def train_on_rollouts(mode: str | None, announces: str, at_home: bool = False) -> Seen:
    """Record and train with replay; `announces` selects the announcement.

    "twice" announces nothing while tokens name an expert twice, and steps do not know their number
    of microbatches.
    """
    import torch

    import megatron_laer
    from megatron_laer.planner.guard import Guard
    from megatron_laer.plugin.metrics_tracker import collect
    from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner
    from megatron_laer.runtime.weights.restored import RestoredExperts
    from megatron_laer.session import current_coordinator

    seen, functions = Seen(), page()
    known = None if announces == "twice" else MICROBATCHES

    def decide(*_: Any) -> None:
        seen.solved_after_gate += threading.current_thread() is threading.main_thread()

    def plan(_planner: Any, _layer: Any, restored: Any, *_: Any, training: bool) -> None:
        if training:
            seen.restores_ahead.append(restored.weights.are_here)

    def change(*_: Any) -> None:
        seen.changes += 1

    with loaded() as module, started(module, mode, at_home=at_home) as (model, optimizer):
        sizes = module.LAYERS, module.EXPERTS, module.MICROBATCHES
        assert sizes == (LAYERS, EXPERTS, MICROBATCHES)
        forward = module.forward_step
        for step in range(STEPS):
            rollout = step // UPDATES
            if step % UPDATES == 0:
                batches = list(module.batches(rollout))
                recorded = functions.record(
                    model[0], lambda batch, chunk: forward(iter([batch]), chunk), batches
                )
                if announces == "twice":
                    for experts in (experts for layers in recorded for experts in layers):
                        experts[::3, 1] = experts[::3, 0]
            told = iter(recorded)

            def told_forward(data: Any, chunk: Any, told: Any = told) -> Any:
                functions.replay(next(told))
                return forward(data, chunk)

            if announces == "as recorded":
                functions.announce(recorded, EXPERTS)
            elif announces == "otherwise":
                functions.announce(
                    [[(experts + 1) % EXPERTS for experts in layers] for layers in recorded],
                    EXPERTS,
                )
            with (
                mock.patch.object(module, "forward_step", told_forward),
                watching(
                    (Guard, "decide", decide),
                    (MicrobatchPlanner, "_plan", plan),
                    (RestoredExperts, "change", change),
                ),
                megatron_laer.training_step(step, known, model),
            ):
                loss, _ = module.train_step(rollout, model, optimizer)
            seen.losses.append(loss)
        coordinator = current_coordinator()
        if coordinator is not None:
            for layer in coordinator.layers:
                outcomes = layer.statistics.take_outcomes()
                seen.max_over_mean += [of.decision.max_over_mean_after for of in outcomes]
                seen.reasons += [of.decision.reason for of in outcomes]
            scalars, _ = collect(coordinator, LAYERS, 0)
            seen.misses = scalars.get("fsep_announcement_misses")
        assert torch.isfinite(torch.tensor(seen.losses)).all()
    return seen


@pytest.fixture(scope="module")
def run(ranks: RankPools) -> Runs:
    """Return `run(mode, announces)`, which gives both ranks' observations and caches them."""
    return cache(partial(ranks(2).run, train_on_rollouts))


Runs = Callable[..., list[Seen]]


@pytest.mark.parametrize(
    ("announces", "at_home"),
    [("as recorded", False), ("nothing", False), ("as recorded", True)],
)
def test_announced_layouts_are_those_of_exact_with_nothing_left_for_after_the_gate(
    run: Runs, announces: str, at_home: bool
) -> None:
    # Without announcements before the step, the router replay announces each microbatch.
    stock, exact = run(None, "nothing")[0], run("exact", "nothing", at_home)[0]
    assert len(set(stock.losses)) == STEPS
    for announced in run("announced", announces, at_home):
        assert announced.losses == exact.losses, "the same layouts, so the same bits"
        assert announced.losses == pytest.approx(stock.losses, rel=1e-6)
        assert announced.solved_after_gate == announced.changes == announced.misses == 0
        assert announced.restores_ahead == [True] * PASSES
    first = run("announced", announces, at_home)[0]
    assert first.max_over_mean == exact.max_over_mean and len(first.max_over_mean) == PASSES
    assert all(reason.startswith("as announced: max/mean 1.0") for reason in first.reasons)
    assert exact.solved_after_gate == PASSES and exact.restores_ahead == [False] * PASSES
    assert exact.misses is None


def test_an_expert_that_is_named_twice_is_announced_once(run: Runs) -> None:
    exact = run("exact", "twice")[0]  # stock's dispatcher needs K experts of each token
    assert exact.losses != run("exact", "nothing")[0].losses
    for announced in run("announced", "twice"):
        assert announced.losses == exact.losses
        assert announced.solved_after_gate == announced.misses == 0


def test_routing_that_differs_from_the_announced_is_computed_rightly_and_counted(run: Runs) -> None:
    stock = run(None, "nothing")[0]
    for announced in run("announced", "otherwise"):
        assert announced.losses == pytest.approx(stock.losses, rel=1e-6)
        assert announced.misses == announced.solved_after_gate == PASSES
        assert announced.changes == 0
    first = run("announced", "otherwise")[0]
    assert max(first.max_over_mean) > 1.05
    assert all(reason.startswith("not as announced: max/mean 1.") for reason in first.reasons)


@dataclass(eq=False)
class RoutingReplay:
    """Replacement of slime's class of this name, of which each router has one."""

    all_routing_replays: ClassVar[list[RoutingReplay]] = []
    forward_index: int = 0
    top_indices_list: list[Any] = field(default_factory=list)

    def pop_forward(self) -> Any:
        self.forward_index += 1
        return self.top_indices_list[self.forward_index - 1]


def train_by_slimes_hooks(hooks: Path, replays_routing: bool) -> tuple[list[int], int | None, int]:
    """Train on two rollouts of two steps.

    Return announced microbatches by step, passes routed otherwise, and the layouts' version.
    """
    import megatron_laer

    announced: list[int] = []
    functions = page()

    def announce(counts_MLE: Any) -> None:
        announced.append(len(counts_MLE))

    slime = SimpleNamespace(RoutingReplay=RoutingReplay)
    with (
        loaded() as module,
        loaded(hooks) as hook,
        watching((megatron_laer, "announce_routing", announce)),
        mock.patch.object(RoutingReplay, "all_routing_replays", []),
        mock.patch.object(hook, "REPLAYS_ROUTING", replays_routing),
        started(module, None, hook.init) as (model, optimizer),
        # Within it, since modules that are imported under it are forgotten.
        mock.patch.dict(sys.modules, {"slime": slime, "slime.utils.routing_replay": slime}),
    ):
        a_rollout = {"rollout_batch_size": 2, "n_samples_per_prompt": 1}
        forward = module.forward_step
        for rollout in range(2):
            replays = [RoutingReplay() for _ in range(LAYERS)]
            RoutingReplay.all_routing_replays[:] = replays
            batches = [batch for step in range(2) for batch in module.batches(2 * rollout + step)]
            recorded = functions.record(
                model[0], lambda batch, chunk: forward(iter([batch]), chunk), batches
            )
            for layers in recorded:
                for replay, experts in zip(replays, layers, strict=True):
                    replay.top_indices_list.append(experts)

            def replayed_forward(data: Any, chunk: Any, replays: Any = replays) -> Any:
                functions.replay([replay.pop_forward().long() for replay in replays])
                return forward(data, chunk)

            for step in range(2):
                args = SimpleNamespace(num_experts=EXPERTS, global_batch_size=1, **a_rollout)
                hook.before_train_step(args, rollout, step, model, optimizer, None)
                with mock.patch.object(module, "forward_step", replayed_forward):
                    module.train_step(2 * rollout + step, model, optimizer)
        coordinator = running()
        return announced, coordinator.pass_layouts.misses, coordinator.layouts.version


@pytest.mark.parametrize(
    ("replays_routing", "expected"),
    [
        (True, ([2 * MICROBATCHES, MICROBATCHES] * 2, 0, 0)),
        # A plan between each two of four steps.
        (False, ([], None, 3)),
    ],
    ids=["replay", "no replay"],
)
def test_slimes_hooks_mark_steps_and_announce_its_replay(
    ranks: RankPools, tmp_path: Path, replays_routing: bool, expected: object
) -> None:
    hooks = tmp_path / "fsep_hooks.py"
    hooks.write_text(code_of("rl.md", "before_train_step"))
    found = ranks(2).run(train_by_slimes_hooks, hooks, replays_routing)
    assert found == [expected] * 2


def problems() -> list[str]:
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.router_replay import RouterReplay

    import megatron_laer

    said: list[str] = []
    right = torch.ones(MICROBATCHES, LAYERS, EXPERTS, dtype=torch.int32)
    with loaded() as module, started(module, "announced") as (model, optimizer):

        def step(num_microbatches: int | None, counts_MLE: Any = None) -> None:
            try:
                if counts_MLE is not None:
                    megatron_laer.announce_routing(counts_MLE)
                with megatron_laer.training_step(0, num_microbatches, model):
                    module.train_step(0, model, optimizer)
            except ValueError as error:
                said.append(str(error))

        step(MICROBATCHES, right[0])
        step(MICROBATCHES, right[:, :, 1:].tolist())
        step(MICROBATCHES, right.float())
        step(MICROBATCHES, -right)
        step(None, right[: 1 + dist.get_rank()])
        step(MICROBATCHES, right[:1])
        step(MICROBATCHES, right if dist.get_rank() == 0 else None)
        # Set the routers on one rank only.
        RouterReplay.clear_global_indices()
        if dist.get_rank() == 0:
            tokens = module.BATCH * module.LENGTH
            page().replay([torch.arange(tokens * 2).view(tokens, 2) % EXPERTS] * LAYERS)
        step(MICROBATCHES)
    megatron_laer.announce_routing("nothing looks at it without FSEP")
    megatron_laer.enable(megatron_laer.FSEPConfig(plan_mode="exact"))
    try:
        with pytest.raises(ValueError, match="no effect with --fsep-plan-mode exact"):
            megatron_laer.announce_routing([])
    finally:
        megatron_laer.disable()
    return said


def test_a_wrong_announcement_is_an_error_on_every_rank(ranks: RankPools) -> None:
    shape = f"must be integers [microbatches, {LAYERS}, {EXPERTS}]"
    expected = [
        ("int32 [2, 8]", shape),
        ("int64 [2, 2, 7]", shape),
        ("float32 [2, 2, 8]", shape),
        ("got -1 tokens", "must be at least 0"),
        ("as many microbatches must be announced on every rank", "ranks (0, 1) announced [1, 2]"),
        ("2 microbatches must be announced", "ranks (0, 1) announced [1, 1]"),
        ("2 microbatches must be announced", "ranks (0, 1) announced [2, 0]"),
        ("step 0, microbatch 0: no routing is announced on ranks [1]", "REPLAY_FORWARD"),
    ]
    for said in ranks(2).run(problems):
        assert len(said) == len(expected)
        for message, parts in zip(said, expected, strict=True):
            assert all(part in message for part in parts), message
