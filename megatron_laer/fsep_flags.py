"""Command-line flags of `FSEPConfig`, made from the metadata of its fields.

The settings that most runs choose have flags; all others are `--fsep-set name=value`. Arguments are
named as the fields, after `fsep_`. A flag without effect is an error here. `support` checks
combinations with Megatron's flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

from megatron_laer.choices import Auto, ExpertParallelMode, Restore
from megatron_laer.config import FSEPConfig, flag_name, setting, takes_several, types_of, words_of
from megatron_laer.files.checks import numbered, quoted
from megatron_laer.planner.strategies import described_strategies, uses_costs
from megatron_laer.rules import IDLE, problems_by, settings_with

MODE = "--expert-parallel-mode"
_FIELDS = {spec.name: spec for spec in dataclasses.fields(FSEPConfig)}
# Settings by name, in `--fsep-set`, and recordings by their words in `--fsep-record`.
SET = tuple(name for name in _FIELDS if flag_name(name) == f"--fsep-set {name}")
RECORDED = {name.removeprefix("record_"): name for name in _FIELDS if name.startswith("record_")}
_BY_DEFAULT = ("trace", "metrics")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--expert-parallel-mode` and the flags of `FSEPConfig`.

    Defaults are `None`, to distinguish a given flag: without effect, it is an error.
    """
    group = parser.add_argument_group(title="fully sharded expert parallel (megatron_laer)")
    group.add_argument(
        MODE,
        choices=[mode.value for mode in ExpertParallelMode],
        default=ExpertParallelMode.STANDARD.value,
        help="standard: Megatron's expert parallelism, untouched; fsep: experts rebalanced at "
        "every microbatch",
    )
    for name in _FIELDS:
        if " " not in flag_name(name):
            metavar = _metavar(name)
            group.add_argument(
                flag_name(name),
                nargs="+" if takes_several(name) else None,
                type=_parser(name),
                # Plain strings, since Megatron pickles parsed arguments into checkpoints.
                choices=None if metavar else words_of(name),
                metavar=metavar,
                help=help_of(name),
            )
    group.add_argument(
        "--fsep-record",
        action=_Record,
        default=argparse.SUPPRESS,
        nargs="+",
        metavar=("DIR", "WHAT"),
        help="files in DIR: "
        + "; ".join(f"{word}: {help_of(name)}" for word, name in RECORDED.items())
        + f"; default: {' '.join(_BY_DEFAULT)}",
    )
    group.add_argument(
        "--fsep-set",
        action=_Set,
        default=argparse.SUPPRESS,
        nargs="+",
        metavar="NAME=VALUE",
        help="settings of this list:",
    )
    for name in SET:  # lines of the help alone, which argparse has no public way to add
        shown = _metavar(name) or f"{{{','.join(words_of(name))}}}"
        line = argparse.Action([], name, metavar=f"  {name}={shown}", help=help_of(name))
        group._group_actions.append(line)
    parser.set_defaults(**{f"fsep_{name}": None for name in _FIELDS})
    return parser


def check_known(words: Iterable[str]) -> None:
    """Refuse `--fsep-` flags that do not exist, each with the form that is meant."""
    flags = {flag_name(name).split()[0]: None for name in _FIELDS}
    given = dict.fromkeys(word.split("=")[0] for word in words)
    problems = [
        f"{word}: no such flag; {_meant(word.removeprefix('--fsep-'), flags)}"
        for word in given
        if word.startswith("--fsep-") and word not in flags
    ]
    if problems:
        raise ValueError(numbered(problems))


def _meant(given: str, known: Iterable[str]) -> str:
    """Return the way to give a setting of this name or a similar one, else the known names."""
    asked = given.replace("-", "_")
    for name in [asked] if asked in _FIELDS else difflib.get_close_matches(asked, _FIELDS, 1):
        form = setting(name, "DIR" if name in RECORDED.values() else "VALUE")
        return f"give {form}" if name == asked else f"did you mean {form}?"
    return f"there are {', '.join(known)}"


def _metavar(name: str) -> str | None:
    """Return the value's name in the help; None for words, which are listed."""
    own = {"restore": "{layer,step,GIB}", "planner": "NAME"}
    by_type = {int: "N", float: "X", str: "FILE"}
    return own.get(name) or (None if words_of(name) else by_type[types_of(name)[0]])


def help_of(name: str) -> str:
    """Return a field's help, with its default, as argparse formats it."""
    spec = _FIELDS[name]
    text = str(spec.metadata["help"]).replace("%", "%%")
    text = text.replace("{strategies}", described_strategies())
    return text if spec.default in (None, ()) else f"{text} (default {spec.default})"


def _parser(name: str) -> Callable[[str], Any]:
    own = {"capacity": _slots, "restore": _word_or_gib}
    return own.get(name) or (str if words_of(name) else types_of(name)[0])


def _slots(text: str) -> int | None:
    """Parse a number of slots; None for `auto`, the default."""
    return None if text == Auto.AUTO else int(text)


_slots.__name__ = "int"  # in argparse's message


def _word_or_gib(text: str) -> str | float:
    try:
        return text if text in list(Restore) else float(text)
    except ValueError:
        problem = f"invalid choice: {text!r} (choose from layer, step, or GiB such as 1.5)"
        raise argparse.ArgumentTypeError(problem) from None


class _Record(argparse.Action):
    """`--fsep-record DIR [WHAT ...]`: one folder for several recordings."""

    def __call__(self, _: Any, into: Any, given: Any, flag: str | None = None) -> None:
        folder, *words = given
        problem = None
        if folder in RECORDED and not words:
            problem = f"{folder!r} is no folder's name; give DIR first, or ./{folder}"
        elif unknown := [word for word in words if word not in RECORDED]:
            problem = f"invalid choice: {unknown[0]!r} (choose from {', '.join(RECORDED)})"
        if problem is not None:
            raise argparse.ArgumentError(self, problem)
        for word in words or _BY_DEFAULT:
            setattr(into, f"fsep_{RECORDED[word]}", folder)


class _Set(argparse.Action):
    """`--fsep-set NAME=VALUE ...`: settings without flags of their own."""

    def __call__(self, _: Any, into: Any, given: Any, flag: str | None = None) -> None:
        for text in given:
            name, mark, value = text.partition("=")
            try:
                if not mark:
                    raise ValueError(f"{quoted(text)}: write name=value")
                if name not in SET:
                    problem = f"{quoted(text)}: no setting of this list; {_meant(name, SET)}"
                    raise ValueError(problem)
                setattr(into, f"fsep_{name}", _value(name, value))
            except ValueError as error:
                raise argparse.ArgumentError(self, str(error)) from error


def _value(name: str, text: str) -> Any:
    """Return a value in the field's type; its bounds are FSEPConfig's."""
    words, parse = words_of(name), _parser(name)
    if words and text not in words:
        raise ValueError(f"{name}: invalid choice: {text!r} (choose from {', '.join(words)})")
    try:
        return text if words else parse(text)
    except ValueError:
        raise ValueError(f"{name}: invalid {parse.__name__} value: {text!r}; give one") from None


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields whose flags were given, with their values."""
    values = {name: getattr(args, "fsep_" + name, None) for name in _FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def config_from_args(args: argparse.Namespace) -> FSEPConfig | None:
    """Return the config that the flags ask for, or None in standard mode."""
    given = given_flags(args)
    if args.expert_parallel_mode == ExpertParallelMode.FSEP:
        config = FSEPConfig(**given)
        names = [f"fsep_{name}" for name in given]
        settings = settings_with(args, config, fsep_given=names, fsep_uses_costs=uses_costs(config))
        if idle := problems_by(IDLE, settings):
            raise ValueError(numbered(idle))
        return config
    if given:
        flags = ", ".join(setting(name, value) for name, value in given.items())
        raise ValueError(
            f"{flags}: no effect with {MODE} {args.expert_parallel_mode}; add {MODE} fsep or leave "
            "the flag out"
        )
    return None
