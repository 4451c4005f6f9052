"""Top-ups by `upto`, on both databases: the whole authorization is settled once, and becomes its payer's balance."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of
from payments import promises, receipts
from payments.chain.networks import Network
from payments.errors import PaymentConflict
from payments.ledger.accounts import payer_account
from payments.recovery import put_right
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.exact import ExactHold
from payments.x402.wire import Payment
from tests.payments.desks import VALUE
from tests.payments.exact_samples import QUOTED, quote_of
from tests.payments.pledging import Desk, gateway
from tests.payments.settling import PAY_TO

TOPUP = {"kind": "topup"}


@pytest.fixture
async def desk(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Desk]:
    approve_permit2(chain.rpc_url, chain.usdc, chain.wallets[1].private_key)
    async with gateway(database, chain, network) as desk:
        yield desk


async def authorize(desk: Desk, payment: Payment, request: bytes = b"t" * 32) -> ExactHold:
    token = desk.network.tokens[0]
    requirement = desk.scheme.requirement(token, QUOTED, 300)
    tender = desk.scheme.tender(payment, token, requirement, request, int(time.time()), tops_up=True)
    hold = await tender.authorize(quote_of(), TOPUP)
    assert isinstance(hold, ExactHold)
    return hold


async def check_credited(desk: Desk, receipt_id: str, payer: str) -> None:
    view = await desk.store.read(lambda tx: receipts.get(tx, receipt_id))
    assert view is not None
    assert (view.tender, view.state, view.settlement_state) == ("upto", "captured", "mined")
    assert (view.paid_nano_usd, view.charged_nano_usd, view.credited_nano_usd) == (QUOTED, 0, QUOTED)
    assert await desk.balance(payer_account(payer, desk.network.tokens[0].asset)) == QUOTED
    assert balance_of(desk.chain.rpc_url, desk.chain.usdc, PAY_TO) == VALUE
    await desk.check_books()


async def test_of_fifty_uses_one_tops_up_and_the_others_are_told(desk: Desk) -> None:
    payment = desk.sign(desk.chain.wallets[1], desk.network.tokens[0])
    results = await asyncio.gather(*(authorize(desk, payment) for _ in range(50)), return_exceptions=True)
    (hold,) = [result for result in results if isinstance(result, ExactHold)]
    assert sum(isinstance(result, AlreadyUsed) and result.state == "in_progress" for result in results) == 49
    with pytest.raises(PaymentConflict) as as_a_request:
        await desk.authorize(payment)
    assert as_a_request.value.code == "authorization_reused"
    # Nothing is under way for it that could be lost.
    assert await desk.store.read(lambda tx: promises.exposure(promises.under_way(tx, payment.payer))) == 0
    await hold.ready()
    charge = await hold.capture(0, Outcome(TOPUP))
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (0, QUOTED)
    with pytest.raises(AlreadyUsed) as used:
        await authorize(desk, payment)
    assert (used.value.state, used.value.receipt_id) == ("captured", hold.receipt_id)
    await check_credited(desk, hold.receipt_id, payment.payer)


async def test_what_a_restart_interrupted_is_taken_up_by_the_same_payment(desk: Desk) -> None:
    payment = desk.sign(desk.chain.wallets[1], desk.network.tokens[0])
    first = await authorize(desk, payment)
    await desk.store.write(lambda tx: put_right(tx, alone=False))
    desk.services.end_use(first.receipt_id)
    second = await authorize(desk, payment)
    assert second.receipt_id == first.receipt_id
    await second.ready()
    await second.capture(0, Outcome(TOPUP))
    await check_credited(desk, first.receipt_id, payment.payer)
