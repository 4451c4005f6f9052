"""Circuit breakers, one a candidate: a model at a provider that keeps failing is left alone for a while.

The allowed transitions are the table `TRANSITIONS`; nothing else changes a state. An open breaker always gets its probe when
its time is over, and a probe that never reports is forgotten, so no breaker stays open for ever.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final


class State(Enum):
    """Of one breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One probe is under way; nobody else is admitted."""


class Signal(Enum):
    """What moves a breaker."""

    TRIPPED = "tripped"
    """Too many failures, or the provider asked to be left alone."""
    COOLED = "cooled"
    """The time is over and somebody asks to be admitted: that is the probe."""
    PROBE_OK = "probe_ok"
    PROBE_FAILED = "probe_failed"
    PROBE_ABANDONED = "probe_abandoned"
    """The probe ended without a verdict: its caller hung up."""


TRANSITIONS: Final[dict[tuple[State, Signal], State]] = {
    (State.CLOSED, Signal.TRIPPED): State.OPEN,
    (State.OPEN, Signal.TRIPPED): State.OPEN,
    (State.OPEN, Signal.COOLED): State.HALF_OPEN,
    (State.HALF_OPEN, Signal.PROBE_OK): State.CLOSED,
    (State.HALF_OPEN, Signal.PROBE_FAILED): State.OPEN,
    (State.HALF_OPEN, Signal.TRIPPED): State.OPEN,
    (State.HALF_OPEN, Signal.PROBE_ABANDONED): State.OPEN,
}
"""Only a probe closes a breaker: a success that began before it opened says nothing of now."""


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When breakers open, and for how long."""

    consecutive_failures: int = 5
    window_s: float = 30.0
    window_calls_min: int = 10
    """Below this many calls in the window the share says nothing."""
    window_failure_share: float = 0.5
    cooldown_s: float = 5.0
    """The first time; doubled by every failed probe."""
    cooldown_s_max: float = 60.0
    probe_s_max: float = 120.0
    """A probe that has not reported by then is given up."""


class Breaker:
    """The breaker of one candidate.

    Args:
        limits: When it opens.
        clock: Monotonic seconds.
    """

    __slots__ = ("_calls", "_clock", "_consecutive", "_cooldown_s", "_limits", "_until", "state")

    def __init__(self, limits: BreakerLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self.state = State.CLOSED
        self._consecutive = 0
        self._cooldown_s = limits.cooldown_s
        self._until = 0.0
        self._calls: deque[tuple[float, bool]] = deque(maxlen=128)

    @property
    def blocked(self) -> bool:
        """Whether `admits` would say no. Changes nothing."""
        return self.state is not State.CLOSED and self._clock() < self._until

    def admits(self) -> bool:
        """Whether to try the candidate now. True from an open breaker makes the asker its probe, who has to report."""
        if self.state is State.CLOSED:
            return True
        if self.blocked:
            return False
        if self.state is State.HALF_OPEN:
            self._move(Signal.PROBE_ABANDONED)
        self._move(Signal.COOLED)
        self._until = self._clock() + self._limits.probe_s_max
        return True

    def succeeded(self) -> None:
        """An answer came."""
        self._consecutive = 0
        if self.state is State.CLOSED:
            self._calls.append((self._clock(), True))
        elif self.state is State.HALF_OPEN:
            self._calls.clear()
            self._cooldown_s = self._limits.cooldown_s
            self._until = 0.0
            self._move(Signal.PROBE_OK)

    def failed(self, retry_after_s: float | None = None) -> None:
        """The candidate failed; `retry_after_s` is how long the provider asked to be left alone, if it did."""
        now = self._clock()
        self._consecutive += 1
        self._calls.append((now, False))
        if self.state is State.HALF_OPEN:
            self._cooldown_s = min(self._cooldown_s * 2, self._limits.cooldown_s_max)
            self._open(Signal.PROBE_FAILED, now, retry_after_s)
        elif retry_after_s or (self.state is State.CLOSED and self._is_too_much(now)):
            self._open(Signal.TRIPPED, now, retry_after_s)

    def abandoned(self) -> None:
        """The attempt ended without saying anything about the candidate: a probe's place is free again at once."""
        if self.state is State.HALF_OPEN:
            self._move(Signal.PROBE_ABANDONED)
            self._until = self._clock()

    def _open(self, signal: Signal, now: float, retry_after_s: float | None) -> None:
        self._move(signal)
        self._until = max(self._until if signal is Signal.TRIPPED else 0.0, now + (retry_after_s or self._cooldown_s))

    def _is_too_much(self, now: float) -> bool:
        if self._consecutive >= self._limits.consecutive_failures:
            return True
        recent = [ok for at, ok in self._calls if at > now - self._limits.window_s]
        share = recent.count(False) / len(recent)
        return len(recent) >= self._limits.window_calls_min and share >= self._limits.window_failure_share

    def _move(self, signal: Signal) -> None:
        self.state = TRANSITIONS[self.state, signal]


class Breakers:
    """The breakers of all candidates, made when first asked for, the least recently used forgotten beyond a bound."""

    def __init__(
        self,
        limits: BreakerLimits = BreakerLimits(),
        clock: Callable[[], float] = time.monotonic,
        breakers_max: int = 10_000,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._max = breakers_max
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()

    def of(self, candidate_id: str) -> Breaker:
        """The breaker of a candidate."""
        breaker = self._breakers.get(candidate_id)
        if breaker is None:
            breaker = self._breakers[candidate_id] = Breaker(self._limits, self._clock)
            if len(self._breakers) > self._max:
                self._breakers.popitem(last=False)
        else:
            self._breakers.move_to_end(candidate_id)
        return breaker

    def states(self) -> dict[str, State]:
        """Every breaker's state by candidate, for metrics and `/readyz`."""
        return {candidate_id: breaker.state for candidate_id, breaker in self._breakers.items()}
