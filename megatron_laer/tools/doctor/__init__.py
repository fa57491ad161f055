"""`doctor` examines a machine for what training needs: what is there, supported or missing.

This trains nothing and changes nothing. It needs nothing but the standard library, so that it runs
where everything else is missing; what must be imported to be known is asked in other processes
(`probes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

from megatron_laer.tools.doctor import machine, packages
from megatron_laer.tools.doctor.asking import asked
from megatron_laer.tools.doctor.row import Answer, Row


def examine(environment: Mapping[str, str]) -> Iterator[Row]:
    """Yield all rows in the order in which they are printed, each when it is known."""
    requirements = packages.requirements()
    optional = packages.optional(requirements)
    questions = {
        required.name: ["module", required.module, required.name]
        for required in (*requirements.always, *optional)
    }
    questions |= {
        "torch": ["torch", "torch"],
        "megatron-core": ["megatron", "megatron"],
        "native core": ["native_core", "numpy"],
        "plugin": ["plugin", ""],
    }
    with asked(questions) as answers:
        can_train = True
        for row in _needs(requirements, optional, answers, environment):
            can_train &= not row.stops
            yield row
        # Where something that it needs is missing, it would say so again.
        if can_train:
            yield packages.plugin(answers["plugin"].result())
        torch = answers["torch"].result()
        on_cuda = torch.get("device") == "cuda"
        yield machine.compiler(environment)
        yield machine.launched(environment)
        yield machine.node_size(environment, torch.get("num_cards", 0), on_cuda)
        yield machine.connections(environment, on_cuda)


def _needs(
    requirements: packages.Requirements,
    optional: Sequence[packages.Requirement],
    answers: Mapping[str, Future[Answer]],
    environment: Mapping[str, str],
) -> Iterator[Row]:
    """Yield the rows of what the plugin needs, and of what it can do without."""
    yield packages.ours()
    yield packages.native_core(answers["native core"].result())
    yield packages.python(requirements.python)
    yield machine.system()
    for required in requirements.always:
        yield packages.needed(required, answers[required.name].result())
    torch, megatron = answers["torch"].result(), answers["megatron-core"].result()
    on_cuda = torch.get("device") == "cuda"
    for required in optional:
        yield packages.extra(required, answers[required.name].result(), on_cuda)
    if "error" not in torch:
        yield machine.cuda(torch, environment)
        yield machine.cards(torch)
        yield machine.nccl(torch, on_cuda)
    if "error" not in megatron:
        yield machine.dataset_helper(megatron, environment)
