"""A settlement that cannot be written, looked at, or booked holds up none of the others."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from contracts.devnet import Devnet
from payments.chain.networks import Network
from payments.chain.rpc import Rpc, RpcError
from payments.ledger.transfers import TransferConflict
from payments.settlement import dispatcher, judge, late, lookout, outbox, second_looks, states, stories
from payments.settlement.orders import Kind, SettlementOrder
from payments.store import Store, Transaction
from payments.tenders.exact import PAYMENT
from payments.x402.wire import Payment
from tests.payments.settling import Books, engine, order_for, pay
from tests.payments.test_late_executions import execute


class Watched(Books):
    """Books of payments that are watched after they have failed, as a gateway's are; of one order they take nothing."""

    refused = ""

    @property
    def kind(self) -> Kind:
        return dataclasses.replace(PAYMENT, on_paid=self.on_mined, on_failed=self.on_failed)

    def on_mined(self, tx: Transaction, row: dict[str, Any]) -> None:
        if row["id"] == self.refused:
            raise TransferConflict("exists with other content")
        super().on_mined(tx, row)


def payments_of(chain: Devnet, network: Network, count: int) -> tuple[list[Payment], list[SettlementOrder]]:
    usdc = network.tokens[0]
    signed = [pay(wallet, usdc, 700) for wallet in chain.wallets[1 : count + 1]]
    return signed, [order_for(each, usdc) for each in signed]


def put_failed(tx: Transaction, orders: Sequence[SettlementOrder], watched: bool = True) -> None:
    """As if all had failed long ago, the first one first."""
    for number, order in enumerate(orders):
        assert outbox.enqueue(tx, order)
        assert states.move(tx, order.id, "failed", reason="reverted", watch_again_ms=number + 1 if watched else None)


def wish(tx: Transaction, orders: Sequence[SettlementOrder]) -> None:
    """As if a person had asked for a second look at each, the first one first."""
    for number, order in enumerate(orders):
        stories.ask_again(tx, order.id)
        tx.execute("UPDATE settlement SET look_again_ms = ? WHERE id = ?", (number + 1, order.id))


async def until_state(store: Store, order: SettlementOrder, state: str, timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while (await store.read(lambda tx: outbox.find(tx, order.id))).state != state:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_what_cannot_be_booked_is_tried_again_and_holds_up_nothing_else(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "FIRST_LOOK_MS", 10)
    monkeypatch.setattr(late, "FIRST_LOOK_MS", 50)
    monkeypatch.setattr(late, "INTERVAL_MAX_MS", 50)
    monkeypatch.setattr(second_looks, "AGAIN_MS", 50)
    books, (signed, orders) = Watched(network), payments_of(chain, network, 4)
    await store.write(lambda tx: put_failed(tx, orders[:2]))
    await store.write(lambda tx: put_failed(tx, orders[2:], watched=False))
    for payment in signed:
        execute(chain, payment, network.tokens[0])
    books.refused = orders[0].id
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books):
        await until_state(store, orders[1], "superseded")
        books.refused = orders[2].id
        await until_state(store, orders[0], "superseded")
        await store.write(lambda tx: wish(tx, orders[2:]))
        await until_state(store, orders[3], "superseded")
        books.refused = ""
        await until_state(store, orders[2], "superseded")


@pytest.mark.parametrize("refused", ["eth_call", "eth_getLogs"])
async def test_what_a_node_always_refuses_holds_up_nothing_else(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Of one authorization: its history is pruned, or its token says no more whether it was used."""
    monkeypatch.setattr(second_looks, "LOOKS_MAX", 1)
    books, (signed, orders) = Watched(network), payments_of(chain, network, 3)
    await store.write(lambda tx: put_failed(tx, orders[:2]))
    await store.write(lambda tx: put_failed(tx, orders[2:], watched=False))
    for payment in signed:
        execute(chain, payment, network.tokens[0])
    true_batch, nonce = Rpc.batch, f"{orders[0].authorization_nonce:064x}"

    async def batch(self: Rpc, requests: Sequence[Any]) -> list[Any]:
        replies = await true_batch(self, requests)
        return [
            RpcError(-32000, "history has been pruned") if method == refused and nonce in str(params) else reply
            for (method, params), reply in zip(requests, replies, strict=True)
        ]

    monkeypatch.setattr(Rpc, "batch", batch)
    await store.write(lambda tx: wish(tx, [orders[0], orders[2]]))
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books):
        await until_state(store, orders[1], "superseded")
        await until_state(store, orders[2], "superseded")
        await until_state(store, orders[0], "failed")


@pytest.mark.parametrize("whose", ["unknown kind", "another process"])
async def test_what_cannot_be_looked_at_here_fills_no_look(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """Of a kind that is configured no more, or carried by an account of a living process that has not come to it."""
    monkeypatch.setattr(late, "LOOKS_MAX", 2)
    monkeypatch.setattr(second_looks, "LOOKS_MAX", 2)
    books, (signed, orders) = Watched(network), payments_of(chain, network, 6)
    if whose == "unknown kind":
        orders[:4] = [dataclasses.replace(order, kind="gone") for order in orders[:4]]
    await store.write(lambda tx: put_failed(tx, [*orders[:2], orders[4]]))
    await store.write(lambda tx: put_failed(tx, [*orders[2:4], orders[5]], watched=False))
    await store.write(lambda tx: wish(tx, [*orders[2:4], orders[5]]))
    if whose == "another process":
        await store.write(lambda tx: carried_by_another(tx, network, orders[:4]))
    for payment in signed[4:]:
        execute(chain, payment, network.tokens[0])
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books):
        await until_state(store, orders[4], "superseded")
        await until_state(store, orders[5], "superseded")


def carried_by_another(tx: Transaction, network: Network, orders: Sequence[SettlementOrder]) -> None:
    """As if a living process had sent them with an account that only it has."""
    account = "0x" + "a0" * 20
    tx.execute(
        "INSERT INTO chain_transaction (id, chain_id, kind, state, signer, signer_nonce, raw_transaction, broadcasts,"
        " inclusions, created_ms, updated_ms) VALUES ('other', ?, 'batch', 'included', ?, 0, ?, '[]', 1, 1, 1)",
        (network.chain_id, account, b""),
    )
    for order in orders:
        tx.execute("UPDATE settlement SET transaction_id = 'other' WHERE id = ?", (order.id,))
    tx.execute(
        "INSERT INTO lease (name, owner, expires_ms) VALUES (?, ?, ?)",
        (f"signer:{network.chain_id}:{account}", "another", 2**53),
    )


async def test_an_order_that_cannot_be_written_holds_up_none_that_go_out_with_it(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "RETRY_S", 0.05)
    books, (_, orders) = Books(network), payments_of(chain, network, 6)
    submitted, queued = orders[:3], orders[3:]
    unwritable, true_submit, true_assign = {orders[1].id, orders[4].id}, outbox.submit, outbox.assign

    def submit(tx: Transaction, order: SettlementOrder, *place: Any) -> Any:
        written = true_submit(tx, order, *place)
        if order.id in unwritable:
            raise ValueError("no row takes this")
        return written

    def assign(tx: Transaction, entry: Any, *place: Any) -> bool:
        if entry.id in unwritable:
            raise ValueError("no row takes this")
        return true_assign(tx, entry, *place)

    monkeypatch.setattr(outbox, "submit", submit)
    monkeypatch.setattr(outbox, "assign", assign)
    await store.write(lambda tx: [outbox.enqueue(tx, order) for order in queued])
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        told = await asyncio.gather(*map(settlements.submit, submitted), return_exceptions=True)
        assert [type(each) for each in told] == [type(None), ValueError, type(None)]
        for order in (submitted[0], submitted[2], queued[0], queued[2]):
            assert (await settlements.outcome(order.id, 10)).paid
        # What is durable is tried again until it can be written, without the others.
        assert (await settlements.outcome(queued[1].id, 0.3)).state == "queued"
        unwritable.clear()
        assert (await settlements.outcome(queued[1].id, 10)).paid
        assert settlements.signers[0].in_flight == 0
    assert len(books.mined) == 5


async def test_orders_that_wait_for_something_else_hold_up_none_that_do_not(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as one look reads, each with an approval that is never mined: wallets cost nothing."""
    monkeypatch.setattr(lookout, "ENTRIES_MAX", 2)
    monkeypatch.setattr(dispatcher, "QUEUED_MAX", 2)
    books, (signed, orders) = Books(network), payments_of(chain, network, 4)
    await store.write(lambda tx: [outbox.enqueue(tx, order, waits_for="an approval") for order in orders[:2]])
    assert await store.read(lambda tx: outbox.waiting(tx, network.chain_id, dispatcher.QUEUED_MAX)) == 0
    await store.write(lambda tx: outbox.enqueue(tx, orders[2]))
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        assert (await settlements.outcome(orders[2].id, 10)).paid
        await store.write(lambda tx: outbox.release(tx, orders[1].id))
        settlements.take_queued(orders[1].id)
        assert (await settlements.outcome(orders[1].id, 10)).paid
        # What a stranger has executed waits for nothing any more, not even if a reorganisation takes that away.
        execute(chain, signed[0], network.tokens[0])
        await store.write(lambda tx: wish(tx, orders[:1]))
        await until_state(store, orders[0], "superseded")
        found = await store.read(lambda tx: outbox.find(tx, orders[0].id))
        assert found is not None
        assert found.waits_for is None


async def test_an_order_that_nobody_can_carry_holds_up_no_other_queued_one(
    chain: Devnet, network: Network, store: Store
) -> None:
    books, (_, orders) = Books(network), payments_of(chain, network, 2)
    true_gas = books.kind.gas

    def gas(order: SettlementOrder) -> int:
        if order.id == orders[0].id:
            raise ValueError("the call makes no sense")
        return true_gas(order)

    class Odd(Books):
        @property
        def kind(self) -> Kind:
            return dataclasses.replace(super().kind, gas=gas)

    await store.write(lambda tx: outbox.enqueue(tx, orders[0]))
    await asyncio.sleep(0.005)  # the oldest is taken up first
    await store.write(lambda tx: outbox.enqueue(tx, orders[1]))
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], Odd(network)) as settlements:
        assert (await settlements.outcome(orders[1].id, 10)).paid
