"""Command-line flags of `FSEPConfig`, made from the metadata of its fields.

The settings that most runs choose have flags; all others are `--fsep-set name=value`. Arguments are
named as the fields, after `fsep_`. A flag without effect is an error here. `support` checks
combinations with Megatron's flags.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import math
import re
from collections.abc import Iterable
from typing import Any

from megatron_laer.choices import Auto, ExpertParallelMode
from megatron_laer.config import (
    FIELDS,
    FSEPConfig,
    flag_name,
    setting,
    takes_several,
    types_of,
    words_of,
)
from megatron_laer.files.checks import numbered, one_line, quoted
from megatron_laer.planner.strategies import described_strategies, uses_costs
from megatron_laer.rules import IDLE, problems_by, settings_with

MODE = "--expert-parallel-mode"
# Settings by name, in `--fsep-set`, and recordings by their words in `--fsep-record`.
SET = tuple(name for name in FIELDS if flag_name(name) == f"--fsep-set {name}")
RECORDED = {name.removeprefix("record_"): name for name in FIELDS if name.startswith("record_")}
_BY_DEFAULT = ("trace", "metrics")
# Names that no field resembles, of earlier versions or by their sense, with the way out.
_FORMER = {
    "domain_nodes": "layouts are planned for single nodes, whose ranks --fsep-node-size gives",
    "overlap": f"give {setting('scheduler', 'VALUE')}",
    "restore_memory_gib": f"give {setting('restore', 'GIB')}",
}
# Forms of numbers. Python's own readers take blanks, underscores and digits of other scripts too.
_FORMS = {
    int: re.compile("-?[0-9]+"),
    float: re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"),
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--expert-parallel-mode` and the flags of `FSEPConfig`.

    Defaults are `None`, to distinguish a given flag: without effect, it is an error.
    """
    group = parser.add_argument_group(title="fully sharded expert parallel (megatron_laer)")
    group.add_argument(
        MODE,
        type=functools.partial(one_line, longest=200),  # argparse quotes what is no choice
        choices=[mode.value for mode in ExpertParallelMode],
        default=ExpertParallelMode.STANDARD.value,
        help="standard: Megatron's expert parallelism, untouched; fsep: experts rebalanced at "
        "every microbatch",
    )
    for name in FIELDS:
        if " " not in flag_name(name):
            group.add_argument(
                flag_name(name),
                nargs="+" if takes_several(name) else None,
                type=functools.partial(_parsed, name),
                metavar=_metavar(name),
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
        line = argparse.Action([], name, metavar=f"  {name}={_metavar(name)}", help=help_of(name))
        group._group_actions.append(line)
    parser.set_defaults(**{f"fsep_{name}": None for name in FIELDS})
    return parser


def check_known(words: Iterable[str]) -> None:
    """Refuse `--fsep-` flags that do not exist, each with the form that is meant."""
    flags = {flag_name(name).split()[0]: None for name in FIELDS}
    given = dict.fromkeys(word.split("=")[0] for word in words)
    problems = [
        f"{one_line(word, 200)}: no such flag; {_meant(word.removeprefix('--fsep-'), flags)}"
        for word in given
        if word.startswith("--fsep-") and word not in flags
    ]
    if problems:
        raise ValueError(numbered(problems))


def _meant(given: str, known: Iterable[str]) -> str:
    """Return the way to give a setting of this name or a similar one, else the known names."""
    asked = given.replace("-", "_").lower()[:100]
    if asked in _FORMER:
        return _FORMER[asked]
    found = [asked] if asked in FIELDS else difflib.get_close_matches(asked, FIELDS, 1)
    found = found or [name for name in FIELDS if asked in name.split("_")]
    if len(found) != 1:
        return f"there are {', '.join(known)}"
    form = setting(found[0], "DIR" if found[0] in RECORDED.values() else "VALUE")
    return f"give {form}" if found[0] == asked else f"did you mean {form}?"


def _metavar(name: str) -> str:
    own = {"restore": "{layer,step,GIB}", "planner": "NAME", "verify": "{first,N,all,off,warn}"}
    by_type = {int: "N", float: "X", str: "FILE"}
    words = ",".join(words_of(name))
    return own.get(name) or (f"{{{words}}}" if words else by_type[types_of(name)[0]])


def help_of(name: str) -> str:
    """Return a field's help, with its default, as argparse formats it."""
    spec = FIELDS[name]
    text = str(spec.metadata["help"]).replace("%", "%%")
    text = text.replace("{strategies}", described_strategies())
    return text if spec.default in (None, ()) else f"{text} (default {spec.default})"


def _parsed(name: str, text: str) -> Any:
    """Return a field's number; another text as it is, which `FSEPConfig` judges and quotes."""
    if (name, text) == ("capacity", Auto.AUTO):
        return None  # the default
    kinds = types_of(name)
    for number, form in _FORMS.items():  # whole numbers first, which are quoted without a point
        if (float in kinds or number in kinds) and form.fullmatch(text):
            with contextlib.suppress(ValueError):  # more digits than Python converts
                value = number(text)
                return text if value in (math.inf, -math.inf) else value
    return text


class _Record(argparse.Action):
    """`--fsep-record DIR [WHAT ...]`: one folder for several recordings."""

    def __call__(self, _: Any, into: Any, given: Any, flag: str | None = None) -> None:
        folder, *words = given
        problem = None
        if folder in RECORDED and not words:
            problem = f"{quoted(folder)} is no folder's name; give DIR first, or ./{folder}"
        elif unknown := [word for word in words if word not in RECORDED]:
            problem = f"invalid choice: {quoted(unknown[0])} (choose from {', '.join(RECORDED)})"
        if problem is not None:
            raise argparse.ArgumentError(self, problem)
        for word in words or _BY_DEFAULT:
            setattr(into, f"fsep_{RECORDED[word]}", folder)


class _Set(argparse.Action):
    """`--fsep-set NAME=VALUE ...`: settings without flags of their own."""

    def __call__(self, _: Any, into: Any, given: Any, flag: str | None = None) -> None:
        for text in given:
            name, mark, value = text.partition("=")
            problem = None
            if not mark:
                problem = "write name=value" + ("" if name in SET else f", of {', '.join(SET)}")
            elif name not in SET:
                problem = f"no setting of this list; {_meant(name, SET)}"
            elif getattr(into, f"fsep_{name}") is not None:
                problem = f"{name} is given before; leave one out"
            if problem is not None:
                raise argparse.ArgumentError(self, f"{quoted(text)}: {problem}")
            setattr(into, f"fsep_{name}", _parsed(name, value))


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields whose flags were given, with their values."""
    values = {name: getattr(args, "fsep_" + name, None) for name in FIELDS}
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
