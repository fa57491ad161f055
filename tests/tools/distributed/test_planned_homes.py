"""Homes that `plan` makes from a run's pairs: the next run sends fewer rows."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_laer.cpu.training import train
from megatron_laer.planner.homes_file import read_homes
from megatron_laer.tools import cli
from tests.parity.flags import command_line
from tests.topical_routing import by_topic

RANKS, STEPS = 4, 4
AT_HOME = (
    " --expert-parallel-mode fsep --fsep-sharding experts --fsep-planner static"
    " --fsep-plan-mode forecast --fsep-node-size 2 --fsep-token-exchange node"
    " --fsep-set restore_algorithm=node --log-interval 1"
)


def test_a_run_records_pairs_and_the_next_has_homes_by_them(ranks, text_data, tmp_path):
    def trained(flags):
        command = command_line(
            text_data, flags, expert_parallel=RANKS, global_batch=16, steps=STEPS
        )
        return ranks(RANKS).run(train, command, None, None, by_topic)[0]

    def rows_sent(folder, homes=""):
        record = f" --tensorboard-dir {folder} --fsep-record {folder} trace"
        record += " --fsep-set pairs_interval=1 sampled_sets=100000"
        losses = trained(AT_HOME + record + homes).losses
        events = EventAccumulator(str(folder))
        events.Reload()
        rows = [event.value for event in events.Scalars("fsep_token_rows_inter_node")]
        assert len(rows) == STEPS
        return losses, rows

    losses, rows = rows_sent(tmp_path / "before")
    trace, homes = tmp_path / "before" / "group-0.trace", tmp_path / "homes.json"
    plan = f"plan {trace} --node-size 2 --homes {homes} --json {tmp_path / 'plan.json'}"
    assert cli.main(plan.split()) == 0
    assert not all(order.is_stock for order in read_homes(homes).by_layer.values())
    again, fewer = rows_sent(tmp_path / "after", f" --fsep-homes {homes}")

    stock = trained("").losses
    assert losses == pytest.approx(stock, rel=1e-5) and again == pytest.approx(stock, rel=1e-5)
    layers = json.loads((tmp_path / "plan.json").read_text())["homes"]
    expected = sum(of["rows"] for of in layers) / sum(of["stock_rows"] for of in layers)
    assert expected < 1
    # The plan counted these steps. Tokens are not quite from all nodes alike.
    later = slice(STEPS // 2, None)
    assert sum(fewer[later]) / sum(rows[later]) == pytest.approx(expected, abs=0.03)
    assert sum(fewer[later]) < sum(rows[later])
