"""Simulates the launches of training steps on cards with one hardware queue, and with many.

    python -m tests.races.one_queue [--cluster NAME] [--case NAME …] [--json OUT]

It needs no GPU. Ranks train small Mixtral layers on the labelled device of `tests/fake_cuda`, with
Megatron's own loop, in both orders of launch. The last step's launches, with their events and waits
of the host, then run on simulated cards. Durations are those of the cluster file, as if the model
had its full size. With CUDA_DEVICE_MAX_CONNECTIONS=1 a card has one queue.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command_line import add_json, parser_of, program, write_json
from megatron_laer.cpu.ranks import RankPools
from megatron_laer.planner.cluster_files import load_cluster
from megatron_laer.planner.clusters import Cluster
from tests.fake_cuda.hardware_queues import makespan
from tests.fake_cuda.recorder import Recording, priced
from tests.races.queue_cases import CASES, SCALE, record
from tests.text_data import write_text_data

COLUMNS = {
    "many": "many queues",
    "before": "one, all launched at once",
    "after": "one, copied when needed",
    "in_place": "one, received in place",
    "deferred": "many, copied when needed",
}


def makespans_s(
    at_once: list[Recording], when_needed: list[Recording], cluster: Cluster, node_size: int
) -> dict[str, float]:
    """Return the seconds of a step in both orders of launch, by ranks' recordings of each."""

    def seconds(recordings: list[Recording], *, one_queue: bool, in_place: bool = False) -> float:
        programs = [priced(of, cluster, node_size, SCALE, in_place=in_place) for of in recordings]
        return makespan(programs, one_queue=one_queue, launch_s=cluster.host.launch_s)

    return {
        "many": seconds(at_once, one_queue=False),
        "before": seconds(at_once, one_queue=True),
        "after": seconds(when_needed, one_queue=True),
        "in_place": seconds(when_needed, one_queue=True, in_place=True),
        "deferred": seconds(when_needed, one_queue=False),
    }


def run() -> int:
    parser = parser_of("tests.races.one_queue", __doc__)
    parser.add_argument(
        "--cluster", default="a100-4x8-ib800", help="name or path of a cluster file"
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES], help="trainings")
    add_json(parser)
    given = parser.parse_args()
    cluster = load_cluster(given.cluster)
    print(f"ms of a step, {cluster.name}; in brackets against many queues")
    print(f"{'training':40}" + "".join(f"{title:>28}" for title in COLUMNS.values()))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, RankPools(4) as pools:
        data = str(Path(folder) / "text")
        write_text_data(data)
        for name in given.case:
            pool = pools(CASES[name].ranks)
            orders = [pool.run(record, data, name, late) for late in (False, True)]
            for node_size in (CASES[name].ranks, CASES[name].node_size):
                found = makespans_s(*orders, cluster, node_size)
                rows.append({"training": name, "node_size": node_size, "makespan_s": found})
                cells = [
                    f"{1e3 * found[key]:.1f} ({found[key] / found['many']:.3f})" for key in COLUMNS
                ]
                print(
                    f"{f'{name}, nodes of {node_size}':40}"
                    + "".join(f"{cell:>28}" for cell in cells),
                    flush=True,
                )
    write_json(given.json, {"cluster": cluster.name, "scale": SCALE, "rows": rows})
    return 0


if __name__ == "__main__":
    program("one_queue", run)
