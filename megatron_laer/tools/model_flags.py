"""Megatron's flags of a model configuration in YAML, and its experts' sizes.

A file is grouped for the reader; a group's keys are Megatron's flags, without the dashes at their
begin:

    description: a model for tests
    architecture:
      num-layers: 4              # --num-layers 4
      swiglu: true               # --swiglu
    moe:
      moe-router-topk: 2

Values are passed on as they are written: Megatron's parser checks the flags.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from megatron_laer.choices import Unproven
from megatron_laer.files.checks import quoted
from megatron_laer.files.shipped import yaml_file
from megatron_laer.files.yaml_text import read_yaml
from megatron_laer.planner.layout import MAX_EXPERTS
from megatron_laer.precision import MEGATRONS_RECIPE, Precision
from megatron_laer.rules import WITH_FP8_EXPERTS, problems_by

GROUPS = ("architecture", "moe", "initialization", "precision", "data")

_KEY = re.compile(r"(?:--)?([a-z0-9]+(?:[-_][a-z0-9]+)*)")
# YAML 1.1's words for true and false, which users may know from elsewhere.
_ON = ("true", "yes", "on")
_OFF = ("false", "no", "off")
_NOTHING = ("", "~", "null")
_YAML_POINT = re.compile(r"\.(?=(inf|nan)$)", re.IGNORECASE)
# Maximum width, far above any model's; products of two, in bytes, stay far below 2**63.
MAX_WIDTH = 2**20
_MAX_LAYERS = 4096
# Maxima of a model's sizes, by Megatron's flags, each of which reads one number.
MOST_OF_MODEL: Mapping[str, int] = {
    "--num-layers": _MAX_LAYERS,
    "--mtp-num-layers": _MAX_LAYERS,
    "--num-experts": MAX_EXPERTS,
    "--moe-router-topk": MAX_EXPERTS,
    "--vocab-size": 2**24,
    "--max-position-embeddings": 2**24,
    **dict.fromkeys(
        (
            *("--hidden-size", "--ffn-hidden-size", "--moe-ffn-hidden-size", "--kv-channels"),
            *("--num-attention-heads", "--num-query-groups", "--seq-length"),
            *("--moe-shared-expert-intermediate-size", "--q-lora-rank", "--kv-lora-rank"),
            *("--qk-head-dim", "--qk-pos-emb-head-dim", "--v-head-dim"),
        ),
        MAX_WIDTH,
    ),
}
# A path may be long; a number may not.
_LONGEST_VALUE = 4096


def model_flags(path_or_name: str | Path) -> list[str]:
    """Return Megatron's flags for a model, by a YAML file's path or the name of a shipped one."""
    return [word for words in _flags(path_or_name).values() for word in words]


def model_values(path_or_name: str | Path) -> dict[str, str]:
    """Return the value of each of a model's flags, with dashes for underscores; "" for a switch."""
    return {flag: " ".join(words[1:]) for flag, words in _flags(path_or_name).items()}


def _flags(path_or_name: str | Path) -> dict[str, list[str]]:
    path = yaml_file("model", path_or_name)
    content = read_yaml(path)
    try:
        flags: dict[str, list[str]] = {}
        for key, value in _settings(content):
            words = flag_words(key, value)
            if words[0] in flags:
                raise ValueError(f"{key} is given twice; remove one of them")
            flags[words[0]] = words
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return flags


def whole_number(
    values: Mapping[str, str],
    flag: str,
    *,
    least: int = 0,
    default: int | None = None,
    way_out: str = "mend it",
) -> int:
    """Return the value of a model's flag; raise ValueError with its range and a remedy."""
    text, most = values.get(flag, "" if default is None else str(default)), MOST_OF_MODEL[flag]
    if not (text.isascii() and text.isdigit() and len(text) < 19 and least <= int(text) <= most):
        name, found = flag.removeprefix("--"), f", but {quoted(text)}" if text else ""
        raise ValueError(f"has no {name} in {least}..{most}{found}; {way_out}")
    return int(text)


def _settings(content: object) -> Iterator[tuple[str, object]]:
    if not isinstance(content, Mapping):
        raise ValueError(
            f"the file holds {reprlib.repr(content)}, expected a mapping with the groups "
            f"{', '.join(GROUPS)}"
        )
    description = content.get("description")
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"description must say what the model is, got {reprlib.repr(description)}")
    for group, settings in content.items():
        if group == "description":
            continue
        if group not in GROUPS:
            raise ValueError(f"unknown group {reprlib.repr(group)}; groups are {', '.join(GROUPS)}")
        if not isinstance(settings, Mapping):
            raise ValueError(f"{group} must hold `flag: value` lines, got {reprlib.repr(settings)}")
        yield from settings.items()


def flag_words(key: str, value: object) -> list[str]:
    """Return a flag of a command line and the words after it, for a key and its value in YAML."""
    name = _KEY.fullmatch(key)
    if not name:
        raise ValueError(f"{quoted(key)} is no flag; write Megatron's, such as num-layers")
    flag = f"--{name[1].replace('_', '-')}"
    if isinstance(value, str) and value.lower() in _ON:
        return [flag]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{key} is an empty list; give it values or leave it out")
    if len(values) > 1 and flag in (*MOST_OF_MODEL, "--moe-layer-freq"):
        raise ValueError(f"{key} is {reprlib.repr(value)}; give one value")
    for item in values:
        if not isinstance(item, str) or item.lower() in (*_ON, *_OFF, *_NOTHING):
            raise ValueError(
                f"{key} is {reprlib.repr(value)}; give true for a switch, else a number, a text or "
                "a list of them. A switch that is off is left out"
            )
        if item.startswith("--") or not item.isprintable() or len(item) > _LONGEST_VALUE:
            raise ValueError(
                f"{key} is {reprlib.repr(value)}; a value has one line of at most "
                f"{_LONGEST_VALUE} characters, and does not begin with --"
            )
        if not _is_finite(item):
            raise ValueError(f"{key} is {reprlib.repr(value)}; give a finite number")
    return [flag, *map(str, values)]


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(_YAML_POINT.sub("", text)))
    except ValueError:
        return True


@dataclass(frozen=True)
class ExpertSizes:
    """Widths of an expert, and the number of experts of a token.

    With `gated`, an expert's first matrix is [2F, H].
    """

    hidden: int
    ffn: int
    gated: bool
    num_experts: int | None = None
    top_k: int = 2
    precision: Precision = Precision.PARAMETERS

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of the two matrices."""
        return ((2 if self.gated else 1) * self.ffn, self.hidden), (self.hidden, self.ffn)

    @property
    def flops_per_token(self) -> int:
        """Count the FLOPs of one token in one pass: two per weight."""
        return 2 * sum(rows * columns for rows, columns in self.matrices)

    @property
    def widths(self) -> str:
        return f"{self.hidden} x {self.ffn}{'' if self.gated else ', not gated'}"


# Mixtral-8x7B's experts, as in the paper.
DEFAULT_SIZES = ExpertSizes(hidden=4096, ffn=14336, gated=True)

# Megatron's flags for activations that multiply two halves of the first matrix's output.
_GATED: Sequence[str] = ("--swiglu", "--quick-geglu")


def model_sizes(config: str, way_out: str = "mend it") -> ExpertSizes:
    """Read the widths from a model configuration, given by path or by a shipped one's name."""
    values = model_values(config)
    if "--num-experts" not in values:
        raise ValueError(f"has no num-experts, so all its layers are dense; {way_out}")

    def size(flag: str) -> int:
        return whole_number(values, flag, least=1, way_out=way_out)

    own_ffn, top_k = "--moe-ffn-hidden-size", "--moe-router-topk"
    return ExpertSizes(
        size("--hidden-size"),
        size(own_ffn if own_ffn in values else "--ffn-hidden-size"),
        any(flag in values for flag in _GATED),
        size("--num-experts"),
        size(top_k) if top_k in values else ExpertSizes.top_k,
        precision_of(values.get("--fp8-format"), values.get("--fp8-recipe")),
    )


def precision_of(fp8_format: str | None, recipe: str | None) -> Precision:
    """Return the precision by Megatron's two flags of fp8."""
    if fp8_format is None:
        if recipe is not None:
            raise ValueError(
                f"--fp8-recipe {quoted(recipe)}: no effect without --fp8-format; add that, or "
                "leave the recipe out"
            )
        return Precision.PARAMETERS
    recipe = recipe or MEGATRONS_RECIPE
    words = (Unproven.FP8_EXPERTS,)
    asked = SimpleNamespace(fp8=fp8_format, fp8_recipe=recipe, fsep_allow_unproven=words)
    if problems := problems_by(WITH_FP8_EXPERTS, asked):
        raise ValueError(problems[0])
    return Precision(recipe)
