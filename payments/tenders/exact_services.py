"""What all payments on one network share: the database, the engine that settles them, and who works on which receipt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from payments import receipts
from payments.chain.networks import Token
from payments.errors import PaymentError
from payments.promises import Earlier
from payments.settlement.orders import SettlementOrder
from payments.sponsoring.sponsor import Sponsor
from payments.store import Store
from payments.verification.chain_state import Seen
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

    @property
    def from_block(self) -> int:
        """A block before which nobody can have executed what is found unexecuted now; see `outbox.enqueue`."""

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
        earlier: Earlier | None,
        unproven: PaymentError | None = None,
    ) -> Seen:
        """What is known of the payer, if the transfer would succeed now; else raise a `PaymentError`, which is `unproven` if
        the payer has no code that could make its signature good. `earlier` is promised before it."""


class ExactServices:
    """What all exact payments on one network share.

    Args:
        store: The database.
        settlements: Settles them.
        chain_states: Judges them by the chain.
        payer_exposure_nano_usd: Inference that one payer may have under way, by all schemes together, before its money has
            arrived.
        settlement_wait_s: How long a request waits for its transfer, in seconds.
        credited: Told the payer and the asset whose credit may have grown.
        sponsor: Brings payers' approvals of Permit2 to the chain, if anybody does.
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
        sponsor: Sponsor | None = None,
    ) -> None:
        self.store = store
        self.settlements = settlements
        self.chain_states = chain_states
        self.settlement_wait_s = settlement_wait_s
        self.credited = credited
        self.payer_exposure_nano_usd = payer_exposure_nano_usd
        self.sponsor = sponsor
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
