"""Rules on the settings of a run, of which rules.toml is the table.

Settings are attributes of one object: Megatron's arguments by their names, FSEP's after `fsep_`. A
rule holds where all settings that it names are there. `FSEPConfig` has FSEP's alone, the command
line Megatron's too, and a TransformerConfig some of these.

Over 400 lines: the type of a rule, with the predicates of all.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

from megatron_laer.choices import (
    Auto,
    ExchangeAlgorithm,
    FixedPlanner,
    Restore,
    Sharding,
    Split,
    Unproven,
)
from megatron_laer.files.checks import quoted

# The paper's planner; names of its variants begin with it. It leaves no expert at home.
LAER_PLANNER = "laer"

# Modules that Transformer Engine may capture: they end at a rank's own counts, or have no experts.
GRAPHED = frozenset({"attn", "mamba", "mlp", "moe_preprocess", "moe_router"})

# Features that each word of `--fsep-allow-unproven` allows.
UNPROVEN = {
    Unproven.TE_GRAPHS: "Transformer Engine's CUDA graphs of parts of layers, up to the counts",
    Unproven.DENSE_FP8: "fp8 in all layers but the experts, which compute in the parameters' dtype",
    Unproven.FP8_EXPERTS: "fp8 in all layers, the experts at home and their replicas included",
}

# Strategies of Megatron-FSDP that shard dense layers.
STRATEGIES = ("optim", "optim_grads", "optim_grads_params")
# Attributes of flags with other names than theirs.
_ARGUMENTS = {
    "--fp8-format": "fp8",
    "--fp4-format": "fp4",
    "--use-nccl-ub": "nccl_ub",
}
_OFF: tuple[object, ...] = (False, None)
_SHARDING = "--fsep-sharding"
_NOT_RUN = "nobody has run it with FSEP, and no test on a GPU has shown it"
_PLAIN = re.compile(r"[\w.+,/:-]+")
_LONGEST = 200
_LONGEST_FLOAT = 1e15
_MODE = "--fsep-plan-mode"


class LeftOut(StrEnum):
    """Loss of a run without a refused setting that does not change the model."""

    SPEED = "speed-only"
    PRECISION = "precision"


class NextTo(NamedTuple):
    """Condition on another setting, as `--ckpt-format torch`, `no --flag` or `peft.dropout !0`."""

    flag: str
    values: tuple[object, ...]
    is_negated: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        if text.startswith("no "):
            return cls(text.removeprefix("no "), _OFF)
        words = text.split()
        parts = 2 if words[0] == "--fsep-set" else 1
        values = "".join(words[parts:])
        flag = " ".join(words[:parts])
        return cls(flag, _values(values.lstrip("!").split("|")) or (True,), values[:1] == "!")

    def holds(self, settings: Any) -> bool:
        name = argument_of(self.flag)
        if not hasattr(settings, name):
            return False
        value = getattr(settings, name)
        words = value if isinstance(value, list | tuple) else (value,)
        return any(_is_among(word, self.values) for word in words) != self.is_negated

    def said(self, settings: Any = None) -> str:
        """Return the condition behind another setting, with its value if settings are given."""
        if self.values == _OFF:
            return f" without {self.flag}"
        if self.values[0] is True:
            return f" with {self.flag}"
        if self.flag == _MODE and (by := getattr(settings, "fsep_mode_by", "")):
            return f" with {by}"
        if settings is not None:
            return f" with {said(self.flag, getattr(settings, argument_of(self.flag)))}"
        first, *more = self.values
        if self.is_negated:
            return f" with {self.flag} other than {first}"
        return f" with {said(self.flag, first)}{''.join(f' or {value}' for value in more)}"


@dataclass(frozen=True)
class Rule:
    """Setting that a run cannot have, or not next to other ones.

    Attributes:
        flag: as on a command line (`--fp8-format`, `--fsep-set plan_lag`), or the attribute of a
            setting without a flag.
        title: setting with its refused part, if not the flag.
        accepted: accepted values, first the one to choose. None and False are both "off".
        refused: refused values, in place of accepted ones.
        when: predicate on the settings, in place of both.
        next_to: other settings, next to which alone the rule holds.
        is_idle: whether only a given flag is refused, not a default.
        example: value, or words of a command line or of Python, that the rule refuses.
        given: more words of the command line of the example.
        field: field of TransformerConfig that the flag ends up in, by default of the flag's name;
            "" if there is none.
        is_filled_in: whether FSEP makes the accepted value the flag's default, as it does not
            change the model.
        allow: words of `--fsep-allow-unproven` that accept `unproven_values` too, in a text.
        fits: word of `--fsep-allow-unproven` with which the setting is accepted.
        left_out: loss of a run without the setting, if that is speed or precision alone.
    """

    flag: str
    reason: str
    way_out: str = "leave it out"
    title: str = ""
    accepted: tuple[object, ...] = _OFF
    refused: tuple[object, ...] = ()
    when: Callable[[Any], bool] | None = None
    next_to: tuple[NextTo, ...] = ()
    is_idle: bool = False
    example: object = True
    given: str = ""
    field: str = ""
    is_filled_in: bool = False
    allow: str = ""
    unproven_values: tuple[str, ...] = ()
    fits: Unproven | None = None
    left_out: LeftOut | None = None

    @property
    def argument(self) -> str:
        """Return the attribute that holds the setting's value."""
        return argument_of(self.flag)

    @property
    def words(self) -> tuple[Unproven, ...]:
        return tuple(word for word in Unproven if word in self.allow)

    @property
    def setting(self) -> str:
        """Return the refused setting with those next to it; key of the row in docs."""
        return self.title + _together(other.said() for other in self.next_to)

    @property
    def said_way_out(self) -> str:
        """Return the remedy, with a note if its only cost is speed."""
        is_speed_only = self.left_out is LeftOut.SPEED
        return f"{self.way_out} (it is {LeftOut.SPEED})" if is_speed_only else self.way_out

    def problem(self, settings: Any, *, as_field: bool = False) -> str | None:
        """Return the reason and remedy if FSEP cannot run with these settings, else None.

        Args:
            as_field: whether a TransformerConfig was given, and no command line.
        """
        if not self._is_refused(settings):
            return None
        value = getattr(settings, self.argument)
        if value is None and self.when is None:  # not given, so Megatron's default stands
            return None
        is_said_by_name = value is None or value == [] or isinstance(value, bool | tuple)
        given = self.title if is_said_by_name else said(self.flag, value)
        if as_field and self.field:
            given = f"{self.field}={value!r}"
        if self.asks_for_unproven(settings):
            return (
                f"{given}: {_NOT_RUN}; to run it all the same give "
                f"--fsep-allow-unproven {self.allow}, or {self.said_way_out}"
            )
        others = _together(dict.fromkeys(other.said(settings) for other in self.next_to))
        return f"{given}{others}: {self.reason}; {self.said_way_out}"

    def asks_for_unproven(self, settings: Any) -> bool:
        """Return whether the setting has a value that was never run."""
        value = getattr(settings, self.argument, None)
        return bool(self.words) and value in self.unproven_values

    def _is_refused(self, settings: Any) -> bool:
        name, allowed = self.argument, allowed_by(settings)
        if not hasattr(settings, name):  # another stage's, or of a newer Megatron
            return False
        is_default = self.is_idle and name not in getattr(settings, "fsep_given", ())
        if is_default or self.fits in allowed:
            return False
        if not all(other.holds(settings) for other in self.next_to):
            return False
        value = getattr(settings, name)
        if self.when is not None:
            return self.when(settings)
        if self.refused:
            if isinstance(value, list | tuple):
                return {*self.refused} <= {*value}
            return _is_among(value, self.refused)
        if isinstance(value, list | tuple):
            return not {*value} <= {*self.accepted}
        if not set(self.words).isdisjoint(allowed) and self.asks_for_unproven(settings):
            return False
        return self.is_idle or not _is_among(value, self.accepted)


def lays_out_freely(planner: str) -> bool:
    """Return whether a planner leaves no expert at home: the paper's, or a variant."""
    return planner.split("-")[0] == LAER_PLANNER


def graphed(settings: Any) -> set[str] | None:
    """Return the modules that Transformer Engine captures; empty for whole layers, None without."""
    if getattr(settings, "cuda_graph_impl", None) != "transformer_engine":
        return None
    # The second is the flag's old name.
    old = getattr(settings, "cuda_graph_scope_deprecated", None)
    modules = settings.cuda_graph_modules or old or ()
    return {modules} if isinstance(modules, str) else set(names_of(modules))


def _captures_plan(settings: Any) -> bool:
    modules = graphed(settings)
    return modules is not None and not set() < modules <= GRAPHED


def _overlaps_graphs_of_attention(settings: Any) -> bool:
    overlaps = getattr(settings, "overlap_moe_expert_parallel_comm", False)
    return bool(overlaps) and "attn" in (graphed(settings) or ())


def _reduces_before_wgrad(settings: Any) -> bool:
    """Return True if Megatron reduces gradients of home experts before they are computed."""
    delays = settings.overlap_dispatch_backward_with_experts_wgrad
    overlaps = getattr(settings, "overlap_grad_reduce", False)
    is_in_rows = getattr(settings, "fsep_sharding", None) == Sharding.ROWS
    return bool(delays and overlaps) and not is_in_rows


def _pads_for_fp8(settings: Any) -> bool:
    """Return True if the router pads, which Megatron does for fp8 and fp4 alone."""
    names = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    pads = any(getattr(settings, name, None) for name in names)
    return pads and bool(settings.fp8 or getattr(settings, "fp4", None))


def _drops_tokens(settings: Any) -> bool:
    factor = settings.moe_expert_capacity_factor
    # For Megatron, a negative factor means none, and NaN does not.
    return factor is not None and not factor < 0


def _fuses_accumulation(settings: Any) -> bool:
    # A recipe that says nothing has Megatron's default.
    return settings.use_megatron_fsdp and getattr(settings, "gradient_accumulation_fusion", True)


def _exceeds_any_load(settings: Any) -> bool:
    tolerance = settings.fsep_imbalance_tolerance
    # A rank alone is refused.
    ranks = getattr(settings, "expert_model_parallel_size", 1)
    return tolerance is not None and ranks > 1 and tolerance >= ranks - 1


def _is_on_one_node(settings: Any) -> bool:
    """Return True if rows of experts take one hop: FSEP's group is known to be one node."""
    size = settings.fsep_node_size
    is_one = size is not None and size == getattr(settings, "expert_model_parallel_size", None)
    return is_one and getattr(settings, "fsep_sharding", None) == Sharding.ROWS


# Predicates by their names in the table.
_WHEN: Mapping[str, Callable[[Any], bool]] = {
    "captures_plan": _captures_plan,
    "drops_tokens": _drops_tokens,
    "fuses_accumulation": _fuses_accumulation,
    "exceeds_any_load": _exceeds_any_load,
    "has_one_hop": lambda settings: settings.fsep_grad_wire_dtype and _is_on_one_node(settings),
    "is_no_cluster": lambda settings: settings.fsep_cluster == "",
    "is_no_file": lambda settings: settings.fsep_homes == "",
    "lays_out_freely": lambda settings: lays_out_freely(settings.fsep_planner or ""),
    "no_experts": lambda settings: settings.num_experts is None or settings.num_experts < 1,
    "nothing_by_cost": lambda settings: not settings.fsep_uses_costs,
    "one_rank": lambda settings: bool(settings.expert_model_parallel_size < 2),
    "overlaps_graphs_of_attention": _overlaps_graphs_of_attention,
    "pads_for_fp8": _pads_for_fp8,
    "reduces_before_wgrad": _reduces_before_wgrad,
    "relays_on_one_node": lambda settings: (
        settings.fsep_restore_algorithm == ExchangeAlgorithm.NODE and _is_on_one_node(settings)
    ),
}


def problems_by(rules: Iterable[Rule], settings: Any, *, as_fields: bool = False) -> list[str]:
    """Return the reasons and remedies of the rules that these settings break.

    Fields of a TransformerConfig are quoted as such if they were given, see `of_fields`.
    """
    found = (rule.problem(settings, as_field=as_fields) for rule in rules)
    return [text for text in found if text is not None]


def allowed_by(settings: Any) -> Collection[Unproven]:
    """Return the given words of `--fsep-allow-unproven`."""
    return getattr(settings, "fsep_allow_unproven", None) or ()


def idle_words(settings: Any) -> list[str]:
    """Return the words of `--fsep-allow-unproven` that allow nothing in these settings."""
    used = {word for row in REFUSALS if row.asks_for_unproven(settings) for word in row.words}
    return [
        f"--fsep-allow-unproven {word}: no effect, since nothing that it allows is asked for "
        f"({UNPROVEN[word]}); leave it out"
        for word in allowed_by(settings)
        if word not in used
    ]


def sharding_for(settings: Any) -> tuple[Sharding | Auto, str]:
    """Return the sharding that settings need in place of `auto`, and why rows or homes do not work.

    Raises:
        ValueError: some need rows and others experts at home.
    """
    given = getattr(settings, "fsep_sharding", None) or Auto.AUTO
    if given != Auto.AUTO:
        return given, ""
    against: dict[Sharding, str] = {}
    for sharding in Sharding:
        asked = SimpleNamespace(**vars(settings) | {"fsep_sharding": sharding})
        rules = (rule for rule in RULES if NextTo(_SHARDING, (sharding.value,)) in rule.next_to)
        for text in problems_by(rules, asked):
            against.setdefault(sharding, text)
    reasons = "; but ".join(against.values())
    fitting = [sharding for sharding in Sharding if sharding not in against]
    if not fitting:
        raise ValueError(f"{_SHARDING} {Auto.AUTO}: neither works: {reasons}; leave out one")
    return fitting[0] if against else Auto.AUTO, reasons


def settings_with(settings: Any, config: Any, **more: object) -> SimpleNamespace:
    """Return Megatron's settings and FSEP's in one object, as rules read them."""
    ours = {f"fsep_{name}": value for name, value in vars(config).items()}
    by = "" if config.plan_mode is not None else _mode_by(config)
    ours |= {"fsep_plan_mode": config.mode, "fsep_mode_by": by, "fsep_given": ()}
    return SimpleNamespace(**vars(settings) | ours | more)


def _mode_by(config: Any) -> str:
    """Return the setting that decides the plan mode if none is given, or ""."""
    if config.planner in list(FixedPlanner):
        return said("--fsep-planner", config.planner)
    if config.split == Split.EVEN:
        return said("--fsep-set split", config.split)
    return said("--fsep-restore", config.restore) if config.restore == Restore.STEP else ""


def of_fields(config: Any) -> SimpleNamespace:
    """Return the fields of a TransformerConfig, also by the names of their flags' arguments."""
    fields = {row.argument: row.field for row in REFUSALS if hasattr(config, row.field)}
    named = {argument: getattr(config, field) for argument, field in fields.items()}
    return SimpleNamespace(**vars(config) | named)


def argument_of(flag: str) -> str:
    """Return the attribute of a flag's value: `--fsep-set plan_lag` → `fsep_plan_lag`."""
    if flag in _ARGUMENTS:
        return _ARGUMENTS[flag]
    if flag.startswith("--fsep-record "):
        return f"fsep_record_{flag.split()[-1]}"
    return flag.replace("--fsep-set ", "--fsep-").removeprefix("--").replace("-", "_")


def said(flag: str, value: object) -> str:
    """Return a setting in a command line's form: `--fsep-set plan_lag=2`, `--fsep-record d trace`.

    A text that is long or no plain word is quoted, and an empty list is "none".
    """
    is_ours = flag.startswith("--fsep-")
    if is_ours and isinstance(value, float) and value.is_integer() and abs(value) < _LONGEST_FLOAT:
        value = int(value)  # as it is usually written
    text = value_text(value)
    if len(text) > _LONGEST or (isinstance(value, str) and not _PLAIN.fullmatch(text)):
        text = quoted(text, _LONGEST)
    name, *of_value = flag.split()
    if name == "--fsep-set" or not flag.startswith("--"):
        return f"{flag}={text}"
    if not name.startswith("--fsep-") and (value is None or value is True or value == []):
        return flag
    return " ".join([name, text, *of_value[1:]])  # the first stands for the value


def value_text(value: object) -> str:
    """Return a value in a command line's form; "none" for an empty list of words."""
    if isinstance(value, list | tuple):
        return " ".join(names_of(value)) or "none"
    return str(getattr(value, "value", value))


def names_of(words: Collection[Any]) -> list[str]:
    """Return words in a command line's form; some are members of Megatron's enumerations."""
    return [str(word if isinstance(word, str) else getattr(word, "name", word)) for word in words]


def _together(conditions: Iterable[str]) -> str:
    first, *more = [*conditions] or [""]
    return first + "".join(text.replace(" with ", " and ", 1) for text in more)


def _is_among(value: object, values: tuple[object, ...]) -> bool:
    is_off = value is None or value is False
    return value in values or str(value) in values or (is_off and not {*_OFF}.isdisjoint(values))


def _values(words: Iterable[str]) -> tuple[object, ...]:
    read = {"None": None, "False": False}
    return tuple(read.get(word, int(word) if word.isdecimal() else word) for word in words if word)


def _rules(row: dict[str, Any]) -> Iterator[Rule]:
    """Yield the rules of one row of the table, which may have several flags with an example."""
    _check_row(row)
    flags = row.pop("flags", None) or [row.pop("flag")]
    for key in ("accepted", "refused", "unproven_values"):
        if key in row:
            row[key] = _values(row[key].split())
    next_to = row.pop("next_to", [])
    row["next_to"] = tuple(map(NextTo.parse, [next_to] if isinstance(next_to, str) else next_to))
    for key, read in (("when", _WHEN.__getitem__), ("left_out", LeftOut), ("fits", Unproven)):
        row[key] = read(row[key]) if key in row else None
    for text in flags:
        flag, _, example = text.partition(": ")
        own: dict[str, Any] = {"title": _title(flag, row), "example": example or True}
        if not row["next_to"] and not flag.startswith("--fsep-") and "." not in flag:
            own["field"] = argument_of(flag)
        way_out = row.get("way_out", Rule.way_out).replace("{flag}", flag)
        yield Rule(**own | row | {"flag": flag, "way_out": way_out})


# Types of a row's values that are no text.
_TYPES = {"flags": list, "next_to": str | list, "is_filled_in": bool, "is_idle": bool}


def _check_row(row: Mapping[str, Any]) -> None:
    known = {"flags", *(spec.name for spec in dataclasses.fields(Rule))}
    for key, value in row.items():
        if key not in known:
            raise ValueError(f"{key!r} must be a key of a rule")
        if key != "example" and not isinstance(value, _TYPES.get(key, str)):
            raise ValueError(f"{key} = {value!r} must be of another type")
    if row.get("when", "captures_plan") not in _WHEN:
        raise ValueError(f"when = {row['when']!r} must be a predicate")


def _title(flag: str, row: Mapping[str, Any]) -> str:
    if "refused" in row:
        between = " " if flag == "--fsep-allow-unproven" else " or "
        return said(flag, between.join(map(str, row["refused"]))).replace("'", "")
    values = [str(value) for value in row.get("accepted", ()) if value not in _OFF]
    if values and not row["next_to"]:
        return f"{flag} other than {', '.join(values)}"
    return flag if flag.startswith("--") or "." not in flag else f"{flag}=True"


def read_table(path: Path) -> dict[str, Any]:
    """Return a file's lists of rules, and its fields without rules.

    Raises:
        ImportError: pip's record of the installed package has another digest, or the file is no
            table of rules; it names the first damaged rule.
    """
    place = ""
    try:
        content = path.read_bytes()
        if not _is_as_installed(path, content):
            raise ValueError("it must be the file that was installed")
        table = tomllib.loads(content.decode())
        fields, defaults = table.pop("fields"), table.pop("default")
        found: dict[str, Any] = {name: frozenset(fields[name].split()) for name in _FIELDS}
        reasons = table.pop("without_effect").items()
        found["without_effect"] = {name: why for why, names in reasons for name in names.split()}
        for kind in _TABLES:
            found[kind] = []
            for number, row in enumerate(table.pop(kind), start=1):
                place = f"[[{kind}]] {number}, {row.get('flag') or row.get('flags')}: "
                found[kind] += _rules(defaults.get(kind, {}) | row)
        place = ""
        if table:
            raise ValueError(f"{', '.join(table)} must be a known table")
        used = [rule.when for kind in _TABLES for rule in found[kind]]
        if lost := [name for name, when in _WHEN.items() if when not in used]:
            raise ValueError(f"a rule must have when = {lost[0]!r}")
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = f"{error} is absent" if isinstance(error, KeyError) else error
        raise ImportError(f"{path}: {place}{reason}; install megatron_laer again") from error
    return found


def _is_as_installed(path: Path, content: bytes) -> bool:
    """Return False if a package of pip's has another digest of this file; a checkout has none."""
    package, site = path.parent.name, path.parents[1]
    records = site.glob(f"{package}-*.dist-info/RECORD")
    lines = [line for record in records for line in record.read_text("utf-8").splitlines()]
    known = [line for line in lines if line.startswith(f"{package}/{path.name},sha256=")]
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return not known or any(f",sha256={digest}," in line for line in known)


_FIELDS = ("proved", "untried")
_TABLES = (
    *("refused", "own", "idle", "with_fsdp", "with_fp8_experts", "with_megatrons"),
    *("with_adapters", "in_bridge"),
)
_TABLE = read_table(Path(__file__).with_name("rules.toml"))
# Fields of TransformerConfig about MoE that are not refused.
PROVED: frozenset[str] = _TABLE["proved"]
UNTRIED: frozenset[str] = _TABLE["untried"]
# Fields without effect on FSEP, with the reason.
WITHOUT_EFFECT: Mapping[str, str] = _TABLE["without_effect"]

# Settings of Megatron by themselves.
REFUSALS: tuple[Rule, ...] = (*_TABLE["refused"],)
# Given flags that others leave without effect.
IDLE: tuple[Rule, ...] = (*_TABLE["idle"],)
WITH_FSDP: tuple[Rule, ...] = (*_TABLE["with_fsdp"],)
WITH_FP8_EXPERTS: tuple[Rule, ...] = (*_TABLE["with_fp8_experts"],)
WITH_ADAPTERS: tuple[Rule, ...] = (*_TABLE["with_adapters"],)
IN_BRIDGE: tuple[Rule, ...] = (*_TABLE["in_bridge"],)
RULES: tuple[Rule, ...] = tuple(rule for kind in _TABLES for rule in _TABLE[kind])
# By two configurations in a loop of one's own; DDP's wrapper is the first to have both.
REDUCES_BEFORE_WGRAD = next(rule for rule in REFUSALS if rule.when is _reduces_before_wgrad)
