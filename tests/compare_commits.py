"""Comparison of two commits: each trains a small model, and every resulting number is compared.

    scripts/compare_commits.sh BEFORE AFTER

Each commit is checked out into a temporary worktree, which builds its native core. Its own
`pretrain_gpt.py` trains configs/models/tiny-moe.yaml on two gloo ranks from a fixed seed. Equal
means equal bits. Only command lines of the commits are used, so their modules may lie anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint

from megatron_laer.tools.cli.argument_types import between
from tests import processes
from tests.checkpoints import iteration_folder, saved_tensors
from tests.records import taken_apart, without_run

ROOT = Path(__file__).resolve().parents[1]

# Suffixes of metrics that differ from run to run: times, and free memory.
_MEASURED = ("_ms", "_gib")

_TRAINING_FLAGS = """
    --micro-batch-size 4 --global-batch-size 16 --lr 1e-3 --min-lr 1e-4 --weight-decay 0.1
    --clip-grad 1.0 --seed 1234 --split 95,5,0 --eval-iters 1 --eval-interval 1000
    --log-interval 1 --tensorboard-log-interval 1 --num-workers 0
    --ckpt-format torch_dist --save-interval 1000
    --expert-model-parallel-size 2 --expert-parallel-mode fsep
"""
_PLANNED = "--fsep-late-plan wait --fsep-record layouts layouts --fsep-record routing trace"
CONFIGURATIONS = {
    "adaptive": _PLANNED,
    "restore per step": f"{_PLANNED} --fsep-restore step",
    "random layouts, bf16": "--fsep-planner random --fsep-record routing trace --bf16 "
    "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    "experts at home, bf16": "--fsep-sharding experts --fsep-planner random --bf16 "
    "--fsep-record routing trace --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather --dist-ckpt-optim-fully-reshardable",
    "experts at home by relay": "--fsep-sharding experts --fsep-planner random --fsep-node-size 1 "
    "--fsep-record routing trace --fsep-set restore_algorithm=node "
    "--recompute-granularity selective --recompute-modules moe",
}

# By kind of result a text for each number, tensor or file; equal texts mean equal bits.
Results = Mapping[str, Mapping[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two commits; return 0 if they are equal, 1 if not, 2 for bad input."""
    args = _parser().parse_args(argv)
    try:
        commits = [_commit(name) for name in (args.before, args.after)]
        with tempfile.TemporaryDirectory(prefix="compare-commits-") as folder:
            results = [
                _results_of(commit, Path(folder, label), args.steps)
                for label, commit in zip(("before", "after"), commits, strict=True)
            ]
    except ValueError as error:
        print(f"compare_commits: {error}", file=sys.stderr)
        return 2
    lines, is_equal = comparison(*results)
    print("\nbefore {}\nafter  {}\n".format(*commits) + "\n".join(lines))
    return 0 if is_equal else 1


def comparison(before: Results, after: Results) -> tuple[list[str], bool]:
    """Return a table with one line per kind of result, and True if all results are equal.

    A missing result counts as different, and so does a kind without results.
    """
    rows = [("what", "compared", "result")]
    is_equal = True
    for kind in dict.fromkeys([*before, *after]):
        old, new = before.get(kind, {}), after.get(kind, {})
        names = list(dict.fromkeys([*old, *new]))
        differing = [name for name in names if old.get(name) != new.get(name)]
        result = "equal" if names else "NOTHING TO COMPARE"
        if differing:
            first, values = differing[0], [of.get(differing[0], "nothing") for of in (old, new)]
            result = "{} DIFFER, first {}: {} before, {} after".format(
                len(differing), first, *values
            )
        is_equal = is_equal and result == "equal"
        rows.append((kind, str(len(names)), result))
    width = max(len(kind) for kind, _, _ in rows)
    return [f"{kind:<{width}}{number:>10}  {result}" for kind, number, result in rows], is_equal


def read_results(folder: Path, steps: int) -> Results:
    checkpoint = iteration_folder(folder / "checkpoint", steps)
    entries = torch_checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors: dict[str, dict[str, str]] = {"weights": {}, "optimizer state": {}}
    for name, tensor in saved_tensors(checkpoint).items():
        kind = "optimizer state" if name.startswith("optimizer.") else "weights"
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        tensors[kind][name] = f"{tensor.dtype} {tuple(tensor.shape)} {_digest(content)}"
    results = {
        **_scalars(folder / "tensorboard"),
        "checkpoint keys": dict.fromkeys(entries, "a key"),
        **tensors,
        "files of routing": _files(folder / "routing"),
    }
    if (folder / "layouts").exists():
        results["layouts"] = _layouts(folder / "layouts")
        results["files of the planner's state"] = {
            path.name: _digest(without_times(path))
            for path in sorted((checkpoint / "fsep_planner").iterdir())
        }
    return results


def without_times(state: Path) -> bytes:
    fields, content = taken_apart(state)
    for _, _, values in content:
        values.pop("plan_ms", None)
    records = [
        (kind, step, {name: of.tobytes() for name, of in values.items()})
        for kind, step, values in content
    ]
    return repr((fields, records)).encode()


def _scalars(folder: Path) -> dict[str, dict[str, str]]:
    """Return TensorBoard's scalars with the precision of loss and norm, without measured ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    kinds = {"lm loss": "losses", "grad-norm": "gradient norms"}
    found: dict[str, dict[str, str]] = {"losses": {}, "gradient norms": {}, "other metrics": {}}
    for tag in events.Tags()["scalars"]:
        for event in [] if tag.endswith(_MEASURED) else events.Scalars(tag):
            found[kinds.get(tag, "other metrics")][f"{tag}, step {event.step}"] = repr(event.value)
    return found


def _layouts(folder: Path) -> dict[str, str]:
    return {
        f"{path.name}, line {number}": _digest(line)
        for path in _recordings(folder)
        for number, line in enumerate(without_run(path), start=1)
    }


def _files(folder: Path) -> dict[str, str]:
    return {path.name: _digest(b"".join(without_run(path))) for path in _recordings(folder)}


def _recordings(folder: Path) -> list[Path]:
    # Hidden files say which process wrote a recording, so they differ from run to run.
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _commit(name: str) -> str:
    words = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"{name!r} is no commit of {ROOT}; give a hash, a branch or a tag")
    return found.stdout.strip()


def _results_of(commit: str, folder: Path, steps: int) -> Results:
    folder.mkdir()
    data = folder.parent / "text"
    results: dict[str, Mapping[str, str]] = {}
    with _worktree(commit, folder / "tree") as tree:
        print(f"{folder.name} {commit[:12]}: building", flush=True)
        _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, tree)
        package = [sys.executable, "-m", "megatron_laer"]
        if not data.with_suffix(".idx").exists():
            _run([*package, "prepare-data", "--python-sources", "--output", str(data)], tree, tree)
        model = _run([*package, "flags", "configs/models/tiny-moe.yaml", "--cpu"], tree, tree)
        # A commit's own flags, since later ones may have other names.
        module = runpy.run_path(str(tree / "tests" / "compare_commits.py"))
        for number, (name, flags) in enumerate(module["CONFIGURATIONS"].items()):
            print(f"{folder.name} {commit[:12]}: training, {name}", flush=True)
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
            for kind, found in read_results(run, steps).items():
                results[f"{name}: {kind}"] = found
    return results


@contextmanager
def _worktree(commit: str, path: Path) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(path), commit], check=True)
    try:
        yield path
    finally:
        subprocess.run([*git, "remove", "--force", str(path)], check=True)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/compare_commits.sh",
        description="Trains a small model with two commits, each in a worktree of its own, and "
        "compares losses, gradient norms, metrics, recordings and checkpoints, bit for bit.",
        epilog="Exit status: 0 if nothing differs, 1 if something does, 2 if a commit cannot be "
        "built or trained.",
    )
    parser.add_argument("before", metavar="BEFORE", help="a commit, such as main")
    parser.add_argument("after", metavar="AFTER", help="a commit, such as HEAD")
    parser.add_argument("--steps", type=between(1, 10**5), default=30, help="default %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
