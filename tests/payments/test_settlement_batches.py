"""Many settlements in one transaction: each decided by itself, and none lost when the transaction is."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import (
    Devnet,
    approve_permit2,
    as_owner,
    balance_of,
    call_data,
    place_operator_contracts,
    rpc,
    send_as,
)
from payments.chain.networks import Network
from payments.ledger import books as ledger_books
from payments.ledger import transfers
from payments.ledger.accounts import account_id, native_asset
from payments.settlement import dispatcher, judge
from payments.settlement.orders import SettlementOrder
from payments.settlement.outbox import order_gas
from payments.store import Store
from tests.contracts import hostile_code
from tests.databases import open_store
from tests.payments.settling import (
    PAY_TO,
    Books,
    credit,
    engine,
    mine,
    order_for,
    pay,
    rows,
    transactions,
    until,
    until_rows,
)

SETTLED_S = 30


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def books(network: Network) -> Books:
    return Books(network)


@pytest.fixture
def batch_contract(chain: Devnet) -> str:
    """The operator's, whose signers are the first two wallets."""
    signers = [wallet.address for wallet in chain.wallets[:2]]
    return place_operator_contracts(chain.rpc_url, PAY_TO, chain.wallets[9].address, signers)[0]


async def settle_all(settlements: Any, orders: list[SettlementOrder]) -> list[Any]:
    await asyncio.gather(*(settlements.submit(order) for order in orders))
    return list(await asyncio.gather(*(settlements.outcome(order.id, SETTLED_S) for order in orders)))


async def test_payments_that_arrive_together_share_transactions(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[7].private_key)
    orders = [order_for(pay(chain.wallets[2 + i % 5], usdc, 1_000 + i), usdc) for i in range(60)]
    orders += [order_for(pay(chain.wallets[7], usdt, 2_000 + i), usdt) for i in range(20)]
    async with engine(
        store, network, chain.rpc_url, list(chain.wallets[:2]), books, batch_contract=batch_contract
    ) as settlements:
        outcomes = await settle_all(settlements, orders)

    assert all(outcome.paid for outcome in outcomes)
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders[:60])
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == sum(order.value for order in orders[60:])
    sent = await transactions(store)
    assert len(sent) < 12
    assert ("batch", "included") in sent
    assert {row["id"] for row in books.mined} == {order.id for order in orders}
    assert len(books.mined) == len(orders)
    for wallet in chain.wallets[2:7]:
        paid = sum(order.value for order in orders[:60] if order.payer == wallet.address.lower())
        assert await credit(store, wallet, usdc) == paid * 1_000
    assert await store.read(ledger_books.check) == []


async def test_what_settling_cost_is_in_the_ledger(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc, signer = network.tokens[0], chain.wallets[0]
    before = int(rpc(chain.rpc_url, "eth_getBalance", signer.address, "latest"), 16)
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(9)]
    async with engine(store, network, chain.rpc_url, [signer], books, batch_contract=batch_contract) as settlements:
        await settle_all(settlements, orders)
    spent = before - int(rpc(chain.rpc_url, "eth_getBalance", signer.address, "latest"), 16)

    fees = [int(fee) for (fee,) in await transactions(store, "fee_wei")]
    assert sum(fees) == spent
    asset = native_asset(network.chain_id)
    account = account_id("signer", asset, signer.address.lower())
    owed = await store.read(lambda tx: transfers.balance(tx, account).balance)
    gas = await store.read(lambda tx: transfers.balance(tx, account_id("gas", asset)).balance)
    assert gas == -owed
    assert spent <= gas * 10**9 < spent + len(fees) * 10**9  # whole gwei, each rounded up


async def test_a_payment_that_fails_in_a_batch_fails_alone(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc = network.tokens[0]
    good = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(4)]
    poor = order_for(pay(chain.wallets[3], usdc, 10**15), usdc)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        first = await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in (good[0], good[1], poor, *good[2:])))
        await until(lambda: settlements.transactions == 2)
        await until(lambda: settlements.courier.broadcasts == 2)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        mine(chain.rpc_url)
        outcomes = [await settlements.outcome(order.id, SETTLED_S) for order in (first, *good, poor)]

    assert [outcome.state for outcome in outcomes[:-1]] == ["mined"] * 5
    assert outcomes[-1].state == "failed"
    assert "exceeds balance" in (outcomes[-1].reason or "")
    assert await transactions(store) == [("single", "included"), ("batch", "included")]
    assert [row["id"] for row in books.failed] == [poor.id]
    assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in good) * 1_000
    assert await credit(store, chain.wallets[3], usdc) == 0


async def occupy(settlements: Any, chain: Devnet, network: Network) -> SettlementOrder:
    """Send something that is not mined yet, so that what comes next gathers into a batch."""
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[8], usdc, 1), usdc)
    await settlements.submit(order)
    return order


async def test_a_payment_that_somebody_else_submitted_is_paid_once_in_a_batch_too(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(3)]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        await until(lambda: settlements.courier.broadcasts == 2)
        # Before the batch is mined, a stranger submits the second authorization and is first.
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        rpc(chain.rpc_url, "evm_setAutomine", True)
        send_as(chain.rpc_url, chain.wallets[5].address, orders[1].call_to, "0x" + orders[1].call_data.hex())
        for transaction in list(settlements.courier.carried.values()):
            settlements.courier.carry(transaction)
        outcomes = [await settlements.outcome(order.id, SETTLED_S) for order in orders]

    assert [outcome.state for outcome in outcomes] == ["mined", "superseded", "mined"]
    assert len({outcome.transaction_hash for outcome in outcomes}) == 2
    assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in orders) * 1_000
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders) + 1


async def test_payments_of_a_batch_that_reverts_as_a_whole_go_out_alone(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc, owner = network.tokens[0], chain.wallets[9]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(3)]
    # As if the operator had taken the signer's right away.
    revoke = call_data("setSigner(address,bool)", chain.wallets[0].address, 0)
    send_as(chain.rpc_url, owner.address, batch_contract, revoke)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        await until(lambda: settlements.courier.broadcasts == 2)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        mine(chain.rpc_url)
        outcomes = [await settlements.outcome(order.id, SETTLED_S) for order in orders]

    assert all(outcome.paid for outcome in outcomes)
    assert await transactions(store, "kind") == [("single",), ("batch",), ("single",), ("single",), ("single",)]
    assert await rows(store, "attempts") == [(0,), (1,), (1,), (1,)]
    assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in orders) * 1_000


async def test_a_restart_carries_on_with_the_same_batch(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(3)]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    signers = [chain.wallets[0]]
    async with engine(store, network, chain.rpc_url, signers, books, batch_contract=batch_contract) as settlements:
        await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in orders))
    signed = await transactions(store, "raw_transaction")
    assert len(signed) == 2
    rpc(chain.rpc_url, "anvil_dropAllTransactions")
    async with engine(store, network, chain.rpc_url, signers, books, batch_contract=batch_contract) as settlements:
        await until(lambda: settlements.courier.broadcasts == 2)
        mine(chain.rpc_url)
        outcomes = [await settlements.outcome(order.id, SETTLED_S) for order in orders]

    assert all(outcome.paid for outcome in outcomes)
    assert await transactions(store, "raw_transaction") == signed
    assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in orders) * 1_000


async def test_a_batch_that_a_reorganisation_took_away_is_paid_again_once(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(3)]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract, confirmations=5
    ) as settlements:
        mine(chain.rpc_url, 3)
        first = await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        await until(lambda: settlements.courier.broadcasts == 2)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        mine(chain.rpc_url)
        for order in orders:
            assert (await settlements.outcome(order.id, SETTLED_S)).paid
        rpc(chain.rpc_url, "anvil_reorg", 2, [])
        await until(lambda: settlements.reorganised >= 3)
        for order in (first, *orders):
            assert (await settlements.outcome(order.id, SETTLED_S)).paid
        mine(chain.rpc_url, 6)
        await until_rows(store, [(order.id, "final") for order in (first, *orders)])

    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders) + 1
    assert await credit(store, chain.wallets[2], usdc) == sum(order.value for order in orders) * 1_000
    assert await transactions(store) == [("single", "included"), ("batch", "included")]
    gas_asset = account_id("gas", native_asset(network.chain_id))
    fees = sum(-(-int(fee) // 10**9) for (fee,) in await transactions(store, "fee_wei"))
    assert (await store.read(lambda tx: transfers.balance(tx, gas_asset))).balance == fees
    assert await store.read(ledger_books.check) == []


async def test_a_batch_is_not_larger_than_a_block_allows(
    chain: Devnet,
    network: Network,
    store: Store,
    books: Books,
    batch_contract: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher, "BATCH_GAS_MAX", 4 * 150_000)
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2], usdc, 1_000 + i), usdc) for i in range(10)]
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        await occupy(settlements, chain, network)
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        await until(lambda: settlements.courier.broadcasts >= 4)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        mine(chain.rpc_url)
        for order in orders:
            assert (await settlements.outcome(order.id, SETTLED_S)).paid
    carried = await rows(store, "transaction_id")
    sizes = {transaction_id: carried.count((transaction_id,)) for (transaction_id,) in carried}
    assert sorted(sizes.values()) == [1, 2, 4, 4]


async def test_one_payment_alone_is_not_held_back(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    slow = dataclasses.replace(network, block_time_ms=600_000)
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[2], usdc, 1_000), usdc)
    async with engine(
        store, slow, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        await settlements.submit(order)
        assert settlements.transactions == 1


async def test_a_paused_token_fails_its_payments_and_no_others(
    chain: Devnet, network: Network, store: Store, books: Books, batch_contract: str
) -> None:
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[7].private_key)
    as_owner(chain.rpc_url, chain.usdc, "pause()")
    orders = [order_for(pay(chain.wallets[7], token, 500), token) for token in (usdc, usdt, usdc, usdt)]
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        outcomes = await settle_all(settlements, orders)
    assert [outcome.state for outcome in outcomes] == ["failed", "mined", "failed", "mined"]


@pytest.mark.parametrize("name", ["RETURNS_FALSE", "BURNS_ALL", "REVERTS_WITH_MEGABYTES", "CALLS_BACK"])
async def test_a_token_that_turns_hostile_pays_nothing_and_the_others_of_its_batch_are_paid(
    chain: Devnet,
    network: Network,
    store: Store,
    books: Books,
    batch_contract: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge, "UNEXPLAINED_S", 1.0)
    usdc, usdt = network.tokens
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[7].private_key)
    rpc(chain.rpc_url, "anvil_setCode", chain.usdt.address, getattr(hostile_code, name))
    orders = [order_for(pay(chain.wallets[2 + i], usdc, 1_000 + i), usdc) for i in range(4)]
    bad = order_for(pay(chain.wallets[7], usdt, 2_000), usdt)
    signer = chain.wallets[0]
    before = int(rpc(chain.rpc_url, "eth_getBalance", signer.address, "latest"), 16)
    async with engine(store, network, chain.rpc_url, [signer], books, batch_contract=batch_contract) as settlements:
        *outcomes, failed = await settle_all(settlements, [*orders, bad])
    assert all(outcome.paid for outcome in outcomes)
    assert (failed.state, failed.paid) == ("failed", False)
    assert {row["id"] for row in books.mined} == {order.id for order in orders}
    assert await credit(store, chain.wallets[7], usdt) == 0
    used = sum(int(gas) for (gas,) in await transactions(store, "gas_used"))
    assert used < 4 * 150_000 + 3 * order_gas(bad), "once in the batch, perhaps once more alone"
    assert before > int(rpc(chain.rpc_url, "eth_getBalance", signer.address, "latest"), 16)


async def test_a_token_that_takes_a_nonce_and_says_nothing_has_paid_nothing(
    chain: Devnet,
    network: Network,
    store: Store,
    books: Books,
    batch_contract: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It succeeds at whatever it is asked, also with a nonce that is used, and calls every nonce used."""
    monkeypatch.setattr(judge, "UNEXPLAINED_S", 0.2)
    monkeypatch.setattr(judge, "RETRY_S", 0.05)
    usdc, first = network.tokens[0], chain.wallets[2]
    payment = pay(first, usdc, 1_000)
    orders = [order_for(payment, usdc), order_for(pay(first, usdc, 1_000), usdc)]
    again = order_for(payment, usdc)
    code = rpc(chain.rpc_url, "eth_getCode", chain.usdc.address, "latest")
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, batch_contract=batch_contract
    ) as settlements:
        assert [outcome.paid for outcome in await settle_all(settlements, orders[:1])] == [True]
        rpc(chain.rpc_url, "anvil_setCode", chain.usdc.address, hostile_code.RETURNS_TRUE)
        outcomes = await settle_all(settlements, [orders[1], again])
    rpc(chain.rpc_url, "anvil_setCode", chain.usdc.address, code)
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert [row["id"] for row in books.mined] == [orders[0].id]
    assert await credit(store, first, usdc) == 1_000_000
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 1_000
