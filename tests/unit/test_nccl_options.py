"""NCCL's options of FSEP's communicators: defaults by cluster file, and the user's own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_laer.config import FSEPConfig
from megatron_laer.files.shipped import yaml_file
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Card, ExchangeCtas
from megatron_laer.plugin import nccl_options
from megatron_laer.plugin.nccl_options import NcclOptions

UNSET = torch.distributed.ProcessGroupNCCL.Options().config.max_ctas
CTAS = ExchangeCtas(intra=16, inter=8)
TWO_NODES, ONE_NODE = range(16), range(8)


def read(folder: Path, content: str, cluster: str = "h100-8") -> NcclOptions:
    path = folder / "nccl.yaml"
    path.write_text(content)
    return NcclOptions.read(str(path), FSEPConfig(cluster=cluster, node_size=8))


@pytest.mark.parametrize("cluster", ["a100-8", "a100-4x8-ib800", "b200-8", "h100-8", "h200-8"])
def test_cluster_files_give_exchanges_fewer_blocks_between_nodes(cluster: str) -> None:
    card = load_cluster(yaml_file("cluster", cluster)).card
    assert card is not None and card.exchange_ctas is not None
    assert 0 < card.exchange_ctas.inter < card.exchange_ctas.intra < card.nccl_channels
    options = NcclOptions.read(None, FSEPConfig(cluster=cluster, node_size=8))
    for exchange in ("FSEP_PARAMETERS", "FSEP_GRADIENTS"):
        for group_desc, ranks, most in (
            (exchange, TWO_NODES, card.exchange_ctas.inter),
            (exchange, ONE_NODE, card.exchange_ctas.intra),
            (f"{exchange}_INTER_NODE", (0, 8), card.exchange_ctas.inter),
            (f"{exchange}_INTRA_NODE", ONE_NODE, card.exchange_ctas.intra),
        ):
            made = options.of(group_desc, ranks)
            assert isinstance(made, torch.distributed.ProcessGroupNCCL.Options)
            assert (made.config.max_ctas, made.config.min_ctas) == (most, UNSET)
            assert not made.is_high_priority_stream
    tokens = options.of("FSEP_TOKENS_INTER_NODE", (0, 8))
    assert tokens.is_high_priority_stream and tokens.config.max_ctas == UNSET


def test_a_cluster_without_cards_leaves_it_to_nccl() -> None:
    options = NcclOptions.read(None, FSEPConfig(cluster="cpu-gloo", node_size=8))
    assert options.of("FSEP_PARAMETERS", TWO_NODES) is None


def test_the_launchers_nodes_count_where_no_flag_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_options, "ranks_per_node", lambda: 8)
    options = NcclOptions({}, CTAS, None)
    assert options.of("FSEP_PARAMETERS", range(4, 12)).config.max_ctas == 8
    assert options.of("FSEP_PARAMETERS", range(8, 16)).config.max_ctas == 16


def test_the_users_file_wins(tmp_path: Path) -> None:
    options = read(
        tmp_path,
        """
        fsep_parameters: {max_ctas: 20}
        fsep_parameters_intra_node: {max_ctas: 12}
        fsep_gradients: {min_ctas: 24}
        dp_cp: {max_ctas: 3, some_option_of_later_megatrons: 1}
        """,
    )
    whole = options.of("FSEP_PARAMETERS", TWO_NODES).config
    assert whole.max_ctas == 20
    inside = options.of("FSEP_PARAMETERS_INTRA_NODE", ONE_NODE).config
    assert inside.max_ctas == 12
    between = options.of("FSEP_PARAMETERS_INTER_NODE", (0, 8)).config
    assert between.max_ctas == 20
    # A default below the user's least would be refused by NCCL.
    assert options.of("FSEP_GRADIENTS", TWO_NODES).config.max_ctas == UNSET
    options.refuse_unused()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("fsep_weights: {max_ctas: 4}", "fsep_weights is no communicator of FSEP's"),
        ("fsep_parameters: 4", "fsep_parameters must be a mapping of options, got 4"),
        ("fsep_parameters: {max_cta: 4}", "fsep_parameters: max_cta: no such option"),
        ("fsep_tokens: {max_ctas: 0}", "fsep_tokens: max_ctas must be 1 to 64, got 0"),
        ("fsep_tokens: {max_ctas: true}", "max_ctas must be 1 to 64, got True"),
        ("fsep_tokens: {max_ctas: '8'}", "max_ctas must be 1 to 64, got '8'"),
        ("fsep_gradients: {cga_cluster_size: 9}", "cga_cluster_size must be 1 to 8, got 9"),
        (
            "fsep_gradients: {min_ctas: 9, max_ctas: 8}",
            "min_ctas 9 must be at most max_ctas, got 8",
        ),
        ("fsep_gradients: {cta_policy: zero}", "fsep_gradients: cta_policy: no such option"),
        ("fsep_gradients: {is_high_priority_stream: 1}", "must be [True, False], got 1"),
        ("fsep_tokens: {is_high_priority_stream: false}", "is_high_priority_stream False: tokens"),
        ("fsep_gradients: {net_name: 3}", "net_name must be a text such as IB or socket, got 3"),
    ],
)
def test_a_wrong_setting_is_refused_and_quoted(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        read(tmp_path, content)
    assert f"--nccl-communicator-config-path {tmp_path / 'nccl.yaml'}: " in str(raised.value)


def test_settings_of_a_communicator_that_is_not_made_are_refused(tmp_path: Path) -> None:
    options = read(tmp_path, "{fsep_tokens: {max_ctas: 4}, fsep_parameters: {max_ctas: 4}}")
    options.of("FSEP_PARAMETERS", TWO_NODES)
    with pytest.raises(ValueError, match=re.escape("settings of ['fsep_tokens'], and this run")):
        options.refuse_unused()


def test_fewer_blocks_need_less_memory_of_nccl() -> None:
    card = Card(memory_gib=80, context_gib=1, nccl_channels=32)
    fewer = replace(card, exchange_ctas=CTAS)
    mebibyte = 2**20
    for ranks, blocks, more in ((8, 16, 0), (16, 8, 8 * 4)):
        own = fewer.communicator_bytes(ranks, 8, of_exchange=True)
        assert own == (7 * blocks * 12 + more) * mebibyte
        assert fewer.communicator_bytes(ranks, 8) == card.communicator_bytes(ranks, 8) > own
        assert card.communicator_bytes(ranks, 8, of_exchange=True) > own
