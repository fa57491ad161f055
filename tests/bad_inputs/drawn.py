"""Bad inputs drawn from a seed, each wrong by construction.

Half are flags of training; the others are damaged recordings of routing and runs, and commands.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import shutil
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_laer.config import FSEPConfig, flag_name, types_of, words_of
from megatron_laer.files.checks import one_line
from megatron_laer.tools import cli
from megatron_laer.tools.model_flags import MOST_OF_MODEL
from tests.bad_inputs import inputs
from tests.bad_inputs.case import Case
from tests.bad_inputs.values import SHOWN
from tests.fuzz import damaged
from tests.records import records_of

SEED, NUMBER = 58, 300
_EVERY = 16

_FOLDER = "drawn"
# Command lines that would work, to which something wrong is added.
_GOOD = (
    "plan good.trace",
    "simulate good.trace --model mixtral-8x7b-e8k2 --node-size 2",
    "advise good.trace --model mixtral-8x7b-e8k2 --cluster h100-8 --gpus 4",
    "report measured",
    "prepare-data --input good.txt --output out/drawn",
    "calibrate out/drawn.yaml",
)
# A command that reads a recording, which `{}` stands for, with the recording that it reads.
_READERS = (
    ("plan {}", "good.trace"),
    ("plan {} --node-size 1 --homes out/drawn.json", "pairs-layer.trace"),
    ("simulate {} --model mixtral-8x7b-e8k2 --node-size 2", "good.trace"),
    ("advise {} --model mixtral-8x7b-e8k2 --cluster h100-8 --gpus 4", "good.trace"),
    ("report {}", "measured"),
)


class Drawn(NamedTuple):
    """A case, and the function that writes its file into the folder of all files, if it has one."""

    case: Case
    write: Callable[[Path], None] = lambda _: None


def drawn(train: Sequence[str], ranks: dict[str, str]) -> Iterator[Drawn]:
    """Yield the cases; `train` are words of a run that would start on `ranks`."""
    seen = set[tuple[str, ...]]()
    for index in range(NUMBER):
        draws = random.Random(f"{SEED}, {index}")
        found = None
        while found is None or found.case.words in seen:
            found = _one(draws, index, train, ranks)
        seen.add(found.case.words)
        yield found._replace(case=dataclasses.replace(found.case, nightly=index % _EVERY > 0))


def _one(draws: random.Random, index: int, train: Sequence[str], ranks: dict[str, str]) -> Drawn:
    if (place := index % 15) < 8:
        words, says = _wrong_setting(draws)
        return Drawn(Case((*train, *words), says, ranks))
    if place % 2:
        return _damaged_recording(draws, f"{_FOLDER}/{index}")
    return _wrong_size(draws, f"{_FOLDER}/{index}.yaml") if place == 8 else _wrong_option(draws)


def make(folder: Path) -> None:
    """Write the damaged files; the good ones are there."""
    (folder / _FOLDER).mkdir()
    for found in drawn((), {}):
        found.write(folder)


def _wrong_setting(draws: random.Random) -> tuple[list[str], str]:
    """Return words that give a wrong setting of FSEP, and a part of the message."""
    fields = [of for of in dataclasses.fields(FSEPConfig) if types_of(of.name)[0] is not str]
    of = draws.choice([of for of in fields if not of.name.startswith("record_")])
    bounds = [of.metadata["minimum"], of.metadata["maximum"]]
    is_number = not words_of(of.name) and any(bounds)
    kind = draws.choice(("spelling", "text", "word", *(is_number * ["number"] * 3)))
    flag, _, name = flag_name(of.name).partition(" ")
    if kind == "spelling":
        wrong = _misspelled(draws, name or flag.removeprefix("--fsep-"))
        return (["--fsep-set", f"{wrong}=1"] if name else [f"--fsep-{wrong}=1"]), wrong
    value: object = _text(draws)
    if kind == "word" and words_of(of.name):
        value = _misspelled(draws, draws.choice([*words_of(of.name)]))
    elif kind == "number":
        value = _beyond(draws, *(bound and bound.value for bound in bounds))
    words = ["--fsep-set", f"{name}={value}"] if name else [f"{flag}={value}"]
    return words, one_line(str(value))[:SHOWN]


def _wrong_option(draws: random.Random) -> Drawn:
    """Return a command with a value that no option takes, or an option that it lacks."""
    words = draws.choice(_GOOD).split()
    _, parser = cli._parsers(words[0])
    options = [of for of in parser._actions if of.option_strings and of.nargs != 0]
    of = draws.choice(options)
    flag = of.option_strings[-1]
    value: object = _text(draws)
    limits = inspect.getclosurevars(of.type).nonlocals if inspect.isfunction(of.type) else {}
    if {"low", "high"} <= {*limits} and draws.random() < 0.7:
        value = _beyond(draws, limits["low"], limits["high"])
    elif not limits and not of.choices:
        flag = f"--{_misspelled(draws, flag[2:])}"
        return Drawn(Case((*words, f"{flag}={value}"), flag))
    return Drawn(Case((*words, f"{flag}={value}"), one_line(str(value))[:SHOWN]))


def _wrong_size(draws: random.Random, place: str) -> Drawn:
    """Return a command that reads a model with a size out of range."""
    name = draws.choice([*inputs.MODEL])
    sizes = inputs.MODEL | {name: _beyond(draws, 1, MOST_OF_MODEL[f"--{name}"])}
    words = ("simulate", "good.trace", "--node-size", "2", "--model", place)
    return Drawn(Case(words, name), lambda folder: inputs.write_model(folder / place, sizes))


def _damaged_recording(draws: random.Random, place: str) -> Drawn:
    """Return a command that reads a damaged recording, and refuses it or warns of it."""
    reader, source = draws.choice(_READERS)
    place += Path(source).suffix
    case = Case(tuple(reader.format(place).split()), place, status=None)
    return Drawn(case, lambda folder: _damage(draws, folder / source, folder / place))


def _beyond(draws: random.Random, low: float | None, high: float | None) -> object:
    """Return a number outside bounds, near them or far away."""
    distance = draws.randrange(1, 10 ** draws.randrange(1, 19))
    beyond = [] if low is None else [low - distance]
    beyond += [] if high is None else [high + distance]
    return draws.choice(beyond)


def _text(draws: random.Random) -> str:
    """Return a word that is no number and no name of this project."""
    letters = string.ascii_letters + string.digits + "_.:+-%@#~^*()[]{}<>?!\x07\x7f\u202e"
    middle = "".join(draws.choices(letters, k=draws.choice((1, 5, 20, 400))))
    return f"q{middle}q"


def _misspelled(draws: random.Random, name: str) -> str:
    """Return a name with two letters swapped, or one doubled."""
    places = [at for at in range(len(name) - 1) if name[at] != name[at + 1]]
    at = draws.choice(places)
    if draws.random() < 0.5:
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    return name[: at + 1] + name[at:]


def _damage(draws: random.Random, source: Path, place: Path) -> None:
    """Write a damaged copy of a recording, or of a run of which one is damaged."""
    has_neighbours = source.is_dir()
    if has_neighbours:
        shutil.copytree(source, place)
        place = draws.choice(sorted(place.iterdir()))
        source = source / place.name
    content = whole = source.read_bytes()
    # Without a neighbour, a loss of whole records at the end cannot be seen.
    unseen = [whole] if has_neighbours else _beginnings(source)
    while content in unseen:
        content = damaged(whole, draws)
    place.write_bytes(content)


def _beginnings(path: Path) -> list[bytes]:
    """Return all beginnings of a recording that end with a record."""
    header, *records = records_of(path)
    return [header + b"".join(records[:number]) for number in range(len(records) + 1)]
