"""Imports of `doctor`, each in a process of its own, since one may fail in any way or hang."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_laer.environment import variables_behind
from megatron_laer.tools.doctor.check import Answer

# A cold import from a network file system takes minutes; a longer one hangs.
_TIMEOUT_S = 600.0


@contextlib.contextmanager
def asked(questions: Mapping[str, list[str]]) -> Iterator[dict[str, Future[Answer]]]:
    """Ask each question in a process of its own during the block; yield the answers by key."""
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        yield {key: threads.submit(_ask, question) for key, question in questions.items()}
    finally:
        threads.shutdown(cancel_futures=True)


def _ask(question: list[str]) -> Answer:
    # The process has this one's module path.
    code = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from megatron_laer.tools.doctor import probes; probes.main()"
    )
    command = [sys.executable, "-c", code, json.dumps(sys.path), *question]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"error": f"its import did not end within {_TIMEOUT_S:.0f} s"}
    except OSError as error:
        return {"error": f"{sys.executable} does not start ({error.strerror})"}
    try:
        answer: Answer = json.loads(result.stdout)
    except ValueError:
        status = result.returncode
        printed = result.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return {"error": f"its import ended Python with {how}{last and f' ({last})'}"}
    return answer


def main() -> None:
    """Print the answer to the question `sys.argv[1]` about `sys.argv[2:]`, as one line of JSON.

    After a failure the answer has a one-line `error`. `absent` is added if the module itself is
    missing, or `lacks` with the name of another missing module.
    """
    # Output of imports goes to stderr, like warnings.
    stdout = os.dup(1)
    os.dup2(2, 1)
    asked = sys.argv[2:]
    try:
        answer = _QUESTIONS[sys.argv[1]](*asked)
    except Exception as error:
        # Our own ImportErrors are sentences.
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        answer = {"error": kind + " ".join(str(error).split())}
        if variables := variables_behind(error):
            answer["error"] += f" (from {', '.join(variables)}, which you have set)"
        if isinstance(error, ModuleNotFoundError):
            absent = error.name == asked[0].split(".")[0]
            answer |= {"absent": True} if absent else {"lacks": error.name}
    os.write(stdout, json.dumps(answer).encode())


def module(name: str, distribution: str) -> Answer:
    imported = importlib.import_module(name)
    found = getattr(imported, "__version__", None)
    return {"version": str(found or importlib.metadata.version(distribution))}


def native_core(_: str) -> Answer:
    from megatron_laer.planner.native_core import native

    return {"file": native.__file__}


def torch(_: str) -> Answer:
    """Describe torch, its communication libraries and the cards that it sees.

    `device_error` says why the device is unknown, `unsupported` why this torch cannot train on it.
    """
    import torch

    from megatron_laer import device
    from megatron_laer.support.torch_version import problem_on_cuda

    answer: Answer = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "cards": [],
    }
    try:
        answer["device"] = "cpu" if device.cpu_needed() else "cuda"
    except ValueError as error:
        answer["device_error"] = str(error)
    if answer.get("device") == "cuda" and (problem := problem_on_cuda(torch.__version__)):
        answer["unsupported"] = problem
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        answer["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        answer["cards"] = [
            f"{count} x {name}, {memory / 2**30:.0f} GiB, sm_{major}{minor}"
            for (name, memory, major, minor), count in Counter(
                (card.name, card.total_memory, card.major, card.minor) for card in every
            ).items()
        ]
        answer["num_cards"] = len(every)
    else:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            answer["cuda_error"] = str(error).splitlines()[0]
    return answer


def megatron(_: str) -> Answer:
    import megatron.core.datasets

    from megatron_laer import megatron_version
    from megatron_laer.releases import TESTED

    datasets = Path(next(iter(megatron.core.datasets.__path__)))
    answer: Answer = {
        "version": megatron_version.megatron_version(),
        "folder": str(datasets.parents[1]),
        "tested": TESTED,
        "builds_helper": (datasets / "Makefile").exists(),
        "has_helper": any(datasets.glob("helpers_cpp*.so")),
    }
    try:
        megatron_version.check_version()
    except ModuleNotFoundError:
        pass  # packaging, as its own row says
    except ImportError as error:
        answer["unsupported"] = str(error)
    return answer


def plugin(_: str) -> Answer:
    """Install the plugin and count the places in Megatron that it replaces."""
    from megatron_laer.launch import prepare

    prepare()
    from megatron_laer.plugin import FSEP_PATCHES

    for patch in FSEP_PATCHES:
        patch.owner_and_name()
    return {"places": len(FSEP_PATCHES)}


_QUESTIONS = {
    question.__name__: question for question in (module, native_core, torch, megatron, plugin)
}
