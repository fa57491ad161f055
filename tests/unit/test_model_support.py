"""MoE fields of Megatron's configuration: each is proved, refused, without effect, or warned of."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from megatron_laer.choices import PlanMode, TokenExchangeChoice
from megatron_laer.releases import NEXT, NUMBERS
from megatron_laer.support import model as model_support
from megatron_laer.support.fields import (
    MOE_FIELD,
    PROVED,
    PROVED_RECOMPUTE,
    UNTRIED,
    WITHOUT_EFFECT,
)
from megatron_laer.support.table import REFUSALS
from tests.parity.rows import ROWS
from tests.releases import FIELDS_BEFORE_NEXT, FIELDS_FROM_NEXT, release_of

pytestmark = pytest.mark.releases

PROGRAM = """
import dataclasses, json
from megatron_laer.launch import prepare
prepare()
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.package_info import __version__
print(json.dumps([__version__, [field.name for field in dataclasses.fields(TransformerConfig)]]))
"""


@dataclass
class Config:
    """As much of Megatron's configuration as is looked at, with a field that nobody knows."""

    moe_token_dispatcher_type: str = "alltoall"
    moe_flex_dispatcher_backend: str | None = "deepep"
    moe_router_topk: int = 2
    moe_enable_routing_replay: bool = False
    moe_grouped_gemm: bool = False
    moe_teleport: bool = False
    gdp_num_householder: int = 3
    warp_experts: bool = False
    moe_teleport_targets: list[str] = field(default_factory=list)
    recompute_granularity: str | None = None
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    expert_tensor_parallel_size: int | None = 1
    delay_wgrad_compute: bool | None = False
    fp8: str | bool | None = None
    fp8_param: bool = False
    cuda_graph_impl: str = "none"
    cuda_graph_modules: list[object] = field(default_factory=list)


def test_every_moe_field_of_this_megatron_is_known() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "MEGATRON_LAER_DEVICE": "cpu"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    version, names = json.loads(result.stdout.splitlines()[-1])
    fields = set(names)
    moe_fields = {name for name in fields if MOE_FIELD.search(name)}
    refused = [row.field for row in REFUSALS if row.field]
    known = [*refused, *PROVED, *WITHOUT_EFFECT]
    assert len(known) == len(set(known)), "a field is in two lists"
    assert moe_fields <= set(known), "new in this Megatron: decide what FSEP makes of it"
    gone = {NUMBERS[-1]: FIELDS_FROM_NEXT, NEXT.number: FIELDS_BEFORE_NEXT}
    if (release := release_of(version)) in gone:
        assert set(known) - fields == gone[release], "gone from this Megatron"
        assert fields & UNTRIED == (UNTRIED if release == NEXT.number else set())


def test_every_field_called_proved_is_set_by_a_row_of_the_parity_table() -> None:
    given = {flag for row in ROWS for flag in row.fsep_run("")[1]}
    flags = {name: f"--{name.replace('_', '-')}" for name in PROVED}
    flags["num_moe_experts"] = "--num-experts"
    assert [name for name, flag in flags.items() if flag not in given] == []


def test_hybridep_has_its_slots_in_fours() -> None:
    for dispatcher, backend, multiple in (
        ("alltoall", "hybridep", 1),
        ("flex", "deepep", 1),
        ("flex", "hybridep", 4),
    ):
        config = Config(moe_token_dispatcher_type=dispatcher, moe_flex_dispatcher_backend=backend)
        assert model_support.slots_multiple(config) == multiple


def test_a_plain_model_is_taken_without_a_warning() -> None:
    model_support.check(Config(moe_router_topk=4, moe_grouped_gemm=True))
    assert model_support.warnings_of(Config(moe_router_topk=4, moe_grouped_gemm=True)) == []


def test_off_is_off_whether_none_or_false_says_it() -> None:
    model_support.check(Config(fp8=False, delay_wgrad_compute=None))
    model_support.check(Config(moe_flex_dispatcher_backend=None))


def test_fields_that_nobody_knows_are_named_in_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    model_support._warn_once.cache_clear()
    config = Config(
        moe_teleport=True,
        moe_teleport_targets=["moon"],
        gdp_num_householder=2,
        warp_experts=True,
    )
    with caplog.at_level(logging.WARNING):
        model_support.check(config)
        model_support.check(config)  # the next layer of the same model
    teleport, untried, warp, targets = (record.getMessage() for record in caplog.records)
    assert "moe_teleport=True" in teleport and "does not know" in teleport
    assert "moe_teleport_targets=['moon']" in targets
    assert untried.startswith("gdp_num_householder=2: no test sets this field")
    assert "warp_experts=True" in warp and "does not know" in warp


def test_recompute_that_no_row_of_the_parity_table_has_is_refused() -> None:
    modules = ["core_attn", "mhc"]
    model_support.check(Config(recompute_granularity="full", recompute_modules=modules))
    with pytest.raises(ValueError, match=r"recompute_modules=\['core_attn', 'mhc'\]: no test"):
        model_support.check(Config(recompute_granularity="selective", recompute_modules=modules))
    given = {word for row in ROWS for word in f"{row.flags} {row.fsep}".split()}
    assert given | {"core_attn"} >= PROVED_RECOMPUTE


def test_only_the_first_rank_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    model_support._warn_once.cache_clear()
    model_support.check(Config(moe_teleport=True))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("config", "quoted"),
    [
        (Config(moe_token_dispatcher_type="allgather"), "moe_token_dispatcher_type='allgather'"),
        (
            Config(moe_flex_dispatcher_backend="ncclep"),
            "moe_flex_dispatcher_backend='ncclep': NCCL EP needs",
        ),
        (Config(delay_wgrad_compute=True), "delay_wgrad_compute=True"),
        (Config(fp8="hybrid"), "fp8='hybrid'"),
        (Config(fp8=True), "fp8=True"),
        (Config(fp8_param=True), "fp8_param=True"),
        (Config(cuda_graph_impl="local"), "cuda_graph_impl='local': layouts and split sizes"),
        (Config(expert_tensor_parallel_size=2), "expert_tensor_parallel_size=2"),
    ],
)
def test_what_cannot_work_is_refused(config: Config, quoted: str) -> None:
    with pytest.raises(ValueError, match="cannot run this model") as error:
        model_support.check(config)
    assert quoted in str(error.value)


def test_all_that_a_token_exchange_cannot_work_with_is_listed_in_one_text() -> None:
    config = SimpleNamespace(moe_token_dispatcher_type="flex", moe_permute_fusion=True)
    model_support.check_choices(config, PlanMode.EXACT, TokenExchangeChoice.RANK)
    with pytest.raises(ValueError, match="cannot run") as raised:
        model_support.check_choices(config, PlanMode.EXACT, TokenExchangeChoice.AUTO)
    first, *others = str(raised.value).splitlines()
    assert first == "FSEP cannot run this model:" and len(others) == 2
    assert all(line.startswith("  --fsep-token-exchange auto with --moe-") for line in others)
