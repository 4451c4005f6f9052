"""Channels with everything real: the signatures, the contract, the engine, the books."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import OWNER_ADDRESS, Devnet, as_owner, balance_of, call_data, rpc
from payments import receipts
from payments.chain.networks import Network
from payments.chain.replies import RpcError
from payments.channels import book, keeper
from payments.channels.refunds import Refunder
from payments.channels.requests import OutOfStep
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.ledger.books import check
from payments.settlement.care import SLACK_BLOCKS
from payments.settlement.dispatcher import Dispatcher
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Outcome
from payments.tenders.channel import ChannelHold, deposit_id
from tests.payments.channel_desk import DELAY_S, FINALIZE, INITIATE, PAYER, PRICE, Gateway, gateway
from tests.payments.exact_samples import DETAILS, QUOTED, assert_books_balance, quote_of
from tests.payments.settling import PAY_TO, later_than_the_last_block, rows, until


@pytest.fixture
async def opened(database: Path | str, chain: Devnet, network: Network) -> AsyncIterator[Gateway]:
    async with gateway(database, chain, network) as opened:
        yield opened


async def test_several_requests_are_in_flight_on_one_channel(opened: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    await opened.pay(PRICE, PRICE, deposit=20 * PRICE)
    payments = [opened.payment(PRICE * (index + 2)) for index in range(8)]
    # A voucher needs no look at the chain.
    monkeypatch.setattr(opened.services, "_rpc", None)
    holds = await asyncio.gather(*(opened.take(payment) for payment in reversed(payments)))
    with pytest.raises(OutOfStep):
        await opened.take(opened.payment(9 * PRICE + 1))
    await asyncio.gather(*(hold.capture(QUOTED // 2, Outcome()) for hold in holds))
    assert (await opened.channel()).charged_nano_usd == QUOTED + 8 * (QUOTED // 2)


async def test_a_channel_without_money_serves_nobody(opened: Gateway) -> None:
    with pytest.raises(PaymentRefused) as refused:
        await opened.take(opened.payment(PRICE))
    assert refused.value.code == "invalid_batch_settlement_evm_cumulative_exceeds_balance"
    await opened.pay(PRICE, PRICE, deposit=PRICE)
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(2 * PRICE))


async def test_strangers_leave_nothing_behind(opened: Gateway) -> None:
    for salt, deposit in ((1, 0), (2, 5 * PRICE)):
        stranger = dataclasses.replace(opened, salt=salt)
        # A deposit that would succeed, and a voucher over less than the price: it is never sent.
        with pytest.raises(PaymentRefused):
            await stranger.take(stranger.payment(PRICE - 1, deposit=deposit))
    rows = await opened.services.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM channel").fetchone())
    assert rows == (0,)


async def test_a_deposit_may_be_valid_from_later_than_the_last_block_on(opened: Gateway, chain: Devnet) -> None:
    now = await later_than_the_last_block(chain.rpc_url)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE, valid_after=now - 1))
    await hold.capture(QUOTED, Outcome())
    assert (await opened.channel()).charged_nano_usd == QUOTED


SPENT = QUOTED // 4


async def _decide(opened: Gateway, chain: Devnet, *, arrives: bool) -> None:
    """Mine the deposit that is under way, or what makes it fail."""
    if not arrives:
        blacklist = call_data("blacklist(address)", opened.wallet.address)
        first = {"from": OWNER_ADDRESS, "to": chain.usdc.address, "data": blacklist, "gas": hex(100_000)}
        fees = {"maxFeePerGas": hex(900 * 10**9), "maxPriorityFeePerGas": hex(800 * 10**9)}
        rpc(chain.rpc_url, "eth_sendTransaction", first | fees)
    rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)


async def _hung_up(opened: Gateway, hold: ChannelHold) -> tuple[str, int | None, int]:
    view = await opened.services.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
    assert view is not None
    await assert_books_balance(opened.services.store)
    return view.state, view.charged_nano_usd, (await opened.channel()).charged_nano_usd


@pytest.mark.parametrize("arrives", [True, False], ids=["it arrives", "it fails"])
async def test_whoever_hangs_up_before_its_deposit_is_there_pays_what_was_spent_when_it_is(
    opened: Gateway, chain: Devnet, arrives: bool
) -> None:
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE), ready=False)
    assert hold.may_start_early
    going = asyncio.create_task(hold.interrupt(Outcome({"reason": "gone"}), SPENT))
    await asyncio.sleep(0.3)
    assert (going.done(), (await opened.channel()).charged_nano_usd) == (False, 0)
    await _decide(opened, chain, arrives=arrives)
    await going
    assert await _hung_up(opened, hold) == (("captured", SPENT, SPENT) if arrives else ("released", 0, 0))


@pytest.mark.parametrize("stopped", [False, True], ids=["waited long enough", "stopped"])
@pytest.mark.parametrize("arrives", [True, False], ids=["it arrives", "it fails"])
async def test_what_was_spent_is_owed_while_nobody_knows_of_the_deposit(
    opened: Gateway, chain: Devnet, arrives: bool, stopped: bool
) -> None:
    opened.services.payers.settlement_wait_s = 20 if stopped else 0
    rpc(chain.rpc_url, "evm_setAutomine", False)
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    hold = await opened.take(payment, ready=False)
    going = asyncio.create_task(hold.interrupt(Outcome({"reason": "gone"}), SPENT))
    if stopped:
        await asyncio.sleep(0.2)
        going.cancel()
    await asyncio.wait({going})
    assert await _hung_up(opened, hold) == ("captured", SPENT, SPENT)
    await _decide(opened, chain, arrives=arrives)
    decided = await opened.settlements.outcome(deposit_id(payment, opened.token.chain_id) or "", 20)
    assert decided.paid is arrives
    await opened.keeper.sync_marked()
    channel = await opened.channel()
    assert (channel.lost_nano_usd, channel.claimable_nano_usd) == ((0, SPENT) if arrives else (SPENT, 0))
    await assert_books_balance(opened.services.store)
    if not arrives:
        # The next deposit pays what is owed.
        as_owner(chain.rpc_url, chain.usdc, "unBlacklist(address)", opened.wallet.address)
        opened.services.payers.settlement_wait_s = 20
        with pytest.raises(OutOfStep):
            await opened.take(opened.payment(PRICE, deposit=5 * PRICE))
        await opened.take(opened.payment(PRICE + SPENT // 1000, deposit=5 * PRICE))
        channel = await opened.channel()
        assert (channel.lost_nano_usd, channel.claimable_nano_usd) == (0, SPENT)
    assert await opened.keeper.claim([channel], opened.token) == 1
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == SPENT // 1000
    await assert_books_balance(opened.services.store)


@pytest.mark.parametrize("hangs_up", [False, True], ids=["stays", "hangs up"])
async def test_whoever_withdraws_while_it_is_served_pays(opened: Gateway, chain: Devnet, hangs_up: bool) -> None:
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await opened.take(opened.payment(PRICE, deposit=5 * PRICE), ready=False)
    await until(lambda: rpc(chain.rpc_url, "txpool_status")["pending"] != "0x0")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    opened.payer_calls(chain.rpc_url, INITIATE, 5 * PRICE)
    if hangs_up:
        await hold.interrupt(Outcome({"reason": "gone"}), SPENT)
    else:
        await hold.ready()
        await hold.capture(SPENT, Outcome())
    assert await _hung_up(opened, hold) == ("captured", SPENT, SPENT)
    await opened.keeper.sync_marked()
    assert await opened.keeper.claim_due() == 1, "before the payer can take it out"
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == SPENT // 1000


async def test_what_made_a_deposit_is_looked_for_from_when_it_was_asked_for(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dispatcher, "take", lambda self, entry: None)
    opened.settlements.courier.head = 1_000
    await opened.take(opened.payment(PRICE, deposit=5 * PRICE), ready=False)
    assert await rows(opened.services.store, "state, from_block") == [("queued", 1_000 - SLACK_BLOCKS)]


async def test_what_can_never_be_claimed_holds_up_no_other_channel(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.services.payers.settlement_wait_s = 0
    rpc(chain.rpc_url, "evm_setAutomine", False)
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    await (await opened.take(payment, ready=False)).interrupt(Outcome(), SPENT)
    await _decide(opened, chain, arrives=False)
    opened.services.payers.settlement_wait_s = 20
    assert not (await opened.settlements.outcome(deposit_id(payment, opened.token.chain_id) or "", 20)).paid
    await opened.keeper.sync_marked()
    other = dataclasses.replace(opened, wallet=chain.wallets[PAYER + 1])
    await other.pay(PRICE, PRICE, deposit=5 * PRICE)
    monkeypatch.setattr(keeper, "DUE_MAX", 1)
    monkeypatch.setattr(opened.keeper, "_claim_age_ms", 0)
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await other.receivable() == 0


async def test_a_node_that_refuses_logs_keeps_no_channel_from_being_claimed(
    opened: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)

    async def refused() -> int:
        raise RpcError(-32000, "no logs here")

    monkeypatch.setattr(opened.keeper, "watch", refused)
    monkeypatch.setattr(opened.keeper, "_claim_age_ms", 0)
    await opened.keeper.start()
    async with asyncio.timeout(20):
        while await opened.receivable():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.02)
    await opened.keeper.stop()


async def test_a_deposit_is_made_once_and_its_replay_finds_the_first_outcome(opened: Gateway, chain: Devnet) -> None:
    payment = opened.payment(PRICE, deposit=5 * PRICE)
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    hold = await opened.take(payment)
    with pytest.raises(AlreadyUsed):
        await opened.take(payment)
    await hold.interrupt(Outcome())
    # Given back, the same payment is good for its request, and its deposit is there.
    hold = await opened.take(payment)
    await hold.capture(QUOTED, Outcome())
    with pytest.raises(AlreadyUsed):
        await opened.take(payment)
    assert before - balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) == 5 * PRICE
    assert (await opened.channel()).on_chain.balance == 5 * PRICE


async def test_requests_at_once_may_come_with_the_same_deposit(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    first = opened.payment(PRICE, deposit=10 * PRICE)
    second = dataclasses.replace(opened.payment(2 * PRICE, deposit=1), deposit=first.deposit)
    check_deposit = opened.services.check_deposit
    overtaking = [first]

    async def overtaken(*arguments: Any) -> Any:
        while overtaking:
            await opened.take(overtaking.pop(), b"another request")
        return await check_deposit(*arguments)

    monkeypatch.setattr(opened.services, "check_deposit", overtaken)
    hold = await opened.take(second)
    await hold.capture(PRICE * 1000, Outcome())
    assert before - balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) == 10 * PRICE
    assert (await opened.channel()).charged_nano_usd == PRICE * 1000


async def test_a_top_up_is_added(opened: Gateway) -> None:
    await opened.pay(PRICE, PRICE, deposit=PRICE)
    await opened.pay(2 * PRICE, PRICE, deposit=3 * PRICE)
    assert (await opened.channel()).on_chain.balance == 4 * PRICE


async def test_what_is_claimed_is_in_the_treasury_and_no_longer_outstanding(opened: Gateway, chain: Devnet) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    await opened.pay(2 * PRICE, PRICE // 2)
    before = balance_of(chain.rpc_url, chain.usdc, PAY_TO)
    assert await opened.keeper.claim_due() == 0, "neither enough nor old enough"
    rpc(chain.rpc_url, "evm_setAutomine", False)
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 0, "one claim at a time"
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) - before == PRICE + PRICE // 2
    assert await opened.receivable() == 0
    custody = account_id("custody", opened.token.asset)
    store = opened.services.store
    assert (await store.read(lambda tx: transfers.balance(tx, custody))).balance == -(PRICE + PRICE // 2) * 1000
    assert await store.read(check) == []


async def test_a_payers_withdrawal_is_noticed_and_answered_with_a_claim(opened: Gateway, chain: Devnet) -> None:
    await opened.keeper.watch()
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    opened.payer_calls(chain.rpc_url, INITIATE, 5 * PRICE)
    await opened.keeper.watch()
    assert (await opened.channel()).state == "withdrawing"
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(2 * PRICE))
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await opened.receivable() == 0
    rpc(chain.rpc_url, "evm_increaseTime", DELAY_S + 1)
    opened.payer_calls(chain.rpc_url, FINALIZE)
    await opened.keeper.watch()
    channel = await opened.channel()
    assert channel.state == "drained"
    assert channel.lost_nano_usd == 0
    assert channel.on_chain.balance == PRICE


async def test_a_channel_that_was_emptied_takes_no_other_channels_claim_with_it(opened: Gateway, chain: Devnet) -> None:
    other = dataclasses.replace(opened, wallet=chain.wallets[PAYER + 1])
    for each in (opened, other):
        await each.pay(PRICE, PRICE, deposit=2 * PRICE)
    opened.payer_calls(chain.rpc_url, INITIATE, 2 * PRICE)
    rpc(chain.rpc_url, "evm_increaseTime", DELAY_S + 1)
    opened.payer_calls(chain.rpc_url, FINALIZE)
    # Nobody watched: the book still believes that there is money.
    assert await opened.keeper.claim([await opened.channel(), await other.channel()], opened.token) == 1
    await opened.settle_open()
    assert await other.receivable() == 0
    await opened.keeper.sync_marked()
    channel = await opened.channel()
    assert channel.lost_nano_usd == QUOTED
    assert await opened.receivable() == 0, "the loss is declared"
    assert await opened.services.store.read(check) == []


async def test_a_refund_gives_back_what_was_not_charged_and_can_be_spent_by_nobody_else(
    opened: Gateway, chain: Devnet
) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    refunder = Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    hold = await opened.take(opened.payment(2 * PRICE))
    before = balance_of(chain.rpc_url, chain.usdc, opened.wallet.address)
    with pytest.raises(OutOfStep):
        await refunder.refund(opened.payment(PRICE // 2, type="refund"), opened.token)
    announced = (await opened.channel()).announced
    refunded = await refunder.refund(opened.payment(announced, type="refund"), opened.token)
    assert refunded.amount == 3 * PRICE, "what is under way stays"
    assert balance_of(chain.rpc_url, chain.usdc, opened.wallet.address) - before == 3 * PRICE
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(3 * PRICE))
    await hold.capture(QUOTED, Outcome())
    with pytest.raises(PaymentRefused) as refused:
        await refunder.refund(opened.payment((await opened.channel()).announced, type="refund"), opened.token)
    assert refused.value.code == "invalid_batch_settlement_evm_refund_no_balance"
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    await opened.settle_open()
    assert await opened.receivable() == 0


async def test_transactions_that_nothing_is_charged_for_are_bounded(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "UNPAID_MAX", 3)
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    refunder = Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    ask = opened.payment((await opened.channel()).announced, type="refund", refund=1)

    async def transactions() -> int:
        signer = chain.wallets[0].address
        return int(rpc(chain.rpc_url, "eth_getTransactionCount", signer, "latest"), 16)

    before = await transactions()
    for _ in range(2):
        await refunder.refund(ask, opened.token)
    # In another channel of the same payer, and hung up on.
    again = dataclasses.replace(opened, salt=1)
    await (await again.take(again.payment(PRICE, deposit=PRICE))).interrupt(Outcome({"reason": "gone"}))
    for refused in (
        refunder.refund(ask, opened.token),
        opened.take(opened.payment(2 * PRICE, deposit=PRICE), b"another request"),
    ):
        with pytest.raises(PaymentRefused) as error:
            await refused
        assert error.value.code == "unpaid_transactions"
    assert await transactions() - before == 3
    await (await again.take(again.payment(PRICE))).capture(QUOTED, Outcome())
    await refunder.refund(ask, opened.token)
    with pytest.raises(PaymentRefused):
        await refunder.refund(ask, opened.token)
    monkeypatch.setattr(book, "UNPAID_WINDOW_MS", 0)
    await refunder.refund(ask, opened.token)


async def test_a_restart_finds_the_channel_its_deposit_and_its_claim(
    database: Path | str, chain: Devnet, network: Network
) -> None:
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with gateway(database, chain, network) as opened:
        payment = opened.payment(PRICE, deposit=5 * PRICE)
        tender = opened.scheme.tender(
            payment,
            opened.token,
            opened.scheme.requirement(opened.token, QUOTED, 300),
            hashlib.sha256(b"request").digest(),
            int(time.time()),
        )
        await tender.authorize(quote_of(QUOTED), dict(DETAILS))
    # The process is gone with the deposit on its way; it is mined while nobody looks.
    rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    async with gateway(database, chain, network, owner="two") as opened:
        hold = await opened.take(payment)
        await hold.capture(QUOTED, Outcome())
        identity = deposit_id(payment, opened.token.chain_id)
        assert identity is not None
        assert (await opened.settlements.outcome(identity, 5)).paid
        assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    async with gateway(database, chain, network, owner="three") as opened:
        await opened.settle_open()
        assert await opened.receivable() == 0
        assert await opened.services.store.read(check) == []
