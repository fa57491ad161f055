"""Fields of files, each with every value of another kind.

A row is a field, a column a value. Daily tests try every sixteenth pair of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_laer.files.checks import one_line
from tests.bad_inputs.case import Case
from tests.bad_inputs.inputs import GOOD_CLUSTER

_EVERY = 16

OF_YAML = {
    "two": "[1, 2]",
    "mapping": "{a: 1}",
    "list in a list": "[[8]]",
    "null": "~",
    "negative": "-8",
    "fraction": "8.5",
    "hexadecimal": "0x8",
    "10^18": str(10**18),
    "2^63": str(2**63),
    "many digits": "9" * 5000,
    "nan": ".nan",
    "infinite": "-.inf",
    "fullwidth digit": "\uff18",
    "words": "8 8",
    "date": "2020-01-01",
    "tag": "!!int 8",
    "anchor": "&a 8",
    "alias": "*a",
    "escapes": '"8\\e[2J"',
    "bidi": '"8\\u202e"',
    "lines": '"8\\n9"',
    "deep": "[" * 40 + "]" * 40,
    "flag": "--lr",
}
OF_JSON: Mapping[str, str] = {
    "null": "null",
    "true": "true",
    "text": '"8"',
    "list": "[8]",
    "mapping": '{"a": 8}',
    "negative": "-8",
    "fraction": "8.5",
    "10^18": str(10**18),
    "2^63": str(2**63),
    "many digits": "9" * 5000,
    "nan": "NaN",
    "infinite": "-Infinity",
    "too large": "1e999",
    "escapes": '"\\u001b[2J\\nFAKE"',
    "half a character": '"\\ud800"',
    "deep": "[" * 3000 + "]" * 3000,
    "nothing": "",
}
_SIZES = {
    "hidden-size": 8,
    "moe-ffn-hidden-size": 8,
    "num-experts": 8,
    "num-layers": 2,
    "num-attention-heads": 2,
    "moe-router-topk": 2,
    "seq-length": 8,
    "vocab-size": 8,
    "kv-channels": 4,
    "num-query-groups": 2,
}
_READ_BY_PLAN = ("hidden-size", "moe-ffn-hidden-size", "num-experts")
_CLUSTER = ("nodes", "ranks_per_node", "gemm", "intra", "inter", "solve")
# Names of recipes of Megatron-Bridge, or functions that are not recipes.
BRIDGE = (
    "nothing_there_config",
    "",
    ":",
    "os:",
    ":getcwd",
    "os:system",
    "os:nothing",
    "nothing:x",
    "a:b:c",
    "os.path:join",
    "sys:path",
    "builtins:eval",
    "./script.py:x",
    "os:get cwd",
    "\x1b[2J:FAKE",
    "os:\x1b[2J",
    "os:\u202ecwd",
    "caf\udce9:x",
    "x" * 5000,
    "..:x",
)


def cases() -> Iterator[Case]:
    for_megatron = {"negative", "fraction", "hexadecimal", "10^18", "2^63", "date", "words"}
    for_megatron |= {"fullwidth digit"}
    ours = {kind: text for kind, text in OF_YAML.items() if kind not in for_megatron}
    yield from _of("flags model-of-{}.yaml", _SIZES, ours)
    yield from _of("plan good.trace --config model-of-{}.yaml", _READ_BY_PLAN, OF_YAML)
    yield from _of("simulate good.trace --model model-of-{}.yaml", _SIZES, OF_YAML)
    yield from _of("plan good.trace --cluster cluster-of-{}.yaml", _CLUSTER, OF_YAML)
    yield from _of("plan trace-of-{}.trace", ("num_ranks", "num_experts", "layers"), OF_JSON)
    for name in BRIDGE:
        part = name.rpartition(":")[2]
        yield Case(("check-recipe", "--bridge-recipe", name), one_line(part)[:40])


def _of(
    place: str, fields: Iterable[str], values: Iterable[str], says: str = "{name}"
) -> Iterator[Case]:
    for row, field in enumerate(fields):
        for column, kind in enumerate(values):
            name = _name(field, kind)
            words = tuple(place.format(name).split(" "))
            part = says.format(name=name, field=field)
            yield Case(words, part, nightly=(row + column) % _EVERY != 0)


def _name(field: str, kind: str) -> str:
    return f"{field}-{kind.replace(' ', '-').replace('^', '-')}"


def make(folder: Path) -> None:
    for kind, text in OF_YAML.items():
        for field in _SIZES:
            lines = [f"  {key}: {size}" for key, size in _SIZES.items() if key != field]
            content = "\n".join(["description: d", "moe:", *lines, f"  {field}: {text}"])
            (folder / f"model-of-{_name(field, kind)}.yaml").write_text(content)
        for field in _CLUSTER:
            kept = [line for line in GOOD_CLUSTER.splitlines() if not line.startswith(f"{field}:")]
            content = "\n".join([*kept, f"{field}: {text}"])
            (folder / f"cluster-of-{_name(field, kind)}.yaml").write_text(content)
    trace = (folder / "good.trace").read_bytes()
    first = trace.index(b"\n")
    for kind, text in OF_JSON.items():
        for field in ("num_ranks", "num_experts", "layers"):
            line = _changed(trace[: first + 1], field, text)
            (folder / f"trace-of-{_name(field, kind)}.trace").write_bytes(line + trace[first + 1 :])


def _changed(content: bytes, field: str, value: str) -> bytes:
    """Replace a field in the first line of JSON."""
    first, _, rest = content.partition(b"\n")
    fields = json.loads(first)
    fields[field] = "\0"
    line = json.dumps(fields, separators=(",", ":")).replace('"\\u0000"', value)
    return line.encode() + b"\n" + rest
