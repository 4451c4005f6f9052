"""Channels outlive the configuration that they were opened with: keys, treasury and tokens of now may be others."""

from __future__ import annotations

import dataclasses

import pytest

from contracts.devnet import Devnet, balance_of, rpc
from payments.chain.signers import Signer
from payments.channels import keeper
from payments.channels.refunds import Refunder
from payments.errors import PaymentRefused
from payments.tenders.base import Outcome
from tests.payments import test_channels_on_chain
from tests.payments.channel_desk import INITIATE, PAYER, PRICE, Gateway
from tests.payments.exact_samples import QUOTED, assert_books_balance
from tests.payments.settling import PAY_TO

opened = test_channels_on_chain.opened
NEW_TREASURY = "0x" + "7f" * 20


@pytest.fixture
def other(opened: Gateway, chain: Devnet) -> Gateway:
    """The same gateway, and the channel of another payer."""
    return dataclasses.replace(opened, wallet=chain.wallets[PAYER + 1])


async def test_a_channel_is_claimed_and_refunded_with_the_key_that_it_names(
    opened: Gateway, other: Gateway, chain: Devnet
) -> None:
    services, refunder = opened.services, Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    old, new = services.authorizer, Signer.from_hex(chain.wallets[8].private_key)
    first = await opened.channel()
    refund = opened.payment(first.announced, type="refund")
    # As a start does when another key was put before the first.
    services.authorizers = {new.address: new, old.address: old}
    await other.pay(PRICE, PRICE, deposit=5 * PRICE)
    second = await other.channel()
    assert (first.config.receiver_authorizer, second.config.receiver_authorizer) == (old.address, new.address)
    assert await opened.keeper.claim([first, second], opened.token) == 2
    await opened.settle_open()
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 2 * PRICE
    assert (await refunder.refund(refund, opened.token)).amount == 4 * PRICE


async def test_a_channel_whose_key_is_gone_holds_up_no_other_and_is_told(
    opened: Gateway, other: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = opened.services
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    old, new = services.authorizer, Signer.from_hex(chain.wallets[8].private_key)
    services.authorizers = {new.address: new}
    await other.pay(PRICE, PRICE, deposit=5 * PRICE)
    monkeypatch.setattr(keeper, "DUE_MAX", 1)
    monkeypatch.setattr(opened.keeper, "_claim_age_ms", 0)
    await opened.keeper.watch()
    assert [(alarm.code, alarm.subject) for alarm in opened.keeper.alarms()] == [("unclaimable", old.address)]
    assert "1 channels owe $0.02 " in opened.keeper.alarms()[0].message
    monkeypatch.setattr(keeper, "ALARM_NANO_USD", QUOTED + 1)
    await opened.keeper.watch()
    assert opened.keeper.alarms() == []
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await other.receivable() == 0
    services.authorizers = {new.address: new, old.address: old}
    await opened.keeper.watch()
    assert opened.keeper.alarms() == []


async def test_a_claim_goes_to_the_treasury_that_its_channel_names(opened: Gateway, chain: Devnet) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    payment = opened.payment(2 * PRICE)
    refund = opened.payment((await opened.channel()).announced, type="refund")
    opened.services.receiver = NEW_TREASURY
    with pytest.raises(PaymentRefused) as refused:
        await opened.take(dataclasses.replace(payment, accepted=opened.scheme.requirement(opened.token, QUOTED, 300)))
    assert refused.value.code == "invalid_batch_settlement_evm_receiver_mismatch"
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    await opened.settle_open()
    there = [balance_of(chain.rpc_url, chain.usdc, each) for each in (PAY_TO, NEW_TREASURY)]
    assert there == [PRICE, 0]
    await opened.keeper.sync_marked()
    channel = await opened.channel()
    assert (channel.claimed_nano_usd, channel.on_chain.total_claimed) == (QUOTED, PRICE)
    refunder = Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    assert (await refunder.refund(refund, opened.token)).amount == 4 * PRICE
    await assert_books_balance(opened.services.store)


async def test_a_channel_in_a_token_that_was_taken_out_holds_up_no_other_and_is_told(
    opened: Gateway, other: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "0x" + "dd" * 20
    await opened.keeper.watch()
    for each in (opened, other):
        await each.pay(PRICE, PRICE, deposit=2 * PRICE)
    await opened.services.store.write(
        lambda tx: tx.execute("UPDATE channel SET token = ? WHERE payer = ?", (gone, opened.config.payer))
    )
    for each in (opened, other):
        each.payer_calls(chain.rpc_url, INITIATE, 2 * PRICE)
    monkeypatch.setattr(keeper, "DUE_MAX", 1)
    await opened.keeper.watch()
    assert (await other.channel()).state == "withdrawing"
    assert [(alarm.code, alarm.subject) for alarm in opened.keeper.alarms()] == [("unclaimable", gone)]
    await opened.keeper.sync_marked()
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await other.receivable() == 0


async def test_a_claim_under_way_in_a_token_that_was_taken_out_is_booked_when_it_is_back(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await opened.pay(PRICE, PRICE, deposit=5 * PRICE)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    network = opened.services.network
    with monkeypatch.context() as without:
        without.setattr(type(network), "token_at", lambda self, address: None)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        rpc(chain.rpc_url, "evm_mine")
        await opened.settle_open()
    await opened.keeper.sync_marked()
    assert (await opened.channel()).claimed_nano_usd == QUOTED
    await assert_books_balance(opened.services.store)


async def test_channels_with_less_than_a_unit_hold_up_no_others(
    opened: Gateway, other: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = await opened.take(opened.payment(PRICE, deposit=PRICE))
    await hold.capture(500, Outcome())
    await other.pay(PRICE, PRICE, deposit=PRICE)
    monkeypatch.setattr(keeper, "DUE_MAX", 1)
    monkeypatch.setattr(opened.keeper, "_claim_age_ms", 0)
    await opened.keeper.sync_marked()
    # As it was written before less than a unit was told apart.
    await opened.services.store.write(
        lambda tx: tx.execute("UPDATE channel SET unclaimed_since_ms = 1 WHERE charged_nano_usd = 500")
    )
    assert await opened.keeper.claim_due() == 1
    await opened.settle_open()
    assert await other.receivable() == 0
