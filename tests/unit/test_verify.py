"""Differences are described, and a `Verifier` checks what its setting says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_laer.choices import Verification
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.layout import EMPTY, ExpertLayout
from megatron_laer.runtime import verifier
from megatron_laer.runtime.comm.layout_index import layout_index
from megatron_laer.runtime.verifier import Verifier
from megatron_laer.runtime.weights.restored import RestoredExperts
from megatron_laer.runtime.weights.slots import ExchangeStreams
from megatron_laer.verify.checked import Checked, VerificationError
from megatron_laer.verify.gradients import Roundings
from megatron_laer.verify.gradients import differences as differences_of_gradients
from megatron_laer.verify.sums import bit_sums, signed_sums
from megatron_laer.verify.weights import differences
from tests.placed import placed
from tests.unit.test_restored_experts import CPU, compute, ones, restored_experts
from tests.unit.test_restored_experts import streams as streams


class Reduce:
    """Two replicas of expert 0 and one of expert 2, which two ranks' homes add up."""

    def __init__(self, sums: torch.dtype = torch.float32) -> None:
        layout = ExpertLayout.from_slots(2, 4, 4, [0, 1, 0, 2, 2, 3, 0, EMPTY])
        of = placed(layout, at_home=True)
        self.checked = Checked("layer 1", "reduce", 0, "direct", of, [(30, 40)], (8, 9))
        self.roundings = Roundings(torch.bfloat16, sums, 1)
        draws = torch.Generator().manual_seed(3)
        self.slots_NCRK = torch.randn(2, 2, 30, 40, generator=draws)
        self.slots_NCRK[1, 1] = torch.nan  # which no layout fills
        self.before_ERK = torch.randn(4, 30, 40, generator=draws).to(sums)

    def found(self, grown_ERK: torch.Tensor) -> list[tuple[int, str]]:
        """Return what is wrong if experts grow by this."""
        slots = signed_sums(self.slots_NCRK.flatten(0, 1)).reshape(2, 2, 1, -1)
        after_ERK = (self.before_ERK + grown_ERK).to(self.roundings.sums)
        owned = [signed_sums(of) for of in (self.before_ERK, after_ERK)]
        sums_EM = torch.stack(owned, dim=1).unsqueeze(1)
        given = self.checked, self.roundings, slots.numpy(), sums_EM.numpy()
        return [*differences_of_gradients(*given)]

    @property
    def right_ERK(self) -> torch.Tensor:
        grown_ERK = torch.zeros(4, 30, 40)
        grown_ERK[0] = self.slots_NCRK[0, 0] + self.slots_NCRK[1, 0]
        grown_ERK[2] = self.slots_NCRK[0, 1]
        return grown_ERK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_explanation_says_which_replica_the_sums_lack_or_have_twice(dtype: torch.dtype) -> None:
    reduce = Reduce(dtype)
    right, slots = reduce.right_ERK, reduce.slots_NCRK
    assert reduce.found(right) == []
    for rank in range(2):
        for sign, text in ((-1, "is missing"), (1, "counts twice")):
            wrong = right.clone()
            wrong[0] += sign * slots[rank, 0]
            ((owner, found),) = reduce.found(wrong)
            assert owner == 0 and found == (
                "the gradients of matrix 1 of 1 (30 x 40) of expert 0 that its home, rank 8 added "
                f"up are not those that its slots sent: slot 0 of rank {8 + rank} {text}"
            )
    late = right.clone()
    late[0] = 0
    assert reduce.found(late)[0][1].endswith("sent: all are missing")
    late[2] = 0
    assert reduce.found(late)[1][1].endswith("sent: slot 1 of rank 8 is missing")
    swapped = right.clone()
    swapped[2] = right[2].flip(0)
    ((owner, found),) = reduce.found(swapped)
    assert owner == 1 and re.search(r"they differ by \d.*, and roundings by up to [\d.e-]+$", found)


def test_numbers_that_are_not_finite_are_compared_with_nothing() -> None:
    for number in (torch.inf, torch.nan):
        reduce = Reduce()
        reduce.slots_NCRK[0, 0, 3, 4] = number
        wrong = reduce.right_ERK
        wrong[2] = 0
        assert [owner for owner, _ in reduce.found(wrong)] == [1]
        reduce.slots_NCRK[0, 1, 5, 6] = number
        assert reduce.found(wrong) == []


def test_slots_that_a_layout_leaves_free_are_not_compared() -> None:
    layout = ExpertLayout.from_slots(2, 3, 4, [0, 1, 2, 2, 3, EMPTY])
    of = placed(layout, at_home=True)
    read = Checked("layer 1", "forward", 0, "direct", of, [(3, 4), (5, 6)], (8, 9))
    owned_EM = np.arange(8).reshape(4, 2)
    slots_NCM = np.full((2, 1, 2), 7)
    slots_NCM[0, 0] = owned_EM[2]
    assert [*differences(read, slots_NCM, owned_EM)] == []
    slots_NCM[0, 0, 1] += 1
    text = (
        "slot 0 of rank 8 has other bits of matrix 2 of 2 (5 x 6) of expert 2 than its home, rank 9"
    )
    assert [*differences(read, slots_NCM, owned_EM)] == [(0, text)]


LAYERS = ("layer 1", "layer 2", "layer 3")


class Reads:
    """Reads of a rank without peers, by the `Verifier` that it holds."""

    def __init__(self, setting: str) -> None:
        self.way = "direct"
        choose = lambda _: SimpleNamespace(name=self.way)  # noqa: E731
        streams: Any = SimpleNamespace(observers=[], exchange=SimpleNamespace(choose=choose))
        groups: Any = SimpleNamespace(size=1, rank=0, index=0, ranks=(0,))
        self.observers = streams.observers
        self.verifier = Verifier(
            Verification.of(setting), groups, streams, torch.device("cpu"), dispatch="rank"
        )
        self.placed = placed(ExpertLayout.from_slots(1, 2, 2, [0, 1]))
        self.matrices = [torch.randn(2, 3, 4).to(torch.bfloat16)]
        self.owned = self.matrices[0].clone()
        self.share: Any = SimpleNamespace(
            form=SimpleNamespace(parts=("bf16",)),
            sizes=[(3, 4)],
            summed=lambda *_: bit_sums(self.owned).unsqueeze(1),
        )

    def read(self, layer: str) -> None:
        weights: Any = SimpleNamespace(
            name=layer, share=self.share, index=SimpleNamespace(placed=self.placed)
        )
        for observer in self.observers:
            observer.reads(weights, self.matrices, "forward")

    def step(self, step: int) -> int:
        """Return the reads that were compared of one of each layer."""
        before = self.verifier.checks
        self.verifier.begin_step(step, LAYERS)
        for layer in LAYERS:
            self.read(layer)
        self.verifier.end_step()
        return self.verifier.checks - before


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Gather from no other rank."""
    gathers = mock.patch.object(verifier, "gather_integers", lambda own, *_: own.numpy()[None])
    own = mock.patch.object(verifier, "add_up", lambda parts, _: [part.numpy() for part in parts])
    with gathers, own:
        yield


@pytest.mark.parametrize(
    ("setting", "compared"),
    [
        ("off", [0] * 8),
        ("all", [3] * 8),
        ("first", [3, 3, 0, 0, 0, 0, 0, 0]),
        # The first two steps whole, then a layer of each step 6, 9, 12.
        ("first,3", [3, 3, 1, 0, 0, 1, 0, 0]),
        ("1,first", [3, 3, 1, 1, 1, 1, 1, 1]),
        ("3", [0, 0, 1, 0, 0, 1, 0, 0]),
    ],
)
def test_a_setting_says_which_reads_are_compared(setting: str, compared: list[int]) -> None:
    reads = Reads(setting)
    reads.verifier.start()
    assert [reads.step(step) for step in range(4, 12)] == compared
    reads.verifier.close()
    assert reads.observers == []


def test_the_default_checks_the_first_steps_and_then_a_layer_in_turn() -> None:
    default = FSEPConfig().verification
    assert default == Verification(first=True, interval=100)
    assert FSEPConfig(verify="warn").verification == replace(default, warns=True)
    assert FSEPConfig(verify="all,warn").verification == Verification(all=True, warns=True)
    assert not FSEPConfig(verify="off").verification.is_on


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'': must be one of off, first, all, warn"),
        ("first,", "'': must be one of off, first, all, warn"),
        ("second", "'second': must be one of off, first, all, warn"),
        ("-1", "'-1': must be one of off, first, all, warn"),
        ("0", "0: must be 1 to 16777216 steps"),
        ("16777217", "16777217: must be 1 to 16777216 steps"),
        ("3,5", "'3,5': a part comes twice; leave it out once"),
        ("first,first", "'first,first': a part comes twice; leave it out once"),
        ("off,5", "'off,5': off has no other parts; leave them out"),
        ("all,3", "'all,3': all has the other checks; leave them out"),
        ("first,all", "'first,all': all has the other checks; leave them out"),
    ],
)
def test_other_parts_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as refused:
        FSEPConfig(verify=text)
    given = shlex.quote(text)
    assert str(refused.value) == f"--fsep-set verify={given}: {problem}; an example is first,100"


def test_each_layer_has_its_turn_also_if_their_number_divides_the_steps() -> None:
    reads, seen = Reads("first,9"), list[str]()
    reads.verifier.start()
    reads.step(0), reads.step(1)
    for step in range(2, 55):
        reads.verifier.begin_step(step, LAYERS)
        seen += reads.verifier._layers
        reads.verifier.end_step()
    assert seen == ["layer 2", "layer 3", "layer 1"] * 2
    reads.verifier.close()


def test_a_new_kind_of_exchange_is_compared_at_its_first_use_and_evaluations_are_not() -> None:
    reads = Reads("first,1000")
    reads.verifier.start()
    reads.step(1), reads.step(2)
    reads.read("layer 1")  # between steps
    assert reads.step(3) == 0
    reads.way = "relay"
    assert [reads.step(4), reads.step(5)] == [1, 0]
    reads.verifier.close()


def test_owners_are_summed_up_when_they_are_read_and_compared_before_the_optimizers_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reads = Reads("all")
    reads.verifier.start()
    reads.verifier.begin_step(0, LAYERS)
    reads.read("layer 1")
    reads.owned.view(torch.uint8).zero_()  # another optimizer's step, within the step
    reads.verifier.end_step()
    assert reads.verifier.checks == 1

    reads.verifier.begin_step(1, LAYERS)
    reads.read("layer 2")
    with pytest.raises(VerificationError, match=r"step 1: layer 2, .*before the optimizer's step"):
        reads.verifier.before_optimizer(can_skip=False)
    assert (tmp_path / "fsep-verify-0.npz").is_file()
    reads.verifier.close()


def test_a_finding_that_warns_is_skipped_once_and_stops_where_it_cannot_or_comes_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reads = Reads("all,warn")
    reads.verifier.start()

    def found(layer: str, *, can_skip: bool = True) -> bool:
        reads.verifier.begin_step(0, LAYERS)
        reads.owned.zero_()
        reads.read(layer)
        return reads.verifier.before_optimizer(can_skip=can_skip)

    assert not reads.verifier.has_found("layer 1")
    assert found("layer 1") and reads.verifier.has_found("layer 1")
    assert not reads.verifier.has_found("layer 2")
    with pytest.raises(VerificationError, match="Every rank stops"):
        found("layer 2", can_skip=False)
    assert found("layer 2")
    with pytest.raises(VerificationError, match=r"layer 1, .*Every rank stops"):
        found("layer 1")
    reads.verifier.close()


def test_a_dump_replaces_no_file_and_one_that_cannot_be_written_does_not_replace_the_finding(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    (tmp_path / "fsep-verify-0.npz").symlink_to(other)
    monkeypatch.chdir(tmp_path)
    reads = Reads("all")
    reads.verifier.start()

    def found() -> str:
        reads.verifier.begin_step(0, LAYERS)
        reads.read("layer 1")
        with pytest.raises(VerificationError) as error:
            reads.verifier.before_optimizer(can_skip=False)
        return str(error.value)

    reads.verifier.begin_step(0, LAYERS)
    reads.read("layer 1")
    reads.verifier.end_step()
    reads.owned.view(torch.uint8).zero_()
    assert "cannot be written" not in found()
    assert other.read_text() == "other" and (tmp_path / "fsep-verify-0.2.npz").is_file()
    full = mock.patch.object(verifier, "write_file", side_effect=OSError(28, "no space left"))
    with full:
        text = found()
    assert "has other bits" in text and "fsep-verify-0.3.npz cannot be written: no space" in text
    reads.verifier.close()


class FirstReads:
    """Observer that notes the directions in which restored weights are read first."""

    def __init__(self) -> None:
        self.directions: list[str] = []

    def reads(self, _weights: object, _matrices: object, direction: str) -> None:
        self.directions.append(direction)

    def sends(self, *_: object) -> Callable[[], None]:
        return lambda: None


@pytest.mark.parametrize("slots", [[0, 1], [1, 0]], ids=["one layout", "two layouts"])
def test_observers_see_the_first_read_of_weights_that_are_handed_on(
    streams: ExchangeStreams, slots: list[int]
) -> None:
    streams.observers.append(reads := FirstReads())
    first = restored_experts(streams)
    index = layout_index(placed(ExpertLayout.from_slots(1, 2, 2, slots)), CPU)
    second = RestoredExperts("layer 1", first.share, index, streams)
    first.weights.hand_on(second.weights)
    second.follow = first.first_in_backward
    middle = compute(first, ones(needs_grad=True), ones(needs_grad=True))
    output = compute(second, middle, ones(needs_grad=True))
    assert reads.directions == ["forward"] * 2
    output.sum().backward()
    assert reads.directions == ["forward"] * 2 + ["backward"] * 2


@pytest.mark.parametrize("kept_bytes", [0, 2**20], ids=["restored twice", "kept until backward"])
def test_observers_see_each_first_read_of_weights_that_are_new_kept_or_changed(
    streams: ExchangeStreams, kept_bytes: int
) -> None:
    streams = replace(streams, most_kept_bytes=kept_bytes)
    streams.observers.append(reads := FirstReads())
    restored = restored_experts(streams)
    output = compute(restored, ones(needs_grad=True), ones(needs_grad=True))
    assert restored.weights.are_here == bool(kept_bytes)
    output.sum().backward()
    assert reads.directions == ["forward", "backward"]
    weights = restored.weights
    weights.start_restore()
    weights.matrix(0), weights.matrix(1)
    weights.change(layout_index(placed(ExpertLayout.from_slots(1, 2, 2, [1, 0])), CPU))
    weights.matrix(1), weights.matrix(0)
    weights.free()
    assert reads.directions == ["forward", "backward", "forward", "forward"]
