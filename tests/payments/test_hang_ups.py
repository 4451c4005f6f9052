"""What an answer has cost that its caller did not wait for is charged, on every tender, and never more than was quoted."""

from __future__ import annotations

import pytest

from payments import accounts, receipts
from payments.accounts import POOL_ASSET, pool_account
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.ledger.transfers import Balance
from payments.receipts import ReceiptView
from payments.recovery import recover
from payments.store import Store
from payments.tenders.account import AccountTender
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.exact import ExactHold, settlement_id
from payments.tenders.prepaid import PrepaidTender
from payments.x402.wire import Payment
from tests.payments.exact_samples import (
    ASSET,
    DETAILS,
    PAYER,
    QUOTED,
    Desk,
    assert_books_balance,
    credit_of,
    open_desk,
    payment_of,
    quote_of,
)

SPENT, COST = 3_000_000, 9_000_000
HUNG_UP = Outcome({"reason": "hung up"})
ANSWERED = Outcome({"model": "m"})


@pytest.fixture
def desk(store: Store) -> Desk:
    return open_desk(store)


async def receipt(store: Store, receipt_id: str) -> ReceiptView:
    found = await store.read(lambda tx: receipts.get(tx, receipt_id))
    assert found is not None
    return found


async def hold_of(desk: Desk, payment: Payment) -> ExactHold:
    return await desk.tender(payment).authorize(quote_of(), DETAILS)


async def revenue(store: Store, asset: str = ASSET) -> int:
    return (await store.read(lambda tx: transfers.balance(tx, account_id("revenue", asset)))).balance


async def variance(store: Store) -> int:
    return (await store.read(lambda tx: transfers.balance(tx, account_id("variance", ASSET)))).balance


async def test_a_key_and_a_balance_pay_for_the_input(store: Store) -> None:
    await store.write(lambda tx: accounts.fund_pool(tx, "team", QUOTED, "first"))
    account = payer_account(PAYER, ASSET)
    custody = account_id("custody", ASSET)
    await store.write(
        lambda tx: transfers.post(tx, id="log:1", debit=custody, credit=account, amount=QUOTED, reference="log")
    )
    for tender in (AccountTender(store, "key_1", "team"), PrepaidTender(store, PAYER, (ASSET,))):
        hold = await tender.authorize(quote_of(), {})
        await hold.interrupt(HUNG_UP, SPENT)
        await hold.interrupt(HUNG_UP, SPENT)
        view = await receipt(store, hold.receipt_id)
        assert (view.state, view.charged_nano_usd, view.reason) == ("captured", SPENT, "hung up")
    left = Balance(QUOTED - SPENT, 0)
    assert await store.read(lambda tx: transfers.balance(tx, pool_account("team"))) == left
    assert await credit_of(store) == left
    assert (await revenue(store), await revenue(store, POOL_ASSET)) == (SPENT, SPENT)
    await assert_books_balance(store)


async def test_the_same_payment_still_gets_its_answer_for_what_it_has_left(desk: Desk) -> None:
    payment = payment_of()
    first = await hold_of(desk, payment)
    await first.ready()
    await first.interrupt(HUNG_UP, SPENT)
    view = await receipt(desk.store, first.receipt_id)
    assert (view.state, view.as_json()["charged_usd"], view.as_json()["credited_usd"]) == (
        "interrupted",
        "0.003",
        "0.017",
    )
    assert await credit_of(desk.store) == Balance(QUOTED - SPENT, 0)
    second = await hold_of(desk, payment)
    assert second.maximum_nano_usd == QUOTED - SPENT
    charge = await second.capture(COST, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (SPENT + COST, QUOTED - SPENT - COST)
    assert await revenue(desk.store) == SPENT + COST
    await assert_books_balance(desk.store)


async def test_who_pays_is_never_charged_more_than_was_quoted(desk: Desk) -> None:
    payment = payment_of()
    first = await hold_of(desk, payment)
    await first.ready()
    await first.interrupt(HUNG_UP, SPENT)
    second = await hold_of(desk, payment)
    charge = await second.capture(QUOTED, ANSWERED)
    assert (charge.charged_nano_usd, charge.credited_nano_usd) == (QUOTED, 0)
    assert await credit_of(desk.store) == Balance(0, 0)
    await assert_books_balance(desk.store)


async def test_what_was_spent_before_the_money_arrived_is_charged_when_it_does(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    payment = payment_of()
    first = await hold_of(desk, payment)
    await first.interrupt(HUNG_UP, SPENT)
    assert await revenue(desk.store) == 0
    await desk.settlements.mine(settlement_id(first.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED - SPENT, 0)
    assert await revenue(desk.store) == SPENT
    second = await hold_of(desk, payment)
    assert (await second.release(HUNG_UP)).charged_nano_usd == SPENT
    assert (await receipt(desk.store, second.receipt_id)).credited_nano_usd == QUOTED - SPENT
    await assert_books_balance(desk.store)


async def test_sent_again_before_the_money_arrived_it_holds_what_is_left(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    payment = payment_of()
    await (await hold_of(desk, payment)).interrupt(HUNG_UP, SPENT)
    second = await hold_of(desk, payment)
    assert not second.may_start_early
    await desk.settlements.mine(settlement_id(second.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED - SPENT, QUOTED - SPENT)
    assert (await second.capture(COST, ANSWERED)).charged_nano_usd == SPENT + COST
    await assert_books_balance(desk.store)


async def test_a_payment_that_fails_is_charged_nothing(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    hold = await hold_of(desk, payment_of())
    await hold.interrupt(HUNG_UP, SPENT)
    await desk.settlements.fail(settlement_id(hold.receipt_id))
    assert (await receipt(desk.store, hold.receipt_id)).charged_nano_usd == 0
    # Money that arrives after all is its payer's, all of it.
    await desk.settlements.mine(settlement_id(hold.receipt_id))
    assert await credit_of(desk.store) == Balance(QUOTED, 0)
    await assert_books_balance(desk.store)


async def test_hanging_up_ends_when_the_payment_is_spent(desk: Desk) -> None:
    payment, uses = payment_of(), 0
    with pytest.raises(AlreadyUsed) as used:  # noqa: PT012 - which of them is refused is what is asked
        while True:
            hold = await hold_of(desk, payment)
            await hold.ready()
            await hold.interrupt(HUNG_UP, 8_000_000)
            uses += 1
    assert uses == 3
    assert used.value.state == "released"
    assert await revenue(desk.store) == QUOTED
    await assert_books_balance(desk.store)


async def test_a_reorganisation_takes_back_what_was_charged_for_it_too(desk: Desk) -> None:
    payment = payment_of()
    hold = await hold_of(desk, payment)
    await hold.ready()
    await hold.interrupt(HUNG_UP, SPENT)
    name = settlement_id(hold.receipt_id)
    await desk.settlements.reorganise(name)
    await desk.settlements.fail(name)
    assert await credit_of(desk.store) == Balance(0, 0)
    assert await variance(desk.store) == -SPENT
    await assert_books_balance(desk.store)
    await desk.settlements.mine(name)
    assert await variance(desk.store) == 0
    await assert_books_balance(desk.store)


@pytest.mark.parametrize("ends", ["released", "hung up", "crashed"])
async def test_a_use_that_ends_when_its_money_is_gone_leaves_its_payer_nothing_that_nobody_paid(
    desk: Desk, ends: str
) -> None:
    hold = await hold_of(desk, payment_of())
    await hold.ready()
    name = await taken_away(desk, hold)
    assert await credit_of(desk.store) == Balance(QUOTED, QUOTED)
    if ends == "crashed":
        await recover(desk.store)
    else:
        await (hold.release(HUNG_UP) if ends == "released" else hold.interrupt(HUNG_UP))
    assert (await credit_of(desk.store), await variance(desk.store)) == (Balance(0, 0), 0)
    await assert_books_balance(desk.store)
    await desk.settlements.mine(name)
    assert (await credit_of(desk.store), await variance(desk.store)) == (Balance(QUOTED, 0), 0)
    await assert_books_balance(desk.store)


async def taken_away(desk: Desk, hold: ExactHold) -> str:
    """A reorganisation takes a payment out of the chain for good; what may execute it all the same is returned."""
    name = settlement_id(hold.receipt_id)
    await desk.settlements.reorganise(name)
    await desk.settlements.fail(name)
    return name


async def assert_charged(desk: Desk, charged: int) -> None:
    assert await revenue(desk.store) == charged
    assert await credit_of(desk.store) == Balance(QUOTED - charged, 0)
    await assert_books_balance(desk.store)


async def test_what_was_taken_from_a_hold_is_not_charged_again_when_a_payment_that_was_gone_arrives(desk: Desk) -> None:
    hold = await hold_of(desk, payment_of())
    await hold.ready()
    name = await taken_away(desk, hold)
    await hold.interrupt(HUNG_UP, SPENT)
    assert (await revenue(desk.store), await variance(desk.store)) == (SPENT, -SPENT)
    assert await credit_of(desk.store) == Balance(0, 0), "nobody has paid it"
    for _ in range(2):
        await desk.settlements.mine(name)
        await assert_charged(desk, SPENT)
        await taken_away(desk, hold)


async def test_an_earlier_use_is_not_charged_again_when_the_money_of_a_running_one_was_gone(desk: Desk) -> None:
    payment = payment_of()
    first = await hold_of(desk, payment)
    await first.ready()
    await first.interrupt(HUNG_UP, SPENT)
    second = await hold_of(desk, payment)
    name = await taken_away(desk, second)
    assert (await second.capture(COST, ANSWERED)).charged_nano_usd == SPENT + COST
    assert (await credit_of(desk.store), await variance(desk.store)) == (Balance(0, 0), -SPENT - COST)
    await desk.settlements.mine(name)
    await assert_charged(desk, SPENT + COST)


async def test_money_that_arrives_again_with_more_than_at_first_pays_the_rest_of_what_was_spent(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    payment, less = payment_of(), SPENT // 3
    hold = await hold_of(desk, payment)
    await hold.interrupt(HUNG_UP, SPENT)
    name = settlement_id(hold.receipt_id)
    await desk.settlements.mine(name, less // 1_000)
    assert await revenue(desk.store) == less
    for arrives in (less, QUOTED):
        await taken_away(desk, hold)
        await desk.settlements.mine(name, arrives // 1_000)
    await assert_charged(desk, SPENT)


async def test_what_was_charged_on_arrival_and_from_a_hold_is_not_charged_at_the_next_arrival(desk: Desk) -> None:
    desk.settlements.mine_at_once = False
    payment = payment_of()
    first = await hold_of(desk, payment)
    await first.interrupt(HUNG_UP, SPENT)
    await desk.settlements.mine(settlement_id(first.receipt_id))
    second = await hold_of(desk, payment)
    name = await taken_away(desk, second)
    await second.interrupt(HUNG_UP, COST)
    await desk.settlements.mine(name)
    await assert_charged(desk, SPENT + COST)


@pytest.mark.parametrize("arrives", [QUOTED, QUOTED // 2])
async def test_a_use_that_runs_on_when_its_money_goes_and_comes_back_is_charged_once(desk: Desk, arrives: int) -> None:
    hold = await hold_of(desk, payment_of())
    await hold.ready()
    await desk.settlements.mine(await taken_away(desk, hold), arrives // 1_000)
    assert (await hold.capture(COST, ANSWERED)).charged_nano_usd == COST
    assert await revenue(desk.store) == COST
    await assert_books_balance(desk.store)
    assert (await credit_of(desk.store), await variance(desk.store)) == (Balance(arrives - COST, 0), 0)


async def test_a_use_released_before_its_money_arrives_leaves_what_an_earlier_one_spent_to_be_charged(
    desk: Desk,
) -> None:
    desk.settlements.mine_at_once = False
    payment = payment_of()
    await (await hold_of(desk, payment)).interrupt(HUNG_UP, SPENT)
    second = await hold_of(desk, payment)
    assert (await second.release(HUNG_UP)).charged_nano_usd == SPENT
    await desk.settlements.mine(settlement_id(second.receipt_id))
    await assert_charged(desk, SPENT)
    assert (await receipt(desk.store, second.receipt_id)).credited_nano_usd == QUOTED - SPENT
