"""Routing traces: the tokens that each rank sent to each expert, over a training run.

`read_trace` reads the recordings of `telemetry.trace_file`, which training writes with
`--fsep-record DIR trace`. Neither Megatron nor torch is imported.
"""

from megatron_laer.tools.traces.reading import read_trace

__all__ = ["read_trace"]
