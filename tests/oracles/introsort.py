"""The order in which libstdc++'s `std::sort` leaves equal values, by which answers are compared.

Source: the algorithm, introsort with a median of three and insertion below 17 values. It stops
before its heapsort, which only adversarial inputs reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_FEW = 16


def order_of(keys: Sequence[float]) -> list[int]:
    """Return the indices of ascending keys as `std::sort` leaves them."""
    order = list(range(len(keys)))

    def less(one: int, other: int) -> bool:
        return keys[one] < keys[other]

    _split(order, less, 0, len(order))
    for at in range(1, len(order)):
        value, to = order[at], at
        if at < _FEW and less(value, order[0]):
            to = 0
        else:
            while less(value, order[to - 1]):
                to -= 1
        order.insert(to, order.pop(at))
    return order


def _split(order: list[int], less: Callable[[int, int], bool], first: int, last: int) -> None:
    """Partition until parts are short, each around the median of its second, middle and last."""
    while last - first > _FEW:
        places = first + 1, (first + last) // 2, last - 1
        _, median, _ = _sorted_places(order, less, *places)
        order[first], order[median] = order[median], order[first]
        pivot, low, high = order[first], first + 1, last
        while True:
            while less(order[low], pivot):
                low += 1
            high -= 1
            while less(pivot, order[high]):
                high -= 1
            if low >= high:
                break
            order[low], order[high] = order[high], order[low]
            low += 1
        _split(order, less, low, last)
        last = low


def _sorted_places(
    order: list[int], less: Callable[[int, int], bool], one: int, two: int, three: int
) -> tuple[int, int, int]:
    """Order three places by their values; of equal ones the median is the one of libstdc++."""
    values = {place: order[place] for place in (one, two, three)}
    if less(values[one], values[two]):
        if less(values[two], values[three]):
            return one, two, three
        return (one, three, two) if less(values[one], values[three]) else (three, one, two)
    if less(values[one], values[three]):
        return two, one, three
    return (two, three, one) if less(values[two], values[three]) else (three, two, one)
