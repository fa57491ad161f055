"""Comparison of two commits: each trains a small model, and all that it wrote is compared.

    scripts/compare_commits.sh BEFORE AFTER

Each commit's files are copied into a temporary folder, and its native core is built. Its own
`pretrain_gpt.py` trains configs/models/tiny-moe.yaml on two gloo ranks from a fixed seed. Equal
means equal bits. Only command lines of the commits are used, so their modules may lie anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as torch_checkpoint

from tests import processes
from tests.checkpoints import iteration_folder, saved_tensors
from tests.documents import ROOT
from tests.records import taken_apart

# Suffixes of metrics that differ from run to run: times, and free memory.
_MEASURED = ("_ms", "_gib")

_TRAINING_FLAGS = """
    --micro-batch-size 4 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --weight-decay 0.1
    --clip-grad 1.0 --seed 1234 --split 95,5,0 --eval-iters 1 --eval-interval 1000
    --log-interval 1 --tensorboard-log-interval 1 --num-workers 0
    --ckpt-format torch_dist --save-interval 1000
    --expert-model-parallel-size 2 --expert-parallel-mode fsep
"""
_PLANNED = "--fsep-late-plan wait --fsep-record recorded trace layouts"
CONFIGURATIONS = {
    "adaptive": _PLANNED,
    "restore per step": f"{_PLANNED} --fsep-restore step",
    "random layouts, bf16": "--fsep-planner random --fsep-record recorded trace --bf16 "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    "experts at home, bf16": "--fsep-sharding experts --fsep-planner random --bf16 "
    "--fsep-record recorded trace --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --dist-ckpt-optim-fully-reshardable",
    "experts at home by relay": "--fsep-sharding experts --fsep-planner random --fsep-node-size 1 "
    "--fsep-record recorded trace --fsep-set restore_algorithm=node "
    "--recompute-granularity selective --recompute-modules moe",
}

# A text for each number, tensor or file of a run; equal texts mean equal bits.
Results = Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two commits; return 0 if they are equal, 1 if not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="scripts/compare_commits.sh",
        description="Compares losses, gradient norms, metrics, recordings and checkpoints of a "
        "small model that two commits train, bit for bit. Exit status: 0 if nothing differs, 1 if "
        "something does, 2 if a commit cannot be built or trained.",
    )
    parser.add_argument("before", metavar="BEFORE", help="a commit, such as main")
    parser.add_argument("after", metavar="AFTER", help="a commit, such as HEAD")
    parser.add_argument("--steps", type=int, default=30, help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="compare-commits-") as folder:
            before = _results_of(args.before, Path(folder, "before"), args.steps)
            after = _results_of(args.after, Path(folder, "after"), args.steps)
    except ValueError as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return 2
    for name in CONFIGURATIONS:
        print(f"{name}: {comparison(before.get(name, {}), after.get(name, {}))}")
    return int(before != after)


def comparison(before: Results, after: Results) -> str:
    """Describe the differences of two runs; a missing result differs."""
    names = dict.fromkeys([*before, *after])
    differing = [name for name in names if before.get(name) != after.get(name)]
    if not differing:
        return f"{len(names)} results are equal"
    lines = (
        f"  {name}: {before.get(name, 'nothing')} before, {after.get(name, 'nothing')} after"
        for name in differing
    )
    return "\n".join([f"{len(differing)} of {len(names)} results DIFFER", *lines])


def read_results(folder: Path, steps: int) -> Results:
    checkpoint = iteration_folder(folder / "checkpoint", steps)
    metadata = torch_checkpoint.FileSystemReader(checkpoint).read_metadata()
    found = dict.fromkeys(metadata.state_dict_metadata, "a key") | _scalars(folder / "tensorboard")
    for name, tensor in saved_tensors(checkpoint).items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {_digest(content)}"
    for path in sorted([*folder.glob("recorded/group-*"), *checkpoint.glob("fsep_planner/*")]):
        found[path.name] = _digest(lasting(path))
    return found


def lasting(path: Path) -> bytes:
    """Return the content of a file of records without the run's number and measured times."""
    fields, content = taken_apart(path)
    lasting = [
        (kind, step, {n: np.asarray(of).tobytes() for n, of in values.items() if n != "plan_ms"})
        for kind, step, values in content
    ]
    return repr((fields | {"run": ""}, lasting)).encode()


def _scalars(folder: Path) -> dict[str, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        f"{tag}, step {event.step}": repr(event.value)
        for tag in events.Tags()["scalars"]
        if not tag.endswith(_MEASURED)
        for event in events.Scalars(tag)
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _results_of(commit: str, folder: Path, steps: int) -> dict[str, Results]:
    tree, data = folder / "tree", folder.parent / "text"
    tree.mkdir(parents=True)
    _run(["git", "-C", str(ROOT), "archive", f"--output={folder / 'tar'}", commit], tree, tree)
    _run(["tar", "-xf", str(folder / "tar")], tree, tree)
    print(f"{folder.name} {commit}: building", flush=True)
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, tree)
    package = [sys.executable, "-m", "megatron_laer"]
    if not data.with_suffix(".idx").exists():
        _run([*package, "prepare-data", "--python-sources", "--output", str(data)], tree, tree)
    model = _run([*package, "flags", "configs/models/tiny-moe.yaml", "--cpu"], tree, tree)
    results: dict[str, Results] = {}
    # A commit's own flags, since later ones may have other names.
    module = runpy.run_path(str(tree / "tests" / "compare_commits.py"))
    for number, (name, flags) in enumerate(module["CONFIGURATIONS"].items()):
        print(f"{folder.name} {commit}: training, {name}", flush=True)
        run = folder / str(number)
        run.mkdir()
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", str(tree / "pretrain_gpt.py")),
            *(*model.split(), *_TRAINING_FLAGS.split(), *flags.split()),
            *("--train-iters", str(steps), "--data-path", str(data)),
            *"--data-cache-path cache --tensorboard-dir tensorboard --save checkpoint".split(),
        ]
        _run(command, tree, run)
        results[name] = read_results(run, steps)
    return results


def _run(command: Sequence[str], tree: Path, folder: Path) -> str:
    """Run in `folder` with the modules of `tree`; return the output, or raise ValueError."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MEGATRON_LAER_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    result = processes.run(command, 3600.0, cwd=folder, env=os.environ | environment)
    if result.returncode:
        output = (result.stdout + result.stderr)[-4000:]
        raise ValueError(f"{' '.join(command[:5])} ... failed in {tree}:\n{output}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
