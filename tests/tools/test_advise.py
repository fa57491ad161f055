"""`advise`: its choice, its figures and its refusals.

Over 400 lines: one suite for one command, whose cases share a search.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from megatron_laer.choices import Recompute
from megatron_laer.planner.cluster_files import cluster_content, load_cluster
from megatron_laer.tools import cli
from megatron_laer.tools.cli import run_flags
from megatron_laer.tools.simulator.advisor import search
from megatron_laer.tools.simulator.iteration.model_shape import read_model
from tests.processes import python
from tests.tools.plan_cases import drifting_trace, recording

MODEL = """\
description: four layers of Mixtral-8x7B
architecture: {num-layers: 4, hidden-size: 4096, ffn-hidden-size: 14336, num-attention-heads: 32,
  group-query-attention: true, num-query-groups: 8, seq-length: 4096, swiglu: true}
moe: {num-experts: 8, moe-router-topk: 2}
precision: {bf16: true}
"""
MODEL_FILE = "FOUR-LAYERS"
GPUS = "--cluster h100-8 --gpus 8"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "four-layers.yaml"
    path.write_text(MODEL)
    return path


def written(command, words, out, capsys, status=0):
    """Return the JSON of a command with its printed text."""
    assert cli.main([command, *map(str, words), "--json", str(out)]) == status
    printed, err = capsys.readouterr()
    assert err == ""
    return json.loads(out.read_text()) | {"printed": printed}


@pytest.fixture
def advised(model, tmp_path, capsys):
    def run(*words, status=0):
        given = ["--model", model, *words]
        return written("advise", given, tmp_path / "advised.json", capsys, status)

    return run


@pytest.fixture
def simulated(model, tmp_path, capsys):
    def run(*words):
        return written("simulate", ["--model", model, *words], tmp_path / "x.json", capsys)

    return run


@pytest.fixture
def by_flags(model, tmp_path):
    """Advise with Megatron's flags, which must not be imported here before CUDA is replaced."""

    def run(words, given):
        out = tmp_path / "by-flags.json"
        words = words.replace(MODEL_FILE, str(model)).split()
        printed = python(
            "-m", "megatron_laer", "advise", *words, "--json", out, "--", *given.split()
        )
        return json.loads(out.read_text()) | {"printed": printed}

    return run


def value(found):
    return found["iteration_s"]["value"]


def test_no_setting_of_simulate_is_faster_and_times_are_its_own(advised, simulated):
    run = "--workload W1 --cluster h100-8"
    limit = "--memory-gib 36"
    found = advised(*f"{run} {limit} --gpus 16".split())
    rows = [f"--ranks {ranks} --capacity {slots}" for ranks in (8, 16) for slots in (2, 3)]
    homes = [f"--ranks {ranks} --capacity {slots}" for ranks, slots in ((4, 3), (8, 3), (8, 2))]
    sizes = [f"{of} --sharding rows" for of in rows] + [f"{of} --sharding experts" for of in homes]
    cases = [
        simulated(
            *f"{run} {of} --world 16 --tokens 4096 --method fsep".split(),
            *f"--token-exchange {tokens} {kept}".split(),
        )["methods"]["fsep"]
        for tokens in ("rank", "node", "flex", "rank --overlap", "flex --overlap")
        for kept in ("--restore layer", "--restore step")
        for of in sizes
    ]
    fitting = [case for case in cases if case["peak_bytes"] <= 36 * 2**30]
    assert 0 < len(fitting) < len(cases)  # the limit is one
    best = found["best"][0]
    assert value(best) <= 1.01 * min(map(value, fitting))
    same = [case for case in fitting if case["peak_bytes"] == best["peak_bytes"]]
    assert any(value(case) == pytest.approx(value(best), rel=2e-3) for case in same)

    stock = f"{run} {limit} --ranks 8 --world 16 --tokens 4096 --recompute none --method stock"
    theirs, balanced = (
        min(
            (value(of), f"stock EP{of['group']} ({dispatcher}{more.replace(' --', ', ')})")
            for more in ("", " --overlap")
            for dispatcher in ("alltoall", "flex")
            for of in [
                simulated(*f"{words}{more} --stock-dispatcher {dispatcher}".split())["methods"][
                    "stock"
                ]
            ]
        )
        for words in (stock, stock.replace("W1", "W0"))
    )
    assert found["stock"][0]["label"] == theirs[1]
    assert value(found["stock"][0]) == pytest.approx(theirs[0], rel=2e-3)
    assert best["share"] == pytest.approx(balanced[0] / value(best), rel=2e-3)
    assert f"Use FSEP ({best['label']}): it is " in found["verdict"]
    printed = found["printed"]
    assert " ".join(printed.split("\n\n")[0].split()) == found["verdict"]
    numbers, pasted = printed.split("\n\n")[1:3]
    expected = f", {best['share']:.1%} of perfectly balanced speed, max/mean "
    assert expected in " ".join(numbers.split())
    assert pasted == f"flags: {best['flags']}"


def test_of_settings_that_are_alike_the_one_with_most_free_memory_is_advised():
    predictions = {
        name: SimpleNamespace(
            iteration_s=seconds,
            by_rates_s=(seconds,),
            peak_bytes=gib * 2**30,
            waiting_s=0.0,
            exposed_s={"tokens": seconds},
        )
        for name, seconds, gib in (
            ("slow", 1.02, 30.0),
            ("fast", 1.0, 77.6),
            ("roomy", 1.007, 56.8),
            ("huge", 0.9, 99.0),
        )
    }
    predictor = SimpleNamespace(
        run=SimpleNamespace(most_bytes=78.6 * 2**30, rates=[None]),
        least_bytes=lambda of: of.prediction.peak_bytes,
        roughly=lambda of: of.prediction.iteration_s,
        predict=lambda of, rates: of.prediction,
    )
    candidates = [
        SimpleNamespace(label=name, shape=name, kind=name, prediction=of, leaves_nodes=False)
        for name, of in predictions.items()
    ]
    ways = predictor, "FSEP", candidates, lambda title, items: items, 3
    best = search._rank(*ways, alike=1.01)
    assert [of.label for of in best.found] == ["roomy", "fast", "slow"]
    assert (best.fastest.label, [of.label for of in best.too_large]) == ("fast", ["huge"])
    assert search._rank(*ways).found[0].label == "fast"
    stocks = replace(best, found=(search.Found("stock", predictions["slow"], None),))
    said = search.Results(best, stocks, stocks.found[0], None, None, None, False).verdict(78.6)
    assert said.endswith(
        " fast takes 0.7% less time, which constants leave open, and 20.8 GiB more."
    )


@pytest.mark.parametrize("cluster", ["a100-4x8-ib800", "h100-8"])
def test_balanced_routing_asks_for_stock(cluster, advised):
    found = advised(*f"{GPUS} --cluster {cluster} --workload W0".split())
    stock = found["stock"][0]["label"]
    assert not found["takes_fsep"]
    assert f"Take {stock}, not FSEP: " in found["verdict"]
    assert found["printed"].count("--expert-parallel-mode fsep") == len(found["best"]) == 5


def test_constants_that_could_reverse_the_answer_are_to_be_measured(tmp_path, advised):
    cluster = load_cluster("h100-8")
    wide = replace(dict(cluster.spreads)["host.gate"], high=500.0)  # only FSEP has a gate
    path = tmp_path / "wide.yaml"

    def asked(of):
        path.write_text(yaml.safe_dump(cluster_content(of)))
        return advised(*f"{GPUS} --workload W1 --cluster {path} --memory-gib 32".split())

    found = asked(replace(cluster, spreads=(("host.gate", wide),)))
    assert found["takes_fsep"]
    assert found["verdict"].endswith(" At the worst constants it is not worth it, so measure them.")
    slow = cluster.with_constants({"host.gate": 500.0})
    found = asked(replace(slow, spreads=(("host.gate", replace(wide, low=0.002, high=1.0)),)))
    assert not found["takes_fsep"]
    assert found["verdict"].endswith(" At the best constants it is worth it, so measure them.")


def test_a_trace_has_the_tokens_and_microbatches_of_its_ranks(tmp_path, model, capsys):
    path = recording(tmp_path / "x.trace", drifting_trace(ranks=4))
    words = [path, "--model", model, *"--cluster h100-8 --gpus 8 --memory-gib 200".split()]
    found = written("advise", words, tmp_path / "x.json", capsys)
    printed = " ".join(found["printed"].split())
    assert "x.trace: 2048 tokens per rank and microbatch, 3 microbatches" in printed
    assert re.search(r"^1 +EP[248] ", found["printed"], re.MULTILINE)


def test_nothing_may_fit(advised):
    found = advised(*GPUS.split(), "--memory-gib", "2", status=1)
    assert found["best"] == found["stock"] == []
    said = " ".join(found["printed"].split())
    assert said.startswith("Nothing fits 2 GiB of a rank: the least need is of EP")
    assert (
        re.search(r", full recompute \d", said)
        and " GiB. Spread the model over more pipeline" in said
    )


def test_a_job_in_fp8_has_experts_at_home_and_the_flags_say_so(advised, model, tmp_path):
    words = f"{GPUS} --workload W1 --memory-gib 60".split()
    in_fp8 = "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --micro-batch-size 1".split()
    out = tmp_path / "of-run.json"
    # Megatron reads the flags, and must not be imported in this process before CUDA is replaced.
    given = ["--model", model, *words, "--json", out, "--", *in_fp8]
    python("-m", "megatron_laer", "advise", *given)
    found = json.loads(out.read_text())
    assert value(found["best"][0]) < value(advised(*words)["best"][0])
    assert all(" experts C=" in each["label"] for each in found["best"])
    allowed = "--fsep-allow-unproven fp8-experts"
    assert all(allowed in each["flags"] for each in found["best"])
    assert not any(allowed in each["flags"] for each in found["stock"])


def test_flags_that_say_nothing_of_dispatcher_and_optimizer_change_no_verdict(advised, by_flags):
    """The baseline is the fastest stock, not the one of Megatron's defaults."""
    words = "--model tiny-moe --cluster h100-8 --gpus 8"
    alone, with_flags = advised(*words.split()), by_flags(words, "--lr 1e-3")
    assert with_flags["verdict"] == alone["verdict"]
    assert alone["verdict"].startswith(
        "First try --moe-token-dispatcher-type flex: stock EP8 (flex) is then 1."
    )
    assert "Take stock EP8 (flex), not FSEP: " in alone["verdict"]
    assert alone["as_given"]["label"] == with_flags["as_given"]["label"] == "stock EP4 (alltoall)"
    assert with_flags["stock"][0]["flags"] == alone["stock"][0]["flags"]


def test_a_dispatcher_that_flags_fix_is_the_baselines(advised, by_flags):
    words = "--model tiny-moe --cluster h100-8 --gpus 8"
    fixed = by_flags(words, "--moe-token-dispatcher-type alltoall")
    assert fixed["verdict"].startswith("First try --moe-token-dispatcher-type flex: ")
    assert " as fast as stock EP4 (alltoall); " in fixed["verdict"]
    assert not any("flex" in each["flags"] for each in fixed["best"] + fixed["stock"])
    # More than stock's balanced speed, with a slower dispatcher, is no share to boast of.
    assert fixed["best"][0]["share"] > 1
    assert "perfectly balanced speed" not in fixed["printed"]
    flex = by_flags(words, "--moe-token-dispatcher-type flex")
    assert flex["verdict"].startswith("Take stock EP8 (flex), not FSEP: ")


def test_a_sharded_optimizer_that_flags_lack_is_named_first(by_flags):
    words = f"--model {MODEL_FILE} {GPUS} --workload W1 --memory-gib 30"
    found = by_flags(words, "--micro-batch-size 1")
    flag = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    assert found["verdict"].startswith(f"First add {flag}: without that, no group of stock fits.")
    assert all(each["flags"].startswith(flag) for each in found["best"] + found["stock"])
    assert not found["as_given"]


def test_recompute_is_tried_before_nothing_fits(advised):
    """The paper's model on its cluster."""
    found = advised(*"--model mixtral-8x7b-e8k2 --cluster a100-4x8-ib800 --gpus 32".split())
    again = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    assert found["takes_fsep"]
    assert (
        "Use FSEP (EP8 experts C=2, tokens rank, restore layer, full recompute)"
        in (found["verdict"])
    )
    assert again in found["verdict"] and again in found["printed"].split("\n\n")[2]
    assert all(again in each["flags"] for each in found["best"] + found["stock"])


def test_what_fits_without_recompute_has_none(advised):
    found = advised(*f"{GPUS} --workload W1 --memory-gib 30".split())
    rows = found["best"] + found["stock"]
    assert {"full recompute" in each["label"] for each in rows} == {False, True}
    assert all(each["peak_bytes"] <= 30 * 2**30 for each in rows)
    for each in rows:
        assert ("--recompute-granularity full" in each["flags"]) == (
            "full recompute" in each["label"]
        )


def test_a_group_over_nodes_is_advised_only_if_its_worst_case_gains():
    def option(label, *seconds, leaves_nodes=False):
        prediction = SimpleNamespace(
            iteration_s=seconds[0],
            by_rates_s=seconds,
            peak_bytes=2.0**30,
            waiting_s=0.0,
            exposed_s={"tokens": 0.1},
        )
        candidate = SimpleNamespace(kind=label)
        return search.Found(label, prediction, candidate, leaves_nodes=leaves_nodes)

    def ranking(*found):
        return search.Ranking(found, found[0], len(found), (), (found[0].label, 1.0))

    stock = option("stock", 1.0, 1.0)
    near, far = option("near", 0.9, 1.0), option("far", 0.7, 1.2, leaves_nodes=True)
    best = search._by_worth(ranking(near), ranking(far), stock)
    assert [of.label for of in best.found] == ["near", "far"] and best.fastest is near
    said = search.Results(best, ranking(stock), stock, None, None, None, False).verdict(80.0)
    assert said.startswith("Use FSEP (near): ")
    assert said.endswith(" far takes 22.2% less time, but may lose over nodes.")
    sure = option("sure", 0.7, 0.9, leaves_nodes=True)
    best = search._by_worth(ranking(near), ranking(sure), stock)
    assert [of.label for of in best.found] == ["sure", "near"] and best.fastest is sure

    lonely = search._by_worth(ranking(far), ranking(far), stock)
    results = search.Results(lonely, ranking(stock), stock, None, None, None, False)
    assert not results.takes_fsep
    assert results.verdict(80.0).startswith(
        "Take stock, not FSEP: of its settings far is the best, and it is 1.43 times (0.83 to 1.43)"
        " as fast as stock; over nodes the worst case must gain."
    )


def test_with_muon_experts_are_at_home(model, tmp_path):
    words = [*f"{GPUS} --workload W1 --memory-gib 60".split(), "--json", tmp_path / "out.json"]
    python("-m", "megatron_laer", "advise", "--model", model, *words, "--", "--optimizer", "muon")
    best = json.loads((tmp_path / "out.json").read_text())["best"]
    assert best and all(" experts C=" in each["label"] for each in best)


def test_slots_fit_the_buffers_of_the_flags_back_end(model, tmp_path):
    """HybridEP takes a multiple of 4 slots in all, where 2 ranks would have 5 each."""
    path, out = tmp_path / "nodes-of-one.yaml", tmp_path / "out.json"
    cluster = replace(load_cluster("h100-8"), ranks_per_node=1)
    path.write_text(yaml.safe_dump(cluster_content(cluster)))
    run = "--bf16 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep".split()
    run.append("--moe-permute-fusion")  # without it tokens take no other way through nodes
    words = f"--cluster {path} --gpus 2 --workload natural --memory-gib 200".split()
    python("-m", "megatron_laer", "advise", "--model", model, *words, "--json", out, "--", *run)
    found = [each["flags"].split() for each in json.loads(out.read_text())["best"]]
    (flags,) = [each for each in found if "flex" in each]
    given = [*python("-m", "megatron_laer", "flags", model).split(), *run, *flags]
    python("-m", "megatron_laer", "check-recipe", "--ranks", "2", "--", *given)


def flags(**given):
    return Namespace(**run_flags.DEFAULTS | given)


def test_flags_give_the_shape_of_the_run():
    model = read_model("mixtral-8x7b-e8k2")
    given = flags(
        micro_batch_size=2,
        seq_length=2048,
        global_batch_size=64,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=4,
        num_layers_per_virtual_pipeline_stage=4,
        recompute_granularity="selective",
        recompute_modules=["moe"],
        use_distributed_optimizer=False,
    )
    shape = run_flags.run_shape(given, 32, model, 4096, 8)
    assert (shape.ranks, shape.stages, shape.chunks, shape.tensor) == (8, 4, 2, 2)
    assert (shape.tokens, shape.microbatches) == (2048, 8)
    assert (shape.recompute, shape.attention_again) == (Recompute.FULL, False)
    assert (shape.shards_optimizer, shape.overlaps_data_parallel) == (False, True)
    shape = run_flags.run_shape(flags(), 32, model, 4096, 8)
    assert (shape.ranks, shape.tokens, shape.microbatches) == (32, 4096, 8)
    in_bf16 = run_flags.model_with(flags(bf16=True), read_model("tiny-moe"))
    assert (read_model("tiny-moe").bytes_per_element, in_bf16.bytes_per_element) == (4, 2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pipeline_model_parallel_size": 4}, "--gpus 6: is no multiple of 4 pipeline stages"),
        ({"tensor_model_parallel_size": 4}, "1 pipeline stages times 4 tensor"),
        ({"global_batch_size": 7}, "--global-batch-size 7: 6 GPUs take 6 sequences at a time"),
        ({"seq_length": 99, "tensor_model_parallel_size": 2}, "--seq-length 99: is no multiple"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2: is not simulated"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp: is not simulated"),
        ({"tensor_model_parallel_size": 3}, "-size 3: the model's 32 attention heads are no mul"),
        (
            {"decoder_first_pipeline_num_layers": 99},
            "--decoder-first-pipeline-num-layers 99: is",
        ),
        ({"rampup_batch_size": [1, 2, 3]}, "--rampup-batch-size 1 2 3: is not simulated; leave"),
        ({"optimizer": "sgd"}, "--optimizer sgd: is not simulated, since memory and time of adam"),
        ({"num_layers_per_virtual_pipeline_stage": 5}, "32 layers on 1 stages are no multiple"),
    ],
)
def test_flags_that_give_no_shape_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        run_flags.run_shape(flags(**given), 6, read_model("mixtral-8x7b-e8k2"), 4096, 8)


def test_heads_that_share_no_width_are_refused(tmp_path, model, capsys):
    path = tmp_path / "three-heads.yaml"
    path.write_text(model.read_text().replace("num-attention-heads: 32", "num-attention-heads: 3"))
    for command in ("advise --gpus 8", "simulate --workload W1 --ranks 8"):
        given = [*command.split(), "--model", str(path), "--cluster", "h100-8"]
        assert cli.main(given) == 2
        assert "has hidden-size 4096, which is no multiple of its num-attention-heads, 3; mend" in (
            capsys.readouterr().err
        )


def test_combined_1f1b_is_tried_where_megatron_allows_it(advised):
    found = advised(*f"{GPUS} --workload W1 --memory-gib 60".split())
    flag = "--overlap-moe-expert-parallel-comm --delay-wgrad-compute"
    rows = found["best"] + found["stock"]
    assert any(flag in each["flags"] for each in rows)
    for each in rows:
        assert (flag in each["flags"]) == (", overlap" in each["label"])
    seconds = [value(row) for row in found["best"]]
    alike = sum(each <= 1.01 * min(seconds) for each in seconds)
    assert seconds[alike:] == sorted(seconds)[alike:]
    peaks = [row["peak_bytes"] for row in found["best"][:alike]]
    assert peaks == sorted(peaks)

    shape = run_flags.run_shape(flags(), 8, read_model("mixtral-8x7b-e8k2"), 4096, 8)
    asked = flags(overlap_moe_expert_parallel_comm=True)
    assert run_flags.overlaps(flags(), shape) == (False, True)
    assert run_flags.overlaps(asked, shape) == (True,)
    again = replace(shape, recompute=Recompute.FULL)
    assert run_flags.overlaps(flags(), again) == (False,)
    for given, of in (
        (asked, again),
        (flags(overlap_moe_expert_parallel_comm=True, moe_shared_expert_overlap=True), shape),
    ):
        with pytest.raises(ValueError, match="--overlap-moe-expert-parallel-comm: not with"):
            run_flags.overlaps(given, of)
