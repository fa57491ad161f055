"""`prepare`, which a training script calls before it imports Megatron."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from megatron_laer.environment import CONNECTIONS, MOST_QUEUES


def prepare(force_cpu: bool = False) -> None:
    """Prepare this process for Megatron and turn the plugin on.

    Call it before any import of `megatron`. Without a usable GPU, with `force_cpu`, or with
    `MEGATRON_LAER_DEVICE=cpu` in the environment, Megatron runs on the CPU. Its command line then
    needs `megatron_laer.device.CPU_FLAGS`. On a GPU, CUDA_DEVICE_MAX_CONNECTIONS is 32 unless it is
    set: a layer's streams are more than CUDA's 8 hardware queues.

    Raises:
        ImportError: a module or the native core is missing, or Megatron is not supported.
        ValueError: another value of that variable.
    """
    # Imported first, because torch and Megatron take seconds to import, and print.
    from megatron_laer import device
    from megatron_laer.planner import native_core  # noqa: F401

    with _logging_as_it_is():
        if device.cpu_needed(force_cpu):
            device.install_cpu()
        else:
            os.environ.setdefault(CONNECTIONS, MOST_QUEUES)
        from megatron_laer.plugin import wheel

        wheel.mend_dataset_helper()

    from megatron_laer.plugin import install

    install()


@contextlib.contextmanager
def _logging_as_it_is() -> Iterator[None]:
    """Leave logging to `megatron.training`, which sets it up only if that was not done.

    Importing `megatron.core` does it through emerging-optimizers, which logs a line by absl.
    Messages of Megatron and FSEP below a warning would be lost.
    """
    before = list(logging.root.handlers)
    try:
        yield
    finally:
        for handler in logging.root.handlers[:]:
            if handler not in before:
                logging.root.removeHandler(handler)
