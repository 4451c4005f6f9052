"""Several processes with the same signer keys on one PostgreSQL: each account is one process's at a time; all orders go out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, balance_of, place_operator_contracts, rpc
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.errors import PaymentRefused, SettlementUnavailable
from payments.kinds import every_kind
from payments.leases import Leases, holder, signer_name
from payments.ledger import books as ledger_books
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.settlement.refunds import Refunds
from payments.store import Store
from tests.payments.settling import (
    PAY_TO,
    Books,
    credit,
    mine,
    order_for,
    owe,
    pay,
    rows,
    transactions,
    until,
    until_rows,
)

TTL_S = 3.0


@dataclass(slots=True)
class Replica:
    """One process, as far as settlements go."""

    store: Store
    leases: Leases
    engine: Settlements
    books: Books

    @property
    def owns(self) -> bool:
        return all(signer.mine for signer in self.engine.signers)

    async def die(self) -> None:
        """As by SIGKILL: nothing more is done, and nothing given back."""
        self.engine._running = False
        self.engine._lookout.stop()
        heart = self.leases._heart
        tasks = [*self.engine._tasks, self.engine._ownership._task, heart]
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        self.store.close()


@contextlib.asynccontextmanager
async def replica(
    database: str,
    chain: Devnet,
    network: Network,
    *,
    signers: list[Wallet] | None = None,
    ttl_s: float = TTL_S,
    look_s: float = 0.2,
    without: str = "",
    **wanted: Any,
) -> AsyncIterator[Replica]:
    store = Store(database, lease_s=ttl_s)
    held = Leases(store, store.instance)
    await held.start()
    async with Rpc([chain.rpc_url], timeout_s=5) as chain_rpc:
        keys = [wallet.private_key for wallet in signers or [chain.wallets[0]]]
        engine = Settlements(store, chain_rpc, network, keys, housekeeping_s=0.05, look_s=look_s, leases=held, **wanted)
        books = Books(network)
        kinds = every_kind(store, network) | {"payment": books.kind}
        for name, kind in kinds.items():
            if name != without:
                engine.handle(name, kind)
        await engine.start()
        made = Replica(store, held, engine, books)
        try:
            yield made
        finally:
            if engine._running:
                await engine.stop()
            if not store._closed:
                await held.stop()
                store.close()


def orders_of(chain: Devnet, network: Network, count: int, wallet: int = 2) -> list[SettlementOrder]:
    usdc = network.tokens[0]
    return [order_for(pay(chain.wallets[wallet], usdc, 1_000 + i), usdc) for i in range(count)]


async def settled(one: Replica, orders: list[SettlementOrder]) -> None:
    outcomes = await asyncio.gather(*(one.engine.outcome(order.id, 20) for order in orders))
    assert all(outcome.paid for outcome in outcomes), outcomes


async def assert_nonces_in_order(store: Store, chain: Devnet) -> None:
    """Every transaction was included, at nonces without gaps, and none of ours was replaced by another."""
    found = await transactions(store, "signer, signer_nonce, state")
    assert {state for _, _, state in found} <= {"included"}
    for signer in {signer for signer, _, _ in found}:
        nonces = [nonce for address, nonce, _ in found if address == signer]
        assert nonces == list(range(nonces[0], nonces[0] + len(nonces)))
        assert int(rpc(chain.rpc_url, "eth_getTransactionCount", signer, "latest"), 16) == nonces[-1] + 1


async def test_orders_of_a_process_without_accounts_are_sent_by_the_one_that_has_them(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    usdc = network.tokens[0]
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        assert (first.owns, second.owns) == (True, False)
        mine_, others = orders_of(chain, network, 10), orders_of(chain, network, 10)
        await asyncio.gather(
            *(first.engine.submit(order) for order in mine_), *(second.engine.submit(order) for order in others)
        )
        # Each waits where the other's are decided, too.
        await asyncio.gather(settled(first, others), settled(second, mine_), settled(second, others))
        assert (first.engine.paid, second.engine.paid, second.engine.transactions) == (20, 0, 0)
        assert second.books.mined == []
        # The same again changes nothing.
        await asyncio.gather(*(second.engine.submit(order) for order in (*mine_, *others)))
        await asyncio.sleep(0.3)
        assert first.engine.in_flight == second.engine.in_flight == 0
        await assert_nonces_in_order(first.store, chain)
        paid = sum(order.value for order in (*mine_, *others))
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == paid
        assert await credit(first.store, chain.wallets[2], usdc) == paid * 1_000
        assert await first.store.read(ledger_books.check) == []


async def test_orders_of_several_processes_share_batches(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    signer = chain.wallets[0]
    contract, _ = place_operator_contracts(chain.rpc_url, signer.address, signer.address, [signer.address])
    wanted: dict[str, Any] = {"batch_contract": contract}
    async with (
        replica(postgres_database, chain, network, **wanted) as first,
        replica(postgres_database, chain, network, **wanted) as second,
        replica(postgres_database, chain, network, **wanted) as third,
    ):
        rpc(chain.rpc_url, "evm_setAutomine", False)
        leader = orders_of(chain, network, 1)[0]
        await first.engine.submit(leader)
        await until(lambda: first.engine.courier.broadcasts == 1)
        places = (first, second, third)
        waves = [(one, order) for one in places for order in orders_of(chain, network, 12)]
        await asyncio.gather(*(one.engine.submit(order) for one, order in waves))
        await until(lambda: first.engine.in_flight == 37)
        await asyncio.sleep(0.3)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        mine(chain.rpc_url)
        await asyncio.gather(*(settled(one, [order]) for one, order in waves))
        # What came within one tenth of a second or so is one transaction, or a few on a slow machine; never 36.
        assert first.engine.transactions <= 8
        await assert_nonces_in_order(first.store, chain)


async def test_a_killed_process_is_replaced_within_the_time_of_its_lease(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    usdc = network.tokens[0]
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        rpc(chain.rpc_url, "evm_setAutomine", False)
        under_way, queued = orders_of(chain, network, 5), orders_of(chain, network, 5)
        await asyncio.gather(*(first.engine.submit(order) for order in under_way))
        # Signed and durable, and not broadcast: as if it had died between the two.
        first.engine.courier.stop()
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        await first.die()
        died = time.monotonic()
        await asyncio.gather(*(second.engine.submit(order) for order in queued))
        rpc(chain.rpc_url, "evm_setAutomine", True)
        await settled(second, [*under_way, *queued])
        assert second.owns
        assert time.monotonic() - died < TTL_S + 4
        await assert_nonces_in_order(second.store, chain)
        paid = sum(order.value for order in (*under_way, *queued))
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == paid
        assert await credit(second.store, chain.wallets[2], usdc) == paid * 1_000


async def test_what_a_killed_process_saw_mined_is_watched_by_the_next_until_it_is_final(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        (order,) = orders_of(chain, network, 1)
        await first.engine.submit(order)
        await settled(first, [order])
        await first.die()
        await until(lambda: second.owns)
        mine(chain.rpc_url, 3)
        await until_rows(second.store, [(order.id, "final")])


async def test_accounts_given_back_at_a_stop_are_taken_at_once(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with (
        replica(postgres_database, chain, network, ttl_s=600) as first,
        replica(postgres_database, chain, network, ttl_s=600) as second,
    ):
        await first.engine.stop()
        await until(lambda: second.owns, 5)
        (order,) = orders_of(chain, network, 1)
        await second.engine.submit(order)
        await settled(second, [order])


async def steal(thief: Replica, chain: Devnet) -> None:
    """Another process has the account's lease all of a sudden: this one was stopped for longer than it knows."""
    name = signer_name(chain.chain_id, chain.wallets[0].address.lower())
    await thief.store.write(lambda tx: tx.execute("UPDATE lease SET owner='thief' WHERE name=?", (name,)))


async def test_a_process_that_lost_its_lease_signs_nothing_and_leaves_its_orders_to_others(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with replica(postgres_database, chain, network, ttl_s=60) as first:
        await steal(first, chain)
        orders = orders_of(chain, network, 4)
        await asyncio.gather(*(first.engine.submit(order) for order in orders))
        assert not first.owns
        assert await transactions(first.store) == []
        assert sorted(await rows(first.store)) == sorted((order.id, "queued") for order in orders)
        assert (await first.engine.outcome(orders[0].id, 0)).open
        name = signer_name(chain.chain_id, chain.wallets[0].address.lower())
        await first.store.write(lambda tx: tx.execute("DELETE FROM lease WHERE name=?", (name,)))
        async with replica(postgres_database, chain, network, ttl_s=60) as second:
            assert await second.store.read(lambda tx: holder(tx, name)) in (second.store.instance, first.store.instance)
            await settled(first, orders)
            await assert_nonces_in_order(second.store, chain)


async def test_a_process_that_lost_its_lease_decides_nothing_about_its_transactions(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with replica(postgres_database, chain, network, ttl_s=60) as first:
        rpc(chain.rpc_url, "evm_setAutomine", False)
        (order,) = orders_of(chain, network, 1)
        await first.engine.submit(order)
        await until(lambda: first.engine.courier.broadcasts == 1)
        await steal(first, chain)
        mine(chain.rpc_url)
        await until(lambda: not first.owns)
        assert await rows(first.store) == [(order.id, "submitted")]
        assert first.books.mined == []
        assert (first.engine.in_flight, first.engine.signers[0].in_flight) == (0, 0)


async def test_what_notifications_do_not_tell_is_found_by_looking(
    chain: Devnet, network: Network, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*_: object) -> Any:
        return lambda: None

    monkeypatch.setattr(Store, "listen", deaf)
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        orders = orders_of(chain, network, 3)
        await asyncio.gather(*(second.engine.submit(order) for order in orders))
        told: list[bool] = []
        second.engine.outcomes.follow(orders[0].id, lambda outcome: told.append(outcome.paid))
        await settled(second, orders)
        await until(lambda: told == [True])
        await first.engine.stop()
        await first.leases.stop()
        await until(lambda: second.owns)


async def test_several_accounts_of_several_processes_work_side_by_side(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    one, other = chain.wallets[0], chain.wallets[1]
    async with (
        replica(postgres_database, chain, network, signers=[one]) as first,
        replica(postgres_database, chain, network, signers=[other]) as second,
        replica(postgres_database, chain, network, signers=[one, other]) as third,
    ):
        assert first.owns
        assert second.owns
        assert not any(signer.mine for signer in third.engine.signers)
        everywhere = [(each, order) for each in (first, second, third) for order in orders_of(chain, network, 10)]
        await asyncio.gather(*(each.engine.submit(order) for each, order in everywhere))
        await asyncio.gather(*(settled(each, [order]) for each, order in everywhere))
        assert first.engine.paid + second.engine.paid == 30
        assert len(await rows(first.store)) == 30
        await assert_nonces_in_order(first.store, chain)
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for _, order in everywhere)


async def test_accounts_are_spread_over_the_processes_that_want_them(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    signers = [chain.wallets[0], chain.wallets[1], chain.wallets[4]]
    async with replica(postgres_database, chain, network, signers=signers) as first:
        assert first.owns
        before = orders_of(chain, network, 6)
        rpc(chain.rpc_url, "evm_setAutomine", False)
        await asyncio.gather(*(first.engine.submit(order) for order in before))
        async with replica(postgres_database, chain, network, signers=signers) as second:
            await until(lambda: (held_by(first), held_by(second)) == (2, 1))
            rpc(chain.rpc_url, "evm_setAutomine", True)
            mine(chain.rpc_url)
            await settled(second, before)
            for _ in range(5):
                orders = orders_of(chain, network, 6)
                places = (first, second) * 3
                await asyncio.gather(*(one.engine.submit(order) for one, order in zip(places, orders, strict=True)))
                await settled(first, orders)
            assert second.engine.transactions > 0
            # Nothing changes hands while nobody comes or goes.
            assert (held_by(first), held_by(second)) == (2, 1)
            await second.engine.stop()
            await until(lambda: first.owns)
        async with replica(postgres_database, chain, network, signers=signers) as third:
            await until(lambda: (held_by(first), held_by(third)) == (2, 1))
            await third.die()
            await until(lambda: first.owns)
        await assert_nonces_in_order(first.store, chain)
        assert await first.store.read(ledger_books.check) == []


def held_by(one: Replica) -> int:
    return sum(signer.mine for signer in one.engine.signers)


async def test_orders_of_an_unknown_kind_are_left_to_whoever_knows_it(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    usdc, treasury = network.tokens[0], chain.wallets[3]
    async with (
        replica(postgres_database, chain, network, without="refund", treasury_key=treasury.private_key) as first,
        replica(postgres_database, chain, network, treasury_key=treasury.private_key) as second,
    ):
        refunds = Refunds(second.store, second.engine, network.tokens, 1_000_000_000)
        await owe(second.store, chain.wallets[1], usdc, 2_000_000_000)
        refunds.consider(chain.wallets[1].address.lower(), usdc.asset)
        assert await refunds.round() == 1
        (order,) = orders_of(chain, network, 1)
        await second.engine.submit(order)
        await settled(second, [order])
        assert {state for _, state in await rows(second.store)} == {"queued", "mined"}
        await first.engine.stop()
        await until(lambda: refunds.sent == 1)
        assert await second.store.read(ledger_books.check) == []


async def test_a_payer_whose_payments_revert_is_refused_by_every_process(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    usdc, payer = network.tokens[0], chain.wallets[4]
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        too_much = balance_of(chain.rpc_url, chain.usdc, payer.address) + 1
        orders = [order_for(pay(payer, usdc, too_much), usdc) for _ in range(3)]
        await asyncio.gather(*(second.engine.submit(order) for order in orders))
        for order in orders:
            assert (await second.engine.outcome(order.id, 20)).state == "failed"
        await until(lambda: first.engine.failed == 3)
        for one in (first, second):
            with pytest.raises(PaymentRefused, match="failed on chain lately"):
                one.engine.admit(payer.address.lower())
            one.engine.admit(chain.wallets[2].address.lower())


async def test_orders_are_turned_away_when_too_many_wait_for_others(
    chain: Devnet, network: Network, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.settlement.dispatcher.QUEUED_MAX", 2)
    async with replica(postgres_database, chain, network, ttl_s=60) as first:
        await steal(first, chain)
        orders = orders_of(chain, network, 4)
        await first.engine.submit(orders[0])
        await first.engine.submit(orders[1])
        with pytest.raises(SettlementUnavailable) as refused:
            await first.engine.submit(orders[2])
        assert refused.value.code == "settlement_busy"
        assert len(await rows(first.store)) == 2


async def test_transactions_of_an_account_whose_key_nobody_has_any_more_are_carried_on(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    retired, current = chain.wallets[0], chain.wallets[1]
    async with replica(postgres_database, chain, network, signers=[retired]) as first:
        rpc(chain.rpc_url, "evm_setAutomine", False)
        (order,) = orders_of(chain, network, 1)
        await first.engine.submit(order)
        await until(lambda: first.engine.courier.broadcasts == 1)
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        rpc(chain.rpc_url, "evm_setAutomine", True)
        await first.die()
    async with replica(postgres_database, chain, network, signers=[current]) as second:
        # At first it may still be alive.
        second.engine._care._refreshed_at = -1e9
        async with asyncio.timeout(20):
            while not (await second.engine.outcome(order.id, 0.2)).paid:
                second.engine._care._refreshed_at = -1e9


async def test_an_order_whose_payment_was_given_up_meanwhile_is_not_written(
    chain: Devnet, network: Network, postgres_database: str
) -> None:
    async with (
        replica(postgres_database, chain, network) as first,
        replica(postgres_database, chain, network) as second,
    ):
        forgotten, wanted = orders_of(chain, network, 2)
        for one in (first, second):
            one.engine._kinds["payment"] = replace(
                one.books.kind, still_wanted=lambda tx, order: order.id != forgotten.id
            )
        for one in (first, second):
            done = await asyncio.gather(one.engine.submit(forgotten), one.engine.submit(wanted), return_exceptions=True)
            assert isinstance(done[0], SettlementUnavailable)
            assert (done[0].code, done[1]) == ("request_interrupted", None)
        await settled(second, [wanted])
        assert [name for name, _ in await rows(first.store)] == [wanted.id]
