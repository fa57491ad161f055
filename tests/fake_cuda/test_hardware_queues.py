"""Simulated cards with one hardware queue or many, on programs that are computed by hand."""

from __future__ import annotations

import pytest

from tests.fake_cuda.hardware_queues import Deadlock, HostWait, Kernel, Program, makespan

pytestmark = pytest.mark.races

NOTHING: frozenset[int] = frozenset()


def kernel(seconds: float, *after: int, meets: str = "", name: str = "") -> Kernel:
    return Kernel(frozenset(after), seconds, (meets,) if meets else (), name)


def seconds(*programs: Program, launch_s: float = 0.0) -> tuple[float, float]:
    """Return the makespans with many queues and with one."""
    many, one = (makespan(programs, one_queue=one, launch_s=launch_s) for one in (False, True))
    return many, one


def test_what_waits_keeps_later_kernels_from_starting_in_one_queue() -> None:
    exchange, unpack, compute = kernel(2.0), kernel(0.5, 0), kernel(3.0)
    assert seconds([exchange, unpack, compute]) == (3.0, 5.0)
    assert seconds([exchange, compute, unpack]) == (3.0, 3.0)


def test_a_kernel_of_the_same_stream_waits_in_both() -> None:
    assert seconds([kernel(2.0), kernel(3.0, 0), kernel(1.0)]) == (5.0, 5.0)
    assert seconds([kernel(2.0), kernel(3.0, 0), kernel(4.0)]) == (5.0, 6.0)


def test_an_exchange_ends_when_the_last_rank_has_taken_part() -> None:
    early = [kernel(1.0, meets="x"), kernel(0.5, 0)]
    late = [kernel(2.0), kernel(1.0, 0, meets="x")]
    assert seconds(early, late) == (3.5, 3.5)
    # In one queue an exchange that has started lets others start.
    assert seconds([*early[:1], kernel(1.0)], late) == (3.0, 3.0)


def test_the_second_exchange_of_a_name_meets_the_second() -> None:
    twice = [kernel(1.0, meets="x"), kernel(1.0, 0, meets="x")]
    slow = [kernel(1.0, meets="x"), kernel(4.0, 0), kernel(1.0, 1, meets="x")]
    assert seconds(twice, slow) == (6.0, 6.0)


def test_the_host_launches_one_after_the_other_and_waits() -> None:
    program = [kernel(0.5), HostWait(frozenset({0})), kernel(0.25)]
    assert seconds(program, launch_s=1.0) == (2.75, 2.75)
    assert seconds([kernel(0.5), kernel(0.25)], launch_s=0.125) == (0.625, 0.625)


def test_a_batch_of_messages_is_one_kernel() -> None:
    both = ("0 to 1", "1 to 0")
    ranks = [[Kernel(NOTHING, 1.0, both)], [Kernel(NOTHING, 1.0, both[::-1])]]
    assert seconds(*ranks) == (1.0, 1.0)
    apart = [kernel(1.0, meets="0 to 1"), kernel(1.0, 0, meets="1 to 0")]
    with pytest.raises(Deadlock):
        seconds(apart, [kernel(1.0, meets="1 to 0"), kernel(1.0, 0, meets="0 to 1")])


def test_opposite_orders_hang_in_one_queue_only() -> None:
    def program(first: str, second: str) -> list[Kernel]:
        exchange = kernel(1.0, meets=first, name=first)
        return [exchange, kernel(1.0, 0, name=f"unpack {first}"), kernel(1.0, meets=second)]

    ranks = program("x", "y"), program("y", "x")
    assert makespan(ranks, one_queue=False) == 2.0
    with pytest.raises(Deadlock, match=r"wait for each other: .*unpack x"):
        makespan(ranks, one_queue=True)


def test_an_exchange_that_a_rank_leaves_out_never_ends() -> None:
    exchange = kernel(1.0, meets="x")
    with pytest.raises(Deadlock, match="a rank leaves out: kernel, launch 1 of rank 0"):
        seconds([exchange, exchange], [exchange])
