"""A report is one page of HTML that shows what a run kept of forced balance, and where time went.

`sources` finds what a run has written, `recorded` and `replayed` make a `RunData` of it, `verdict`
and `figures` work out what is shown, `page` writes it. The page's scripts are in the folder `page`.
Neither Megatron nor torch is imported.
"""
