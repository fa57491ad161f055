"""The tables of docs/metrics.md are made from the descriptions of metrics in the code.

`python -m tests.metrics_page` writes the page; a unit test compares it.
"""

from __future__ import annotations

from pathlib import Path

from megatron_laer.telemetry.metrics import (
    LOGGED,
    RECORDED_OF_LAYERS,
    RECORDED_OF_STEPS,
    table,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"

_BEGIN = """\
# Metrics

This page is made from `megatron_laer/telemetry/metrics.py` by
```text
python -m tests.metrics_page
```

## Logged

In Megatron's log line, TensorBoard and W&B, through Megatron's own writers, every
`--log-interval` steps. The log line leaves some out, and 99th percentiles: Slurm passes output on
in pieces of 1,024 bytes, and a longer line may get another rank's into its middle. Percentiles
are over layers. Layers count from 0 in names, as in
Megatron's own metrics; a layer's value is in TensorBoard and W&B only. Predictions are the cost
model's, with the constants of the cluster in force. The times of layers need marks in the stream
of compute, which only planner ranks that record metrics set.
"""

_STEPS = """
## Recorded

`--fsep-record-metrics DIR` writes them for every step, into a file `DIR/metrics-I.jsonl` for each
FSEP group I, for [`report`](report.md) and for whatever reads lines of JSON:

```text
{"format":"megatron_laer-metrics","version":2,"num_ranks":N,...,"layers":["layer 1",...],"crc":...}
{"step":0,"run":{"plan_mode":"adaptive",...},"cluster":{"name":...,"gemm":...,...},"crc":...}
{"step":0,"step_ms":...,"metrics":{...},"layers":{"passes":[...],...},"rank_tokens":[...],"crc":...}
```
The first line says what the recording is of; a line `run` how a run began that goes on from its
step, with the settings and versions that its metrics depend on, and `cluster` the constants that it
reckons with, under the keys of a [cluster file](calibrate.md); every other line is a step. It is
written by the planner rank, rank 0 of the group, about the group: once the device has passed the
step, so no step waits for it. `metrics` has the logged names, of this group and step alone.
A step's numbers have four digits, and `null` stands for what was not there. A step takes about
L·(N·6 + 110) bytes. The last key of each line is the CRC-32 of the bytes before it, as eight
hexadecimal digits, and a line that it does not fit is refused. A killed run leaves whole lines, and
a resumed one goes on with the file as with [other recordings](checkpoints.md#recordings).

Of a step:

"""

_LAYERS = """
Of each of its layers, in lists in the order of `layers`:

"""

_END = """
`rank_tokens` has for each layer the tokens that each rank computed, summed over the step.
"""


def page() -> str:
    """The whole page."""
    return (
        f"{_BEGIN}\n"
        + "\n".join(table(LOGGED))
        + "\n"
        + _STEPS
        + "\n".join(table(RECORDED_OF_STEPS))
        + "\n"
        + _LAYERS
        + "\n".join(table(RECORDED_OF_LAYERS))
        + "\n"
        + _END
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
