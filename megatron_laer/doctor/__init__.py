"""`doctor` examines a machine for what training needs: what is there, supported or missing.

This trains nothing and changes nothing. It needs nothing but the standard library, so that it runs
where everything else is missing; what must be imported to be known is asked in other processes
(`probes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_laer.doctor import machine, packages
from megatron_laer.doctor.asking import answers_to
from megatron_laer.doctor.row import Row


def examine(environment: Mapping[str, str]) -> list[Row]:
    """Return all rows, in the order in which they are printed."""
    requirements = packages.requirements()
    optional = packages.optional(requirements)
    asked = [*requirements.always, *optional]
    questions = {required.name: ["module", required.module, required.name] for required in asked}
    questions |= {
        "torch": ["torch", "torch"],
        "megatron-core": ["megatron", "megatron"],
        "native core": ["native_core", "numpy"],
        "plugin": ["plugin", ""],
    }
    answers = answers_to(questions)
    torch, megatron = answers["torch"], answers["megatron-core"]
    on_cuda = torch.get("device") == "cuda"

    rows = [
        packages.ours(),
        packages.native_core(answers["native core"]),
        packages.python(requirements.python),
        machine.system(),
        *(packages.needed(required, answers[required.name]) for required in requirements.always),
        *(packages.extra(required, answers[required.name], on_cuda) for required in optional),
    ]
    if "error" not in torch:
        rows += [
            machine.cuda(torch, environment),
            machine.cards(torch),
            machine.nccl(torch, on_cuda),
        ]
    if "error" not in megatron:
        rows.append(machine.dataset_helper(megatron, environment))
    # Where something that it needs is missing, it would say so again.
    if not any(row.stops for row in rows):
        rows.append(packages.plugin(answers["plugin"]))
    rows += [
        machine.compiler(environment),
        machine.launched(environment),
        machine.node_size(environment, torch.get("num_cards", 0), on_cuda),
        machine.connections(environment, on_cuda),
    ]
    return rows
