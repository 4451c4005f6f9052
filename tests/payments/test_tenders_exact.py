"""Signed payments by exact: used once, for what was quoted, and what is paid and not used is the payer's."""

from __future__ import annotations

import asyncio

import pytest

import payments.store
from payments.chain.networks import Token
from payments.errors import AllowanceRequired, PaymentError, PaymentRefused, SettlementUnavailable
from payments.ledger.transfers import Balance
from payments.promises import Earlier
from payments.store import Store, StoreBusy
from payments.tenders.base import HoldEnded, Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, settlement_id
from payments.verification.chain_state import Seen
from payments.x402.wire import Payment
from tests.payments.exact_samples import (
    ANSWERED,
    ASSET,
    DETAILS,
    FAILED,
    NETWORK,
    PAYER,
    QUOTED,
    Desk,
    HandChain,
    again,
    assert_books_balance,
    credit_of,
    desk,
    open_desk,
    payment_of,
    quote_of,
    rows,
    shown,
)

__all__ = ["desk"]


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


async def test_order_carries_the_payment_to_the_engine(desk: Desk) -> None:
    payment = payment_of()
    hold = await desk.tender(payment).authorize(quote_of(), DETAILS)
    (order,) = desk.settlements.submitted
    assert (order.id, order.reference, order.kind) == (settlement_id(hold.receipt_id), hold.receipt_id, "payment")
    assert (order.payer, order.pay_to, order.value) == (PAYER, payment.authorization.recipient, QUOTED // 1000)
    assert (order.authorization_nonce, order.valid_before) == (payment.authorization.nonce, 2_000_000_000)
    assert order.call_to == order.token == NETWORK.tokens[0].address


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
