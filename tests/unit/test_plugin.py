"""The plugin's changes of Megatron can be undone. Each test runs in a process of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import megatron_laer
from megatron_laer import device, session
from megatron_laer import megatron_version as versions
from megatron_laer.environment import UNRELEASED_MEGATRON
from megatron_laer.plugin import sharded_models
from megatron_laer.releases import NEXT, NUMBERS, TESTED_RANGE, release_after
from megatron_laer.support.torch_version import problem_on_cuda
from tests.processes import finished, python

UNSUPPORTED = ("0.16.1", "0.17.1", f"{release_after(NEXT.number)}.0")

PREPARE = "from megatron_laer.launch import prepare; prepare()\n"

# Expressions of attributes that a patch may replace, read through Megatron's own modules.
SNAPSHOT = """
import importlib
from megatron_laer.plugin import ARGUMENT_PATCHES, FSEP_PATCHES

def snapshot(patches):
    found = {}
    for patch in patches:
        owner, name = patch.owner_and_name()
        found[patch.path] = vars(owner)[name]
    return found
"""


@pytest.mark.releases
def test_enabling_is_idempotent_undoable_and_refuses_what_it_does_not_know() -> None:
    out = python(
        "-c",
        PREPARE
        + SNAPSHOT
        + f"UNSUPPORTED = {UNSUPPORTED}\n"
        + """
import megatron.core.package_info as info
from megatron.training import training

import logging
import megatron_laer
from megatron.core.models.hybrid import hybrid_layer_specs as hybrid
from megatron_laer import plugin
from megatron_laer.plugin.install_tracker import install_metrics

def refusal():
    try:
        plugin.enable()
    except ImportError as error:
        assert all(snapshot(FSEP_PATCHES)[path] is before[path] for path in before)
        print("refused:", error)

# Logging is left to Megatron, whatever its optimizers import.
handlers = [type(handler).__name__ for handler in logging.root.handlers]
assert (logging.root.level, handlers) == (20, ["CustomHandler"])

before = snapshot(FSEP_PATCHES)
megatron_laer.enable(megatron_laer.FSEPConfig(capacity=4))
once = snapshot(FSEP_PATCHES)
megatron_laer.enable(megatron_laer.FSEPConfig(capacity=5))
assert all(snapshot(FSEP_PATCHES)[path] is once[path] for path in once)
assert all(once[path] is not before[path] for path in before)
megatron_laer.disable()
megatron_laer.disable()
assert all(snapshot(FSEP_PATCHES)[path] is before[path] for path in before)

# Hybrid models' spec was built before.
for turn, layer in ((plugin.enable, "FSEPMoELayer"), (plugin.disable, "MoELayer")) * 2:
    turn()
    assert hybrid.hybrid_stack_spec.submodules.moe_layer.submodules.mlp.func.__name__ == layer

found = info.__version__
for info.__version__ in UNSUPPORTED:
    refusal()
info.__version__ = found

original = training.train_step
del training.train_step
before.pop("train_step")
FSEP_PATCHES, every = [p for p in FSEP_PATCHES if p.path != "train_step"], FSEP_PATCHES
refusal()
training.train_step = original
FSEP_PATCHES = every

plugin.uninstall()
assert plugin.patch_table() == ""
plugin.install(); plugin.install()
assert all(snapshot(FSEP_PATCHES)[path] is before[path] for path in before)
print("installed", plugin.patch_table(), "enabled", sep="\\n")
plugin.enable()
install_metrics(1, 2, 0)
print(plugin.patch_table())
plugin.uninstall()
assert plugin.patch_table() == ""
""",
    )
    refusals = [line for line in out.splitlines() if line.startswith("refused:")]
    assert len(refusals) == 4
    for version, refusal in zip(UNSUPPORTED, refusals, strict=False):
        assert f"found {version}" in refusal and TESTED_RANGE in refusal
    assert "needs megatron.training.training.train_step" in refusals[3]
    assert TESTED_RANGE in refusals[3]
    installed, _, enabled = out.partition("installed\n")[2].partition("enabled\n")
    for change in ("hybrid_stack_spec", 'gets "ep" with NCCL', "moe_logging, its tracker"):
        assert change in enabled
    rows = [line.split(":")[0].strip() for line in installed.splitlines()]
    assert [row for row in rows if not row.startswith("also ")] == [
        "megatron.training.arguments.add_megatron_arguments",
        "megatron.training.arguments.validate_args",
    ]
    assert "also args.num_experts" in rows


# Found version, requested release, and words of the refusal (None without one).
UNRELEASED = [
    (f"{NEXT.number}.0", None, f"{UNRELEASED_MEGATRON}={NEXT.number} in the environment tries it"),
    (f"{NEXT.number}.0", NEXT.number, None),
    (f"{NEXT.number}.0rc0", NEXT.number, None),
    (NEXT.tested[-1], NEXT.number, None),
    (f"{NEXT.number}.0", "1", f"{UNRELEASED_MEGATRON}=1: must be {NEXT.number}"),
    (f"{NUMBERS[-1]}.0", NEXT.number, None),
    (f"{NUMBERS[-1]}.0", None, None),
    (f"{release_after(NEXT.number)}.0", NEXT.number, f"supports megatron-core {TESTED_RANGE}"),
]


@pytest.mark.parametrize(("found", "asked", "quoted"), UNRELEASED)
def test_a_megatron_that_is_not_released_has_to_be_asked_for(
    found: str,
    asked: str | None,
    quoted: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(versions, "megatron_version", lambda: found)
    monkeypatch.delenv(UNRELEASED_MEGATRON, raising=False)
    if asked is not None:
        monkeypatch.setenv(UNRELEASED_MEGATRON, asked)
    if quoted is None:
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            assert not caplog.messages
            versions.check_version()
        needless = asked is not None and not found.startswith(NEXT.number)
        assert ["has no effect with megatron-core" in said for said in caplog.messages] == (
            [True] * needless
        )
        return
    with pytest.raises((ImportError, ValueError), match=re.escape(quoted)):
        versions.check_version()


def test_an_installed_megatron_has_no_commit_and_a_checkout_has_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "megatron" / "core" / "package_info.py"
    info = SimpleNamespace(__version__="0.19.2+c8be1a3", __file__=str(file))
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(package_info=info))
    distribution = SimpleNamespace(locate_file=tmp_path.joinpath)
    monkeypatch.setattr(versions.importlib.metadata, "distribution", lambda _: distribution)
    assert versions.megatron_version() == "0.19.2+c8be1a3"
    file.parent.mkdir(parents=True)
    file.touch()
    assert versions.megatron_version() == "0.19.2"


def test_fsep_is_not_turned_on_with_an_old_torch_on_a_gpu() -> None:
    for taken in ("2.8.0", "2.10.0+cu130", "2.15.0a0+git1", "3.0", "nightly"):
        assert problem_on_cuda(taken) is None
    says = "install torch>=2.8, or train on the CPU with MEGATRON_LAER_DEVICE=cpu"
    for old in ("2.7.1", "2.6.0+cu124", "1.13"):
        problem = problem_on_cuda(old)
        assert problem is not None and problem.startswith(f"torch {old} on a GPU: ")
        assert says in problem
    with (
        mock.patch.object(torch, "__version__", "2.7.1"),
        mock.patch.object(device, "cpu_installed", return_value=False),
        pytest.raises(ValueError, match=r"FSEP cannot run with torch 2\.7\.1 on a GPU"),
    ):
        megatron_laer.enable()
    assert session.current() is None


def test_units_of_megatron_fsdp_release_all_weights_but_those_of_experts() -> None:
    released = []
    release = sharded_models._keep_gathered.replace(lambda _, bucket: released.append(bucket))
    groups = [SimpleNamespace(params=[SimpleNamespace(allreduce=dense)]) for dense in (False, True)]
    for bucket in (0, 1):
        release(SimpleNamespace(buffer=SimpleNamespace(parameter_groups=groups)), bucket)
    assert released == [1]


@pytest.mark.parametrize(
    ("name", "sharding", "shared", "said"),
    [
        ("soap", "auto", False, "--optimizer soap: the optimizer needs whole"),
        ("muon", "rows", False, "^--optimizer muon with --fsep-sharding rows: .*give --fsep-shar"),
        ("lion", "rows", False, "^--optimizer lion with --fsep-sharding rows: .*give --fsep-shar"),
        ("muon", "experts", True, "^--optimizer muon with --use-distributed-optimizer without --b"),
    ],
)
def test_a_loop_of_ones_own_is_refused_what_its_optimizer_cannot_do(
    name: str, sharding: str, shared: bool, said: str
) -> None:
    from megatron.core import optimizer

    settings = SimpleNamespace(
        optimizer=name, use_layer_wise_distributed_optimizer=shared, bf16=False
    )
    megatron_laer.enable(megatron_laer.FSEPConfig(sharding=sharding))  # type: ignore[arg-type]
    try:
        with pytest.raises(ValueError, match=said):
            optimizer._create_emerging_optimizer(settings, [], name, [], None)
    finally:
        megatron_laer.disable()


def test_flags_for_gpus_on_a_machine_without_one_get_one_sentence_that_names_the_way_out() -> None:
    root = Path(__file__).resolve().parents[2]
    flags = python("-m", "megatron_laer", "flags", "tiny-moe").split()  # of README's command
    result = finished(
        *(root / "pretrain_gpt.py", *flags, "--mock-data"),
        *"--micro-batch-size 1 --global-batch-size 8 --train-iters 1 --lr 1e-3".split(),
        *"--expert-parallel-mode fsep --expert-model-parallel-size 8".split(),
        MEGATRON_LAER_DEVICE="cpu",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="8",
    )
    said = result.stderr.splitlines()
    (problem,) = [line for line in said if line.startswith("pretrain_gpt.py: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "no GPU" in problem and "`python -m megatron_laer flags tiny-moe --cpu`" in problem
