"""What became of settlements: told to whoever waits, and remembered for a while for whoever asks later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from payments.settlement import states
from payments.settlement.outbox import Entry

OUTCOMES_KEPT = 4_096


@dataclass(frozen=True, slots=True)
class SettlementOutcome:
    """What became of a settlement so far."""

    state: str
    """See `payments.settlement.states`."""
    transaction_hash: str | None
    block_number: int | None
    reason: str | None

    @classmethod
    def of(cls, entry: Entry) -> SettlementOutcome:
        """As the entry stands now."""
        return cls(entry.state, entry.transaction_hash, entry.block_number, entry.reason)

    @property
    def paid(self) -> bool:
        """Whether there is evidence that it was paid."""
        return self.state in states.PAID

    @property
    def open(self) -> bool:
        """Whether its fate is unknown."""
        return self.state in states.OPEN


Follower = Callable[[SettlementOutcome], object]


class Outcomes:
    """The outcomes that were decided last, by settlement."""

    def __init__(self) -> None:
        self._kept: dict[str, SettlementOutcome] = {}
        self._followers: dict[str, Follower] = {}

    def follow(self, settlement_id: str, told: Follower) -> None:
        """Have `told` called, once, with what becomes of a settlement, whichever process decides it. May be called before it is
        written, and before the engine starts."""
        self._followers[settlement_id] = told

    def unfollow(self, settlement_id: str) -> None:
        """It was not written, or nobody wants to be told any more."""
        self._followers.pop(settlement_id, None)

    def get(self, settlement_id: str) -> SettlementOutcome | None:
        """What was decided; None if it was not, or long ago."""
        return self._kept.get(settlement_id)

    def keep(self, entry: Entry) -> None:
        """Remember what was decided; the oldest outcomes are forgotten."""
        self._kept[entry.id] = SettlementOutcome.of(entry)
        if len(self._kept) > OUTCOMES_KEPT:
            del self._kept[next(iter(self._kept))]
        told = self._followers.pop(entry.id, None)
        if told is not None:
            told(self._kept[entry.id])

    def forget(self, entry: Entry) -> None:
        """It is not decided after all."""
        self._kept.pop(entry.id, None)


async def wait_for(entry: Entry, timeout_s: float) -> None:
    """Wait until `wake`, at most `timeout_s`."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    entry.waiters.append(waiter)
    timer = asyncio.get_running_loop().call_later(timeout_s, _finish, waiter)
    try:
        await waiter
    finally:
        timer.cancel()
        if waiter in entry.waiters:
            entry.waiters.remove(waiter)


def wake(entry: Entry) -> None:
    """Let everybody go on who waits for an entry."""
    waiters, entry.waiters = entry.waiters, []
    for waiter in waiters:
        _finish(waiter)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
