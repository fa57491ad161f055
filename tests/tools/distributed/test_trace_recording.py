"""Files of a run: `plan` reads its routing, which is the router's, and `inspect` its checkpoint."""

from __future__ import annotations

import re

from megatron_laer.cpu.training import train
from megatron_laer.tools import cli
from megatron_laer.tools.traces.reading import read_trace
from tests.parity.flags import command_line

STEPS, MICROBATCHES = 4, 2


def test_a_recorded_run_can_be_planned_for(ranks, text_data, tmp_path, capsys):
    command = command_line(
        text_data,
        f" --expert-parallel-mode fsep --fsep-sharding rows --fsep-record {tmp_path} trace"
        f" --save {tmp_path} --save-interval {STEPS} --ckpt-format torch_dist"
        " --eval-interval 2 --eval-iters 1",
        global_batch=2 * 2 * MICROBATCHES,
        steps=STEPS,
    )
    ranks(2).run(train, command)
    trace = read_trace(tmp_path / "group-0.trace")
    assert trace.layers == ("layer 1", "layer 2")
    records = STEPS * MICROBATCHES * len(trace.layers)
    assert trace.counts_RNE.shape == (records, 2, 8), "evaluation must not be recorded"
    # Two sequences of 48 tokens per rank and microbatch, two experts each.
    assert (trace.counts_RNE.sum(axis=2) == 2 * 48 * 2).all()

    assert cli.main(["plan", str(tmp_path / "group-0.trace"), "--node-size", "2"]) == 0
    assert "greedy" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path)]) == 0
    state = rf"group 0: N = 2 ranks, C = \d+ slots, E = 8 experts; goes on with step {STEPS}"
    assert re.search(state, capsys.readouterr().out)
