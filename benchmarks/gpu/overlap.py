"""What matrix products and an exchange of weights cost each other when they run at once.

Under torchrun: `-m benchmarks.gpu.overlap --data PREFIX`. The exchange is an All-to-All of a
restore's bytes on a stream of FSEP's priority. NCCL's kernels hold SMs meanwhile, which large
products need as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.ranks import Ranks, run_ranks_part
from benchmarks.gpu.recipe import fsep_group
from benchmarks.gpu.report import Part
from benchmarks.gpu.timing import Times, elapsed_ms
from megatron_laer.runtime.comm.streams import make_comm_stream
from megatron_laer.telemetry.activities import Activity, Kind

TITLE = "Products during an exchange, slowest rank"
_ROUNDS = 20


def measure_both(ranks: Ranks) -> Part:
    if not ranks.may_run():
        return Part(left_out=["products during an exchange: the time was spent"])
    dist.init_process_group("nccl")
    device = torch.device("cuda", ranks.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    group = fsep_group(range(ranks.size), "FSEP_PARAMETERS")
    size, links, sent_bytes = (64, 3, 2**16) if ranks.dry else (4096, 12, 2**28)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    elements = sent_bytes // ranks.size * ranks.size
    sent = torch.zeros(elements, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    stream = make_comm_stream("parameters", device, overlaps=True)

    def products() -> None:
        for _ in range(links):
            torch.mm(a, b, out=product)

    def exchange() -> torch.Tensor:
        dist.all_to_all_single(received, sent, group=group)
        return received

    def start() -> Any:
        return stream.submit(exchange, Activity(Kind.RESTORE, "layer"))

    def products_during() -> None:
        start()
        products()

    def exchange_beside() -> None:
        pending = start()
        products()
        pending.wait()

    def run(what: Callable[[], object]) -> Times:
        """Time every round from all ranks' common start."""
        times_ms = []
        for _ in range(2 if ranks.dry else _ROUNDS):
            dist.barrier()
            times_ms.append(elapsed_ms(what))
            start().wait()  # ends what was left of the last round
            torch.cuda.synchronize()
        return Times.of(times_ms[1:])

    found = {
        "products alone": run(products),
        "exchange alone": run(lambda: start().wait()),
        "products during the exchange": run(products_during),
        "both": run(exchange_beside),
    }
    gathered: list[dict[str, float]] = [{}] * ranks.size
    dist.all_gather_object(gathered, {name: times.median_ms for name, times in found.items()})
    stream.close()
    dist.destroy_process_group()
    return Part({TITLE: rows(gathered)})


def rows(gathered: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return the table, with each time of the slowest rank."""
    slowest = {name: max(times[name] for times in gathered) for name in gathered[0]}
    longer = max(slowest["products alone"], slowest["exchange alone"])
    return [
        {
            **{f"{name}, ms": time_ms for name, time_ms in slowest.items()},
            "products' slowdown": slowest["products during the exchange"]
            / slowest["products alone"],
            "both, of the longer one": slowest["both"] / longer,
        }
    ]


if __name__ == "__main__":
    sys.exit(run_ranks_part(__doc__, measure_both))
