"""The table of Megatron's releases is sound and true, and differences by release are followed.

The release that is not installed is replaced here.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from argparse import Namespace
from dataclasses import astuple
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet

from megatron_laer import releases
from megatron_laer.plugin import checkpoints, pretraining
from megatron_laer.releases import (
    DIFFERENCES,
    NEXT,
    NUMBERS,
    RELEASES,
    SUPPORTED,
    TESTED,
    Difference,
    release_after,
)
from tests.compatibility import recorded
from tests.processes import python
from tests.releases import installed_release


def test_releases_and_their_tested_versions_are_in_order() -> None:
    after = [release_after(number) for number in NUMBERS]
    assert after == [*NUMBERS[1:], NEXT.number]
    tried = rf"{NEXT.number}\.\d+\+[0-9a-f]{{7,}}"
    assert NEXT.tested and all(re.fullmatch(tried, version) for version in NEXT.tested)
    supported = SpecifierSet(SUPPORTED, prereleases=True)
    assert [version for version in TESTED if version not in supported] == []
    assert NUMBERS[0] in supported and f"{NUMBERS[-1]}.99" in supported
    after = release_after(NUMBERS[-1])
    outside = [f"{NUMBERS[0]}rc0", after, f"{after}.0rc0", f"{after}.dev0"]
    assert [version for version in outside if version in supported] == []

    for release in RELEASES:
        patches = [int(version.removeprefix(f"{release.number}.")) for version in release.tested]
        assert patches and patches == sorted(set(patches))


def test_a_difference_parts_the_supported_releases_or_its_fallback_has_to_go() -> None:
    assert {d.since for d in DIFFERENCES} <= {*NUMBERS, NEXT.number}
    assert [d.name for d in DIFFERENCES if not d.lacked_by()] == []
    declared = {id(value) for value in vars(releases).values() if isinstance(value, Difference)}
    assert {id(difference) for difference in DIFFERENCES} == declared
    assert all(all(astuple(difference)) for difference in DIFFERENCES)


LOOKING = """
import json, pkgutil
from megatron_laer.launch import prepare
prepare()
from megatron_laer.releases import DIFFERENCES

def is_there(difference):
    try:
        return difference.is_in(pkgutil.resolve_name(difference.owner))
    except (ImportError, AttributeError):  # an older Megatron lacks the owner as well
        return False

print(json.dumps([is_there(difference) for difference in DIFFERENCES]))
"""


@pytest.mark.releases
def test_the_installed_megatron_has_what_the_table_says() -> None:
    found = json.loads(python("-c", LOOKING).splitlines()[-1])
    expected = [installed_release() not in difference.lacked_by() for difference in DIFFERENCES]
    assert found == expected, [difference.name for difference in DIFFERENCES]


MODEL = Namespace(num_experts=8, record_memory_history=False, spec=None)


def with_training(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Give `megatron.training.argument_utils` these functions and no other."""
    container = {"pretrain_cfg_container_from_args": lambda *given: given}
    utils = SimpleNamespace(**container, **functions)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(argument_utils=utils))


def test_a_model_is_built_from_its_configuration_where_megatron_can_and_else_by_a_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_training(
        monkeypatch,
        gpt_config_from_args=lambda args: ("model of", args),
        hybrid_config_from_args=lambda args: ("hybrid model of", args),
    )
    dense = Namespace(num_experts=None, spec="my.spec", hybrid_layer_pattern=None)
    assert pretraining.pretrain_arguments(dense) == {"cfg_container": (dense, ("model of", dense))}
    hybrid = Namespace(hybrid_layer_pattern="*E")
    expected = {"cfg_container": (hybrid, ("hybrid model of", hybrid))}
    assert pretraining.pretrain_arguments(hybrid) == expected
    with_training(monkeypatch)
    found = pretraining.pretrain_arguments(MODEL)
    assert found == {"cfg_container": (MODEL,), "model_provider": pretraining.build_gpt}


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ({"spec": "my.spec"}, "--spec"),
        ({"heterogeneous_layers_config_path": "x"}, "--heterogeneous-layers-config-path"),
        ({"record_memory_history": True}, "--record-memory-history"),
        ({"num_experts": None}, "no --num-experts"),
    ],
)
def test_what_that_function_does_not_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], quoted: str
) -> None:
    with_training(monkeypatch)
    lacking, since = NUMBERS[0], releases.GPT_FROM_CONFIG.since
    sentence = f"^{quoted}: with megatron-core {lacking} .*; use {since}"
    with pytest.raises(ValueError, match=sentence):
        pretraining.pretrain_arguments(Namespace(**(vars(MODEL) | given)))


def storage(monkeypatch: pytest.MonkeyPatch, **msc_utils: object) -> object:
    """Replace the checkpoint writer's storage, with these switches if Megatron has them."""
    core = SimpleNamespace(msc_utils=SimpleNamespace(**msc_utils))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    return checkpoints._storage()


@pytest.mark.parametrize("is_on", [True, False], ids=["object store", "files"])
def test_checkpoints_go_where_megatrons_go(monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    client = SimpleNamespace(open=io.StringIO, os=object())
    assert storage(monkeypatch, maybe_msc=client) is client
    feature = SimpleNamespace(is_enabled=lambda: is_on, import_package=lambda: client)
    found = storage(monkeypatch, MultiStorageClientFeature=feature)
    assert (found.open, found.os) == ((client.open, client.os) if is_on else (open, os))


def test_every_recorded_megatron_is_one_that_the_table_of_releases_calls_tested() -> None:
    stacks = recorded()
    assert {stack.megatron for stack in stacks} <= {*TESTED, *NEXT.tested}
    assert {TESTED[0], TESTED[-1], *NEXT.tested} <= {stack.megatron for stack in stacks}
    assert len({*stacks}) == len(stacks)
