"""Top-ups through a channel, on both databases: credited at once, claimed at once, and withdrawn no sooner."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contracts.devnet import Devnet, balance_of
from payments import receipts, withdrawals
from payments.chain.networks import Network
from payments.errors import PaymentRefused
from payments.ledger import history, transfers
from payments.ledger.accounts import account_id, payer_account
from payments.recovery import put_right
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.channel import ChannelHold, TopUpHold
from payments.withdrawals import Limits, WithdrawalRefused
from payments.x402.channels import ChannelPayment
from tests.payments.channel_desk import PRICE, Gateway, gateway
from tests.payments.exact_samples import QUOTED, assert_books_balance, quote_of
from tests.payments.settling import PAY_TO

TOPUP = {"kind": "topup"}
LIMITS = Limits(minimum=1, maximum=10**18, daily=10**18, review=10**18, fee=0)


@pytest.fixture
async def opened(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Gateway]:
    async with gateway(database, chain, network) as opened:
        yield opened


async def authorize(opened: Gateway, payment: ChannelPayment) -> ChannelHold:
    requirement = opened.scheme.requirement(opened.token, QUOTED, 300)
    digest = hashlib.sha256(b"top-up").digest()
    tender = opened.scheme.tender(payment, opened.token, requirement, digest, int(time.time()), tops_up=True)
    return await tender.authorize(quote_of(QUOTED), dict(TOPUP))


async def top_up(opened: Gateway, payment: ChannelPayment) -> str:
    hold = await authorize(opened, payment)
    await hold.ready()
    charge = await hold.capture(0, Outcome(dict(TOPUP)))
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (0, QUOTED)
    return hold.receipt_id


async def credit(opened: Gateway) -> int:
    account = payer_account(opened.wallet.address.lower(), opened.token.asset)
    return (await opened.services.store.read(lambda tx: transfers.balance(tx, account))).available


async def withdraw(opened: Gateway, key: str, amount: int | None = None) -> int:
    made, _ = await opened.services.store.write(
        lambda tx: withdrawals.request(
            tx,
            address=opened.wallet.address.lower(),
            idempotency_key=key,
            token=opened.token,
            amount_nano_usd=amount,
            limits=LIMITS,
            treasury=PAY_TO,
        )
    )
    return made.amount_nano_usd


async def test_a_deposit_tops_up_once_and_is_claimed_before_it_is_withdrawn(opened: Gateway, chain: Devnet) -> None:
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    results = await asyncio.gather(*(authorize(opened, payment) for _ in range(20)), return_exceptions=True)
    (hold,) = [result for result in results if isinstance(result, TopUpHold)]
    assert sum(isinstance(result, AlreadyUsed) and result.state == "in_progress" for result in results) == 19
    assert not hold.may_start_early
    await hold.ready()
    assert await credit(opened) == 0
    await asyncio.gather(*(hold.capture(0, Outcome(dict(TOPUP))) for _ in range(5)))
    with pytest.raises(AlreadyUsed) as used:
        await authorize(opened, payment)
    assert (used.value.state, used.value.receipt_id) == ("captured", hold.receipt_id)
    told = hold.payment_response()
    assert told is not None
    assert (told["success"], told["chargedAmount"]) == (True, str(PRICE))
    assert (await credit(opened), await opened.receivable()) == (QUOTED, -QUOTED)
    view = await opened.services.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert view is not None
    assert (view.state, view.paid_nano_usd, view.charged_nano_usd, view.credited_nano_usd) == (
        "captured",
        QUOTED,
        0,
        QUOTED,
    )
    page = await opened.services.store.read(lambda tx: history.page(tx, opened.wallet.address.lower(), 9))
    assert [(entry.kind, entry.amount_nano_usd, entry.receipt) for entry in page.entries] == [
        ("topup", QUOTED, hold.receipt_id)
    ]
    # Whoever took it out now would be paid with others' money.
    for amount in (QUOTED, 1000, None):
        with pytest.raises(WithdrawalRefused) as refused:
            await withdraw(opened, "early", amount)
        assert refused.value.code == "topup_unclaimed"
    await assert_books_balance(opened.services.store)

    # Far below what is worth a claim, and not old.
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == PRICE
    assert await opened.receivable() == 0
    custody = account_id("custody", opened.token.asset)
    assert (await opened.services.store.read(lambda tx: transfers.balance(tx, custody))).balance == -QUOTED
    assert await withdraw(opened, "all") == QUOTED
    await assert_books_balance(opened.services.store)
    # What answers cost afterwards waits for more, as ever.
    await opened.keeper.sync_marked()
    await opened.pay(2 * PRICE, PRICE)
    assert await opened.keeper.claim_due() == 0


async def test_only_what_is_claimed_of_a_balance_is_withdrawn(opened: Gateway) -> None:
    await top_up(opened, opened.payment(PRICE, deposit=5 * PRICE))
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    await opened.keeper.sync_marked()
    await top_up(opened, opened.payment(2 * PRICE))
    assert await credit(opened) == 2 * QUOTED
    with pytest.raises(WithdrawalRefused):
        await withdraw(opened, "too much", QUOTED + 1000)
    assert await withdraw(opened, "all") == QUOTED


async def test_a_voucher_that_topped_up_pays_for_nothing_else(opened: Gateway) -> None:
    await opened.pay(PRICE, PRICE, deposit=9 * PRICE)
    generous = opened.payment(5 * PRICE)
    await top_up(opened, generous)
    for again in (generous, dataclasses.replace(generous, digest=b"x" * 32)):
        with pytest.raises(PaymentRefused):
            await opened.take(again)
    assert (await opened.channel()).charged_nano_usd == 2 * QUOTED
    assert await credit(opened) == QUOTED


async def test_what_a_restart_interrupted_is_done_by_the_same_payment(opened: Gateway, chain: Devnet) -> None:
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    first = await authorize(opened, payment)
    await opened.services.store.write(lambda tx: put_right(tx, alone=False))
    first._end()
    await top_up(opened, payment)
    assert (await credit(opened), (await opened.channel()).charged_nano_usd) == (QUOTED, QUOTED)
    assert (await opened.channel()).on_chain.balance == 5 * PRICE
    await assert_books_balance(opened.services.store)
