"""What the tests of tenders share: a database, and payments whose transfers are mined when the test says so.

The signature is not checked here (that is `payments.verification`'s business), so it is not one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from payments import receipts
from payments.chain.networks import KNOWN_NETWORKS, Token
from payments.errors import PaymentError
from payments.ledger import books, transfers
from payments.ledger.accounts import payer_account
from payments.promises import Earlier
from payments.quotes import Quote, make_quote
from payments.settlement import outbox, states
from payments.settlement.orders import SettlementOrder
from payments.settlement.outcomes import SettlementOutcome
from payments.store import Store, Transaction
from payments.tenders.base import Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, ExactServices, ExactTender, on_failed, on_mined
from payments.verification.chain_state import Seen
from payments.x402.wire import Eip3009Authorization, Payment, Requirement

NETWORK = KNOWN_NETWORKS[84532]
USDC = NETWORK.tokens[0]
ASSET = USDC.asset
PAY_TO = "0x" + "7e" * 20
PAYER = "0x" + "a1" * 20
QUOTED = 20_000_000
"""Two cents."""
DETAILS = {"model_asked": "auto"}
ANSWERED = Outcome({"model": "m", "provider": "p"})
FAILED = Outcome({"reason": "all_candidates_failed"})
_nonces = itertools.count(1)


async def assert_books_balance(store: Store) -> None:
    assert await store.read(books.check) == []


async def credit_of(store: Store, address: str = PAYER, asset: str = ASSET) -> transfers.Balance:
    return await store.read(lambda tx: transfers.balance(tx, payer_account(address, asset)))


def quote_of(maximum_nano_usd: int = QUOTED) -> Quote:
    return make_quote(
        inference_nano_usd=maximum_nano_usd,
        network_fee_nano_usd=0,
        minimum_nano_usd=0,
        route=("model@provider",),
        request_digest=b"r" * 32,
        expires_at=2_000_000_000,
    )


def payment_of(
    value: int = QUOTED // 1000, payer: str = PAYER, nonce: int | None = None, token: Token = USDC
) -> Payment:
    """A payment of `value` atomic units, with a nonce of its own unless one is given."""
    authorization = Eip3009Authorization(payer, PAY_TO, value, 0, 2_000_000_000, nonce or next(_nonces))
    return Payment(
        version=2,
        scheme="exact",
        network=NETWORK.caip2,
        accepted=None,
        authorization=authorization,
        signature=b"\x01" * 64 + b"\x1b",
        quote_token=None,
        digest=hashlib.sha256(repr((token.address, authorization)).encode()).digest(),
    )


@dataclass
class HandSettlements:
    """The outbox without a chain: rows are written as the engine writes them, and mined or failed by hand."""

    store: Store
    submitted: list[SettlementOrder] = field(default_factory=list)
    before_submit: Callable[[], None] = lambda: None
    after_submit: Callable[[], None] = lambda: None
    mine_at_once: bool = True
    taken: list[str] = field(default_factory=list)
    from_block: int = 77

    def admit(self, payer: str) -> None:
        return

    async def submit(self, order: SettlementOrder) -> None:
        self.before_submit()
        if await self.store.write(lambda tx: _enqueue(tx, order)):
            self.submitted.append(order)
        self.after_submit()

    async def book_executed(self, order: SettlementOrder) -> bool:
        return False

    def take_queued(self, settlement_id: str) -> None:
        self.taken.append(settlement_id)

    async def outcome(self, settlement_id: str, timeout_s: float) -> SettlementOutcome:
        if self.mine_at_once and timeout_s:
            await self.mine(settlement_id)
        row = await self.store.read(lambda tx: _row(tx, settlement_id))
        return SettlementOutcome(row["state"], row["transaction_hash"], row["block_number"], row["reason"])

    async def mine(self, settlement_id: str, received: int | None = None) -> None:
        await self.store.write(lambda tx: _mine(tx, settlement_id, received))

    async def fail(self, settlement_id: str, reason: str = "reverted") -> None:
        await self.store.write(lambda tx: _fail(tx, settlement_id, reason))

    async def reorganise(self, settlement_id: str) -> None:
        await self.store.write(
            lambda tx: states.move(tx, settlement_id, "submitted", transfer_log_index=None, block_number=None)
        )


def _enqueue(tx: Transaction, order: SettlementOrder) -> bool:
    if not outbox.enqueue(tx, order):
        return False
    assert states.move(tx, order.id, "submitted", transaction_hash="0x" + hashlib.sha256(order.id.encode()).hexdigest())
    return True


def _mine(tx: Transaction, settlement_id: str, received: int | None) -> None:
    number = tx.execute("SELECT COUNT(*) FROM settlement WHERE block_number IS NOT NULL").fetchone()[0]
    row = _row(tx, settlement_id)
    columns = {"block_number": number + 1, "transfer_log_index": 0}
    columns["received_value"] = row["value"] if received is None else str(received)
    if states.move(tx, settlement_id, "mined", **columns):
        on_mined(tx, row | columns | {"state": "mined"})


def _fail(tx: Transaction, settlement_id: str, reason: str) -> None:
    if states.move(tx, settlement_id, "failed", reason=reason):
        on_failed(tx, _row(tx, settlement_id))


def _row(tx: Transaction, settlement_id: str) -> dict[str, Any]:
    columns = (
        "id, kind, reference, chain_id, state, token, payer, pay_to, value, transaction_hash, block_number, reason"
    )
    row = tx.execute(f"SELECT {columns} FROM settlement WHERE id = ?", (settlement_id,)).fetchone()
    if row is None:
        raise KeyError(settlement_id)
    return dict(zip(columns.split(", "), row, strict=True))


@dataclass
class HandChain:
    """What the chain says of payments: nothing, unless the test sets an error."""

    refusal: PaymentError | None = None
    payer_has_code: bool = False
    checked: int = 0
    others: list[int] = field(default_factory=list)
    """Atomic units that were promised before each."""

    async def check(
        self,
        payment: Payment,
        token: Token,
        pay_to: str,
        earlier: Earlier | None,
        unproven: PaymentError | None = None,
    ) -> Seen:
        self.checked += 1
        self.others.append(0 if earlier is None else earlier.in_use.balance)
        if self.refusal is not None:
            raise self.refusal
        return Seen(self.payer_has_code)


@dataclass
class Desk:
    """Everything that exact payments need, on one database."""

    store: Store
    settlements: HandSettlements
    chain: HandChain
    services: ExactServices

    def tender(self, payment: Payment, request: bytes = b"request", maximum: int = QUOTED) -> ExactTender:
        requirement = Requirement("exact", NETWORK.caip2, USDC.address, maximum // 1000, PAY_TO, 300, {})
        return ExactTender(self.services, payment, USDC, NETWORK, requirement, hashlib.sha256(request).digest())


def open_desk(store: Store, exposure: int = 50_000_000) -> Desk:
    settlements, chain = HandSettlements(store), HandChain()
    services = ExactServices(
        store=store,
        settlements=settlements,
        chain_states=chain,
        payer_exposure_nano_usd=exposure,
        settlement_wait_s=5,
    )
    return Desk(store, settlements, chain, services)


@pytest.fixture
def desk(store: Store) -> Desk:
    return open_desk(store)


async def shown(desk: Desk, receipt_id: str) -> dict[str, Any]:
    view = await desk.store.read(lambda tx: receipts.get(tx, receipt_id))
    assert view is not None
    return view.as_json()


async def rows(desk: Desk, table: str) -> int:
    return int(await desk.store.read(lambda tx: tx.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]))


async def again(desk: Desk, payment: Any) -> ExactHold | AlreadyUsed:
    """The same payment sent once more: a hold, or what became of it."""
    try:
        return await desk.tender(payment).authorize(quote_of(), DETAILS)
    except AlreadyUsed as used:
        return used
