"""A report: one page of HTML on a run's balance and times.

`run_files` finds the files of a run, `recorded` makes a `RunData` of them,
`assessment` and `figures` compute the contents, `page` writes it. The page's scripts are in the
folder `page`. Neither Megatron nor torch is imported.
"""
