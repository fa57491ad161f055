"""`plan` takes its defaults from the metrics that a run recorded next to its trace."""

from __future__ import annotations

import json

from megatron_laer.tools import cli
from tests.recorded_runs import OWN, record_run
from tests.unit.plan_cases import drifting_trace, recording

OF_THE_RUN = {
    "cluster": OWN.name,
    "hidden": "64",
    "ffn": "32",
    "gated": "False",
    "bytes_per_element": "4",
    "recompute": "full",
    "restore_algorithm": "node",
    "token_exchange": "node",
    "top_k": "3",
}
QUICK = ("--strategy", "greedy", "--mode", "forecast", "--json")


def run(*words, capsys):
    return cli.main(["plan", *map(str, words)]), *capsys.readouterr()


def test_a_trace_is_planned_for_as_the_metrics_beside_it_say(tmp_path, capsys):
    record_run(tmp_path / "run", run=OF_THE_RUN, cluster=OWN)
    trace, out = tmp_path / "run" / "group-0.trace", tmp_path / "x.json"
    for path in (trace, tmp_path / "run"):
        status, text, err = run(path, *QUICK, out, capsys=capsys)
        assert (status, err) == (0, "")
        header = text.splitlines()[1]
        assert "4 ranks in nodes of 2 on my-machine; experts of 64 x 32, not gated; from" in header
        names = header.partition("metrics-0.jsonl: ")[2].split(", ")
        assert set(names) == {*OF_THE_RUN, "node_size", "capacity"}
        assert "travel by node; expected for even counts, 20000 tokens of top-3 and C = 3" in text
    written = json.loads(out.read_text())
    assert written["from_recording"] == names
    for name in ("bytes_per_element", "recompute", "restore_algorithm", "token_exchange"):
        assert str(written[name]) == OF_THE_RUN[name]

    # Flags win, and another model is in bf16.
    words = "--cluster h100-8 --config mixtral-8x7b-e8k2 --ffn 7 --capacity 2 --recompute none"
    more = "--restore-algorithm flat --token-exchange rank"
    status, text, err = run(trace, *words.split(), *more.split(), *QUICK, out, capsys=capsys)
    assert (status, err) == (0, "")
    # The recorded nodes belong to the recorded cluster.
    assert "for 4 ranks in nodes of 4 on h100-8; experts of 4096 x 7\n" in text
    written = json.loads(out.read_text())
    assert written["from_recording"] == [] and written["bytes_per_element"] == 2
    assert [row["capacity"] for row in written["rows"]] == [2, 2]

    # Slots and nodes belong to the recorded number of ranks.
    status, text, _ = run(trace, "--ranks", 8, *QUICK, out, capsys=capsys)
    assert status == 0 and "planned for 8 ranks in nodes of 8 on my-machine; experts of" in text
    assert json.loads(out.read_text())["rows"][-1]["capacity"] == 2


def test_experts_stay_at_home_as_recorded_or_as_the_flag_says(tmp_path, capsys):
    record_run(tmp_path / "run", run=OF_THE_RUN | {"sharding": "experts"}, cluster=OWN)
    out = tmp_path / "x.json"
    words = ("--strategy", "static", "laer", "greedy", "--mode", "forecast", "--json", out)
    words = (*words, "--restore-algorithm", "flat")
    for flags, sharding in (((), "experts"), (("--sharding", "rows"), "rows")):
        status, text, err = run(tmp_path / "run", *flags, *words, capsys=capsys)
        assert (status, err) == (0, "")
        assert ("not gated, at home; from" in text) == (sharding == "experts")
        assert ("laer leaves no expert at home" in text) == (sharding == "experts")
        written = json.loads(out.read_text())
        assert written["sharding"] == sharding
        stock, static, laer, greedy = written["rows"]
        assert static["mean"] == stock["mean"] or sharding == "rows"
        assert (static["restored_bytes"] == 0) == (sharding == "experts")
        assert laer["restored_bytes"] > 0
        # A rank fetches at most its replica instead of three slots.
        assert (greedy["restored_bytes"] <= 2 * 64 * 32 * 4) == (sharding == "experts")
    for words, problem in (
        (("--ranks", 16), "8 experts cannot be at home on 16 ranks in equal numbers; give"),
        (("--capacity", 2), "--capacity 2: each rank has 2 home experts and needs a slot for rep"),
    ):
        status, _, err = run(tmp_path / "run", *words, capsys=capsys)
        assert status == 2 and problem in err and len(err.splitlines()) == 1


def test_defaults_are_said_to_be_that(tmp_path, capsys):
    by_default = "on a100-4x8-ib800 (by default); experts of 4096 x 14336 (by default)\n"
    path = recording(tmp_path / "group-0.trace", drifting_trace())
    assert by_default in run(path, *QUICK, tmp_path / "x.json", capsys=capsys)[1]
    record_run(tmp_path / "run", run={"cluster": "my-machine"}, cluster=None)
    status, out, err = run(tmp_path / "run", *QUICK, tmp_path / "x.json", capsys=capsys)
    assert status == 0 and by_default.removesuffix("\n") in out
    assert "a100-4x8-ib800 for cluster 'my-machine', whose constants it does not hold" in err
    assert "4096 for hidden, which is missing" in err and len(err.splitlines()) == 1


def test_metrics_of_another_run_or_damaged_ones_are_refused_and_not_written_over(tmp_path, capsys):
    folder = tmp_path / "run"
    record_run(folder)
    path = folder / "group-0.trace"
    for name in ("metrics-0.jsonl", "metrics-3.jsonl", "plan.log"):
        status, _, err = run(path, "--json", folder / name, capsys=capsys)
        assert status == 2 and "--json" in err
    (folder / "metrics-0.jsonl").rename(tmp_path / "moved")
    (folder / "metrics-0.jsonl").symlink_to(tmp_path / "moved")
    status, _, err = run(path, "--json", tmp_path / "moved", capsys=capsys)
    assert status == 2 and "would write over the input" in err
    path.unlink()
    recording(path, drifting_trace())
    status, _, err = run(path, capsys=capsys)
    assert status == 2 and "they are of different runs, so move one away" in err
    (tmp_path / "moved").write_text("hello\n")
    status, _, err = run(path, capsys=capsys)
    assert status == 2 and "metrics-0.jsonl, line 1: not JSON" in err
