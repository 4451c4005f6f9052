"""The settlement engine on a real chain: one transfer for each order, whatever happens between the two."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, approve_permit2, as_owner, balance_of, rpc, send_signed
from payments.chain.networks import Network
from payments.errors import SettlementUnavailable
from payments.ledger import books as ledger_books
from payments.settlement import dispatcher, outbox, states
from payments.settlement.alarms import Alarms
from payments.store import Store, Transaction
from tests.databases import open_store
from tests.payments.nodes import LyingNode
from tests.payments.settling import (
    PAY_TO,
    SETTLED_S,
    Books,
    credit,
    engine,
    mine,
    order_for,
    pay,
    receipt,
    rows,
    transactions,
    until,
    until_rows,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def books(network: Network) -> Books:
    return Books(network)


async def test_a_payment_is_mined_and_credited_in_one_unit(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 12_345), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        outcome = await settlements.outcome(order.id, SETTLED_S)
        assert outcome.paid
        assert outcome.state == "mined"
        assert receipt(chain.rpc_url, outcome.transaction_hash)["status"] == "0x1"
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 12_345
        assert await credit(store, chain.wallets[1], usdc) == 12_345_000
        assert [(row["id"], row["state"], row["received_value"]) for row in books.mined] == [
            (order.id, "mined", "12345")
        ]
        mine(chain.rpc_url, 2)
        await until_rows(store, [(order.id, "final")])
    assert await store.read(ledger_books.check) == []


async def test_two_signers_settle_a_hundred_payments_once_each_without_a_gap(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[2 + i % 4], usdc, 1_000 + i), usdc) for i in range(100)]
    async with engine(store, network, chain.rpc_url, list(chain.wallets[:2]), books) as settlements:
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        outcomes = await asyncio.gather(*(settlements.outcome(order.id, SETTLED_S) for order in orders))
    assert all(outcome.paid for outcome in outcomes)
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders)
    assert len({row["id"] for row in books.mined}) == len(books.mined) == 100
    for signer in chain.wallets[:2]:
        nonces = await store.read(
            lambda tx, signer=signer: tx.execute(  # type: ignore[misc]
                "SELECT signer_nonce FROM chain_transaction WHERE signer=? ORDER BY 1", (signer.address.lower(),)
            ).fetchall()
        )
        assert len(nonces) >= 40
        assert [nonce for (nonce,) in nonces] == list(range(nonces[0][0], nonces[0][0] + len(nonces)))


async def test_an_order_submitted_many_times_at_once_is_one_transaction(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 500), usdc)
    async with engine(store, network, chain.rpc_url, list(chain.wallets[:1]), books) as settlements:
        await asyncio.gather(*(settlements.submit(order) for _ in range(20)))
        outcomes = await asyncio.gather(*(settlements.outcome(order.id, SETTLED_S) for _ in range(20)))
        await settlements.submit(order)
        assert settlements.courier.broadcasts == 1
        assert settlements.signers[0].in_flight == 0
    assert len({outcome.transaction_hash for outcome in outcomes}) == 1
    assert len(books.mined) == 1


async def test_usdt_over_permit2_is_settled_through_the_proxy(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdt, payer = network.tokens[1], chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    order = order_for(pay(payer, usdt, 4_000), usdt)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, SETTLED_S)).state == "mined"
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == 4_000
    assert await credit(store, payer, usdt) == 4_000_000


async def test_a_token_that_takes_a_fee_credits_what_arrived(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdt, payer = network.tokens[1], chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    as_owner(chain.rpc_url, chain.usdt, "setParams(uint256,uint256)", 10, 40)
    order = order_for(pay(payer, usdt, 1_000_000), usdt)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, SETTLED_S)).paid
    arrived = balance_of(chain.rpc_url, chain.usdt, PAY_TO)
    assert 0 < arrived < 1_000_000
    assert books.mined[0]["received_value"] == str(arrived)
    assert await credit(store, payer, usdt) == arrived * 1_000


async def test_a_restart_broadcasts_the_same_bytes(chain: Devnet, network: Network, store: Store, books: Books) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, 0.3)).open
    [(written,)], signed = await rows(store, "transaction_hash"), await transactions(store, "raw_transaction")
    rpc(chain.rpc_url, "anvil_dropAllTransactions")
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await until(lambda: settlements.courier.broadcasts > 0)
        mine(chain.rpc_url)
        outcome = await settlements.outcome(order.id, SETTLED_S)
    assert outcome.paid
    assert outcome.transaction_hash == written
    assert await rows(store, "transaction_hash") == [(written,)]
    assert await transactions(store, "raw_transaction") == signed
    assert await credit(store, chain.wallets[1], usdc) == 700_000


async def test_what_was_mined_while_the_gateway_was_down_is_credited_at_the_start(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        await until(lambda: settlements.courier.broadcasts > 0)
    mine(chain.rpc_url)
    assert books.mined == []
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        assert (await settlements.outcome(order.id, SETTLED_S)).paid
    assert await credit(store, chain.wallets[1], usdc) == 700_000


async def test_a_transfer_that_reverts_fails_with_the_tokens_reason(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", chain.wallets[1].address)
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        outcome = await settlements.outcome(order.id, SETTLED_S)
        assert outcome.state == "failed"
        assert "blacklisted" in (outcome.reason or "")
        following = order_for(pay(chain.wallets[2], usdc, 5), usdc)
        await settlements.submit(following)
        assert (await settlements.outcome(following.id, SETTLED_S)).paid
    assert [row["id"] for row in books.failed] == [order.id]
    assert await credit(store, chain.wallets[1], usdc) == 0


async def test_an_authorization_that_expired_unmined_fails_and_holds_up_nobody(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    expired = order_for(pay(chain.wallets[1], usdc, 700, valid_s=-60), usdc)
    following = order_for(pay(chain.wallets[1], usdc, 800), usdc)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    mine(chain.rpc_url)  # the chain's own clock decides, and the last block may be old
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(expired)
        await settlements.submit(following)
        outcome = await settlements.outcome(expired.id, SETTLED_S)
        assert outcome.state == "failed"
        assert "expired" in (outcome.reason or "")
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
    # Its nonce is still what the chain waits for: a restart must not forget that.
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        rpc(chain.rpc_url, "evm_setAutomine", True)
        assert (await settlements.outcome(following.id, SETTLED_S)).paid
    assert await credit(store, chain.wallets[1], usdc) == 800_000


async def test_a_gap_in_the_nonces_is_filled(chain: Devnet, network: Network, store: Store, books: Books) -> None:
    fast = dataclasses.replace(network, block_time_ms=50)
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, fast, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        # As if a pending transaction that the node told us of at the start was dropped afterwards.
        floor = settlements.signers[0].nonce_floor
        assert floor is not None
        settlements.signers[0].nonce_floor = floor + 2
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, SETTLED_S)).paid
    kinds = await transactions(store, "kind, signer_nonce")
    assert kinds == [("filler", floor), ("filler", floor + 1), ("single", floor + 2)]


async def test_a_stalled_transaction_is_sent_again_for_higher_fees(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    fast = dataclasses.replace(network, block_time_ms=50)
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(store, fast, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        await until(lambda: settlements.courier.broadcasts > 0)
        # The base fee jumps above what the transaction offers.
        rpc(chain.rpc_url, "anvil_setNextBlockBaseFeePerGas", hex(50 * 10**9))
        mine(chain.rpc_url)
        async with asyncio.timeout(SETTLED_S):
            while not books.mined:
                await asyncio.sleep(0.05)
                mine(chain.rpc_url)
        outcome = await settlements.outcome(order.id, SETTLED_S)
    [(broadcasts,)], [(first_hash,)] = await transactions(store, "broadcasts"), await rows(store, "transaction_hash")
    assert outcome.transaction_hash == first_hash
    assert broadcasts.count("hash") >= 2
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 700
    assert await credit(store, chain.wallets[1], usdc) == 700_000


async def test_a_nonce_that_a_stranger_with_our_key_used_is_replaced(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, signer = network.tokens[0], chain.wallets[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [signer], books) as settlements:
        send_signed(chain.rpc_url, signer.private_key, chain.wallets[5].address, value_wei=1)
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, SETTLED_S)).paid
        assert settlements.signers[0].in_flight == 0
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 700


async def test_a_transfer_that_a_reorganisation_took_away_is_sent_again_and_credited_once(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books, confirmations=3) as settlements:
        mine(chain.rpc_url, 3)
        await settlements.submit(order)
        first = await settlements.outcome(order.id, SETTLED_S)
        assert first.paid
        rpc(chain.rpc_url, "anvil_reorg", 2, [])
        assert rpc(chain.rpc_url, "eth_getTransactionReceipt", first.transaction_hash) is None
        await until(lambda: settlements.reorganised > 0)
        again = await settlements.outcome(order.id, SETTLED_S)
        assert again.paid
        mine(chain.rpc_url, 3)
        await until_rows(store, [(order.id, "final")])
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 700
    assert await credit(store, chain.wallets[1], usdc) == 700_000


async def test_a_booking_that_fails_holds_up_only_itself_and_is_tried_again(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    orders = [order_for(pay(chain.wallets[1], usdc, 100 + i), usdc) for i in range(10)]
    refused: list[str] = []
    on_mined = books.on_mined

    def sometimes(tx: Transaction, row: dict[str, Any]) -> None:
        on_mined(tx, row)
        if row["id"] == orders[3].id and len(refused) < 2:
            refused.append(row["id"])
            raise RuntimeError("the books are closed")

    books.on_mined = sometimes  # type: ignore[method-assign]
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await asyncio.gather(*(settlements.submit(order) for order in orders))
        outcomes = await asyncio.gather(*(settlements.outcome(order.id, SETTLED_S) for order in orders))
    assert len(refused) == 2
    assert all(outcome.paid for outcome in outcomes)
    assert await credit(store, chain.wallets[1], usdc) == sum(order.value for order in orders) * 1_000


@pytest.mark.parametrize("told", [None, {}], ids=["null", "before EIP-1559"])
async def test_while_no_node_says_what_gas_costs_orders_are_turned_away_and_then_carried(
    chain: Devnet, network: Network, store: Store, books: Books, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr(dispatcher, "SLOT_WAIT_S", 0.3)
    usdc, node = network.tokens[0], LyingNode(chain.rpc_url)
    turned_away, carried, queued = (order_for(pay(wallet, usdc, 5), usdc) for wallet in chain.wallets[1:4])
    node.results = {"eth_feeHistory": told}
    async with node.serve() as url, engine(store, network, url, [chain.wallets[0]], books) as settlements:
        alarms = Alarms(settlements, PAY_TO, gas_minimum_wei=0, treasury_minimum_nano_usd=0)
        await store.write(lambda tx: outbox.enqueue(tx, queued))
        settlements.take_queued(queued.id)
        with pytest.raises(SettlementUnavailable, match="what gas costs"):
            await asyncio.wait_for(settlements.submit(turned_away), SETTLED_S)
        assert [alarm.code for alarm in alarms.raised()] == ["fees_unknown"]
        node.results = {}
        await until(lambda: not alarms.raised())
        await asyncio.wait_for(settlements.submit(carried), SETTLED_S)
        for order in (queued, carried):
            assert (await settlements.outcome(order.id, SETTLED_S)).paid


async def test_an_engine_that_does_not_run_writes_nothing(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books, start=False) as settlements:
        with pytest.raises(SettlementUnavailable):
            await settlements.submit(order)
        with pytest.raises(KeyError):
            await settlements.outcome(order.id, 0)
    assert await rows(store) == []


async def test_a_caller_that_is_cancelled_does_not_lose_the_settlement(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        submitting = asyncio.create_task(settlements.submit(order))
        await asyncio.sleep(0)
        submitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submitting
        await until(lambda: bool(books.mined))
        assert (await settlements.outcome(order.id, SETTLED_S)).paid


async def test_a_state_follows_only_where_the_table_says_so(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    order = order_for(pay(chain.wallets[1], usdc, 700), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        await settlements.outcome(order.id, SETTLED_S)
    assert not await store.write(lambda tx: states.move(tx, order.id, "failed", reason="no"))
    assert not await store.write(lambda tx: states.move(tx, order.id, "queued"))
    assert await rows(store, "state, reason") == [("mined", None)]
