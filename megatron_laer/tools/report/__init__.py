"""A report: one page of HTML on a run's balance and times.

`read_metrics` reads a run's recorded metrics for scripts of your own.

`run_files` finds the files of a run, `logs` its logs, `recorded` makes a `RunData` of them,
`assessment` and `figures` compute the contents, `page` writes it. The page's scripts are in the
folder `page`. Neither Megatron nor torch is imported.
"""

from megatron_laer.tools.report.metrics_recording import MetricsRecording, read_metrics

__all__ = ["MetricsRecording", "read_metrics"]
