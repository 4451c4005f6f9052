"""What a reorganisation took out of the chain is not in a channel: nothing is lent on it, nothing is done in its place."""

from __future__ import annotations

import asyncio

import pytest

from contracts.devnet import Devnet, balance_of, rpc
from payments.chain.networks import Network
from payments.channels import kinds
from payments.channels.keeper import REORGANISED_BLOCKS
from payments.channels.refunds import Refunder
from payments.errors import PaymentRefused, SettlementPending
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.store import Store
from payments.tenders import channel as tender
from payments.tenders.base import Outcome
from tests.payments import test_channels_on_chain
from tests.payments.channel_desk import INITIATE, PRICE, Gateway
from tests.payments.exact_samples import QUOTED, assert_books_balance
from tests.payments.settling import PAY_TO, until

opened = test_channels_on_chain.opened
DEPOSIT = 5 * PRICE


class Branch:
    """The chain as it is now, from which it may go on in another way."""

    def __init__(self, url: str) -> None:
        rpc(url, "evm_setAutomine", False)
        self._url, self._before = url, rpc(url, "evm_snapshot")

    async def mine(self) -> None:
        """Put what is under way into a block, as soon as it is there."""
        await until(lambda: rpc(self._url, "txpool_status")["pending"] != "0x0")
        rpc(self._url, "evm_mine")

    def leave(self) -> None:
        """Nothing of what happened is in the chain any more."""
        assert rpc(self._url, "evm_revert", self._before)
        rpc(self._url, "anvil_dropAllTransactions")
        rpc(self._url, "evm_mine")
        rpc(self._url, "evm_mine")


async def test_nothing_is_lent_on_a_deposit_that_is_not_there_any_more(
    opened: Gateway, chain: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    branch = Branch(chain.rpc_url)
    hold = await opened.take(opened.payment(PRICE, deposit=DEPOSIT), ready=False)
    await branch.mine()
    await hold.ready()
    await hold.capture(QUOTED, Outcome())
    branch.leave()
    await until(lambda: opened.settlements.reorganised == 1)
    monkeypatch.setattr(tender, "QUEUE_WAIT_S", 0.1)
    with pytest.raises(PaymentRefused) as refused:
        await opened.take(opened.payment(2 * PRICE), b"another request", ready=False)
    assert refused.value.code == "invalid_batch_settlement_evm_channel_busy"
    channel = await opened.channel()
    assert (channel.on_chain.balance, channel.lost_nano_usd) == (0, QUOTED), "what was served is owed"
    await branch.mine()
    monkeypatch.setattr(tender, "QUEUE_WAIT_S", 10)
    await opened.take(opened.payment(2 * PRICE), b"another request")
    channel = await opened.channel()
    assert (channel.on_chain.balance, channel.lost_nano_usd) == (DEPOSIT, 0)
    await assert_books_balance(opened.services.store)


async def test_a_claim_that_is_not_there_any_more_is_outstanding_and_made_once(opened: Gateway, chain: Devnet) -> None:
    await opened.pay(PRICE, PRICE, deposit=DEPOSIT)
    branch = Branch(chain.rpc_url)
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 1
    await branch.mine()
    await opened.settle_open()
    assert await opened.receivable() == 0
    branch.leave()
    await until(lambda: opened.settlements.reorganised == 1)
    await opened.keeper.sync_marked()
    assert -(await opened.receivable()) == QUOTED
    assert await opened.keeper.claim([await opened.channel()], opened.token) == 0, "it is under way again"
    await branch.mine()
    await opened.settle_open()
    assert (await opened.receivable(), balance_of(chain.rpc_url, chain.usdc, PAY_TO)) == (0, PRICE)
    await assert_books_balance(opened.services.store)


async def test_what_a_refund_gives_back_is_lent_to_nobody_although_it_is_not_there_any_more(
    opened: Gateway, chain: Devnet
) -> None:
    await opened.pay(PRICE, PRICE, deposit=DEPOSIT)
    refunder = Refunder(opened.services, opened.settlements, opened.scheme.check_channel)
    asked = opened.payment((await opened.channel()).announced, type="refund", refund=3 * PRICE)
    branch = Branch(chain.rpc_url)
    refunding = asyncio.create_task(refunder.refund(asked, opened.token))
    await branch.mine()
    await refunding
    branch.leave()
    await until(lambda: opened.settlements.reorganised == 1)
    with pytest.raises(PaymentRefused):
        await opened.take(opened.payment(3 * PRICE))
    channel = await opened.channel()
    assert (channel.on_chain.balance, channel.spendable) == (DEPOSIT, 2 * PRICE)
    opened.services.payers.settlement_wait_s = 0
    with pytest.raises(SettlementPending) as pending:
        await refunder.refund(asked, opened.token)
    assert pending.value.receipt_id == channel.refund_id, "it is under way again"
    await branch.mine()
    assert (await opened.settlements.outcome(channel.refund_id or "", 10)).paid
    await opened.keeper.sync_marked()
    channel = await opened.channel()
    assert (channel.on_chain.balance, channel.spendable, channel.refund_id) == (2 * PRICE, 2 * PRICE, None)


async def test_what_a_payer_did_itself_may_be_gone_too(opened: Gateway, chain: Devnet) -> None:
    await opened.pay(PRICE, PRICE, deposit=DEPOSIT)
    rpc(chain.rpc_url, "anvil_mine", hex(REORGANISED_BLOCKS))
    for _ in range(2):
        await opened.keeper.watch()
    branch = Branch(chain.rpc_url)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    opened.payer_calls(chain.rpc_url, INITIATE, 4 * PRICE)
    await opened.keeper.watch()
    assert (await opened.channel()).state == "withdrawing"
    branch.leave()
    assert await opened.keeper.watch() == 0, "there is no event that tells it"
    await opened.keeper.sync_marked()
    assert (await opened.channel()).state == "open"


async def test_what_a_token_kept_of_a_claim_that_is_not_there_any_more_is_no_loss(
    store: Store, network: Network
) -> None:
    kind, token = kinds.kinds(store, network)["channel_claim"], network.tokens[0]
    row = {"id": "claim_1", "token": token.address, "block_number": 5}
    variance = account_id("variance", token.asset)

    async def lost() -> int:
        return -(await store.read(lambda tx: transfers.balance(tx, variance))).balance

    assert kind.on_reopened is not None
    for withheld in (7, 9, 0, 5):
        paid = row | {"withheld_value": str(withheld)}
        for _ in range(2):
            await store.write(lambda tx, paid=paid: kind.on_paid(tx, paid))  # type: ignore[misc]
        assert await lost() == withheld * 1000
        await store.write(lambda tx: kind.on_reopened(tx, row))  # type: ignore[misc]
        assert await lost() == 0
