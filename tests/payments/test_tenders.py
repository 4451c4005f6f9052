"""Prepaid credit and API keys: hold the maximum, charge what was used, free the rest, and say so in the receipt."""

from __future__ import annotations

import asyncio
import threading

import pytest

from payments import accounts, receipts
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.ledger.transfers import Balance
from payments.store import Store, Transaction
from payments.tenders.account import AccountTender
from payments.tenders.base import HoldEnded, Outcome
from payments.tenders.prepaid import PrepaidTender
from tests.payments.exact_samples import (
    DETAILS,
    PAYER,
    QUOTED,
    assert_books_balance,
    credit_of,
    quote_of,
)

USDC, USDT = "eip155:84532/USDC", "eip155:84532/USDT"
ANSWERED = Outcome({"model": "m", "provider": "p", "attempts": [{"status": "ok"}], "usage": {"output_tokens": 3}})


def give_credit(tx: Transaction, asset: str, amount: int) -> None:
    account = payer_account(PAYER, asset)
    transfers.post(tx, id=f"log:{asset}", debit=f"custody@{asset}", credit=account, amount=amount, reference="log")


async def pool_of(store: Store) -> Balance:
    return await store.read(lambda tx: transfers.balance(tx, accounts.pool_account("team")))


async def fund_pool(store: Store, amount: int = 100_000_000) -> None:
    await store.write(lambda tx: accounts.fund_pool(tx, "team", amount, "first"))


async def test_api_key_holds_the_maximum_and_pays_what_was_used(store: Store) -> None:
    await fund_pool(store)
    hold = await AccountTender(store, "key_1", "team").authorize(quote_of(), DETAILS)
    assert (hold.may_start_early, hold.maximum_nano_usd, hold.payment_response()) == (True, QUOTED, None)
    assert await pool_of(store) == Balance(100_000_000, QUOTED)
    await hold.ready()
    charge = await hold.capture(7_000_001, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (7_000_001, 0)
    assert await pool_of(store) == Balance(92_999_999, 0)
    receipt = await store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert receipt is not None
    shown = receipt.as_json()
    assert shown == shown | {
        "state": "captured",
        "tender": "account",
        "payer": None,
        "asset": "USD",
        "quoted_usd": "0.02",
        "paid_usd": "0.00",
        "charged_usd": "0.007000001",
        # What was held and not used was never anybody else's.
        "credited_usd": "0.00",
        "transaction": None,
        "model": "m",
        "provider": "p",
        "attempts": [{"status": "ok"}],
        "usage": {"output_tokens": 3},
        "model_asked": "auto",
        "resumable": False,
        "reason": None,
    }
    assert shown["created"] <= shown["closed"]
    await assert_books_balance(store)


async def test_each_end_of_a_hold_is_idempotent_and_excludes_the_others(store: Store) -> None:
    await fund_pool(store)
    tender = AccountTender(store, "key_1", "team")
    captured, released = await tender.authorize(quote_of(), {}), await tender.authorize(quote_of(), {})
    first = await captured.capture(5, ANSWERED)
    assert await captured.capture(9, ANSWERED) == first
    with pytest.raises(HoldEnded):
        await captured.release(ANSWERED)
    second = await released.release(Outcome({"reason": "all_candidates_failed"}))
    assert await released.release(ANSWERED) == second
    with pytest.raises(HoldEnded):
        await released.capture(5, ANSWERED)
    for hold in (captured, released):
        await hold.interrupt(ANSWERED)
    assert await pool_of(store) == Balance(100_000_000 - 5, 0)
    receipt = await store.read(lambda tx: receipts.get(tx, released.receipt_id))
    assert receipt is not None
    assert (receipt.state, receipt.reason, receipt.charged_nano_usd) == ("released", "all_candidates_failed", 0)
    await assert_books_balance(store)


async def test_overrun_is_the_operators_loss_and_revenue_is_what_the_answer_cost(store: Store) -> None:
    await fund_pool(store)
    hold = await AccountTender(store, "key_1", "team").authorize(quote_of(), {})
    charge = await hold.capture(QUOTED + 11, ANSWERED)
    assert charge.charged_nano_usd == QUOTED
    balances = await store.read(
        lambda tx: [transfers.balance(tx, name).balance for name in ("revenue@USD", "variance@USD")]
    )
    assert balances == [QUOTED + 11, -11]
    receipt = await store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert receipt is not None
    assert receipt.as_json()["overrun_usd"] == "0.000000011"
    await assert_books_balance(store)


async def test_what_is_written_with_the_charge_is_written_or_undone_with_it(store: Store) -> None:
    await fund_pool(store)
    hold = await AccountTender(store, "key_1", "team").authorize(quote_of(), {})

    def keep(tx: Transaction) -> None:
        tx.execute("INSERT INTO replay (receipt_id, ciphertext, expires_ms) VALUES (?, ?, 1)", (hold.receipt_id, b"x"))

    def keep_and_fail(tx: Transaction) -> None:
        keep(tx)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        await hold.capture(5, ANSWERED, also=keep_and_fail)
    count = "SELECT COUNT(*) FROM replay"
    assert (await store.read(lambda tx: tx.execute(count).fetchone()), await pool_of(store)) == (
        (0,),
        Balance(100_000_000, QUOTED),
    )
    await hold.capture(5, ANSWERED, also=keep)
    assert await store.read(lambda tx: tx.execute(count).fetchone()) == (1,)


async def test_empty_pool_is_refused_without_a_trace(store: Store) -> None:
    await fund_pool(store, QUOTED - 1)
    with pytest.raises(PaymentRefused) as refusal:
        await AccountTender(store, "key_1", "team").authorize(quote_of(), {})
    assert refusal.value.code == "insufficient_pool"
    assert "0.019999999 USD left" in refusal.value.message
    assert await store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM receipt").fetchone()) == (0,)
    assert await pool_of(store) == Balance(QUOTED - 1, 0)


async def test_hundred_requests_at_once_spend_a_pool_exactly(store: Store) -> None:
    await fund_pool(store, 10 * QUOTED + 1)
    tender = AccountTender(store, "key_1", "team")

    async def request() -> bool:
        try:
            hold = await tender.authorize(quote_of(), {})
        except PaymentRefused:
            return False
        await hold.capture(QUOTED, ANSWERED)
        return True

    assert sum(await asyncio.gather(*(request() for _ in range(100)))) == 10
    assert await pool_of(store) == Balance(1, 0)
    await assert_books_balance(store)


async def test_prepaid_credit_is_spent_in_the_first_token_that_suffices(store: Store) -> None:
    await store.write(lambda tx: give_credit(tx, USDC, QUOTED - 1))
    await store.write(lambda tx: give_credit(tx, USDT, QUOTED + 5))
    tender = PrepaidTender(store, PAYER, (USDC, USDT))
    hold = await tender.authorize(quote_of(), DETAILS)
    assert (hold.asset, hold.payer) == (USDT, PAYER)
    assert await credit_of(store, asset=USDT) == Balance(QUOTED + 5, QUOTED)
    with pytest.raises(PaymentRefused) as refusal:
        await tender.authorize(quote_of(), DETAILS)
    assert refusal.value.code == "insufficient_credit"
    assert "a credit of 0.019999999 USD" in refusal.value.message
    await hold.capture(6, ANSWERED)
    assert await credit_of(store, asset=USDT) == Balance(QUOTED - 1, 0)
    assert await credit_of(store, asset=USDC) == Balance(QUOTED - 1, 0)
    receipt = await store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert receipt is not None
    assert (receipt.as_json()["payer"], receipt.as_json()["asset"]) == (PAYER, USDT)
    await assert_books_balance(store)


async def test_interrupted_request_on_a_balance_is_released(store: Store) -> None:
    await fund_pool(store)
    hold = await AccountTender(store, "key_1", "team").authorize(quote_of(), {})
    await hold.interrupt(Outcome({"reason": "caller_gone"}))
    receipt = await store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert receipt is not None
    assert (receipt.state, receipt.reason) == ("released", "caller_gone")
    assert await pool_of(store) == Balance(100_000_000, 0)


async def test_caller_who_hangs_up_while_the_hold_is_written_leaves_nothing_held(store: Store) -> None:
    await fund_pool(store)
    go_on = threading.Event()
    blocking = asyncio.ensure_future(store.write(lambda tx: go_on.wait(10)))
    authorizing = asyncio.ensure_future(AccountTender(store, "key_1", "team").authorize(quote_of(), {}))
    await asyncio.sleep(0)
    authorizing.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await authorizing
    await blocking
    for _ in range(2):
        await store.write(lambda tx: None)
    assert await pool_of(store) == Balance(100_000_000, 0)
    assert await store.read(lambda tx: tx.execute("SELECT state, reason FROM receipt").fetchall()) == [
        ("released", "caller_gone")
    ]


async def test_unknown_receipt_is_none(store: Store) -> None:
    assert await store.read(lambda tx: receipts.get(tx, receipts.new_receipt_id())) is None
