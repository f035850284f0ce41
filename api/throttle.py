"""How often somebody may guess: token buckets in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from time import monotonic

_BUCKETS = 10_000  # kept; the one not used for longest goes first


class Throttle:
    """`size` tries per key, refilled evenly within `period` seconds."""

    def __init__(
        self, size: int = 10, period: float = 300.0, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._size, self._rate, self._clock = float(size), size / period, clock
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, key: Hashable) -> float:
        """Use one try; the seconds until there is one if there is none, else 0."""
        left = self._left(key)
        if left < 1:
            return (1 - left) / self._rate
        self._put(key, left - 1)
        return 0.0

    def give_back(self, key: Hashable) -> None:
        """The try was a good one and does not count."""
        self._put(key, min(self._left(key) + 1, self._size))

    def _left(self, key: Hashable) -> float:
        left, at = self._buckets.get(key, (self._size, 0.0))
        return min(left + (self._clock() - at) * self._rate, self._size)

    def _put(self, key: Hashable, left: float) -> None:
        self._buckets.pop(key, None)
        self._buckets[key] = (left, self._clock())
        if len(self._buckets) > _BUCKETS:
            self._buckets.popitem(last=False)
