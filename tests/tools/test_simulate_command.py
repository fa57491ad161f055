"""`simulate`: its output, files and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from benchmarks import home_recipes
from megatron_laer.choices import Auto
from megatron_laer.config import FSEPConfig
from megatron_laer.planner.cluster_files import cluster_text, load_cluster
from megatron_laer.planner.costs import CostModel
from megatron_laer.planner.sharding_choice import choose_geometry
from megatron_laer.tools import cli
from megatron_laer.tools.simulator.iteration.clocks import COMPUTE, EXPOSED
from megatron_laer.tools.simulator.iteration.methods import METHODS
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from megatron_laer.tools.simulator.run_settings import priced
from tests.documents import ROOT, blocks
from tests.recorded_runs import OWN, record_run
from tests.tools.plan_cases import drifting_trace, recording


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return recording(tmp_path_factory.mktemp("trace") / "x.trace", drifting_trace())


def simulated(out, *words, capsys):
    """Return the written JSON with the printed lines, after a run without errors."""
    assert cli.main(["simulate", *map(str, words), "--json", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    return json.loads(out.read_text()) | {"lines": printed.splitlines()}


TINY = "--model mixtral-8x7b-e8k2 --node-size 2".split()
ENOUGH = "--memory-gib", "10000"


def test_the_command_prints_and_writes(tmp_path, path, capsys):
    written = simulated(tmp_path / "x.json", path, *TINY, *ENOUGH, capsys=capsys)
    begin = written["lines"][: next(n for n, x in enumerate(written["lines"]) if "method " in x)]
    assert max(map(len, begin)) <= 100
    said, chosen = " ".join(begin), f"EP4 {written['sharding']} C={written['capacity']}, tokens "
    assert said.startswith(written["advice"]) and written["advice"].count(chosen) == 1
    assert said.count(chosen) == 2
    assert ", adaptive; 4 ranks in nodes of 2, 2048 tokens per rank and microbatch, 3 mi" in said
    assert written["advice"].startswith(("Use FSEP (", "Take stock EP"))
    assert list(written["methods"]) == list(METHODS)
    for method in written["methods"].values():
        seconds = method["iteration_s"]
        assert seconds["low"] < seconds["value"] < seconds["high"]
        assert set(method["exposed_s"]) == set(EXPOSED)
        assert set(method["compute_s"]) == set(COMPUTE)
        assert method["peak_bytes"] == pytest.approx(sum(method["memory_bytes"].values()))
        assert method["tokens_per_s"] == pytest.approx(4 * 2048 * 3 / seconds["value"])
        assert 0 < method["mfu"] < 1


@pytest.mark.parametrize("order", ["fsep stock", "stock fsep"])
def test_memory_has_the_parts_of_all_methods_in_any_order(order, tmp_path, path, capsys):
    words = *TINY, *ENOUGH, "--steps", "1", "--method", *order.split()
    lines = simulated(tmp_path / "x", path, *words, capsys=capsys)["lines"]
    (workspaces,) = (line.split()[-2:] for line in lines if "memory workspaces" in line)
    assert workspaces[order.split().index("stock")] == "0.00"


W0 = "--workload W0 --ranks 8 --model mixtral-8x7b-e8k2 --steps 1"
FITS = "{path} --model mixtral-8x7b-e8k2 --node-size 2 --tokens 32768 --steps 1 --method stock fsep"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            f"{FITS} --cluster h100-8",
            r"^Nothing fits 78.6 GiB of a rank: the least need is of EP4 .* \d{3} and stock "
            r"EP\d \(\w+\) \d{3} GiB\. Spread the model .* with 78.6 GiB each; recompute full",
        ),
        (
            f"{FITS} --cluster h100-8 --recompute none",
            r"^Nothing fits 78.6 GiB of .* GiB\. Recompute more, .* each; recompute none",
        ),
        (f"{FITS} --memory-gib 10000", r"C=.* as stock EP1 \(alltoall\); .* recompute none "),
        (
            f"{FITS} --memory-gib 480 --stock-expert-parallel 1 --recompute none",
            r"^Use FSEP \(EP4 .*\): stock does not fit 480 GiB; "
            r".* of stock EP1 \(alltoall\), \d+ GiB\. ",
        ),
        (f"{FITS} --cluster cpu-gloo", r" cpu-gloo has no card, so only --memory-gib limits "),
        (
            f"{W0} --restore step --memory-gib 190 --recompute none --stock-dispatcher flex",
            r"^Take stock EP8 \(flex\): no setting of FSEP fits 190 GiB; the least need is of "
            r"EP8 .*, 2\d\d GiB\..* EP8 experts C=2, tokens rank, restore step, forecast; ",
        ),
    ],
    ids=[
        "the card is too small for both",
        "more can be recomputed",
        "enough memory",
        "stock does not fit",
        "a cluster without a card",
        "layouts of a step do not fit",
    ],
)
def test_advice_and_omissions_are_explained(tmp_path, path, capsys, words, said):
    found = simulated(tmp_path / "x", *words.format(path=path).split(), capsys=capsys)
    assert re.search(said, " ".join(found["lines"]))


def test_stock_has_the_fastest_group_that_fits_and_all_outputs_name_it(tmp_path, path, capsys):
    cluster = tmp_path / "no-card.yaml"
    without = replace(load_cluster("a100-4x8-ib800"), card=None)
    cluster.write_text(cluster_text(without))

    def stock(*words):
        flags = "--ranks 8 --method stock fsep --steps 1 --tokens 4096 --recompute none".split()
        flags += ["--cluster", cluster]
        found = simulated(tmp_path / "x", path, *TINY, *flags, *words, capsys=capsys)
        of_method = found["methods"]["stock"]
        title = f"stock EP{of_method['group']} ({of_method['dispatcher']})"
        assert any(f"{title} " in line for line in found["lines"])
        assert found["methods"]["fsep"]["group"] is None
        return of_method, found["advice"]

    fixed = {group: stock("--stock-expert-parallel", group)[0] for group in (1, 2, 4, 8)}
    assert [of["group"] for of in fixed.values()] == list(fixed)
    for group, of in fixed.items():  # each with its faster dispatcher
        words = "--stock-expert-parallel", group, "--stock-dispatcher"
        ways = [stock(*words, dispatcher)[0] for dispatcher in ("alltoall", "flex")]
        assert of == min(ways, key=lambda way: way["iteration_s"]["value"])
        assert [way["dispatcher"] for way in ways] == [
            "alltoall",
            "flex" if group > 1 else "alltoall",
        ]
    assert fixed[8] == min(fixed.values(), key=lambda of: of["peak_bytes"])
    in_a_node = min((2, 4, 8), key=lambda group: fixed[group]["iteration_s"]["value"])
    chosen, advice = stock()
    assert chosen == fixed[in_a_node]
    assert f"as fast as stock EP{in_a_node} ({chosen['dispatcher']}); " in advice
    for group in fixed:
        limit = fixed[group]["peak_bytes"] / 2**30 + 1e-3
        fits = [of for of in fixed.values() if of["peak_bytes"] <= limit * 2**30]
        fastest = min(fits, key=lambda of: of["iteration_s"]["value"])
        assert stock("--memory-gib", limit)[0] == fastest
    # Nothing fits: the group that needs least.
    chosen, advice = stock("--memory-gib", 1)
    assert chosen == fixed[8] and advice.startswith("Nothing fits 1 GiB of a rank: ")


def test_the_most_microbatches_end_soon_and_take_as_long_as_their_number(tmp_path, capsys):
    words = "--workload W1 --model tiny-moe --cluster h100-8 --ranks 4 --microbatches".split()
    some, most = (
        simulated(tmp_path / "x", *words, number, capsys=capsys)["methods"]["fsep"]
        for number in (64, 2**16)
    )
    assert most["iteration_s"]["value"] == pytest.approx(
        2**10 * some["iteration_s"]["value"], rel=0.02
    )


def test_sharding_slots_and_exchange_are_those_of_training_by_default(tmp_path, path, capsys):
    words = [*TINY, *"--ranks 8 --method fsep --steps 1 --tokens 4096".split()]

    def fsep(*more):
        found = simulated(tmp_path / "x", path, *words, *more, capsys=capsys)
        del found["advice"], found["lines"]
        return found

    model = read_model("mixtral-8x7b-e8k2")
    costs = CostModel(load_cluster("a100-4x8-ib800"), model.hidden, model.expert_ffn, True, 2)

    def of(geometry):
        return priced(costs, (geometry, model.topk, 4096), Auto.AUTO, Auto.AUTO)

    taken, _ = choose_geometry(FSEPConfig(), (8, 8, 2), 1, model.topk, of)
    case, sharding = fsep(), taken.geometry.sharding
    assert (case["sharding"], case["capacity"]) == (sharding, taken.geometry.capacity)
    assert fsep("--sharding", "auto") == fsep("--sharding", sharding) == case


def predictions():
    """Yield the words of `simulate` on its page, and of its table of recipes."""
    for block in blocks(ROOT / "docs" / "predict.md"):
        for command in block.text.replace("\\\n", " ").splitlines():
            if " simulate " in command:
                yield command.split(" simulate ")[1].split()
    for recipe in home_recipes.RECIPES:
        common = "--workload W1 --cluster h100-8 --method fsep --recompute compute"
        yield [*common.split(), *recipe.words]


@pytest.mark.parametrize(
    "words",
    # README's first prediction each day; others take many layers.
    [
        pytest.param(
            words,
            id=" ".join(words),
            marks=[] if "mixtral-8x7b-e8k2" in words else [pytest.mark.nightly],
        )
        for words in predictions()
    ],
)
def test_published_predictions_fit_the_card(words, tmp_path, capsys):
    found = simulated(tmp_path / "x.json", *words, "--steps", "1", capsys=capsys)
    peaks = [of["peak_bytes"] for of in found["methods"].values()]
    assert peaks and max(peaks) <= found["memory_gib"] * 2**30


def test_a_recorded_run_has_its_own_cluster(tmp_path, capsys):
    record_run(tmp_path / "run", cluster=OWN)
    words = "--model mixtral-8x7b-e8k2 --method stock --steps 1 --microbatches 1".split()
    for flags, name in (((), OWN.name), (("--cluster", "h100-8"), "h100-8")):
        found = simulated(tmp_path / "x", tmp_path / "run", *words, *flags, capsys=capsys)
        assert found["cluster"] == name and f" on {name}, " in " ".join(found["lines"])


def test_experts_at_home_without_replicas_exchange_no_weights(tmp_path, capsys):
    words = f"{W0} --ranks 4 --stock-expert-parallel 4 --capacity 3"
    found = {}
    for sharding in ("rows", "experts"):
        flags = f"{words} --node-size 2 --sharding {sharding}".split()
        written = simulated(tmp_path / "x", *flags, *ENOUGH, capsys=capsys)
        assert f"EP4 {sharding} C=3, tokens " in written["advice"]
        found[sharding] = written["methods"]
    rows, home = found.values()
    assert home["stock"] == rows["stock"]
    assert home["fsep"]["exposed_s"]["restore"] == 0 < rows["fsep"]["exposed_s"]["restore"]
    restored = [of["fsep"]["memory_bytes"]["restored_experts"] for of in (rows, home)]
    # Of three slots, one has no home expert.
    assert restored[0] == pytest.approx(3 * restored[1])


def test_recipes_have_a_share_of_forced_balance_with_the_points_that_they_lack(
    tmp_path, monkeypatch, capsys
):
    flags = "--model mixtral-8x7b-e8k2 --tokens 1024 --microbatches 2 --steps 1"
    again = home_recipes.Recipe("again", 4, f"{flags} --recompute full")
    monkeypatch.setattr(home_recipes, "RECIPES", (home_recipes.Recipe("small", 4, flags), again))
    monkeypatch.setattr(home_recipes, "WORKLOADS", ("W1", "W0"))
    assert home_recipes.main(["--json", str(tmp_path / "x.json")]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["recipes"]
    cases = [tuple(row[key] for key in ("recipe", "schedule", "routing")) for row in rows]
    assert cases == [
        *((name, schedule, routing) for name, schedule in ALLOWED for routing in ("W1", "W0"))
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert f" {row['share']:.3f}  {row['chosen']}" in printed
        assert sum(row["points"].values()) == pytest.approx(100 * (1 - row["share"]), abs=1e-6)
        assert row["stock"] == pytest.approx(1.0) or row["routing"] == "W1"
        assert 0.5 < row["share"] < 1.2


# Megatron's combined 1F1B takes no full recompute.
ALLOWED = (("small", "1F1B"), ("small", "combined"), ("again", "1F1B"))
