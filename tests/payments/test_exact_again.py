"""A payment by exact that is sent again, at once or later, finds what its first use came to, and is used once."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import pytest

from payments.errors import PaymentConflict, PaymentRefused, SettlementPending
from payments.ledger.transfers import Balance
from payments.money import nano_to_usd
from payments.tenders.authorizations import USES_MAX
from payments.tenders.base import HoldEnded, Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, ExactTender, settlement_id
from payments.tenders.prepaid import PrepaidTender
from payments.x402.wire import Requirement
from tests.payments.exact_samples import (
    ANSWERED,
    ASSET,
    DETAILS,
    FAILED,
    NETWORK,
    PAY_TO,
    PAYER,
    QUOTED,
    Desk,
    again,
    assert_books_balance,
    credit_of,
    desk,
    payment_of,
    quote_of,
    rows,
    shown,
)

__all__ = ["desk"]


async def test_refused_payment_finds_its_first_use_and_begins_none(desk: Desk) -> None:
    refusal = PaymentRefused("quote_expired", "too late")
    payment = payment_of()

    def late() -> ExactTender:
        requirement = Requirement("exact", NETWORK.caip2, NETWORK.tokens[0].address, QUOTED // 1000, PAY_TO, 300, {})
        digest = hashlib.sha256(b"request").digest()
        return ExactTender(desk.services, payment, NETWORK.tokens[0], NETWORK, requirement, digest, refusal)

    with pytest.raises(PaymentRefused) as raised:
        await late().authorize(quote_of(), DETAILS)
    assert raised.value is refusal
    assert (await rows(desk, "receipt"), await rows(desk, "payment_authorization")) == (0, 0)
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    with pytest.raises(AlreadyUsed) as used:
        await late().authorize(quote_of(), DETAILS)
    assert used.value.receipt_id == hold.receipt_id
    assert await rows(desk, "receipt") == 1


async def test_payment_that_is_interrupted_again_and_again_becomes_credit(desk: Desk) -> None:
    payment = payment_of()
    for number in range(USES_MAX):
        hold = await again(desk, payment)
        assert isinstance(hold, ExactHold)
        assert hold.may_start_early
        await hold.ready()
        await hold.interrupt(Outcome({"reason": f"hung up {number}"}))
    used = await again(desk, payment)
    assert isinstance(used, AlreadyUsed)
    assert used.state == "released"
    assert (await shown(desk, used.receipt_id))["credited_usd"] == nano_to_usd(QUOTED)
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    await assert_books_balance(desk.store)


async def test_payment_sent_again_while_it_settles_starts_no_second_inference_early(desk: Desk) -> None:
    payment = payment_of()
    first = await again(desk, payment)
    assert isinstance(first, ExactHold)
    assert first.may_start_early
    await first.interrupt(Outcome({"reason": "settlement_pending"}))
    second = await again(desk, payment)
    assert isinstance(second, ExactHold)
    assert not second.may_start_early
    await second.ready()
    await second.capture(QUOTED, ANSWERED)
    await assert_books_balance(desk.store)


async def test_one_payment_sent_fifty_times_at_once_is_used_once(desk: Desk) -> None:
    payment = payment_of()
    results = await asyncio.gather(*(again(desk, payment) for _ in range(50)))
    (hold,) = [result for result in results if isinstance(result, ExactHold)]
    used = [result for result in results if isinstance(result, AlreadyUsed)]
    assert {(use.receipt_id, use.state, use.code, use.status) for use in used} == {
        (hold.receipt_id, "in_progress", "payment_in_progress", 409)
    }
    assert len(used) == 49
    assert (len(desk.settlements.submitted), desk.chain.checked) == (1, 1)
    assert (await rows(desk, "receipt"), await rows(desk, "payment_authorization")) == (1, 1)
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    later = await again(desk, payment)
    assert isinstance(later, AlreadyUsed)
    assert (later.state, later.code, later.receipt_id) == ("captured", "payment_already_used", hold.receipt_id)


async def test_one_nonce_for_another_request_or_payload_is_a_conflict(desk: Desk) -> None:
    payment = payment_of()
    await desk.tender(payment).authorize(quote_of(), DETAILS)
    other_payload = replace(payment, signature=b"\x02" * 65, digest=b"another payload".ljust(32))
    for tender in (desk.tender(payment, b"another request"), desk.tender(other_payload)):
        with pytest.raises(PaymentConflict) as conflict:
            await tender.authorize(quote_of(), DETAILS)
        assert not isinstance(conflict.value, AlreadyUsed)
        # Whoever copies a header must not learn from it whose receipt it is.
        assert (conflict.value.code, conflict.value.receipt_id) == ("authorization_reused", None)
    assert await rows(desk, "receipt") == 1


@pytest.mark.parametrize("written", [False, True])
async def test_caller_gone_while_submitting_can_come_back(desk: Desk, written: bool) -> None:
    def hang_up() -> None:
        raise asyncio.CancelledError

    payment = payment_of()
    if written:
        desk.settlements.after_submit = hang_up
    else:
        desk.settlements.before_submit = hang_up
    with pytest.raises(asyncio.CancelledError):
        await desk.tender(payment).authorize(quote_of(), DETAILS)
    desk.settlements.before_submit = desk.settlements.after_submit = lambda: None
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.ready()
    await hold.capture(QUOTED, ANSWERED)
    assert len(desk.settlements.submitted) == 1
    await assert_books_balance(desk.store)


async def test_unknown_transfer_is_pending_and_the_same_payment_waits_for_it_again(desk: Desk) -> None:
    payment = payment_of()
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    with pytest.raises(SettlementPending) as pending:
        await hold.ready()
    assert (pending.value.receipt_id, pending.value.status) == (hold.receipt_id, 202)
    await hold.interrupt(Outcome({"reason": "settlement_pending"}))
    receipt = await shown(desk, hold.receipt_id)
    assert (receipt["state"], receipt["resumable"], receipt["transaction"]["state"]) == (
        "interrupted",
        True,
        "submitted",
    )
    desk.settlements.mine_at_once = True
    resumed = await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert resumed.receipt_id == hold.receipt_id
    await resumed.ready()
    await resumed.capture(5, ANSWERED)
    assert (len(desk.settlements.submitted), desk.chain.checked) == (1, 1)
    assert await credit_of(desk.store) == Balance(QUOTED - 5, 0)
    await assert_books_balance(desk.store)


async def interrupted(desk: Desk, mined: bool) -> tuple[Any, str]:
    payment = payment_of()
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.interrupt(Outcome({"reason": "caller_gone"}))
    if mined:
        await desk.settlements.mine(settlement_id(hold.receipt_id))
        assert await credit_of(desk.store) == Balance(QUOTED, 0)
    desk.settlements.mine_at_once = True
    return payment, hold.receipt_id


@pytest.mark.parametrize("mined", [False, True])
async def test_interrupted_payment_sent_fifty_times_at_once_is_taken_up_once(desk: Desk, mined: bool) -> None:
    payment, receipt_id = await interrupted(desk, mined)
    results = await asyncio.gather(*(again(desk, payment) for _ in range(50)))
    (hold,) = [result for result in results if isinstance(result, ExactHold)]
    assert hold.receipt_id == receipt_id
    await hold.ready()
    response = hold.payment_response()
    assert response is not None
    assert response["success"]
    charge = await hold.capture(8_000_000, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (8_000_000, QUOTED - 8_000_000)
    assert await credit_of(desk.store) == Balance(QUOTED - 8_000_000, 0)
    assert len(desk.settlements.submitted) == 1
    await assert_books_balance(desk.store)


async def test_earlier_use_cannot_end_a_later_one(desk: Desk) -> None:
    payment = payment_of()
    first = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await first.ready()
    await first.interrupt(Outcome({"reason": "stopped"}))
    second = await desk.tender(payment).authorize(quote_of(), DETAILS)
    for end in (first.capture(1, ANSWERED), first.release(FAILED)):
        with pytest.raises(HoldEnded):
            await end
    await first.interrupt(FAILED)
    assert await credit_of(desk.store) == Balance(QUOTED, QUOTED)
    await second.capture(1, ANSWERED)
    await assert_books_balance(desk.store)


async def test_interrupted_payment_whose_credit_is_spent_is_not_taken_up(desk: Desk) -> None:
    payment, receipt_id = await interrupted(desk, mined=True)
    spending = await PrepaidTender(desk.store, PAYER, (ASSET,)).authorize(quote_of(1_000_000), {})
    await spending.capture(1_000_000, ANSWERED)
    for _ in range(2):
        used = await again(desk, payment)
        assert isinstance(used, AlreadyUsed)
        assert used.code == "payment_already_credited"
    receipt = await shown(desk, receipt_id)
    assert (receipt["state"], receipt["reason"], receipt["credited_usd"]) == ("released", "credit_spent", "0.02")
    assert await credit_of(desk.store) == Balance(QUOTED - 1_000_000, 0)
    await assert_books_balance(desk.store)


async def test_interrupted_payment_that_a_reorganisation_takes_away_is_not_taken_up(desk: Desk) -> None:
    payment, receipt_id = await interrupted(desk, mined=True)
    await desk.settlements.reorganise(settlement_id(receipt_id))
    await desk.settlements.fail(settlement_id(receipt_id))
    with pytest.raises(PaymentRefused):
        await desk.tender(payment).authorize(quote_of(), DETAILS)
    receipt = await shown(desk, receipt_id)
    assert (receipt["state"], receipt["credited_usd"]) == ("released", "0.00")
    await assert_books_balance(desk.store)


async def test_second_sender_can_wait_for_the_first_use_to_end(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert not await desk.services.use_ended(hold.receipt_id, 0.01)
    waiting = asyncio.ensure_future(desk.services.use_ended(hold.receipt_id, 60))
    await hold.ready()
    await hold.capture(1, ANSWERED)
    assert await waiting
    assert await desk.services.use_ended(hold.receipt_id, 0)
