"""`inspect` reports a checkpoint's content in one process, and runs nothing that it contains."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from megatron_laer.runtime.planning.planner_checkpoint import state_path
from megatron_laer.tools import cli, inspection
from tests.fuzz import damaged
from tests.planner_states import make_state

EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
BIASES = "decoder.layers.mlp.experts.experts.linear_fc1.bias"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    tensors = {
        "embedding.word_embeddings.weight": torch.zeros(16, 4, dtype=torch.bfloat16),
        EXPERTS: torch.zeros(2, 6, 8, 4, dtype=torch.bfloat16),
        BIASES: torch.zeros(2, 6, 8, dtype=torch.bfloat16),
        f"optimizer.state.exp_avg.{EXPERTS}": torch.zeros(2, 6, 8, 4),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path


def write_state(run: Path, data: bytes) -> None:
    path = Path(state_path(str(run / "iter_0000007"), 3))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def test_a_run_and_its_checkpoint_are_described(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_state(run, make_state().to_bytes())
    assert cli.main(["inspect", str(run)]) == 0
    report = capsys.readouterr().out
    for expected in (
        "iter_0000007",
        "3 tensors, 544 elements, 1,088 bytes (bfloat16)",
        "vocabulary 16, hidden 4",
        f"{EXPERTS}: 2 layers, 6 experts of 8 x 4\n",
        f"{BIASES}: 2 layers, 6 experts of 8\n",
        "1 tensors, 1,536 bytes (exp_avg)",
        "planner, group 3: N = 4 ranks, C = 3 slots, E = 6 experts; goes on with step 8, layout "
        "version 5, plans not in force yet from steps 6, 7",
        "layer 2: replicas per expert",
        "mtp 1: replicas per expert",
    ):
        assert expected in report
    assert inspection.describe(run / "iter_0000007") == report.rstrip("\n")


def test_a_damaged_state_is_part_of_the_report(run: Path) -> None:
    assert "no state" in inspection.describe(run)
    write_state(run, make_state().to_bytes()[:-1])
    assert "planner, group 3: is damaged or cut off" in inspection.describe(run)


class Command:
    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> object:
        return self._call


def test_a_pickle_that_would_run_something_is_refused(run: Path) -> None:
    mark = run / "ran"
    metadata = run / "iter_0000007" / ".metadata"
    by_import = (
        b"ctorch.distributed.checkpoint.metadata\nos.mkdir\n(V" + os.fsencode(mark) + b"\ntR."
    )
    for data in (
        pickle.dumps(Command(os.mkdir, str(mark))),
        pickle.dumps(Command(eval, f"__import__('os').mkdir({str(mark)!r})")),
        pickle.dumps(Command(torch.save, 1, str(mark))),
        b"\x80\x04" + by_import,
    ):
        metadata.write_bytes(data)
        with pytest.raises(ValueError, match="it asks for"):
            inspection.describe(run)
    assert not mark.exists()


def rewrite(run: Path, before: bytes, after: bytes) -> None:
    """Change the list of tensors in one place, with equal length in its frame."""
    metadata = run / "iter_0000007" / ".metadata"
    data = metadata.read_bytes()
    assert data.count(before) > 0
    metadata.write_bytes(data.replace(before, after, 1))


def test_names_of_tensors_cannot_forge_lines_of_the_report(run: Path) -> None:
    name = b"embedding.word_embeddings.weight"
    forged = b"\x1b[31m\nFAKE LINE".ljust(len(name), b"!") + b".weight"
    rewrite(
        run, EXPERTS.encode(), (b"\x1b\nmlp.experts.experts.linear_fc" + b"x" * 99)[: len(EXPERTS)]
    )
    rewrite(run, name, forged[: len(name)])
    report = inspection.describe(run)
    assert "\x1b" not in report and "\nFAKE" not in report


def test_huge_sizes_are_told_exactly(run: Path) -> None:
    large = torch.distributed.checkpoint.metadata.TensorStorageMetadata(
        torch.distributed.checkpoint.metadata.TensorProperties(dtype=torch.float32),
        torch.Size([2**62, 2**62]),
        [],
    )
    write_list(run, {"x": large})
    report = inspection.describe(run)
    assert f"1 tensors, {2**124:,} elements, {2**126:,} bytes (float32)" in report


@pytest.mark.parametrize(
    "size", [(-5,), (2**63,), (True,), ("1",), 5, (1,) * 65, (((((((((1,),),),),),),),),)]
)
def test_sizes_that_no_tensor_has_are_refused_by_name(run: Path, size: object) -> None:
    class Size:
        def __reduce__(self) -> object:
            return torch.Size, (size,)

    wrong = torch.distributed.checkpoint.metadata.TensorStorageMetadata(
        torch.distributed.checkpoint.metadata.TensorProperties(dtype=torch.float32), Size(), []
    )
    write_list(run, {"x\n": wrong})
    with pytest.raises(
        ValueError, match=r"tensor 'x\\n' has the size .*expected integers in 0\.\."
    ):
        inspection.describe(run)


def write_list(run: Path, tensors: dict[str, object]) -> None:
    metadata = torch.distributed.checkpoint.metadata.Metadata(tensors)
    (run / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(metadata))


def test_classes_of_this_process_stay_as_they_are(run: Path) -> None:
    is_dir = Path.is_dir
    metadata = run / "iter_0000007" / ".metadata"
    metadata.write_bytes(b"\x80\x04cpathlib\nPath\n}X\x06\0\0\0is_dircbuiltins\ndict\nsb.")
    with pytest.raises(ValueError, match="it is damaged"):
        inspection.describe(run)
    assert Path.is_dir is is_dir


def test_a_planners_state_with_an_endless_tail_is_not_read(run: Path) -> None:
    write_state(run, make_state().to_bytes())
    path = Path(state_path(str(run / "iter_0000007"), 3))
    os.truncate(path, 2**40)
    assert "planner, group 3: has 1099511627776 bytes, its header says " in inspection.describe(run)
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe; give a regular file" in inspection.describe(run)


CASES = 300


@pytest.mark.counts(fuzz_cases=CASES)
def test_only_value_errors_come_out_of_a_damaged_list_of_tensors(run: Path) -> None:
    metadata = run / "iter_0000007" / ".metadata"
    data = metadata.read_bytes()
    luck = random.Random(2)
    refused = 0
    for _ in range(CASES):
        metadata.write_bytes(damaged(data, luck))
        try:
            inspection.describe(run)
        except ValueError:
            refused += 1
    assert refused > CASES // 2
