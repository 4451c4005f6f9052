"""What all exact payments on one network share: the database, the engine that settles them, and who has what under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from payments import receipts
from payments.chain.networks import Token
from payments.errors import PaymentError
from payments.settlement.orders import SettlementOrder
from payments.store import Store
from payments.x402.wire import Payment

POLL_S = 0.2
"""How often the database is asked whether a use in another replica has ended."""


class Settled(Protocol):
    """What became of a settlement so far."""

    @property
    def paid(self) -> bool:
        """Whether there is evidence that it was paid."""

    @property
    def open(self) -> bool:
        """Whether its fate is unknown."""

    @property
    def transaction_hash(self) -> str | None:
        """Of the evidence."""

    @property
    def reason(self) -> str | None:
        """Why it failed."""


class Settling(Protocol):
    """The settlement engine, as far as this tender needs it."""

    def admit(self, payer: str) -> None:
        """Raise `PaymentRefused` if too many payments failed on chain lately."""

    async def submit(self, order: SettlementOrder) -> None:
        """Write an order durably and broadcast it; the same id again changes nothing. `SettlementUnavailable` or `StoreBusy`
        mean that nothing was written."""

    def take_queued(self, settlement_id: str) -> None:
        """Take up an order that a unit has written to the outbox, now that it is durable."""

    async def book_executed(self, order: SettlementOrder) -> bool:
        """Book an order that somebody else executed before us; False if nobody did. Errors as for `submit`."""

    async def outcome(self, settlement_id: str, timeout_s: float) -> Settled:
        """Wait for the fate of a settlement, at most `timeout_s`."""


class ChainCheck(Protocol):
    """What the chain says of a payment before it is settled."""

    async def check(
        self,
        payment: Payment,
        token: Token,
        pay_to: str,
        other_open: Callable[[], int],
        unproven: PaymentError | None = None,
    ) -> bool:
        """Whether the payer has code, if the transfer would succeed now; else raise a `PaymentError`, which is `unproven` if
        the payer has no code that could make its signature good. `other_open` tells what the payer has under way besides,
        in nano-USD, at the moment that it is called."""


class ExactServices:
    """What all exact payments on one network share.

    Args:
        store: The database.
        settlements: Settles them.
        chain_states: Judges them by the chain.
        payer_exposure_nano_usd: Inference that one payer may have under way before its transfers are mined.
        settlement_wait_s: How long a request waits for its transfer, in seconds.
        credited: Told the payer and the asset whose credit may have grown.
    """

    def __init__(
        self,
        *,
        store: Store,
        settlements: Settling,
        chain_states: ChainCheck,
        payer_exposure_nano_usd: int,
        settlement_wait_s: float,
        credited: Callable[[str, str], None] | None = None,
    ) -> None:
        self.store = store
        self.settlements = settlements
        self.chain_states = chain_states
        self.settlement_wait_s = settlement_wait_s
        self.credited = credited
        self._payer_exposure_nano_usd = payer_exposure_nano_usd
        self.unmined = Unmined()
        self._exposed: dict[str, int] = {}
        self._under_way: dict[str, asyncio.Event] = {}

    async def use_ended(self, receipt_id: str, timeout_s: float) -> bool:
        """Wait until nobody works on a receipt, here or in another replica. False if somebody still does after `timeout_s`."""
        ended = self._under_way.get(receipt_id)
        if ended is None:
            return not self.store.shared or await self._use_ended_elsewhere(receipt_id, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            return False
        return True

    async def _use_ended_elsewhere(self, receipt_id: str, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while await self.store.read(lambda tx: receipts.is_open(tx, receipt_id)):
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def begin_use(self, receipt_id: str) -> None:
        """Somebody works on a receipt from here on."""
        self._under_way[receipt_id] = asyncio.Event()

    def end_use(self, receipt_id: str) -> None:
        """Nobody does any more. Ending it again changes nothing."""
        ended = self._under_way.pop(receipt_id, None)
        if ended is not None:
            ended.set()

    def expose(self, payer: str, amount_nano_usd: int) -> bool:
        """Count a request of `payer` whose money has not arrived. False, with nothing counted, if that would be too much."""
        exposed = self._exposed.get(payer, 0) + amount_nano_usd
        if exposed > self._payer_exposure_nano_usd:
            return False
        self._exposed[payer] = exposed
        return True

    def cover(self, payer: str, amount_nano_usd: int) -> None:
        """The money of a request that `expose` counted has arrived, or will not."""
        exposed = self._exposed.pop(payer) - amount_nano_usd
        assert exposed >= 0
        if exposed:
            self._exposed[payer] = exposed


class Unmined:
    """Payments under way, by payer and asset, in the order they came: their money still shows in the balance on chain."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[str, int]] = {}

    def add(self, payer: str, asset: str, receipt_id: str, value_nano_usd: int) -> None:
        """A payment sets out."""
        self._values.setdefault((payer, asset), {})[receipt_id] = value_nano_usd

    def remove(self, payer: str, asset: str, receipt_id: str) -> None:
        """It has arrived, or will not."""
        values = self._values[payer, asset]
        del values[receipt_id]
        if not values:
            del self._values[payer, asset]

    def total(self, payer: str, asset: str) -> int:
        """Nano-USD of all payments under way."""
        return sum(self._values.get((payer, asset), {}).values())

    def before(self, payer: str, asset: str, receipt_id: str) -> int:
        """Nano-USD of the payments that set out before this one: of two that only one balance covers, the first goes on."""
        total = 0
        for other, value in self._values.get((payer, asset), {}).items():
            if other == receipt_id:
                break
            total += value
        return total
