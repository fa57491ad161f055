"""Format of `--fsep-record DIR trace`, one file per FSEP group: `files.records` of three kinds.

`counts` has a microbatch's tokens from each source rank for each expert. `pairs` has those of a
step with `--fsep-set pairs_interval`, summed over the group: tokens that chose both of two experts.
They go row by row of the upper triangle, whose diagonal has each expert's tokens. `sets` has the
experts of some of these tokens: a bit per expert, the lowest first, in whole bytes per token.

There is no compression and no index, because the training thread writes it.
`tools/traces/reading.py` reads whole files.

Legend: N source ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_laer.arrays import Bool, Int64
from megatron_laer.files.recording import RecordingFile
from megatron_laer.files.records import COUNT, MAX_RANKS, OPEN, Field, Format
from megatron_laer.planner.layout import MAX_EXPERTS

MAX_COUNT = int(np.iinfo(np.int32).max)

_LAYER = Field("layer", "<u4", below="layers")
TRACE = Format(
    "megatron_laer-trace",
    "recording of --fsep-record DIR trace",
    "trace",
    {
        "num_ranks": MAX_RANKS,
        "num_experts": MAX_EXPERTS,
        "pairs": MAX_EXPERTS * (MAX_EXPERTS + 1) // 2,
        "set_bytes": MAX_EXPERTS // 8 + 1,
    },
    {
        "counts": (
            _LAYER,
            Field("microbatch", "<u4", below=2**32),
            Field("counts_NE", COUNT, ("num_ranks", "num_experts"), MAX_COUNT + 1),
        ),
        "pairs": (_LAYER, Field("triangle", COUNT, ("pairs",), MAX_COUNT + 1)),
        "sets": (_LAYER, Field("bits", "<u1", (OPEN, "set_bytes"))),
    },
)


class TraceWriter(RecordingFile):
    """Writer of every microbatch's counts, on rank 0 of an FSEP group.

    A resumed run continues an existing recording. Records of earlier steps stay; those from
    `first_step` on are moved to another file, named `*.cut-from-STEP.*`. The same happens whenever
    the step goes back.
    """

    def __init__(
        self,
        path: Path,
        num_ranks: int,
        num_experts: int,
        layer_names: Sequence[str],
        first_step: int = 0,
        run: str | None = None,
    ) -> None:
        fields = {
            "num_ranks": num_ranks,
            "num_experts": num_experts,
            "pairs": num_experts * (num_experts + 1) // 2,
            "set_bytes": -(-num_experts // 8),
            "layers": [*layer_names],
        }
        super().__init__(path, TRACE, fields, first_step, run)

    def append(
        self,
        step: int,
        layer_index: int,
        microbatch: int,
        counts_NE: npt.NDArray[np.integer[Any]],
    ) -> None:
        """Write one record. Of two with the same keys, readers use the later one."""
        values = {"layer": layer_index, "microbatch": microbatch, "counts_NE": counts_NE}
        self.add("counts", step, **values)

    def append_pairs(self, step: int, layer_index: int, pairs_EE: Int64) -> None:
        """Write the pairs of a layer in a step, a symmetric table."""
        triangle = pairs_EE[np.triu_indices(len(pairs_EE))]
        self.add("pairs", step, layer=layer_index, triangle=triangle)

    def append_sets(self, step: int, layer_index: int, chosen_TE: Bool) -> None:
        """Write the experts of some tokens of a layer in a step."""
        bits = np.packbits(chosen_TE, axis=1, bitorder="little")
        self.add("sets", step, layer=layer_index, bits=bits)
