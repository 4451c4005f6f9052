"""Leases: one holder at a time, given up in time by whoever cannot renew, and fenced where it matters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from payments import leases
from payments.leases import LeaseLost, Leases, holder, require
from payments.store import Store, StoreBusy, Transaction

NAME = "signer:84532:0xaa"


class Clock:
    """Both clocks that leases read: how long it has been, and what time it is."""

    def __init__(self) -> None:
        self.at_s = 1_000.0

    def __call__(self) -> float:
        return self.at_s

    def now_ms(self, _: Transaction) -> int:
        return round(self.at_s * 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(leases, "_elapsed_s", made)
    monkeypatch.setattr(leases, "_now_ms", made.now_ms)
    return made


async def required(store: Store, owner: str) -> bool:
    try:
        await store.write(lambda tx: require(tx, NAME, owner))
    except LeaseLost:
        return False
    return True


async def test_only_one_of_many_gets_a_lease(store: Store) -> None:
    processes = [Leases(store, f"process-{number}") for number in range(20)]
    got = await asyncio.gather(*(process.acquire(NAME) for process in processes))
    assert sum(got) == 1
    winner = processes[got.index(True)]
    assert [process.held(NAME) for process in processes] == got
    assert await winner.acquire(NAME)
    assert await store.read(lambda tx: holder(tx, NAME)) == winner.owner
    assert await required(store, winner.owner)
    assert not await required(store, "somebody else")


async def test_holder_that_stops_renewing_knows_before_anybody_else_can_take_over(store: Store, clock: Clock) -> None:
    first, second = Leases(store, "first", ttl_s=10), Leases(store, "second", ttl_s=10)
    assert await first.acquire(NAME)
    clock.at_s += 7.9
    assert first.held(NAME)
    assert not await second.acquire(NAME)
    clock.at_s += 0.2
    assert not first.held(NAME)
    assert not await second.acquire(NAME)
    clock.at_s += 2
    assert await store.read(lambda tx: holder(tx, NAME)) is None
    assert await second.acquire(NAME)
    assert second.held(NAME)


async def test_unit_of_a_stopped_holder_is_undone(store: Store, clock: Clock) -> None:
    first, second = Leases(store, "first", ttl_s=10), Leases(store, "second", ttl_s=10)
    assert await first.acquire(NAME)
    clock.at_s += 11
    assert await second.acquire(NAME)

    def act(tx: Transaction) -> None:
        tx.execute("INSERT INTO chain_cursor (asset, block_number) VALUES ('a', 1)")
        require(tx, NAME, first.owner)

    with pytest.raises(LeaseLost):
        await store.write(act)
    assert await store.read(lambda tx: tx.execute("SELECT 1 FROM chain_cursor").fetchall()) == []


async def test_one_beat_renews_everything_and_drops_what_is_lost(store: Store, clock: Clock) -> None:
    first, second = Leases(store, "first", ttl_s=10), Leases(store, "second", ttl_s=10)
    assert await first.acquire(NAME)
    assert await first.acquire("watcher:84532")
    clock.at_s += 11
    assert await second.acquire(NAME)
    await first.beat()
    assert not first.held(NAME)
    # Expired, but nobody took it meanwhile.
    assert first.held("watcher:84532")
    assert second.held(NAME)
    clock.at_s += 7
    await first.beat()
    clock.at_s += 7
    assert first.held("watcher:84532")
    assert not await second.acquire("watcher:84532")


async def test_answer_that_comes_late_proves_less(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Leases(store, "first", ttl_s=10)
    write = store.write

    async def slow(*args: Any, **kwargs: Any) -> Any:
        result: Any = await write(*args, **kwargs)
        clock.at_s += 9  # the process was stopped between the commit and the answer
        return result

    monkeypatch.setattr(store, "write", slow)
    assert await held.acquire(NAME)
    assert not held.held(NAME)


async def test_given_back_lease_is_free_at_once(store: Store) -> None:
    first, second = Leases(store, "first"), Leases(store, "second")
    assert await first.acquire(NAME)
    assert await first.acquire("watcher:84532")
    await second.release(NAME)  # not its own
    assert not await second.acquire(NAME)
    await first.release(NAME)
    assert not first.held(NAME)
    assert await second.acquire(NAME)
    await first.stop()
    assert not first.held("watcher:84532")
    assert await second.acquire("watcher:84532")
    assert second.held(NAME)


async def test_heart_keeps_leases_and_outlives_an_outage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Leases(store, "first", ttl_s=1.5), Leases(store, "second", ttl_s=1.5)
    await first.start()
    assert await first.acquire(NAME)
    beats = asyncio.Queue[bool]()
    outages = [True]
    write = store.write

    async def failing_once(*args: Any, **kwargs: Any) -> Any:
        beats.put_nowait(True)
        if outages and outages.pop():
            raise StoreBusy("away")
        return await write(*args, **kwargs)

    monkeypatch.setattr(store, "write", failing_once)
    for _ in range(4):  # longer than its time to live
        await beats.get()
    monkeypatch.undo()
    assert first.held(NAME)
    assert not await second.acquire(NAME)
    await first.stop()
    assert await second.acquire(NAME)
