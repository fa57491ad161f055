"""Settings that decide the order and overlap of exchanges on CUDA, tested with mocks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_laer import session
from megatron_laer.config import FSEPConfig
from megatron_laer.runtime.comm import streams
from megatron_laer.runtime.comm.copies import Download
from megatron_laer.runtime.microbatch_planner import MicrobatchPlanner
from megatron_laer.support import arguments, triton_needs
from megatron_laer.telemetry.activities import Activity, Kind

CARD = torch.device("cuda", 0)
RESTORE, REDUCE = Activity(Kind.RESTORE), Activity(Kind.REDUCE)


@pytest.mark.parametrize(
    ("config", "connections", "on_cuda", "warned"),
    [
        (FSEPConfig(), "1", True, 1),
        (FSEPConfig(), "32", True, 0),
        (FSEPConfig(), None, True, 0),
        (FSEPConfig(), "1", False, 0),
        (FSEPConfig(scheduler="off"), "1", True, 0),
    ],
)
def test_one_connection_is_warned_of_where_it_hides_nothing(
    config: FSEPConfig,
    connections: str | None,
    on_cuda: bool,
    warned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_needs, "is_installed", lambda: True)
    monkeypatch.setattr(triton_needs, "problem", lambda _: None)
    environment = {} if connections is None else {"CUDA_DEVICE_MAX_CONNECTIONS": connections}
    warnings = arguments.warnings(config, environment, on_cuda=on_cuda)
    assert len(warnings) == warned
    assert all("CUDA_DEVICE_MAX_CONNECTIONS=1" in warning for warning in warnings)


def test_kernels_that_cannot_be_compiled_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_needs, "is_installed", lambda: True)
    (warning,) = arguments.warnings(FSEPConfig(), {"CC": "no-such-compiler"}, on_cuda=True)
    assert "finds no C compiler (no-such-compiler)" in warning
    monkeypatch.setattr(triton_needs, "is_installed", lambda: False)
    (warning,) = arguments.warnings(FSEPConfig(), {}, on_cuda=True)
    assert "Triton is not installed" in warning


@pytest.mark.parametrize("exchanged", ["parameters", "counts"])
def test_exchanges_go_before_compute_and_after_tokens(exchanged: str) -> None:
    card = torch.device("cuda", 0)
    with (
        mock.patch.object(torch.cuda, "Stream") as stream,
        mock.patch.object(streams, "StreamTimes"),
    ):
        if exchanged == "counts":
            Download(card)
        else:
            streams.make_comm_stream(exchanged, card, overlaps=True)
    (call,) = stream.call_args_list
    transformer_engines, of_tokens_at_most = -1, -3
    assert of_tokens_at_most < call.kwargs["priority"] < transformer_engines


def test_a_graph_that_is_captured_is_told_that_it_cannot_record_a_plan() -> None:
    planner: Any = mock.Mock()
    capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
    with capturing, pytest.raises(AssertionError, match="a CUDA graph is being captured where"):
        MicrobatchPlanner.start_pass(
            planner, mock.Mock(), torch.zeros(2, 4), torch.zeros(4), training=True
        )
    assert planner.mock_calls == []


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_tokens_go_first_and_groups_are_made_as_megatrons_are(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import parallel_state

    from megatron_laer.plugin import layers
    from megatron_laer.session import Session

    first: dict[str, Any] = {}
    group = mock.Mock()

    def initialize(
        tensor: int = 1,
        distributed_timeout_minutes: int = 30,
        nccl_communicator_config_path: str | None = None,
        high_priority_stream_groups: list[str] | None = None,
    ) -> None:
        first.update(tensor=tensor, high=high_priority_stream_groups)

    def create(
        expert_group: Any, node_size: int | None, create_group: Any, *, tokens_through_nodes: bool
    ) -> None:
        assert tokens_through_nodes
        for kind in ("PARAMETERS", "GRADIENTS", "GRADIENTS_INTER_NODE", "TOKENS_INTER_NODE"):
            create_group([0, 1], group_desc=f"FSEP_{kind}")

    settings = tmp_path / "nccl.yaml"
    settings.write_text("fsep_gradients: {max_ctas: 5}\n")
    config = FSEPConfig(token_exchange="node", cluster="h100-8", node_size=8)
    monkeypatch.setattr(session, "_session", Session(config))
    with (
        mock.patch.object(dist, "get_backend", return_value=backend),
        mock.patch.object(session, "create_groups", create),
        mock.patch.object(parallel_state, "get_expert_model_parallel_group"),
        mock.patch.object(parallel_state, "get_nccl_options", lambda name, of: of.get(name)),
        mock.patch.object(parallel_state, "create_group", group),
    ):
        layers._create_groups.replace(initialize)(
            2,
            distributed_timeout_minutes=60,
            high_priority_stream_groups=["dp_cp"],
            nccl_communicator_config_path=str(settings),
        )
    made = [call.kwargs for call in group.call_args_list]
    on_nccl = backend == "nccl"
    assert first == {"tensor": 2, "high": ["dp_cp", "ep"] if on_nccl else ["dp_cp"]}
    assert [call["timeout"] for call in made] == [timedelta(minutes=60)] * 4
    wanted: list[Any] = [{"max_ctas": 16}, {"max_ctas": 5}, {"max_ctas": 5}]
    wanted.append({"is_high_priority_stream": True})
    assert [call["pg_options"] for call in made] == (wanted if on_nccl else [None] * 4)


def test_the_result_of_a_thread_is_waited_for_and_its_error_raised_there() -> None:
    stream = streams.make_comm_stream("parameters", torch.device("cpu"), overlaps=True)
    may_work = threading.Event()

    def work() -> torch.Tensor:
        may_work.wait()
        return torch.ones(3)

    late = stream.submit(work, Activity(Kind.RESTORE))
    wrong = stream.submit(lambda: torch.ones(1, 2).view(3), Activity(Kind.RESTORE))
    # Fires during `wait` below; without waiting, it would return None at once.
    threading.Timer(0.2, may_work.set).start()
    assert torch.equal(late.wait(), torch.ones(3))
    with pytest.raises(RuntimeError, match="shape"):
        wrong.wait()
    stream.close()


@pytest.mark.parametrize("is_over", [True, False])
def test_compute_is_timed_only_while_it_waits(is_over: bool) -> None:
    on_thread = streams.make_comm_stream("parameters", torch.device("cpu"), overlaps=True)
    late = on_thread.submit(lambda: torch.ones(3), RESTORE)
    late.wait()
    if not is_over:  # as while the thread works, of which only the end is seen
        late._is_there = mock.Mock(is_set=lambda: False)  # type: ignore[attr-defined]
    result, done = mock.Mock(), mock.Mock(query=lambda: is_over)
    with (
        mock.patch.object(torch.cuda, "current_stream"),
        mock.patch.object(on_thread.times, "waited") as waited,
    ):
        for pending in (late, streams._StreamResult(result, done, on_thread.times, RESTORE)):
            waited.reset_mock()
            pending.wait()
            assert [call.args[1] for call in waited.mock_calls] == [RESTORE] * (not is_over)
    on_thread.close()


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Record the work of a fake card's streams, and how one waits for another."""
    seen: list[str] = []
    stream = mock.Mock(device=CARD, wait_stream=lambda of: seen.append(f"wait for {of}"))
    with (
        mock.patch.object(torch.cuda, "Stream", return_value=stream),
        mock.patch.object(torch.cuda, "current_stream", return_value="compute"),
        mock.patch.object(torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        mock.patch.object(streams, "StreamTimes"),
    ):
        yield seen


@pytest.mark.parametrize("connections", ["1", "32"])
def test_work_begins_behind_compute_and_the_exchange_before(
    connections: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one queue the rest of an exchange is put off, and other work still comes behind it."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)

    def steps(name: str, seen: list[str]) -> streams.Steps:
        for number in range(2):
            seen.append(f"{name} {number}")
            yield number == 0
        seen.append(f"{name} copied")
        return mock.Mock()

    with launches() as seen:
        stream = streams.make_comm_stream("parameters", CARD, overlaps=True)

        def work() -> torch.Tensor:
            seen.append("work")
            return mock.Mock()

        stream.submit_exchange(steps("first", seen), RESTORE)
        is_put_off = seen == ["wait for compute", "first 0"]
        assert is_put_off == (connections == "1")
        stream.submit_exchange(steps("second", seen), REDUCE)
        stream.submit(work, RESTORE)
    each = [[f"{name} 0", f"{name} 1", f"{name} copied"] for name in ("first", "second")]
    launched = [label for label in seen if not label.startswith("wait")]
    assert launched == [*each[0], *each[1], "work"]
    assert seen.count("wait for compute") == 3
    assert seen[seen.index("work") - 1] == "wait for compute"
