"""The table of docs/errors.md: every error message and warning, by where it comes from.

`python -m tests.site_pages` writes it. A message says itself what is wrong, why, and what would
work; here stands when each kind is raised, and the way out where a message has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.error_messages import (
    Message,
    messages,
    native_messages,
    script_messages,
    warnings,
)


@dataclass(frozen=True)
class Kind:
    """Messages of one kind.

    Attributes:
        title: the heading.
        sources: the files and folders, relative to the package, that they come from.
        when: when they are raised, and by what.
        way_out: for messages that name none.
    """

    title: str
    sources: tuple[str, ...]
    when: str
    way_out: str


# A message is of the first kind that has its source.
KINDS = (
    Kind(
        "Settings of a run",
        (
            *("choices.py", "config.py", "experts/gemm/", "flags.py", "planner/guard.py"),
            *("planner/strategies.py", "plugin/command_line.py", "plugin/optimizers.py"),
            *("plugin/switch.py", "support/"),
        ),
        "On every rank, before the first step: when Megatron's arguments are validated, when "
        "`enable` is called, or when the first MoE layer is built. Settings of Megatron that are "
        "refused have a table of their own: [troubleshooting.md]"
        "(troubleshooting.md#refused-settings).",
        "it lists settings, each with a way out of its own",
    ),
    Kind(
        "Versions, platform and native core",
        (
            *("__init__.py", "platform/", "planner/native_core.py", "plugin/patching.py"),
            "cli/train.py",
        ),
        "When the package is imported, a command starts or FSEP is turned on. "
        "[compatibility.md](compatibility.md) has the versions.",
        "`megatron-laer doctor` says what is there and what is missing",
    ),
    Kind(
        "Ranks, nodes and the launcher",
        ("runtime/comm/",),
        "When process groups are made; what begins with `FSEP` also at a microbatch, if ranks no "
        "longer agree. Every rank of the group stops.",
        "`megatron-laer doctor` under the launcher shows what a rank sees",
    ),
    Kind(
        "Layers and steps",
        (
            *("dispatch/", "experts/module.py", "moe_layer.py", "session.py", "sharding.py"),
            *("runtime/layer_state.py", "runtime/weights/"),
            "runtime/planning/announced_layouts.py",
        ),
        "While the model is built or trains, mostly in loops of one's own: "
        "[own_loop.md](own_loop.md), [announced.md](announced.md).",
        "do what it says must be",
    ),
    Kind(
        "Recordings and checkpoints of a run",
        (
            *("files/recording.py", "planner/state.py", "plugin/checkpoints.py"),
            *("runtime/planning/", "telemetry/"),
        ),
        "When recordings are opened, replayed or read, and when a checkpoint is loaded. What is "
        "wrong with the planner's state in a checkpoint ends no run: a warning quotes it, and "
        "planning starts anew. [checkpoints.md](checkpoints.md) has the files.",
        "if the file is damaged, move it away and record anew, or go on without",
    ),
    Kind(
        "Weights by stock's names, and Megatron-Bridge",
        ("integrations/", "stock_loading.py", "stock_names.py", "stock_tensors.py"),
        "[stock_names.md](stock_names.md) and [bridge.md](bridge.md) have the calls.",
        "do what it says must be",
    ),
    Kind(
        "plan and simulate",
        ("cli/argument_types.py", "cli/plan", "cli/settings.py", "cli/simulate", "simulator/"),
        "One line, and status 2, before anything is computed: [plan.md](plan.md), "
        "[simulator.md](simulator.md).",
        "give a value that it allows",
    ),
    Kind(
        "report",
        ("cli/report.py", "report/"),
        "One line, and status 2: [report.md](report.md).",
        "give a value that it allows",
    ),
    Kind(
        "calibrate",
        ("calibration/", "cli/calibrate.py"),
        "One line, and status 2, on every rank: [calibrate.md](calibrate.md).",
        "give a value that it allows",
    ),
    Kind(
        "Settings of a Slurm job",
        ("recipes/job.py",),
        "One line of `scripts/slurm/pretrain.sbatch`, and status 2, before its nodes do any work: "
        "[slurm.md](slurm.md).",
        "set what it names",
    ),
    Kind(
        "check-recipe",
        ("cli/check_recipe.py", "recipes/"),
        "One line, and status 2: [recipes.md](recipes.md).",
        "mend the line or the cell that it names",
    ),
    Kind(
        "inspect",
        ("files/inert_pickle.py", "inspection.py"),
        "One line, and status 2: [checkpoints.md](checkpoints.md). What begins with `it` follows "
        "the name of a file.",
        "give a whole checkpoint in Megatron's format torch_dist; save it anew if it is damaged",
    ),
    Kind(
        "prepare-data",
        ("cli/prepare_data.py", "data/"),
        "One line, and status 2; an older dataset stays: [prepare_data.md](prepare_data.md).",
        "mend what is named, or leave it out",
    ),
    Kind(
        "Files of models, clusters and settings",
        (
            *("files/", "model_flags.py", "planner/cluster_files.py", "planner/clusters.py"),
            "planner/gemm_curve.py",
        ),
        "When a file is read or written, before anything else is done. "
        "[configurations.md](configurations.md) has their form.",
        "mend the line or the key that it names, as the files in `configs` have it",
    ),
    Kind(
        "Recorded routing",
        ("trace/",),
        "When a trace is read, or made by rule: [plan.md](plan.md) has the formats.",
        "mend the line that it names, or record anew",
    ),
    Kind(
        "Functions of the planner",
        ("layout.py", "planner/"),
        "Raised to code that calls them ([architecture.md](architecture.md)). A run or a command "
        "that shows one has a fault of ours: report it.",
        "pass what it expects",
    ),
)

# What is no error: the run goes on.
_WARNINGS = "A run goes on after these. Each is said once, by one rank."
_SLURM = (
    "Lines of `scripts/slurm/pretrain.sbatch`, before anything starts, with status 2: "
    "[slurm.md](slurm.md)."
)


def kind_of(message: Message) -> Kind:
    """The kind that a message is of.

    Raises:
        ValueError: its source is of no kind.
    """
    for kind in KINDS:
        if message.source.startswith(kind.sources):
            return kind
    raise ValueError(f"{message.source}: of no kind; name it in KINDS of tests/errors_page.py")


def errors() -> Iterator[str]:
    """Every message, and what to do, as sections of a page."""
    found = [*messages(), *native_messages()]
    of_kind = {kind.title: [m for m in found if kind_of(m) is kind] for kind in KINDS}
    for kind in KINDS:
        yield from _section(kind.title, kind.when, of_kind[kind.title], kind.way_out)
    yield from _section("Slurm's script", _SLURM, script_messages(), "set what it names")
    yield from _section("Warnings", _WARNINGS, warnings(), "nothing, if that is meant")


def _section(title: str, text: str, found: Iterable[Message], way_out: str) -> Iterator[str]:
    yield f"## {title}"
    yield f"{text} Where a message names no way out: {way_out}."
    yield ""
    yield "| message | way out |"
    yield "|---|---|"
    rows = {(message.said, message.way_out) for message in found}
    for said, says in sorted(rows, key=lambda row: (row[0].lstrip("…'=: "), row)):
        yield f"| {_code(said)} | {_prose(says)} |"
    yield ""


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _prose(text: str) -> str:
    """Text for a cell, whose marks Markdown takes as they are; code stays between backticks."""
    parts = " ".join(text.split()).rstrip(".").split("`")
    plain = [re.sub(r"([*_<>\[\]|])", r"\\\1", part) for part in parts[::2]]
    code = [f"`{part}`" for part in parts[1::2]]
    return "".join(word for pair in zip(plain, [*code, ""], strict=True) for word in pair)
