"""The store on SQLite: grouped commits in which each unit stands or falls by itself, and reads of one snapshot."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import payments.store
from payments.databases.sqlite import Connection
from payments.store import Store, StoreBusy, StoreOwned, Transaction, Unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    connection = sqlite3.connect(tmp_path / "test.db")
    connection.execute("CREATE TABLE word (text TEXT PRIMARY KEY)")
    connection.close()
    opened = Store(tmp_path / "test.db")
    yield opened
    opened.close()


def adding(text: str) -> Unit[None]:
    """A unit that adds a word."""

    def unit(tx: Transaction) -> None:
        tx.execute("INSERT INTO word (text) VALUES (?)", (text,))

    return unit


def nothing(tx: Transaction) -> None:
    """A unit that changes nothing."""


def words(tx: Transaction) -> list[str]:
    return sorted(row[0] for row in tx.execute("SELECT text FROM word").fetchall())


def stored(location: Path | str) -> list[str]:
    connection = sqlite3.connect(location, factory=Connection)
    try:
        return words(connection)
    finally:
        connection.close()


async def test_write_is_on_disk_when_it_returns(store: Store) -> None:
    def unit(tx: Transaction) -> int:
        tx.execute("INSERT INTO word (text) VALUES ('a')")
        return 7

    assert await store.write(unit) == 7
    assert stored(store.location) == ["a"]


async def test_failing_unit_undoes_only_itself(store: Store) -> None:
    def bad(tx: Transaction) -> None:
        tx.execute("INSERT INTO word (text) VALUES ('half')")
        raise ValueError("no")

    results = await asyncio.gather(
        store.write(adding("a")), store.write(bad), store.write(adding("b")), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), ValueError, type(None)]
    assert stored(store.location) == ["a", "b"]


async def test_units_waiting_together_share_one_commit(store: Store) -> None:
    running, go_on = threading.Event(), threading.Event()
    statements: list[str] = []

    def first(tx: Transaction) -> None:
        assert isinstance(tx, sqlite3.Connection)
        tx.set_trace_callback(statements.append)
        running.set()
        assert go_on.wait(10)

    waiting = asyncio.ensure_future(store.write(first))
    await asyncio.to_thread(running.wait, 10)
    others = [asyncio.ensure_future(store.write(nothing)) for _ in range(50)]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(waiting, *others)
    assert statements.count("COMMIT") == 2


async def test_failed_commit_fails_the_whole_group_and_the_next_one_works(store: Store) -> None:
    def end_the_transaction(tx: Transaction) -> None:
        tx.execute("INSERT INTO word (text) VALUES ('a')")
        tx.execute("ROLLBACK")

    with pytest.raises(StoreBusy):
        await store.write(end_the_transaction)
    await store.write(adding("b"))
    assert stored(store.location) == ["b"]


def fill_the_disk(tx: Transaction) -> None:
    """From here on the database may not grow, as on a full disk."""
    tx.execute("PRAGMA max_page_count = 1")


def free_the_disk(tx: Transaction) -> None:
    tx.execute("PRAGMA max_page_count = 1073741823")


async def test_full_disk_is_busy_and_no_error_of_the_unit(store: Store) -> None:
    await store.write(fill_the_disk)
    with pytest.raises(StoreBusy):
        await store.write(adding("a" * 100_000))
    await store.write(free_the_disk)
    await store.write(adding("b"))
    assert stored(store.location) == ["b"]


async def test_change_that_must_not_be_lost_waits_for_room_on_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments.store, "SURELY_WAIT_S", 0.01)
    monkeypatch.setattr(payments.store, "SURELY_RETRY_S", 0.01)
    done = asyncio.Event()
    await store.write(fill_the_disk)
    with pytest.raises(StoreBusy):
        await store.write_surely(adding("a" * 100_000), lambda _: done.set())
    assert not done.is_set()
    await store.write(free_the_disk)
    await asyncio.wait_for(done.wait(), 10)
    assert stored(store.location) == ["a" * 100_000]


async def test_change_that_must_not_be_lost_outlives_its_caller(store: Store) -> None:
    done = asyncio.Event()
    writing = asyncio.ensure_future(store.write_surely(adding("a"), lambda _: done.set()))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await asyncio.wait_for(done.wait(), 10)
    assert stored(store.location) == ["a"]


async def test_reader_sees_one_snapshot_and_cannot_write(store: Store) -> None:
    loop = asyncio.get_running_loop()

    def look_twice(tx: Transaction) -> tuple[list[str], list[str]]:
        before = words(tx)
        asyncio.run_coroutine_threadsafe(store.write(adding("a")), loop).result(10)
        return before, words(tx)

    assert await store.read(look_twice) == ([], [])
    assert await store.read(words) == ["a"]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        await store.read(lambda tx: tx.execute("DELETE FROM word"))


async def test_write_abandoned_by_its_caller_is_undone(store: Store) -> None:
    go_on = threading.Event()

    def unit(tx: Transaction) -> str:
        assert go_on.wait(10)
        tx.execute("INSERT INTO word (text) VALUES ('a')")
        return "a"

    def undo(tx: Transaction, text: str) -> None:
        tx.execute("DELETE FROM word WHERE text = ?", (text,))
        tx.execute("INSERT INTO word (text) VALUES ('undone')")

    writing = asyncio.ensure_future(store.write(unit, if_abandoned=undo))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    go_on.set()
    await store.write(nothing)  # behind it, the undoing is queued
    await store.write(nothing)
    assert await store.read(words) == ["undone"]


async def test_abandoned_write_that_failed_has_nothing_to_undo(store: Store) -> None:
    go_on = threading.Event()
    undone: list[object] = []

    def unit(tx: Transaction) -> None:
        assert go_on.wait(10)
        raise ValueError("no")

    writing = asyncio.ensure_future(store.write(unit, if_abandoned=lambda tx, result: undone.append(result)))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    go_on.set()
    await store.write(nothing)
    await store.write(nothing)
    assert undone == []


async def test_closing_finishes_what_is_queued_and_refuses_more(store: Store) -> None:
    writing = [asyncio.ensure_future(store.write(adding(str(number)))) for number in range(300)]
    await asyncio.sleep(0)
    await asyncio.to_thread(store.close)
    await asyncio.gather(*writing)
    assert len(stored(store.location)) == 300
    with pytest.raises(StoreBusy):
        await store.write(words)


def test_one_process_owns_a_database(store: Store) -> None:
    store.own()
    store.own()
    script = (
        "import sys; from pathlib import Path; from payments.store import Store, StoreOwned\n"
        "try: Store(Path(sys.argv[1])).own()\n"
        "except StoreOwned: sys.exit(3)"
    )
    attempt = [sys.executable, "-c", script, str(store.location)]
    assert subprocess.run(attempt, check=False).returncode == 3
    second = Store(store.location)
    with pytest.raises(StoreOwned, match="another gateway"):
        second.own()
    second.close()
    store.close()
    assert subprocess.run(attempt, check=False).returncode == 0
