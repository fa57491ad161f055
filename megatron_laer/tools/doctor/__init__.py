"""`doctor` checks a machine for training: present, supported and missing packages and devices.

It needs only the standard library, so that it runs where everything else is missing. `probes`
imports packages in other processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_laer.tools.doctor import machine, packages
from megatron_laer.tools.doctor.check import Check
from megatron_laer.tools.doctor.probes import asked


def examine(environment: Mapping[str, str]) -> Iterator[Check]:
    """Yield all checks in the order of printing, each as soon as its result is known."""
    python, needed, optional = packages.requirements()
    questions = {one.name: ["module", one.module, one.name] for one in (*needed, *optional)}
    questions |= {
        "torch": ["torch", "torch"],
        "megatron-core": ["megatron", "megatron"],
        "native core": ["native_core", "numpy"],
        "plugin": ["plugin", ""],
    }
    with asked(questions) as answers:

        def checks() -> Iterator[Check]:
            yield packages.ours()
            yield packages.native_core(answers["native core"].result())
            yield packages.python(python)
            yield packages.system()
            torch, megatron = answers["torch"].result(), answers["megatron-core"].result()
            on_cuda = torch.get("device") == "cuda"
            for required in (*needed, *optional):
                yield packages.package(required, answers[required.name].result(), on_cuda)
            if "error" not in torch:
                yield machine.cuda(torch, environment)
                yield machine.cards(torch)
                yield machine.nccl(torch, on_cuda)
                yield machine.triton(environment, on_cuda)
            if "error" not in megatron:
                yield machine.dataset_helper(megatron, environment)

        can_train = True
        for check in checks():
            can_train &= not check.stops
            yield check
        # Without a needed package, this check would only repeat that error.
        if can_train:
            yield packages.plugin(answers["plugin"].result())
        torch = answers["torch"].result()
        on_cuda = torch.get("device") == "cuda"
        yield machine.launched(environment)
        yield machine.node_size(environment, torch.get("num_cards", 0), on_cuda)
        yield machine.connections(environment, on_cuda)
