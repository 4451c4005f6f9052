"""Several processes on one database: who lives is left alone, and what the dead had under way is freed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from payments import leases, receipts
from payments.leases import Leases, instance_name
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.ledger.transfers import Balance
from payments.recovery import Recovered, recover, watch
from payments.store import Store, Transaction
from payments.tenders.base import Hold, HoldEnded, Outcome
from payments.tenders.exact import AlreadyUsed
from payments.tenders.prepaid import PrepaidTender
from tests.payments.exact_samples import (
    ASSET,
    DETAILS,
    PAYER,
    QUOTED,
    assert_books_balance,
    credit_of,
    open_desk,
    payment_of,
    quote_of,
)

ANSWERED = Outcome({"model": "m"})


@pytest.fixture
def stores(postgres_database: str) -> Iterator[tuple[Store, Store]]:
    """Two replicas."""
    opened = Store(postgres_database), Store(postgres_database)
    yield opened
    for store in opened:
        store.close()


def fund(tx: Transaction) -> None:
    account = payer_account(PAYER, ASSET)
    transfers.post(tx, id="log:1", debit=f"custody@{ASSET}", credit=account, amount=2 * QUOTED, reference="log")


async def live(store: Store) -> Leases:
    """Prove that a replica lives; the test renews nothing."""
    made = Leases(store, store.instance, ttl_s=60)
    assert await made.acquire(instance_name(store.instance))
    return made


def expire(tx: Transaction) -> None:
    tx.execute("UPDATE lease SET expires_ms = 0")


async def test_what_a_living_replica_works_on_is_left_alone_and_freed_when_it_dies(
    stores: tuple[Store, Store],
) -> None:
    first, second = stores
    await first.write(fund)
    await live(first)
    prepaid = await PrepaidTender(first, PAYER, (ASSET,)).authorize(quote_of(), {})
    exact = await open_desk(first).tender(payment_of()).authorize(quote_of(), DETAILS)
    await exact.ready()

    assert await recover(second) == Recovered(0, 0, 0, 0)
    assert (await credit_of(second)).pending_out == 2 * QUOTED

    await first.write(expire)
    assert await recover(second) == Recovered(2, 1, 1, 0)
    assert await credit_of(second) == Balance(3 * QUOTED, 0)
    await assert_books_balance(second)

    # A replica that was only stopped wakes up: nothing that it began is its own any more.
    holds: tuple[Hold, ...] = (prepaid, exact)
    for hold in holds:
        with pytest.raises(HoldEnded):
            await hold.capture(1, ANSWERED)
    assert await credit_of(second) == Balance(3 * QUOTED, 0)
    views = [await second.read(partial(receipts.get, id=hold.receipt_id)) for hold in holds]
    assert [view.state for view in views if view] == ["released", "interrupted"]
    await assert_books_balance(second)


async def test_reservation_that_a_living_replica_is_about_to_settle_is_not_forgotten(
    stores: tuple[Store, Store],
) -> None:
    first, second = stores
    await live(first)
    desk = open_desk(first)
    found: list[Recovered] = []

    check = desk.services.chain_states.check

    async def look(*args: Any) -> Any:
        found.append(await recover(second))
        return await check(*args)

    desk.services.chain_states.check = look  # type: ignore[method-assign,assignment]
    await desk.tender(payment_of()).authorize(quote_of(), DETAILS)
    assert found == [Recovered(0, 0, 0, 0)]


async def test_same_payment_at_two_replicas_at_once_has_one_use_and_the_other_waits_for_it(
    stores: tuple[Store, Store],
) -> None:
    first, second = stores
    await live(first)
    await live(second)
    payment = payment_of()
    tenders = [open_desk(store).tender(payment) for store in stores]
    tried = await asyncio.gather(*(tender.authorize(quote_of(), DETAILS) for tender in tenders), return_exceptions=True)
    used = [result for result in tried if isinstance(result, AlreadyUsed)]
    holds = [result for result in tried if not isinstance(result, BaseException)]
    assert (len(used), len(holds)) == (1, 1)
    loser = open_desk(stores[tried.index(used[0])])
    assert not await loser.services.use_ended(used[0].receipt_id, 0.3)
    waiting = asyncio.ensure_future(loser.services.use_ended(used[0].receipt_id, 10))
    await holds[0].ready()
    await holds[0].capture(1, ANSWERED)
    assert await waiting
    await assert_books_balance(first)


async def test_replica_that_lost_its_lease_begins_anew(stores: tuple[Store, Store]) -> None:
    first, second = stores
    held = await live(first)
    name = instance_name(first.instance)
    await first.write(expire)
    await recover(second)
    await held.beat()
    assert not held.held(name)
    held.ttl_s = 1.5
    watching = asyncio.ensure_future(watch(first, held))
    async with asyncio.timeout(10):
        while await second.read(lambda tx: leases.holder(tx, name)) is None:  # noqa: ASYNC110 - another process's row
            await asyncio.sleep(0.05)
    watching.cancel()
    assert held.held(name)


async def test_on_sqlite_all_leases_are_a_dead_process_s(sqlite_database: object) -> None:
    store = Store(str(sqlite_database))
    await live(store)
    await store.write(fund)
    await PrepaidTender(store, PAYER, (ASSET,)).authorize(quote_of(), {})
    assert await recover(store) == Recovered(1, 0, 1, 0)
    assert await store.read(lambda tx: leases.holder(tx, instance_name(store.instance))) is None
    store.close()
