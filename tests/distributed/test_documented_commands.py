"""Every command in the README and in docs runs unchanged, in the order of its page.

Assumptions of a page that tests cannot meet are replaced: a cluster, a checkout of Megatron, hours.
Commands that install everything are omitted, since this test runs in their result.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import processes
from tests.distributed.test_paper import check_toys
from tests.documents import COMMANDS, PAGES, ROOT, SCRIPT, SHOWN, Block, blocks, inline_commands

# Replacements in the commands of a page; each must occur there.
ON_TWO_CPU_RANKS = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--expert-model-parallel-size 8": "--expert-model-parallel-size 2",
    "flags tiny-moe": "flags tiny-moe --cpu",
}
SHORT = {
    "--train-iters 100": "--train-iters 3 --num-workers 0",
    "--eval-iters 5": "--eval-iters 1",
    "--global-batch-size 64": "--global-batch-size 8",
    "--log-interval 10": "--log-interval 1",
}
SUBSTITUTES: Mapping[str, Mapping[str, str]] = {
    # start.md has the same line.
    "README.md": ON_TWO_CPU_RANKS | SHORT | {"python -m megatron_laer doctor": "true"},
    "start.md": {
        "--train-iters 40": "--train-iters 3 --num-workers 0",
        "--train-iters 60": "--train-iters 5 --num-workers 0",
        "--log-interval 10": "--log-interval 1",
    },
    # Measured constants of a CPU have no card, and this test is no card's.
    "from_0_to_64.md": {
        "python -m megatron_laer doctor": "true",
        "/data/": "data/",
        "--nproc-per-node 8": "--nproc-per-node 2",
        "node.yaml --config qwen3-30b-a3b": "node.yaml --quick",
        "--cluster node.yaml": "--cluster h100-8",
    },
    "megatron.md": ON_TWO_CPU_RANKS | SHORT,
    # The batch script's own tests run it in a Slurm; here it prints its command.
    "slurm.md": {
        "/data/": "data/",
        # Outside of Slurm, which has pyxis, it is refused.
        "CONTAINER_IMAGE=/images/pytorch.sqsh CONTAINER_MOUNTS=/data:/data ": "",
    },
    "performance.md": {"--ranks 2 --json": "--ranks 2 --quick --json", "--half": "--quick"},
}
# Logs written by a page's commands; FSEP's metrics must be in them.
LOGS = {"start.md": "run/train.log"}
_FIRST_STEPS = """
    python -m megatron_laer prepare-data --python-sources --output data/text
    mkdir -p run
    torchrun --nproc-per-node 2 pretrain_gpt.py \\
        $(python -m megatron_laer flags tiny-moe --cpu) --data-path data/text --split 95,5,0 \\
        --micro-batch-size 4 --global-batch-size 8 --train-iters 3 --lr 1e-3 \\
        --eval-interval 2 --eval-iters 1 --save checkpoints --save-interval 2 --num-workers 0 \\
        --expert-model-parallel-size 2 --expert-parallel-mode fsep \\
        --fsep-record run metrics trace layouts
"""
# Preparations that a page assumes.
BEFORE = {
    **dict.fromkeys(("checkpoints.md", "metrics.md"), _FIRST_STEPS),
    "from_0_to_64.md": "mkdir -p data; echo A corpus. >corpus.txt",
    "slurm.md": "python -m megatron_laer flags mixtral-8x7b-e8k2 >flags.txt",
}
INSTALLS = (
    *("./scripts/quickstart.sh", "./scripts/test.sh", "scripts/environment.sh", "apt-get "),
    ".venv/bin/python -m pip ",
)
# Of other projects, which are not on the package index or need more than a CPU.
NOT_OURS = ("scripts/conversion/convert.sh", "from megatron.bridge", "git apply")
# Blocks of a page that another test runs on ranks, by a word in them.
RUN_ELSEWHERE = {
    ("performance.md", "benchmarks.convergence"): "convergence/test_long_convergence.py",
    ("megatron.md", "own_loop.py"): "distributed/test_own_loop.py",
}

_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=_IDS)
def test_a_block_is_run_or_shown_and_no_command_leaves_anything_out(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        assert block.language in SHOWN | {COMMANDS, SCRIPT}, where
        assert block.language in SHOWN or "…" not in block.text, where
    elided = [text for text in inline_commands(page) if "…" in text or "..." in text]
    assert not elided, elided


@pytest.mark.unit
def test_what_is_run_elsewhere_is() -> None:
    for (page, _), test in RUN_ELSEWHERE.items():
        source = (ROOT / "tests" / test).read_text()
        assert page in source, (page, test)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    folder = tmp_path
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "dist"):
            (folder / path.name).symlink_to(path)
    commands = folder / "bin"
    commands.mkdir()
    for name, body in _PROGRAMS.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    checkout = folder / "Megatron-LM"
    checkout.mkdir()
    (checkout / "pretrain_gpt.py").symlink_to(ROOT / "pretrain_gpt.py")
    return folder


_PYTHON = shlex.quote(sys.executable)
_PROGRAMS = {
    "python": f'exec {_PYTHON} "$@"',
    "torchrun": f'exec {_PYTHON} -m torch.distributed.run --standalone "$@"',
    "megatron-laer": f'exec {_PYTHON} -m megatron_laer "$@"',
    # Only its request is checked.
    "sbatch": 'while [ "${1#--}" != "$1" ]; do [ "$1" != --nodes ] || nodes=$2; shift 2; done; '
    'SLURM_JOB_NUM_NODES=$nodes DRY_RUN=1 exec bash "$@"',
    "pip": 'case "$*" in "install "*.|"install .[tools"*"]") ;; *) exit 1 ;; esac',
}


SHELL = ["bash", "-euo", "pipefail", "-c"]


def run(page: str, command: list[str], text: str, top: Path) -> None:
    result = processes.run(
        [*command, text],
        timeout_s=7200.0,
        cwd=top,
        env=os.environ
        | {
            "PATH": f"{top / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": processes.python_path(),
            "PYTHON": sys.executable,
            "MEGATRON_LAER_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        },
    )
    output = (result.stdout + result.stderr)[-6000:]
    assert result.returncode == 0, f"{page}:\n{text}\n{output}"


def _is_run_here(page: Path, block: Block) -> bool:
    elsewhere = (word for name, word in RUN_ELSEWHERE if name == page.name)
    return block.language not in SHOWN and not any(
        word in block.text for word in (*NOT_OURS, *elsewhere)
    )


def _pages_with_commands() -> list[Path]:
    return [page for page in PAGES if any(_is_run_here(page, block) for block in blocks(page))]


def commands_of(page: Path) -> Iterator[tuple[list[str], str]]:
    """Yield a page's commands and scripts with interpreters; check that substitutes occur."""
    substitutes = SUBSTITUTES.get(page.name, {})
    used = set()
    for block in blocks(page):
        if not _is_run_here(page, block):
            continue
        text = block.text
        if block.language != COMMANDS:
            yield [sys.executable, "-c"], text
            continue
        text = "\n".join(line for line in text.splitlines() if not line.startswith(INSTALLS))
        for old, new in substitutes.items():
            used |= {old} if old in text else set()
            text = text.replace(old, new)
        yield SHELL, text
    assert used == set(substitutes), "what is replaced is not on the page"


# The first page that users follow. Those of the README train each day in test_installs.py, and
# each command of the others has tests of its own.
DAILY = ("start.md",)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[] if page.name in DAILY else [pytest.mark.nightly])
        for page in _pages_with_commands()
    ],
)
def test_the_commands_of_a_page_run_as_they_stand(page: Path, top: Path) -> None:
    if page.name in BEFORE:
        run(page.name, SHELL, BEFORE[page.name], top)
    for interpreter, text in commands_of(page):
        run(page.name, interpreter, text, top)
    if page.name == "paper.md":
        check_toys(top / ".paper")
    if page.name in LOGS:
        log = (top / LOGS[page.name]).read_text()
        assert "fsep_load_imbalance" in log
        said = [line for line in log.splitlines() if "--fsep-sharding auto is " in line]
        assert said and all(" against rows (" in line for line in said), "both predicted times"
        assert "FSEP: expected on cpu-gloo, from even routing to typical skew: " in log
