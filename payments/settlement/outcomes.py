"""What became of settlements: told to whoever waits in this process, and remembered for a while for whoever asks later.

Who waits need not know which process decides. It is told by this one's engine, by other processes' news, or by a look into the
database now and then (`payments.settlement.lookout`).
"""

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
    """The outcomes that were decided last, by settlement, and who waits for others."""

    def __init__(self) -> None:
        self._kept: dict[str, SettlementOutcome] = {}
        self._followers: dict[str, Follower] = {}
        self._waiters: dict[str, list[asyncio.Future[None]]] = {}

    @property
    def awaited(self) -> set[str]:
        """The settlements that somebody waits for or follows."""
        return self._waiters.keys() | self._followers.keys()

    def follow(self, settlement_id: str, told: Follower) -> None:
        """Have `told` called, once, with what becomes of a settlement, whichever process decides it. May be called before it is
        written, and before the engine starts."""
        self._followers[settlement_id] = told

    def unfollow(self, settlement_id: str) -> None:
        """It was not written, or nobody wants to be told any more."""
        self._followers.pop(settlement_id, None)

    def expect(self, settlement_id: str) -> asyncio.Future[None]:
        """Something that is done once the settlement is decided, or the engine stops; to be given back with `give_up`."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(settlement_id, []).append(told)
        return told

    def give_up(self, settlement_id: str, told: asyncio.Future[None]) -> None:
        """Nobody waits with `told` any more."""
        waiters = self._waiters.get(settlement_id, [])
        if told in waiters:
            waiters.remove(told)
        if not waiters:
            self._waiters.pop(settlement_id, None)

    def get(self, settlement_id: str) -> SettlementOutcome | None:
        """What was decided; None if it was not, or long ago."""
        return self._kept.get(settlement_id)

    def keep(self, entry: Entry) -> None:
        """Remember what was decided, and tell it; the oldest outcomes are forgotten."""
        outcome = self._kept[entry.id] = SettlementOutcome.of(entry)
        if len(self._kept) > OUTCOMES_KEPT:
            del self._kept[next(iter(self._kept))]
        _wake(self._waiters.pop(entry.id, ()))
        follower = self._followers.pop(entry.id, None)
        if follower is not None:
            follower(outcome)

    def forget(self, settlement_id: str) -> None:
        """It is not decided after all."""
        self._kept.pop(settlement_id, None)

    def let_go(self) -> None:
        """Let everybody go on who waits: nobody will be told here any more."""
        for waiters in self._waiters.values():
            _wake(waiters)
        self._waiters.clear()


def _wake(waiters: list[asyncio.Future[None]] | tuple[()]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
