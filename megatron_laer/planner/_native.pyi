import numpy as np
import numpy.typing as npt

_Int64 = npt.NDArray[np.int64]
_Int16 = npt.NDArray[np.int16]

sources: str

def slot_loads(counts_NE: _Int64, slots_S: _Int16, node_size: int, /) -> tuple[_Int64, _Int64]: ...
def rank_row(
    counts_NE: _Int64,
    node_counts_QE: _Int64,
    slots_S: _Int16,
    loads_S: _Int64,
    node_size: int,
    rank: int,
    /,
) -> _Int64: ...
def rank_columns(
    counts_NE: _Int64,
    node_counts_QE: _Int64,
    slots_S: _Int16,
    loads_S: _Int64,
    node_size: int,
    rank: int,
    /,
) -> _Int64: ...
def totals(
    counts_NE: _Int64,
    node_counts_QE: _Int64,
    slots_S: _Int16,
    loads_S: _Int64,
    node_size: int,
    /,
) -> tuple[_Int64, _Int64, _Int64, _Int64, _Int64]: ...
def construct(counts_NE: _Int64, current_S: _Int16, node_size: int, /) -> _Int16: ...
def proportional(counts_NE: _Int64, current_S: _Int16, node_size: int, /) -> _Int16: ...
def greedy(counts_NE: _Int64, current_S: _Int16, node_size: int, /) -> _Int16: ...
def search(
    counts_NE: _Int64,
    current_S: _Int16,
    node_size: int,
    scenarios: int,
    candidates: int,
    exchanges: int,
    seed: int,
    /,
) -> _Int16: ...
