"""What was asked to be looked at again, what a crash left half decided, and what one node says of large amounts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import payments.settlement.care
from contracts.devnet import Devnet, as_owner, balance_of, rpc
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.errors import PaymentRefused
from payments.settlement import outbox, stories
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.settlement.reverts import REVERTS_MAX
from payments.store import Store
from tests.databases import open_store
from tests.payments.nodes import LyingNode
from tests.payments.settling import PAY_TO, Books, credit, engine, order_for, pay, rows, until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


async def drained(chain: Devnet, settlements: Settlements, order: SettlementOrder) -> None:
    """Have an order's transfer revert: its payer is put on the token's blacklist while it waits for its block."""
    rpc(chain.rpc_url, "evm_setAutomine", False)
    await settlements.submit(order)
    await until(
        lambda: int(rpc(chain.rpc_url, "eth_getTransactionCount", settlements.signers[0].address, "pending"), 16) > 0
    )
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", order.payer)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    rpc(chain.rpc_url, "evm_mine")


async def test_a_failed_settlement_that_the_chain_has_after_all_is_paid_by_a_second_look(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books = network.tokens[0], Books(network)
    payment = pay(chain.wallets[1], usdc, 5_000)
    order = order_for(payment, usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await settlements.submit(order)
        assert (await settlements.outcome(order.id, 15)).paid
        await until(lambda: not settlements._care.transactions)
    # As if the node had said nothing of it until the deadline.
    await store.write(
        lambda tx: tx.execute(
            "UPDATE settlement SET state='failed', reason='expired', block_number=NULL, transfer_log_index=NULL WHERE id=?",
            (order.id,),
        )
    )
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        assert await store.write(lambda tx: stories.ask_again(tx, order.id)) == "failed"
        await until(lambda: settlements.paid == 1)
        assert (await settlements.outcome(order.id, 1)).paid
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 5_000
    assert await credit(store, chain.wallets[1], usdc) == 5_000_000
    assert await store.write(lambda tx: stories.ask_again(tx, order.id)) in ("mined", "final")
    assert await rows(store, "look_again_ms") == [(None,)]


async def test_a_second_look_at_what_was_never_paid_changes_nothing(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books = network.tokens[0], Books(network)
    order = order_for(pay(chain.wallets[1], usdc, 5_000), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await drained(chain, settlements, order)
        assert (await settlements.outcome(order.id, 15)).state == "failed"
        await store.write(lambda tx: stories.ask_again(tx, order.id))
        async with asyncio.timeout(10):
            while await rows(store, "look_again_ms") != [(None,)]:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
    assert await rows(store) == [(order.id, "failed")]
    assert len(books.failed) == 1


async def test_what_a_killed_engine_had_seen_in_a_block_and_not_decided_is_decided_after_the_restart(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books = network.tokens[0], Books(network)
    order = order_for(pay(chain.wallets[1], usdc, 5_000), usdc)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        await drained(chain, settlements, order)
        assert (await settlements.outcome(order.id, 15)).state == "failed"
    assert await rows(store, "state") == [("failed",)]
    await store.write(lambda tx: tx.execute("UPDATE settlement SET state='submitted', reason=NULL, valid_before=0"))
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        assert (await settlements.outcome(order.id, 15)).state == "failed"
        await until(lambda: not settlements._care.transactions)
    spent = await store.read(lambda tx: tx.execute("SELECT balance FROM ledger_account WHERE kind='gas'").fetchone()[0])
    ((fee_wei,),) = await store.read(lambda tx: tx.execute("SELECT fee_wei FROM chain_transaction").fetchall())
    assert spent == -(-int(fee_wei) // 10**9)


async def test_a_payer_whose_payments_revert_is_refused_and_a_restart_does_not_forget_it(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books = network.tokens[0], Books(network)
    payer = chain.wallets[1].address.lower()
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        for _ in range(REVERTS_MAX):
            settlements.admit(payer)
            order = order_for(pay(chain.wallets[1], usdc, 5_000), usdc)
            await drained(chain, settlements, order)
            assert (await settlements.outcome(order.id, 15)).state == "failed"
            as_owner(chain.rpc_url, chain.usdc, "unBlacklist(address)", payer)
        with pytest.raises(PaymentRefused, match="failed on chain"):
            settlements.admit(payer)
        settlements.admit(chain.wallets[2].address.lower())
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        with pytest.raises(PaymentRefused):
            settlements.admit(payer)


@pytest.mark.parametrize("value", [5_000, 3_000_000])
async def test_above_an_amount_a_receipt_that_one_node_alone_has_pays_nothing(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    monkeypatch.setattr(payments.settlement.care, "WITNESS_RETRY_S", 0.02)
    usdc, books, silent = network.tokens[0], Books(network), LyingNode(chain.rpc_url)
    silent.results = {"eth_getTransactionReceipt": None}
    order = order_for(pay(chain.wallets[1], usdc, value), usdc)
    async with silent.serve() as url, Rpc([chain.rpc_url, url]) as two:
        settlements = Settlements(
            store, two, network, [chain.wallets[0].private_key], cross_check_nano_usd=10**9, housekeeping_s=0.05
        )
        settlements.handle("payment", books.kind)
        await settlements.start()
        try:
            await settlements.submit(order)
            if value > 1_000_000:
                await until(lambda: silent.told > 3)
                assert (await settlements.outcome(order.id, 0)).open
                assert not books.mined
                silent.results = {}
            assert (await settlements.outcome(order.id, 15)).paid
        finally:
            await settlements.stop()
    assert len(books.mined) == 1


async def test_evidence_of_somebody_elses_transaction_is_heard_twice_too(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books, silent = network.tokens[0], Books(network), LyingNode(chain.rpc_url)
    silent.results = {"eth_getTransactionReceipt": None}
    order = order_for(pay(chain.wallets[1], usdc, 3_000_000), usdc)
    rpc(chain.rpc_url, "anvil_impersonateAccount", chain.wallets[5].address)
    sent = {
        "from": chain.wallets[5].address,
        "to": order.call_to,
        "data": "0x" + order.call_data.hex(),
        "gas": hex(200_000),
    }
    async with silent.serve() as url, Rpc([chain.rpc_url, url]) as two:
        settlements = Settlements(
            store, two, network, [chain.wallets[0].private_key], cross_check_nano_usd=10**9, housekeeping_s=0.05
        )
        settlements.handle("payment", books.kind)
        await settlements.start()
        try:
            rpc(chain.rpc_url, "evm_setAutomine", False)
            await store.write(lambda tx: outbox.enqueue(tx, order))
            rpc(chain.rpc_url, "eth_sendTransaction", sent)
            rpc(chain.rpc_url, "evm_mine")
            settlements.take_queued(order.id)
            rpc(chain.rpc_url, "evm_setAutomine", True)
            silent.told = 0
            await until(lambda: silent.told > 3)
            assert (await settlements.outcome(order.id, 0)).open
            silent.results = {}
            assert (await settlements.outcome(order.id, 15)).state == "superseded"
        finally:
            await settlements.stop()
    assert len(books.mined) == 1
