"""Configurations of models have the published sizes, and their page is up to date."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.runtime import build
from tests import processes
from tests.configurations import CLUSTERS, HEAD, KINDS, MODELS, cluster_table, facts, number
from tests.documents import ROOT

PAGE = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8").partition("\n### Clusters\n")[2]
PUBLISHED = sorted(facts())
# The paper's table: layers, hidden, FFN, heads, experts, top-k, and biases of queries, keys and
# values. Heads have 128 columns, 8 are of keys and values; 32,000 words.
PAPER = {
    "mixtral-8x7b-e8k2": (32, 4096, 14336, 32, 8, 2, False),
    "qwen-8x7b-e8k2": (32, 4096, 14336, 32, 8, 2, True),
    "mixtral-8x22b-e8k2": (18, 6144, 16384, 48, 8, 2, False),
    "mixtral-8x7b-e16k4": (24, 4096, 7168, 32, 16, 4, False),
    "qwen-8x7b-e16k4": (24, 4096, 7168, 32, 16, 4, True),
    "mixtral-8x22b-e16k4": (14, 6144, 8192, 48, 16, 4, False),
}


@pytest.fixture(scope="module")
def made():
    return json.loads(processes.python("-m", "tests.configurations", "--json"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name, kind, made):
    published, last_digit = number(facts()[name]["published"][kind])
    _, as_they_count = made["counts"][name][kind]
    # Some publications round, some cut, and one has a single digit.
    most = min(last_digit, 0.03 * published)
    assert abs(as_they_count - published) < most, (as_they_count, published)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_the_parameters_of_its_sizes(name, made):
    layers, hidden, ffn, heads, experts, topk, has_bias = PAPER[name]
    query, key_and_value = heads * 128, 2 * 8 * 128
    attention = hidden * (2 * query + key_and_value) + has_bias * (query + key_and_value)
    expert = 3 * hidden * ffn
    others = layers * (attention + hidden * experts + 2 * hidden) + hidden + 2 * 32000 * hidden
    found = [made["counts"][name][kind][0] for kind in KINDS]
    assert found == [others + layers * number * expert for number in (experts, topk)]


@pytest.mark.parametrize("name", MODELS)
def test_the_page_has_the_line_of_each_model(name, made):
    assert f"\n{made['lines'][name]}\n" in PAGE, "python -m tests.configurations prints it"


def test_every_model_runs_with_fsep(made):
    verdicts = {name: line.split(" | ")[-2] for name, line in made["lines"].items()}
    assert verdicts == dict.fromkeys(MODELS, "*runs*")


def test_the_page_has_no_other_lines_and_the_heads_of_today():
    lines = PAGE.splitlines()
    assert "\n".join(HEAD) in PAGE
    for line in cluster_table():
        assert line in lines, "python -m tests.configurations prints it"
    listed = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert sorted(listed) == sorted([*MODELS, *CLUSTERS])


def test_what_was_published_is_of_models_that_there_are():
    assert {*PUBLISHED} < {*MODELS}
    assert {*PAPER} < {*MODELS}


@pytest.mark.parametrize(
    ("card", "cluster"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-4x8-ib800"),
        ("NVIDIA H100 80GB HBM3", "h100-8"),
        ("NVIDIA H200", "h200-8"),
        ("NVIDIA B200", "b200-8"),
        ("NVIDIA T4", "h100-8"),
    ],
)
def test_a_card_has_the_constants_of_its_kind(card, cluster, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert build.default_cluster(torch.device("cuda")) == cluster
    assert load_cluster(cluster).ranks_per_node == 8
