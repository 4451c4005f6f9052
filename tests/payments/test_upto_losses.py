"""Answers by upto whose settlement failed: the operator's loss and the payer's debt, until their money comes after all.

That it comes is rare (a reorganisation executes a call that had reverted), so it is told to the books here as the engine would.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from payments import promises
from payments.errors import SchemeRefused
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.store import Store, Transaction
from payments.tenders import pledges, upto_settlement
from payments.tenders.base import Outcome
from payments.tenders.pledges import Pledge
from tests.databases import open_store
from tests.payments.exact_samples import ASSET, NETWORK, PAYER, QUOTED, USDC, assert_books_balance

COST = 7_654_321
RECEIVED = 7_655
"""Atomic units that are asked for `COST`: 679 nano-USD more."""
BOOKS = upto_settlement.kind(NETWORK)
CREDIT, RECEIVABLE = payer_account(PAYER, ASSET), account_id("receivable", ASSET, PAYER)
CUSTODY, VARIANCE = account_id("custody", ASSET), account_id("variance", ASSET)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def pledge(tx: Transaction, identity: str) -> Pledge:
    reserved = pledges.reserve(
        tx,
        identity=identity,
        digest=b"d" * 32,
        payer=PAYER,
        asset=ASSET,
        quoted_nano_usd=QUOTED,
        value_nano_usd=QUOTED,
        details={},
        exposure_max_nano_usd=2 * QUOTED,
    )
    assert isinstance(reserved, Pledge)
    return reserved


def unpaid_answer(tx: Transaction) -> dict[str, Any]:
    """Give an answer and fail its settlement; returns the settlement's row."""
    use = pledge(tx, "first").use
    pledges.capture(tx, use, PAYER, QUOTED, COST, Outcome())
    row = {"id": upto_settlement.settlement_id(use.receipt_id), "reference": use.receipt_id, "token": USDC.address}
    BOOKS.on_failed(tx, row)
    return row


def comes_after_all(tx: Transaction, row: dict[str, Any]) -> None:
    place = {"transaction_hash": "0x" + "ab" * 32, "transfer_log_index": 3}
    BOOKS.on_paid(tx, row | place | {"received_value": str(RECEIVED)})


async def balances(store: Store) -> dict[str, int]:
    await assert_books_balance(store)
    names = {"credit": CREDIT, "receivable": RECEIVABLE, "variance": VARIANCE, "custody": CUSTODY}
    return await store.read(
        lambda tx: {name: transfers.balance(tx, account).balance for name, account in names.items()}
    )


async def test_who_owes_for_an_answer_pays_in_another_way_until_the_balance_covers_it(store: Store) -> None:
    await store.write(unpaid_answer)
    assert await balances(store) == {"credit": 0, "receivable": 0, "variance": -COST, "custody": 0}
    with pytest.raises(SchemeRefused) as refused:
        await store.write(lambda tx: pledge(tx, "second"))
    assert refused.value.code == "unpaid_answers"
    await pay_in(store, COST - 1)
    with pytest.raises(SchemeRefused):
        await store.write(lambda tx: pledge(tx, "second"))
    await pay_in(store, 1)
    await store.write(lambda tx: pledge(tx, "second"))
    assert await balances(store) == {"credit": 0, "receivable": 0, "variance": 0, "custody": -COST}
    # The debt is paid once.
    await store.write(lambda tx: pledge(tx, "third"))
    assert await store.read(lambda tx: promises.exposure(promises.under_way(tx, PAYER))) == 2 * QUOTED


async def pay_in(store: Store, amount: int) -> None:
    name = f"paid-in:{amount}"
    await store.write(
        lambda tx: transfers.post(tx, id=name, debit=CUSTODY, credit=CREDIT, amount=amount, reference="test")
    )


async def test_a_loss_is_made_good_when_the_money_comes_after_all(store: Store) -> None:
    row = await store.write(unpaid_answer)
    for _ in range(2):
        await store.write(lambda tx: comes_after_all(tx, row))
        assert await balances(store) == {"credit": 679, "receivable": 0, "variance": 0, "custody": -RECEIVED * 1_000}
    await store.write(lambda tx: pledge(tx, "second"))


async def test_what_was_repaid_from_the_balance_is_given_back_when_the_money_comes_after_all(store: Store) -> None:
    row = await store.write(unpaid_answer)
    await pay_in(store, COST)
    await store.write(lambda tx: pledge(tx, "second"))
    for _ in range(2):
        await store.write(lambda tx: comes_after_all(tx, row))
        assert await balances(store) == {
            "credit": 679 + COST,
            "receivable": 0,
            "variance": 0,
            "custody": -RECEIVED * 1_000 - COST,
        }


async def test_a_debt_that_a_reorganisation_brings_back_is_paid_again(store: Store) -> None:
    row = await store.write(unpaid_answer)
    await pay_in(store, COST)
    await store.write(lambda tx: pledge(tx, "second"))
    await store.write(lambda tx: comes_after_all(tx, row))
    await store.write(lambda tx: BOOKS.on_failed(tx, row))
    # What the transfer brought beyond the price stays the payer's, and is the operator's loss.
    owed = {"credit": COST + 679, "receivable": 0, "variance": -COST - 679, "custody": -COST}
    assert await balances(store) == owed
    await store.write(lambda tx: pledge(tx, "third"))
    assert await balances(store) == owed | {"credit": 679, "variance": -679}
