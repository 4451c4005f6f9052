"""Signed payments: used once whatever is sent how often, and what is paid and not used is the payer's."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import pytest

import payments.store
from payments import receipts
from payments.chain.networks import Token
from payments.errors import (
    AllowanceRequired,
    PaymentConflict,
    PaymentError,
    PaymentRefused,
    SettlementPending,
    SettlementUnavailable,
)
from payments.ledger import transfers
from payments.ledger.transfers import Balance
from payments.money import nano_to_usd
from payments.promises import Earlier
from payments.store import Store, StoreBusy
from payments.tenders.authorizations import USES_MAX
from payments.tenders.base import HoldEnded, Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, ExactTender, settlement_id
from payments.tenders.prepaid import PrepaidTender
from payments.verification.chain_state import Seen
from payments.x402.wire import Payment, Requirement
from tests.payments.exact_samples import (
    ASSET,
    DETAILS,
    NETWORK,
    PAY_TO,
    PAYER,
    QUOTED,
    Desk,
    HandChain,
    assert_books_balance,
    credit_of,
    open_desk,
    payment_of,
    quote_of,
)

ANSWERED = Outcome({"model": "m", "provider": "p"})
FAILED = Outcome({"reason": "all_candidates_failed"})


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


async def test_paid_request_charges_what_was_used_and_credits_the_rest(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert hold.payment_response() is None
    assert (await shown(desk, hold.receipt_id))["transaction"]["state"] == "submitted"
    await hold.ready()
    assert await credit_of(desk.store) == Balance(QUOTED, QUOTED)
    charge = await hold.capture(7_000_000, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (7_000_000, 13_000_000)
    assert await credit_of(desk.store) == Balance(13_000_000, 0)
    receipt = await shown(desk, hold.receipt_id)
    assert receipt == receipt | {
        "state": "captured",
        "tender": "exact",
        "payer": PAYER,
        "asset": ASSET,
        "quoted_usd": "0.02",
        "paid_usd": "0.02",
        "charged_usd": "0.007",
        "credited_usd": "0.013",
        "transaction": {
            "hash": charge.transaction_hash,
            "network": "eip155:84532",
            "block_number": 1,
            "state": "mined",
        },
        "model": "m",
        "model_asked": "auto",
    }
    assert "short_usd" not in receipt
    assert hold.payment_response() == {
        "success": True,
        "tx_hash": charge.transaction_hash,
        "network": NETWORK.caip2,
        "payer": PAYER,
        "receipt": hold.receipt_id,
        "amount": QUOTED // 1000,
    }
    await assert_books_balance(desk.store)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("ending", ["capture", "release", "interrupt"])
async def test_hold_ends_when_the_database_takes_it_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A full disk while the request ends: nobody is charged twice, and the same payment sent again waits for the end."""
    monkeypatch.setattr(payments.store, "SURELY_WAIT_S", 0.01)
    monkeypatch.setattr(payments.store, "SURELY_RETRY_S", 0.01)
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.ready()
    refuse = (
        "CREATE TRIGGER full BEFORE UPDATE ON receipt BEGIN INSERT INTO replay VALUES ('', zeroblob(1000000), 0); END"
    )
    await desk.store.write(lambda tx: (tx.execute(refuse), tx.execute("PRAGMA max_page_count = 1")))
    outcome = Outcome({"model": "m", "provider": "p"})
    if ending == "interrupt":
        await hold.interrupt(outcome)
    else:
        with pytest.raises(StoreBusy):
            await (hold.capture(7_000_000, outcome) if ending == "capture" else hold.release(outcome))
    assert not await desk.services.use_ended(hold.receipt_id, 0.05)
    assert (await shown(desk, hold.receipt_id))["state"] == "open"
    await desk.store.write(
        lambda tx: (tx.execute("PRAGMA max_page_count = 1073741823"), tx.execute("DROP TRIGGER full"))
    )
    assert await desk.services.use_ended(hold.receipt_id, 10)
    states = {"capture": "captured", "release": "released", "interrupt": "interrupted"}
    assert (await shown(desk, hold.receipt_id))["state"] == states[ending]
    charged = 7_000_000 if ending == "capture" else 0
    assert await credit_of(desk.store) == Balance(QUOTED - charged, 0)
    await assert_books_balance(desk.store)


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


async def test_order_carries_the_payment_to_the_engine(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    (order,) = desk.settlements.submitted
    assert (order.id, order.reference, order.kind) == (settlement_id(hold.receipt_id), hold.receipt_id, "payment")
    assert (order.payer, order.pay_to, order.value) == (PAYER, payment.authorization.recipient, QUOTED // 1000)
    assert (order.authorization_nonce, order.valid_before) == (payment.authorization.nonce, 2_000_000_000)
    assert order.call_to == order.token == NETWORK.tokens[0].address


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


@pytest.mark.parametrize(
    "refusal",
    [
        PaymentRefused("insufficient_funds", "too little"),
        AllowanceRequired("permit2_allowance_required", "approve first"),
        SettlementUnavailable("chain_unavailable", "no node answers"),
    ],
)
async def test_payment_refused_by_the_chain_leaves_no_trace_and_may_be_sent_again(
    desk: Desk, refusal: PaymentRefused
) -> None:
    payment = payment_of()
    desk.chain.refusal = refusal
    with pytest.raises(type(refusal)) as raised:
        await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert raised.value is refusal
    assert (await rows(desk, "receipt"), await rows(desk, "payment_authorization")) == (0, 0)
    desk.chain.refusal = None
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.ready()


async def test_payment_that_the_engine_cannot_take_leaves_no_trace(desk: Desk) -> None:
    def refuse() -> None:
        raise SettlementUnavailable("settlement_unavailable", "not running")

    desk.settlements.before_submit = refuse
    with pytest.raises(SettlementUnavailable):
        await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    assert (await rows(desk, "receipt"), await rows(desk, "payment_authorization")) == (0, 0)


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


async def test_nothing_can_be_captured_before_the_transfer_is_mined(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    with pytest.raises(HoldEnded, match="not arrived"):
        await hold.capture(1, ANSWERED)
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    await hold.capture(1, ANSWERED)


async def test_released_payment_is_credited_in_full_for_good(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    await hold.ready()
    charge = await hold.release(FAILED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (0, QUOTED)
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    used = await again(desk, payment)
    assert isinstance(used, AlreadyUsed)
    assert (used.state, used.code) == ("released", "payment_already_credited")


async def test_money_of_a_request_released_before_it_arrived_is_credited_when_it_does(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await hold.release(FAILED)
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    assert (await shown(desk, hold.receipt_id))["credited_usd"] == "0.02"
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


async def test_interrupted_payment_that_a_reorganisation_takes_away_is_not_taken_up(desk: Desk) -> None:
    payment, receipt_id = await interrupted(desk, mined=True)
    await desk.settlements.reorganise(settlement_id(receipt_id))
    await desk.settlements.fail(settlement_id(receipt_id))
    with pytest.raises(PaymentRefused):
        await desk.tender(payment).authorize(quote_of(), DETAILS)
    receipt = await shown(desk, receipt_id)
    assert (receipt["state"], receipt["credited_usd"]) == ("released", "0.00")
    await assert_books_balance(desk.store)


async def test_money_that_arrives_after_a_failure_is_the_payers(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    await desk.settlements.fail(settlement_id(hold.receipt_id))
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    assert (await shown(desk, hold.receipt_id))["credited_usd"] == "0.02"
    await assert_books_balance(desk.store)


async def test_inference_starts_early_only_within_the_payers_exposure(store: Store) -> None:
    desk = open_desk(store, exposure=2 * QUOTED)
    desk.settlements.mine_at_once = False
    holds = [await desk.tender(payment_of()).authorize(quote_of(), DETAILS) for _ in range(3)]
    other = await desk.tender(payment_of(payer="0x" + "b2" * 20)).authorize(quote_of(), DETAILS)
    assert [hold.may_start_early for hold in (*holds, other)] == [True, True, False, True]
    # The chain's balance still shows what is on its way.
    value = QUOTED // 1000
    assert desk.chain.others == [0, value, 2 * value, 0]
    await desk.settlements.mine(settlement_id(holds[0].receipt_id))
    await holds[0].ready()
    assert (await desk.tender(payment_of()).authorize(quote_of(), DETAILS)).may_start_early
    # Whoever hangs up owes it all the same, until its money has arrived or cannot any more.
    await holds[1].interrupt(FAILED)
    assert not (await desk.tender(payment_of()).authorize(quote_of(), DETAILS)).may_start_early
    await desk.settlements.fail(settlement_id(holds[1].receipt_id))
    assert (await desk.tender(payment_of()).authorize(quote_of(), DETAILS)).may_start_early


async def test_of_two_payments_that_one_balance_covers_the_first_goes_on(desk: Desk) -> None:
    waiting: list[Earlier | None] = []
    both = asyncio.Event()

    class OneBalance(HandChain):
        async def check(
            self,
            payment: Payment,
            token: Token,
            pay_to: str,
            earlier: Earlier | None,
            unproven: PaymentError | None = None,
        ) -> Seen:
            waiting.append(earlier)
            if len(waiting) == 2:
                both.set()
            await both.wait()
            assert earlier is not None
            if earlier.in_use.balance >= QUOTED // 1000:
                raise PaymentRefused("insufficient_funds", "too little")
            return Seen(has_code=False)

    desk.services.chain_states = OneBalance()
    results = await asyncio.gather(again(desk, payment_of()), again(desk, payment_of()), return_exceptions=True)
    assert [type(result) for result in results] == [ExactHold, PaymentRefused]


async def test_second_sender_can_wait_for_the_first_use_to_end(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    assert not await desk.services.use_ended(hold.receipt_id, 0.01)
    waiting = asyncio.ensure_future(desk.services.use_ended(hold.receipt_id, 60))
    await hold.ready()
    await hold.capture(1, ANSWERED)
    assert await waiting
    assert await desk.services.use_ended(hold.receipt_id, 0)


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
