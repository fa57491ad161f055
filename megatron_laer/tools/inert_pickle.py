"""A restricted unpickler, which imports and calls nothing that a pickle names.

Classes and functions become `Name`s and their results `PickledObject`s. Only the operations of
the binary protocols are known. Mappings keep only text keys: hashing hostile ones could take
forever.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

# Enough for half a million pieces of tensors; no operation needs more than a hundred bytes.
MAX_OPERATIONS = 2**25


class Name(NamedTuple):
    """Class, function or constant in a pickle, such as torch.bfloat16."""

    module: str
    name: str

    def __call__(self, *arguments: object) -> Any:
        """Return a record of an object, or an empty mapping, whose items follow."""
        return {} if self in _MAPPINGS and not arguments else PickledObject(self, arguments)

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_MAPPINGS = (Name("collections", "OrderedDict"), Name("builtins", "dict"))


# Compared by identity and shown by name: a record may contain itself, and texts of any length.
@dataclass(slots=True, eq=False, repr=False)
class PickledObject:
    """Constructor's arguments and pickled state of an object."""

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"PickledObject({self.name})"


def read(data: bytes, is_allowed: Callable[[Name], bool]) -> Any:
    """Return a pickle's object, made of plain values, `Name`s and `PickledObject`s.

    Raises ValueError for a name that `is_allowed` rejects, an unknown operation or damage.
    """
    with _as_value_error():
        return _Unpickler(data, is_allowed).load()


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    # Handlers of operations fail in many ways on an unexpected stack.
    except Exception as error:
        raise ValueError(f"it is damaged: {type(error).__name__}: {error}"[:200]) from error


class _Operations(dict[int, Callable[[Any], None]]):
    """Handlers by operation, with a limit on the operations that may run."""

    left = MAX_OPERATIONS

    def __getitem__(self, key: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
        return super().__getitem__(key)

    def __missing__(self, key: int) -> Callable[[Any], None]:
        raise ValueError(f"it uses the operation {bytes([key])!r}, which no list of tensors needs")


# The unpickler in Python, whose operations can be replaced.
_PYTHONS: Any = pickle._Unpickler


class _Unpickler(_PYTHONS):  # type: ignore[misc]
    def __init__(self, data: bytes, is_allowed: Callable[[Name], bool]) -> None:
        super().__init__(io.BytesIO(data))
        self._is_allowed = is_allowed
        self.dispatch = _Operations(_HANDLERS)

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if not self._is_allowed(found):
            raise ValueError(f"it asks for {found}")
        return found

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))


_KNOWN = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
    *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.APPEND, pickle.APPENDS),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
)
_HANDLERS: dict[int, Callable[[Any], None]] = {
    operation[0]: _PYTHONS.dispatch[operation[0]] for operation in _KNOWN
} | {
    # A set becomes a list, which hashes nothing.
    pickle.EMPTY_SET[0]: _PYTHONS.dispatch[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS[0]: _PYTHONS.dispatch[pickle.APPENDS[0]],
    # As for REDUCE, the stack has a callable and its arguments.
    pickle.NEWOBJ[0]: _PYTHONS.dispatch[pickle.REDUCE[0]],
    pickle.SETITEM[0]: _Unpickler.set_item,
    pickle.SETITEMS[0]: _Unpickler.set_items,
}
