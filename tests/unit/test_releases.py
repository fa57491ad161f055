"""What is done differently by release, with a stand-in for the release that is not installed."""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_laer.platform import releases
from megatron_laer.plugin import checkpoints

MODEL = Namespace(num_experts=8, record_memory_history=False, spec=None)


def with_training(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """`megatron.training.argument_utils` has these functions and no other."""
    container = {"pretrain_cfg_container_from_args": lambda *given: given}
    utils = SimpleNamespace(**container, **functions)
    monkeypatch.setitem(sys.modules, "megatron.training", SimpleNamespace(argument_utils=utils))


def test_a_model_is_built_from_its_configuration_where_megatron_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_training(monkeypatch, gpt_config_from_args=lambda args: ("model of", args))
    dense = Namespace(num_experts=None, spec="my.spec")
    assert releases.pretrain_arguments(dense) == {"cfg_container": (dense, ("model of", dense))}


def test_a_model_is_built_by_a_function_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with_training(monkeypatch)
    found = releases.pretrain_arguments(MODEL)
    assert found == {"cfg_container": (MODEL,), "model_provider": releases.build_gpt}


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ({"spec": "my.spec"}, "--spec"),
        ({"yaml_cfg": "x.yaml"}, "--yaml-cfg"),
        ({"experimental_attention_variant": "x"}, "--experimental-attention-variant"),
        ({"heterogeneous_layers_config_path": "x"}, "--heterogeneous-layers-config-path"),
        ({"record_memory_history": True}, "--record-memory-history"),
        ({"num_experts": None}, "no --num-experts"),
    ],
)
def test_what_that_function_does_not_build_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], quoted: str
) -> None:
    with_training(monkeypatch)
    with pytest.raises(ValueError, match=f"^{quoted}: with megatron-core 0.18 .*; use 0.19"):
        releases.pretrain_arguments(Namespace(**(vars(MODEL) | given)))


def storage(monkeypatch: pytest.MonkeyPatch, **msc_utils: object) -> object:
    """What checkpoints are written with, if Megatron has these switches."""
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
