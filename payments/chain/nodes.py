"""A chain's nodes and what is known of their health: which one to ask next, and which ones to pass over.

A node that fails rests for a while, longer each time. One that was asked and hung is not asked again while it rests, or every
call would hang with it; when its rest is over, one call finds out. A node that is far from where the others are, or is on
another chain, is passed over while a better one answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

REST_S, REST_MAX_S = 0.5, 15.0
"""After one failure, and after many in a row; it doubles."""
LATENCY_WEIGHT = 0.1


@dataclass(slots=True, eq=False)
class Node:
    """One endpoint. Times are seconds of the monotonic clock."""

    url: str
    head: int = 0
    """The highest block that it told of last; 0 before it did."""
    astray: bool = False
    """Its head is far from the others'."""
    foreign: bool = False
    """It serves another chain."""
    failures: int = 0
    """Since it was made."""
    latency_s: float = 0.0
    """Of its answers: a moving average."""
    _failures_in_a_row: int = 0
    _failed_at: float = 0.0
    _rests_until: float = 0.0
    _hung: bool = False

    @property
    def host(self) -> str:
        """What logs and metrics may show: URLs of nodes carry keys in their path or user part."""
        return urlsplit(self.url).hostname or "the node"

    def resting(self, now: float) -> bool:
        """Whether it failed so recently that others are asked first."""
        return now < self._rests_until

    def shunned(self, now: float) -> bool:
        """Whether it must not be asked at all: it would hang, or tell of another chain."""
        return self.foreign or (self._hung and self.resting(now))

    def healthy(self, now: float) -> bool:
        """Whether it is asked as the operator prefers."""
        return not (self.foreign or self.astray or self.resting(now))

    def asked(self, now: float, timeout_s: float) -> None:
        """A call goes to it. If it hung before, the others wait for what comes of this one."""
        if self._hung:
            self._rests_until = now + timeout_s

    def answered(self, seconds: float) -> None:
        """It answered in `seconds`."""
        self._failures_in_a_row, self._rests_until, self._hung = 0, 0.0, False
        self.latency_s += (seconds - self.latency_s) * (LATENCY_WEIGHT if self.latency_s else 1.0)

    def failed(self, asked_at: float, now: float, *, hung: bool) -> None:
        """It did not answer what it was asked at `asked_at`, or with nonsense. Calls that failed together count once."""
        self.failures += 1
        if asked_at >= self._failed_at:
            self._failures_in_a_row += 1
            self._failed_at = now
        self._hung = hung
        self._rests_until = now + min(REST_S * 2.0 ** min(self._failures_in_a_row - 1, 16), REST_MAX_S)


class Nodes:
    """All nodes of a chain.

    Args:
        urls: In the operator's order of preference.
        lag_blocks_max: How far a node's head may be from the others'.
    """

    def __init__(self, urls: Sequence[str], lag_blocks_max: int) -> None:
        assert urls
        self.all = tuple(Node(url) for url in urls)
        self._lag_blocks_max = lag_blocks_max

    def in_order(self, now: float) -> list[Node]:
        """Whom to ask, one after the other: the healthy as preferred, then those astray, then those that failed last."""
        usable = [node for node in self.all if not node.shunned(now)]
        return sorted(usable, key=lambda node: (node.resting(now), node.astray))

    def compare_heads(self) -> None:
        """Find the nodes that are astray.

        The reference is the median, the higher one of two: a single node that invents blocks cannot make three others look
        late, and of two nodes the one that is late is passed over.
        """
        heads = sorted(node.head for node in self.all if node.head and not node.foreign)
        if not heads:
            return
        reference = heads[len(heads) // 2]
        for node in self.all:
            node.astray = bool(node.head) and abs(node.head - reference) > self._lag_blocks_max
