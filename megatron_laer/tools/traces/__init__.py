"""Routing traces: the tokens that each rank sent to each expert, over a training run.

`read_trace` reads the formats below and recognizes them by content; `telemetry.trace_file` writes
ours during training. Nothing is unpickled, and a stated size is checked against the file's size
first. Neither Megatron nor torch is imported.

| format | what it is | file |
| --- | --- | --- |
| `fsep` | ours, one file per FSEP group, from `--fsep-record-trace` | `telemetry.trace_file` |
| `megatron` | JSONL, one file per rank, from Megatron's `--moe-routing-trace-path` | `megatron` |
| `smartmoe` | the folder `moe_trace` of SmartMoE's artifact | `smartmoe` |
| `npz` | one array `tokens` [iterations, layers, ranks, microbatches, experts] | `smartmoe` |
| `csv` | a table of counts, long or wide | `csv_table` |
| `sets` | the experts of each token, a line per token | `sets` |
"""

from megatron_laer.tools.traces.reading import FORMATS, read_trace

__all__ = ["FORMATS", "read_trace"]
