"""Token buckets: how often somebody may do something, with as many at once as there are in a bucket.

Kept in memory and forgotten from the one that was quiet the longest: a bound on work, not a record.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

NAMES_MAX = 100_000


class Buckets:
    """A bucket for each name, such as an address or a client.

    Args:
        amount: What a full bucket holds, more than 0.
        period_s: How long an empty one takes to fill, in seconds.
        clock: Seconds, monotonic.
    """

    def __init__(self, amount: int, period_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        assert amount > 0
        self._capacity = float(amount)
        self._per_second = amount / period_s
        self._clock = clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, name: str) -> int:
        """How many whole seconds `name` must wait until there is one more; 0 if there is one now."""
        level = self._level(name, self._clock())
        if level >= 1:
            return 0
        # Whoever goes on asking is not the one to forget.
        self._levels.move_to_end(name)
        return int((1 - level) / self._per_second) + 1

    def take(self, name: str) -> None:
        """Take one out, if there is any left."""
        now = self._clock()
        self._levels[name] = (max(self._level(name, now) - 1, 0.0), now)
        self._levels.move_to_end(name)
        if len(self._levels) > NAMES_MAX:
            self._levels.popitem(last=False)

    def _level(self, name: str, now: float) -> float:
        level, since = self._levels.get(name, (self._capacity, now))
        return min(self._capacity, level + (now - since) * self._per_second)
