"""What of a payment by exact arrives on the chain, and when: all, less, nothing, too late, or not any more."""

from __future__ import annotations

import pytest

from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.transfers import Balance
from payments.money import nano_to_usd
from payments.tenders.base import HoldEnded, Outcome
from payments.tenders.exact import settlement_id
from tests.payments.exact_samples import (
    ANSWERED,
    ASSET,
    DETAILS,
    FAILED,
    PAYER,
    QUOTED,
    Desk,
    assert_books_balance,
    credit_of,
    desk,
    payment_of,
    quote_of,
    shown,
)

__all__ = ["desk"]


async def test_failed_transfer_takes_nothing_and_says_so_again(desk: Desk) -> None:
    payment = payment_of()
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await desk.settlements.fail(settlement_id(hold.receipt_id), "cancelled by the payer")
    with pytest.raises(PaymentRefused, match="cancelled by the payer") as refusal:
        await hold.ready()
    assert refusal.value.code == "settlement_failed"
    await hold.interrupt(Outcome({"reason": "stopped"}))
    response = hold.payment_response()
    assert response is not None
    assert (response["success"], response["error_reason"]) == (False, "settlement_failed")
    receipt = await shown(desk, hold.receipt_id)
    assert (receipt["state"], receipt["reason"], receipt["credited_usd"]) == (
        "released",
        "cancelled by the payer",
        "0.00",
    )
    with pytest.raises(PaymentRefused) as refusal:
        await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert refusal.value.code == "settlement_failed"
    assert await credit_of(desk.store) == Balance(0, 0)


async def test_money_of_a_request_released_before_it_arrived_is_credited_when_it_does(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await hold.release(FAILED)
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    assert (await shown(desk, hold.receipt_id))["credited_usd"] == "0.02"
    await assert_books_balance(desk.store)


async def test_token_that_takes_a_fee_credits_what_arrived(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await desk.settlements.mine(settlement_id(hold.receipt_id), received=QUOTED // 1000 - 2_000)
    await hold.ready()
    arrived = QUOTED - 2_000_000
    assert await credit_of(desk.store) == Balance(arrived, arrived)
    charge = await hold.capture(QUOTED, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (arrived, 0)
    receipt = await shown(desk, hold.receipt_id)
    assert (receipt["paid_usd"], receipt["short_usd"], receipt["overrun_usd"]) == (
        nano_to_usd(arrived),
        "0.002",
        "0.002",
    )
    await assert_books_balance(desk.store)


async def test_payment_of_which_nothing_arrives_has_failed(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await desk.settlements.mine(settlement_id(hold.receipt_id), received=0)
    assert (await shown(desk, hold.receipt_id))["reason"] == "nothing arrived"
    with pytest.raises(HoldEnded):
        await hold.capture(1, ANSWERED)
    assert await credit_of(desk.store) == Balance(0, 0)


@pytest.mark.parametrize("charged", [0, 15_000_000])
async def test_reorganised_payment_is_taken_back_and_what_was_spent_is_the_operators_loss(
    desk: Desk, charged: int
) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.ready()
    await hold.capture(charged, ANSWERED)
    settlement = settlement_id(hold.receipt_id)

    async def balances() -> list[int]:
        names = (f"payer:{PAYER}@{ASSET}", f"custody@{ASSET}", f"variance@{ASSET}", f"revenue@{ASSET}")
        return await desk.store.read(lambda tx: [transfers.balance(tx, name).balance for name in names])

    settled = [QUOTED - charged, -QUOTED, 0, charged]
    for _ in range(2):
        assert await balances() == settled
        await desk.settlements.reorganise(settlement)
        await desk.settlements.fail(settlement, "reverted after a reorganisation")
        assert await balances() == [0, 0, -charged, charged]
        await assert_books_balance(desk.store)
        # And it is mined after all.
        await desk.settlements.mine(settlement)
    assert await balances() == settled
    assert (await shown(desk, hold.receipt_id))["paid_usd"] == "0.02"
    await assert_books_balance(desk.store)


async def test_money_that_arrives_after_a_failure_is_the_payers(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await desk.settlements.fail(settlement_id(hold.receipt_id))
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    assert (await shown(desk, hold.receipt_id))["credited_usd"] == "0.02"
    await assert_books_balance(desk.store)


async def test_growing_credit_is_announced(desk: Desk) -> None:
    announced: list[tuple[str, str]] = []
    desk.services.credited = lambda payer, asset: announced.append((payer, asset))
    whole, part = [await desk.tender(payment_of()).authorize(quote_of(), DETAILS) for _ in range(2)]
    await whole.ready()
    await whole.capture(QUOTED, ANSWERED)
    assert announced == []
    await part.ready()
    await part.capture(QUOTED - 1, ANSWERED)
    assert announced == [(PAYER, ASSET)]
