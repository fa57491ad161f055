"""Life of a layer's restored experts as one table: events and kinds of run give actions.

A pass picks its column once its layout is known (`column`). `runtime/weights/restored.py` and
`runtime/scheduler.py` look cells up, and carry out their actions. docs/internals/architecture.md
draws the table and the overlap that it makes. Impossible combinations of kinds have no column.

Source: the LAER-MoE paper's fine-grained schedule (arXiv 2602.11686), with parameters and gradients
on communicators of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import cache


class Kind(Enum):
    """Kind of a run, of a layer or of a pass; a pass has several, or none if it is plain."""

    ALONE = "no overlap"
    FRESH = "layouts after the gate"
    STEP = "held over a step"
    PARTS = "parts of 1F1B"
    DELAYED = "delayed weight gradients"
    SYNCHRONISED = "device synchronised between operations"
    HOMES = "experts at home"
    DIRECTIONS = "payloads by direction"
    EVALUATION = "no backward"
    FIRST = "first pass of a checkpoint"
    RERUN = "re-run of a checkpoint"
    EMPTY = "no replica"
    FROZEN = "no gradient of weights"


Kinds = frozenset[Kind]


class Event(Enum):
    """Event of a pass, in the order of a layer's forward and backward."""

    PREPARED = "the chunk begins, or the tokens of the layer before have arrived"
    DECIDED = "the layout is decided"
    GATE = "the gate has chosen"
    AFTER_EXPERTS = "after the experts"
    LAST_LAYER = "the operation's last layer"
    RELEASED = "another operation begins"
    CHUNK_BACKWARD = "the chunk's backward begins"
    NEXT_IN_BACKWARD = "backward comes here next"
    OUTPUT_GRAD = "gradient of the output"
    INPUT_GRAD = "gradient of the inputs"
    WEIGHT_GRADS = "gradient of the weights"
    DISPATCH_GRAD = "gradient of the dispatch"
    WAIT = "the wait's turn"


class Action(Enum):
    """Action on a layer's weights or gradients, or of the scheduler."""

    AWAIT = "wait for gathered parameters"
    RESTORE = "restore"
    RESTORE_BACKWARD = "restore for backward"
    KEEP = "keep if it fits"
    FREE = "free or hand on"
    FREE_BACKWARD = "free or hand on backward's"
    HAND_ON = "leave them to the layer's own next pass"
    FETCH = "fetch those of the next layer or operation"
    MAKE_WAIT = "make the wait"
    JOIN_WAIT = "join the wait to the tokens"
    DELAY = "leave their compute to `backward_dw`"
    SEND = "start the reduce"
    SUM = "add to the step's, send the last"
    FINISH = "wait for the reduce"
    REPORT = "report the parameters"


Cell = tuple[Action, ...]
Column = Mapping[Event, Cell]


def kinds_of(found: Mapping[Kind, bool]) -> Kinds:
    return frozenset(kind for kind, holds in found.items() if holds)


def _of(*kinds: Kind) -> Kinds:
    return frozenset(kinds)


_K, _A = Kind, Action
# For each event, kinds and actions; a pass takes the first row whose kinds it all has.
LIFE: Mapping[Event, Mapping[Kinds, Cell]] = {
    # All gradients have arrived at the end of a checkpoint: around a transformer layer, its re-run
    # begins with a wait too.
    Event.PREPARED: {
        _of(_K.ALONE): (),
        _of(_K.FRESH): (_A.MAKE_WAIT,),
        _of(): (_A.AWAIT, _A.RESTORE, _A.MAKE_WAIT),
    },
    # Without overlap rows wait in the call of their module. Ranks gather homes in one order.
    Event.DECIDED: {
        _of(_K.ALONE, _K.HOMES): (_A.AWAIT,),
        _of(_K.ALONE): (),
        _of(): (_A.AWAIT, _A.RESTORE),
    },
    # In backward these tokens' gradient follows the dispatch's, hence the start of the reduce. A
    # wait that is not joined is dropped.
    Event.GATE: {
        _of(_K.FROZEN): (),
        _of(_K.PARTS): (_A.JOIN_WAIT,),
        _of(_K.EMPTY): (),
        _of(): (_A.JOIN_WAIT,),
    },
    Event.AFTER_EXPERTS: {
        _of(_K.STEP, _K.RERUN, _K.DIRECTIONS): (_A.RESTORE_BACKWARD,),
        _of(_K.STEP): (),
        _of(_K.EVALUATION): (_A.FREE,),
        _of(_K.RERUN, _K.DIRECTIONS): (_A.FREE, _A.RESTORE_BACKWARD),
        _of(_K.RERUN): (),
        _of(_K.DIRECTIONS): (_A.FREE,),
        _of(): (_A.KEEP, _A.FREE),
    },
    Event.LAST_LAYER: {_of(_K.ALONE): (), _of(_K.SYNCHRONISED): (), _of(): (_A.FETCH,)},
    Event.RELEASED: {_of(_K.STEP): (), _of(): (_A.FREE, _A.FREE_BACKWARD)},
    Event.CHUNK_BACKWARD: {_of(_K.ALONE): (), _of(_K.STEP): (), _of(): (_A.RESTORE_BACKWARD,)},
    # A checkpoint runs forward again first.
    Event.NEXT_IN_BACKWARD: {
        _of(_K.EVALUATION): (),
        _of(_K.FIRST): (_A.RESTORE,),
        _of(): (_A.RESTORE_BACKWARD,),
    },
    Event.OUTPUT_GRAD: {
        _of(_K.ALONE): (_A.RESTORE_BACKWARD, _A.HAND_ON),
        _of(_K.STEP): (_A.RESTORE_BACKWARD,),
        _of(): (_A.RESTORE_BACKWARD, _A.FETCH),
    },
    Event.INPUT_GRAD: {_of(_K.STEP): (), _of(): (_A.FREE_BACKWARD,)},
    Event.WEIGHT_GRADS: {_of(_K.DELAYED): (_A.DELAY,), _of(): ()},
    # Gradients of the weights leave after those of the tokens.
    Event.DISPATCH_GRAD: {
        _of(_K.FROZEN): (),
        _of(_K.EMPTY): (),
        _of(_K.STEP): (_A.SUM,),
        _of(): (_A.SEND,),
    },
    # Hooks of homes' parameters run with stock's gradients, before the sums are there.
    Event.WAIT: {
        _of(_K.HOMES, _K.PARTS, _K.EMPTY): (_A.REPORT,),
        _of(_K.HOMES, _K.PARTS): (_A.FINISH, _A.REPORT),
        _of(): (_A.FINISH,),
    },
}
IMPOSSIBLE = (_of(_K.FRESH, _K.STEP), _of(_K.FIRST, _K.RERUN))


@cache
def column(kinds: Kinds) -> Column:
    """Return the cells of a pass of these kinds; an event that it cannot have is left out."""
    assert not any(pair <= kinds for pair in IMPOSSIBLE), f"no pass is {kinds}"
    found = {}
    for event, rows in LIFE.items():
        fitting = (cell for needed, cell in rows.items() if needed <= kinds)
        if (cell := next(fitting, None)) is not None:
            found[event] = cell
    return found
