"""A limit on the gas that payers can make us burn: with payments that pass every check and fail when they are mined.

Such a payer drains its wallet, or cancels its authorization, between our look at the chain and the block. Each time costs us
the gas of a reverted call and the payer little. So a payer whose payments reverted is refused for a while, and when many have
reverted, by whomever, so is everybody who has not paid yet: whoever makes new wallets for it gets no further.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from payments.errors import PaymentRefused

WINDOW_S = 600.0
REVERTS_MAX = 3
"""Of one payer within the window."""
REVERTS_OF_ALL_MAX = 100
"""Of all payers within the window: at 100,000 gas each, ten million gas."""
PAYERS_MAX = 10_000
"""Remembered; the oldest are forgotten."""


T = TypeVar("T")


class Reverts:
    """The reverted payments of one network, lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of_all: deque[float] = deque(maxlen=REVERTS_OF_ALL_MAX)
        self._of_payer: OrderedDict[str, deque[float]] = OrderedDict()
        self._honest: OrderedDict[str, None] = OrderedDict()
        """Payers whose payments arrived."""

    def admit(self, payer: str) -> None:
        """Let a payment of `payer` (lower-case hex) in.

        Raises:
            PaymentRefused: ``payments_reverted``: too many of its payments failed on chain; nothing was taken.
        """
        own = self._of_payer.get(payer) or deque()
        if len(own) == REVERTS_MAX and self._recent(own[0]):
            wait_s = int(own[0] + WINDOW_S - self._clock()) + 1
            raise PaymentRefused(
                "payments_reverted",
                f"{REVERTS_MAX} payments of this wallet failed on chain lately; pay again in {wait_s} s",
            )
        if len(self._of_all) == REVERTS_OF_ALL_MAX and self._recent(self._of_all[0]) and payer not in self._honest:
            raise PaymentRefused(
                "payments_reverted",
                "many payments fail on chain now, and this wallet has not paid before; pay again in some minutes",
            )

    def paid(self, payer: str) -> None:
        """A payment of `payer` arrived."""
        _remember(self._honest, payer, None)

    def reverted(self, payer: str) -> None:
        """A payment of `payer` failed in a block and moved nothing."""
        now = self._clock()
        self._of_all.append(now)
        own = self._of_payer.get(payer) or deque(maxlen=REVERTS_MAX)
        own.append(now)
        _remember(self._of_payer, payer, own)
        self._honest.pop(payer, None)

    def recall(self, reverts: Iterable[tuple[str, float]]) -> None:
        """After a restart: payers and how many seconds ago their payments reverted, oldest first."""
        now = self._clock()
        for payer, age_s in reverts:
            own = self._of_payer.get(payer) or deque(maxlen=REVERTS_MAX)
            own.append(now - age_s)
            self._of_all.append(now - age_s)
            _remember(self._of_payer, payer, own)

    def _recent(self, then: float) -> bool:
        return self._clock() - then < WINDOW_S


def _remember(memory: OrderedDict[str, T], payer: str, what: T) -> None:
    memory[payer] = what
    memory.move_to_end(payer)
    if len(memory) > PAYERS_MAX:
        memory.popitem(last=False)
