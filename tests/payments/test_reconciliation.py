"""The books against the chain: everything that moved is found, booked once, and the two agree to the unit."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from contracts.devnet import Devnet, call_data, mint, rpc, send_signed
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.reconciliation import open_books, reconcile
from payments.settlement.engine import Settlements
from payments.settlement.refunds import Refunds
from payments.store import Store
from tests.payments.settling import Books, engine, mine, order_for, pay, until

USD = 1_000_000_000


@pytest.fixture
async def node(chain: Devnet) -> AsyncIterator[Rpc]:
    # Anvil forgets the states of long ago, and the first block's with them when other tests have mined a thousand blocks.
    mine(chain.rpc_url, 3)
    async with Rpc([chain.rpc_url]) as opened:
        yield opened


@pytest.fixture
async def settlements(chain: Devnet, network: Network, store: Store) -> AsyncIterator[Settlements]:
    books = Books(network)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=chain.wallets[3], start=False
    ) as running:
        yield running


async def balance(store: Store, kind: str, network: Network) -> int:
    account = account_id(kind, network.tokens[0].asset)
    return (await store.read(lambda tx: transfers.balance(tx, account))).balance


async def test_payments_refunds_gifts_and_withdrawals_add_up(
    chain: Devnet, network: Network, store: Store, node: Rpc, settlements: Settlements
) -> None:
    usdc, treasury, payer = network.tokens[0], chain.wallets[3], chain.wallets[1]
    pay_to = treasury.address.lower()
    refunds = Refunds(store, settlements, network.tokens, USD)
    await settlements.start()
    opened = await reconcile(store, node, network, pay_to)
    assert opened.ok
    assert await balance(store, "owner", network) == 1_000 * USD

    orders = [order_for(pay(payer, usdc, 400_000 + i, to=pay_to), usdc) for i in range(5)]
    for order in orders:
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, 20)).paid
    send_signed(
        chain.rpc_url,
        chain.wallets[2].private_key,
        chain.usdc.address,
        call_data("transfer(address,uint256)", treasury.address, 7_000_000),
    )
    send_signed(
        chain.rpc_url,
        treasury.private_key,
        chain.usdc.address,
        call_data("transfer(address,uint256)", chain.wallets[5].address, 50_000_000),
    )
    refunds.consider(payer.address.lower(), usdc.asset)
    # The treasury's nonce was used outside of the engine; what it owes goes out all the same.
    assert await refunds.round() == 1
    await until(lambda: refunds.sent == 1)
    mine(chain.rpc_url, 2)

    report = await reconcile(store, node, network, pay_to)
    assert report.findings == []
    by_asset = {token.asset: token for token in report.tokens}
    assert sorted(movement.amount_nano_usd for movement in by_asset[usdc.asset].booked) == [-50 * USD, 7 * USD]
    assert await balance(store, "unattributed", network) == 7 * USD
    assert await balance(store, "owner", network) == 950 * USD
    again = await reconcile(store, node, network, pay_to)
    assert again.ok
    assert again.tokens[0].booked == ()


async def test_what_settled_above_the_block_that_is_read_is_told_apart(
    chain: Devnet, network: Network, store: Store, node: Rpc, settlements: Settlements
) -> None:
    usdc, pay_to = network.tokens[0], chain.wallets[3].address.lower()
    await settlements.start()
    assert (await reconcile(store, node, network, pay_to)).ok
    for i in range(4):
        order = order_for(pay(chain.wallets[1], usdc, 100 + i, to=pay_to), usdc)
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, 20)).paid
        report = await reconcile(store, node, network, pay_to, confirmations=i)
        assert report.findings == []


async def test_a_payment_that_is_being_settled_is_in_flight_and_not_unattributed(
    chain: Devnet, network: Network, store: Store, node: Rpc, settlements: Settlements
) -> None:
    usdc, pay_to = network.tokens[0], chain.wallets[3].address.lower()
    await settlements.start()
    assert (await reconcile(store, node, network, pay_to)).ok
    rpc(chain.rpc_url, "evm_setAutomine", False)
    order = order_for(pay(chain.wallets[1], usdc, 100, to=pay_to), usdc)
    await settlements.submit(order)
    await until(lambda: settlements.courier.broadcasts == 1)
    await settlements.stop()
    mine(chain.rpc_url, 3)
    report = await reconcile(store, node, network, pay_to)
    assert report.findings == []
    assert report.tokens[0].in_flight == 100_000
    assert report.tokens[0].booked == ()
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], Books(network)) as restarted:
        assert (await restarted.outcome(order.id, 20)).paid
    mine(chain.rpc_url, 3)
    report = await reconcile(store, node, network, pay_to)
    assert report.findings == []
    assert report.tokens[0].in_flight == 0
    assert await balance(store, "unattributed", network) == 0


async def test_credit_that_no_transfer_brought_in_is_found(
    chain: Devnet, network: Network, store: Store, node: Rpc
) -> None:
    usdc, pay_to = network.tokens[0], chain.wallets[3].address.lower()
    assert (await reconcile(store, node, network, pay_to)).ok
    await store.write(
        lambda tx: transfers.post(
            tx,
            id="settle:forged",
            debit=account_id("custody", usdc.asset),
            credit=payer_account("0x" + "1" * 40, usdc.asset),
            amount=USD,
            reference="forged",
        )
    )
    report = await reconcile(store, node, network, pay_to)
    assert [(finding.code, finding.subject) for finding in report.findings] == [("chain_differs", usdc.asset)]
    assert report.tokens[0].books - report.tokens[0].on_chain == USD


async def test_money_that_was_minted_to_us_is_unattributed(
    chain: Devnet, network: Network, store: Store, node: Rpc
) -> None:
    pay_to = chain.wallets[3].address.lower()
    assert (await reconcile(store, node, network, pay_to, confirmations=0)).ok
    mint(chain.rpc_url, chain.usdc, chain.wallets[3].address, 3_000_000)
    assert (await reconcile(store, node, network, pay_to, confirmations=0)).ok
    assert await balance(store, "unattributed", network) == 3 * USD


async def test_books_are_opened_once_with_what_the_owner_had(
    chain: Devnet, network: Network, store: Store, node: Rpc
) -> None:
    pay_to = chain.wallets[3].address
    await open_books(store, node, network, pay_to)
    mint(chain.rpc_url, chain.usdc, pay_to, 3_000_000)
    await open_books(store, node, network, pay_to)
    assert (await reconcile(store, node, network, pay_to, confirmations=0)).ok
    assert await balance(store, "owner", network) == 1_000 * USD
    assert await balance(store, "unattributed", network) == 3 * USD


async def test_another_chain_under_the_same_database_is_found(
    chain: Devnet, network: Network, store: Store, node: Rpc
) -> None:
    await store.write(
        lambda tx: tx.execute(
            "INSERT INTO chain_cursor (asset, block_number) VALUES (?, ?)", (network.tokens[0].asset, 10**9)
        )
    )
    report = await reconcile(store, node, network, chain.wallets[3].address)
    assert [finding.code for finding in report.findings] == ["chain_behind"]
