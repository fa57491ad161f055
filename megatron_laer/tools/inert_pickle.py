"""A pickle is read as plain records: whatever classes and functions it names, nothing is run.

Unpickling is running a program that somebody else wrote. This runs none: it imports nothing and
calls nothing, but keeps the names, arguments and states that the pickle holds (see `Record`). Only
what the default protocols write is understood, and memory is bounded by the pickle's length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of half a million pieces of tensors; none of them costs more than a hundred bytes.
MAX_OPERATIONS = 2**25


@dataclass(frozen=True, slots=True)
class Name:
    """Names a class, function or constant that the pickle refers to, such as torch.bfloat16."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Compared by identity and shown by name: a record may hold itself, and texts of any length.
@dataclass(slots=True, eq=False, repr=False)
class Record:
    """Stands for an object that unpickling would have made.

    Attributes:
        name: of its class, or of the function that would have returned it.
        arguments: that would have been passed.
        state: of the object: mostly a mapping of its attributes; None without one.
    """

    name: Name
    arguments: tuple[Any, ...]
    state: Any = None

    def __repr__(self) -> str:
        return f"Record({self.name})"


def read(data: bytes, is_allowed: Callable[[Name], bool]) -> Any:
    """Read a pickle's object, made of texts, numbers, lists, tuples, mappings, `Name`, `Record`.

    Mappings are without the entries whose keys are no texts: hashing those could take forever.

    Args:
        is_allowed: whether the pickle may refer to this name.

    Raises:
        ValueError: a name that is not allowed, an operation that is not understood, or damage.
    """
    machine = _Machine(is_allowed)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count == MAX_OPERATIONS:
                raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
            if operation.name == "STOP":
                return machine.pop(object)
            machine.do(operation.name, argument)
    except IndexError as error:
        raise ValueError("it takes more from its stack than there is") from error
    raise ValueError("it has no end")


# Frames and the protocol's number say how bytes are to be read, not what is built.
_IGNORED = ("PROTO", "FRAME")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)
# A set is a list here: hashing is what is to be avoided.
_EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAPPINGS = (Name("collections", "OrderedDict"), Name("builtins", "dict"))


class _Machine:
    """Holds the stack and the memo of a pickle, as `pickletools` documents them."""

    def __init__(self, is_allowed: Callable[[Name], bool]) -> None:
        self._is_allowed = is_allowed
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def pop[T](self, kind: type[T]) -> T:
        """Take the topmost object off the stack.

        Raises:
            ValueError: it is of another kind.
            IndexError: there is none.
        """
        found = self._stack.pop()
        if not isinstance(found, kind):
            raise ValueError(f"it has a {type(found).__name__} where a {kind.__name__} belongs")
        return found

    def do(self, operation: str, argument: Any) -> None:
        """Do one operation.

        Raises:
            ValueError: it is not understood, or does not fit the stack.
            IndexError: the stack is too short.
        """
        push = self._stack.append
        if operation in _IGNORED:
            pass
        elif operation in _LITERALS:
            push(argument)
        elif operation in _CONSTANTS:
            push(_CONSTANTS[operation])
        elif operation in _EMPTY:
            push(_EMPTY[operation]())
        elif operation in _TUPLES:
            items = [self.pop(object) for _ in range(_TUPLES[operation])]
            push(tuple(reversed(items)))
        elif operation == "TUPLE":
            items = self._since_mark()
            self._stack.append(tuple(items))
        elif operation == "MARK":
            self._below_marks.append(self._stack)
            self._stack = []
        elif operation == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif operation in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"it takes number {argument} of its memo, where nothing is")
            push(self._memo[argument])
        elif operation in ("APPENDS", "ADDITEMS"):
            items = self._since_mark()
            self._top(list).extend(items)
        elif operation == "APPEND":
            item = self.pop(object)
            self._top(list).append(item)
        elif operation == "SETITEMS":
            self._set(self._since_mark())
        elif operation == "SETITEM":
            value, key = self.pop(object), self.pop(object)
            self._set([key, value])
        else:
            self._make(operation, argument)

    def _make(self, operation: str, argument: Any) -> None:
        """Do one of the operations that name a class, or would make an object."""
        if operation == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif operation == "STACK_GLOBAL":
            name, module = self.pop(str), self.pop(str)
            self._name(module, name)
        elif operation in ("REDUCE", "NEWOBJ"):
            arguments, called = self.pop(tuple), self.pop(Name)
            # Made empty, to be filled by what follows.
            is_mapping = called in _MAPPINGS and not arguments
            self._stack.append({} if is_mapping else Record(called, arguments))
        elif operation == "BUILD":
            state = self.pop(object)
            self._top(Record).state = state
        else:
            raise ValueError(f"it uses the operation {operation}, which no list of tensors needs")

    def _top[T](self, kind: type[T]) -> T:
        found = self.pop(kind)
        self._stack.append(found)
        return found

    def _since_mark(self) -> list[Any]:
        """Take away the last mark, and return what was pushed since."""
        items = self._stack
        self._stack = self._below_marks.pop()
        return items

    def _set(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        self._top(dict).update((key, value) for key, value in pairs if isinstance(key, str))

    def _name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if not self._is_allowed(found):
            raise ValueError(f"it asks for {found}")
        self._stack.append(found)
