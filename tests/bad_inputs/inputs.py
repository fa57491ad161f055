"""Good files, and copies with one thing wrong, from which bad inputs are made."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_laer.files.records import header_line
from tests.traces import some_counts, write_recording

HUGE = 2**36


def make(folder: Path) -> None:
    _traces(folder)
    _yaml(folder)
    _checkpoints(folder)
    _texts(folder)
    _special(folder)


def _traces(folder: Path) -> None:
    path = folder / "good.trace"
    write_recording(path, some_counts(0, 4, microbatches=1, ranks=4, experts=8, most=99))
    good = path.read_bytes()
    first = good.index(b"\n") + 1
    folder_of_one = folder / "traces"
    folder_of_one.mkdir()
    (folder_of_one / "group-0.trace").write_bytes(good)
    two = folder / "two-groups"
    two.mkdir()
    for group in range(2):
        (two / f"group-{group}.trace").write_bytes(good)
    (folder / "header-only.trace").write_bytes(good[:first])
    (folder / "half-header.trace").write_bytes(good[: first // 2])
    (folder / "half-record.trace").write_bytes(good[: first + 9])
    (folder / "flipped.trace").write_bytes(good[: first + 40] + b"\xff" + good[first + 41 :])
    (folder / "tail.trace").write_bytes(good)
    os.truncate(folder / "tail.trace", HUGE)
    header = json.loads(good[:first])
    del header["crc"]
    line = header_line("megatron_laer-trace", header | {"version": 9})
    (folder / "version.trace").write_bytes(line + good[first:])
    (folder / "nested.trace").write_bytes(b'{"format":"megatron_laer-trace"' + b"[" * 10**5)
    write_recording(folder / "one-step.trace", np.ones((1, 1, 1, 2, 2), int))
    write_recording(folder / "zeros.trace", np.zeros((3, 1, 1, 2, 2), int))


_LEVELS = "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)
# Text, and the message of any command that reads it.
YAML = {
    "empty": ("", "expected a mapping"),
    "text": ("hello", "'hello', expected a mapping"),
    "list": ("- a", "['a'], expected a mapping"),
    "open": ("a: [", "line 1: not valid YAML"),
    "colons": ("a: b: c", "line 1: not valid YAML"),
    "tabs": ("a:\n\t- b", "line 2: not valid YAML"),
    "control": ("a: \x01", "not valid YAML: special characters"),
    "nul": ("a: \0", "character 3: not valid YAML: special characters"),
    "bomb": ("a0: &a0 [x]\n" + _LEVELS, "line 1: anchors and aliases"),
    "lost": ("a: *b", "line 1: anchors and aliases"),
    "int": ("a: !!int x", "line 1: tags such as"),
    "python": ("!!python/object/apply:os.mkdir [ran]", "line 1: tags such as"),
    "own-tag": ("!thing a", "line 1: tags such as"),
    "no-tag": ("! x", "line 1: tags such as '!'"),
    "brackets": ("[" * 900, "line 1: nested too deeply"),
    "dashes": ("- " * 20000, "line 1: nested too deeply"),
    "key-twice": ("a: 1\na: 2", "line 2: the key 'a' is given twice"),
    "list-key": ("? [a]\n: b", "line 1: a list or a mapping is no key"),
    "documents": ("a: 1\n---\nb: 2", "line 2: a second document"),
    "directive": ("%YAML 9.9\n--- a", "not valid YAML"),
    "large": ("#" * 70_000, "has 70,000 bytes; at most 65,536"),
}
MODELS = {
    "date": ("a: 2020-13-45", "description must say"),
    "no-description": ("moe: {}", "description must say what the model is, got None"),
    "group": ("{description: d, expert: {}}", "unknown group 'expert'"),
    "flat": ("{description: d, moe: 8}", "moe must hold `flag: value` lines, got '8'"),
    "off": ("{description: d, moe: {swiglu: false}}", "swiglu is 'false'"),
    "nothing": ("{description: d, moe: {lr: }}", "lr is ''"),
    "list": ("{description: d, moe: {lr: []}}", "lr is an empty list"),
    "mapping": ("{description: d, moe: {lr: {a: 1}}}", "lr is {'a': '1'}"),
    "nan": ("{description: d, moe: {lr: .nan}}", "lr is '.nan'; give a finite number"),
    "digits": (f"{{description: d, moe: {{lr: {'9' * 5000}}}}}", "lr is '999"),
    "flag": ("{description: d, moe: {lr: --load}}", "lr is '--load'"),
    "lines": ('{description: d, moe: {lr: "1\\n2"}}', "lr is '1\\n2'"),
    "spelling": ("{description: d, moe: {a-b: 1}, data: {a_b: 2}}", "a_b is given twice"),
    "escape": ('{description: d, moe: {"a\\e[31m": 1}}', "is no flag"),
}
# Sizes of a model that simulates, and scalars of YAML that are no size.
MODEL: Mapping[str, object] = {
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
NO_SIZES = (
    *("[1, 2]", "{a: 1}", "[[8]]", "~", "-8", "8.5", "0x8", str(10**18), str(2**63), "9" * 5000),
    *(".nan", "-.inf", "\uff18", "8 8", "2020-01-01", "!!int 8", "&a 8", "*a", '"8\\e[2J"'),
    *('"8\\u202e"', '"8\\n9"', "[" * 40 + "]" * 40, "--lr"),
)


def write_model(path: Path, sizes: Mapping[str, object]) -> None:
    lines = [f"  {name}: {size}\n" for name, size in sizes.items()]
    path.write_text("description: d\nmoe:\n" + "".join(lines), encoding="utf-8")


_GOOD_MODEL = "{description: d, moe: {hidden-size: %s, moe-ffn-hidden-size: %s, num-experts: %s}}"
SIZES = {
    "no-size": ("{description: d, moe: {num-experts: 8}}", "has no hidden-size in 1..1048576"),
    "huge-hidden": (_GOOD_MODEL % (10**40, 8, 8), "has no hidden-size in 1..1048576"),
    "zero-ffn": (_GOOD_MODEL % (8, 0, 8), "has no moe-ffn-hidden-size in"),
    "half-ffn": (_GOOD_MODEL % (8, 0.5, 8), "has no moe-ffn-hidden-size in"),
    "many-experts": (_GOOD_MODEL % (8, 8, 10**6), "has no num-experts in 1..32767"),
    "dense": ("{description: d, architecture: {hidden-size: 8}}", "so all its layers are dense"),
    "other-experts": (_GOOD_MODEL % (8, 8, 9), "has 8 experts, not 9"),
}
_GOOD_CLUSTER = """name: x
source: y
assumed: z
nodes: 1
ranks_per_node: 8
gemm: [[1, 2e12], [4096, 237e12]]
intra: {bytes_per_s: 3e11, latency_s: 0}
inter: {bytes_per_s: 1.25e+10, latency_s: 2e-5}
solve: {base_s: 1e-5, slot_s: 1e-7, count_s: 1e-9}
"""


def _yaml(folder: Path) -> None:
    for prefix, texts in (("yaml", YAML), ("model", MODELS), ("sizes", SIZES)):
        for name, (text, _) in texts.items():
            (folder / f"{prefix}-{name}.yaml").write_text(text)
    (folder / "cluster-zero.yaml").write_text(_GOOD_CLUSTER.replace("nodes: 1", "nodes: 0"))
    (folder / "yaml-latin.yaml").write_bytes(b"a: caf\xe9")


def pickles() -> dict[str, tuple[bytes, str]]:
    import torch
    from torch.distributed.checkpoint import metadata

    def tensor(size: object, dtype: object = torch.float32) -> bytes:
        properties = metadata.TensorProperties(dtype=dtype)
        entry = metadata.TensorStorageMetadata(properties, size, [])
        return pickle.dumps(metadata.Metadata({"x\x1b[31m\nFAKE": entry}))

    good = tensor(torch.Size([2]))
    return {
        "nothing": (b"", "no list of tensors"),
        "cut": (good[:-20], "no list of tensors"),
        "number": (pickle.dumps(7), "has no state_dict_metadata"),
        "system": (b"\x80\x04cos\nsystem\n(Vtouch ran\ntR.", "it asks for os.system"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "it asks for torch.os.system"),
        "writer": (
            b"\x80\x04ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n.",
            "it asks for torch.distributed.checkpoint.filesystem.FileSystemWriter",
        ),
        "class": (
            b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n}X\1\0\0\0aK\1sb.",
            "is no list of tensors: 'mappingproxy'",
        ),
        "instance": (b"(ios\nsystem\n.", "it asks for os.system"),
        "bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "no list of tensors"),
        "negative": (tensor(_Size((-5,))), "has the size '(-5,)' and the type 'torch.float32'"),
        "text-size": (tensor(_Size(("a",))), "no list of tensors"),
        "other-type": (tensor(torch.Size([2]), torch.Size), "expected those of torch"),
    }


class _Size:
    def __init__(self, sizes: object) -> None:
        self._sizes = sizes

    def __reduce__(self) -> object:
        import torch

        return torch.Size, (self._sizes,)


def _checkpoints(folder: Path) -> None:
    def checkpoint(name: str, content: bytes) -> Path:
        place = folder / f"checkpoint-{name}"
        place.mkdir()
        (place / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        (place / ".metadata").write_bytes(content)
        return place

    for name, (content, _) in pickles().items():
        checkpoint(name, content)
    os.truncate(checkpoint("list-huge", b"") / ".metadata", HUGE)
    (checkpoint("no-list", b"") / ".metadata").unlink()
    place = checkpoint("pipe", b"")
    (place / ".metadata").unlink()
    os.mkfifo(place / ".metadata")
    runs = {"seven": "seven", "escape": "\x1b[31m", "missing": "8"}
    for name, text in runs.items():
        place = folder / f"run-{name}"
        place.mkdir()
        (place / "latest_checkpointed_iteration.txt").write_text(text)
    place = folder / "run-huge"
    place.mkdir()
    (place / "latest_checkpointed_iteration.txt").write_text("7")
    os.truncate(place / "latest_checkpointed_iteration.txt", HUGE)


def _texts(folder: Path) -> None:
    (folder / "good.txt").write_text("some text")
    (folder / "good.html").write_text("<p>some text</p>")
    (folder / "empty.txt").touch()
    (folder / "out").mkdir()
    (folder / "prefix").mkdir()
    (folder / "prefix" / "kept").write_text("kept")
    (folder / "old.bin").write_bytes(b"old")
    (folder / "old.idx").write_bytes(b"old")


def _special(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "nothing").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "link.trace").symlink_to("good.trace")
    (folder / "hard.trace").hardlink_to(folder / "good.trace")
    (folder / "kept.json").write_text("{}")
    (folder / "homes-metrics.json").write_text('{"format":"megatron_laer-metrics"}')
    (folder / "script.py").write_text("raise SystemExit(0)\n")
    (folder / "megatrons.py").write_text(
        "from megatron.training.arguments import parse_and_validate_args\n"
        "parse_and_validate_args()\n"
    )
