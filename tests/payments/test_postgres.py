"""The store on PostgreSQL: many writers that cannot overtake each other, and connections that die at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import psycopg
import pytest

import payments.databases.postgres as postgres_module
from payments import accounts, migrate
from payments.ledger import books, transfers
from payments.ledger.accounts import payer_account
from payments.ledger.transfers import Balance
from payments.store import Store, StoreBusy, Transaction, Unit
from tests.databases import PostgresServer
from tests.payments import exact_samples as samples

PAYER = "payer:0xa@USD"


@pytest.fixture
def store(postgres_database: str) -> Iterator[Store]:
    opened = Store(postgres_database)
    yield opened
    opened.close()


def noting(asset: str) -> Unit[str]:
    def unit(tx: Transaction) -> str:
        tx.execute("INSERT INTO chain_cursor (asset, block_number) VALUES (?, 1)", (asset,))
        return asset

    return unit


def noted(tx: Transaction) -> list[str]:
    return [row[0] for row in tx.execute("SELECT asset FROM chain_cursor ORDER BY asset").fetchall()]


def kill_own_connection(tx: Transaction) -> None:
    with contextlib.suppress(psycopg.Error):
        tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def test_failing_units_undo_only_themselves(store: Store) -> None:
    units = [store.write(noting(asset)) for asset in ("a", "b", "a", "c", "b", "d")]
    results = await asyncio.gather(*units, return_exceptions=True)
    assert [isinstance(result, psycopg.errors.UniqueViolation) for result in results] == [
        False, False, True, False, True, False,
    ]  # fmt: skip
    assert await store.read(noted) == ["a", "b", "c", "d"]


async def test_unit_that_swallows_a_database_error_is_undone_and_nothing_else(store: Store) -> None:
    def swallowing(tx: Transaction) -> None:
        tx.execute("INSERT INTO chain_cursor (asset, block_number) VALUES ('swallowed', 1)")
        with contextlib.suppress(psycopg.Error):
            tx.execute("INSERT INTO chain_cursor (asset, block_number) VALUES ('swallowed', 1)")

    results = await asyncio.gather(
        store.write(noting("a")),
        store.write(swallowing),
        store.write(noting("b")),
        return_exceptions=True,
    )
    with pytest.raises((psycopg.Error, StoreBusy)):
        await store.write(swallowing)
    # The first may have been written alone, before the two others.
    assert [result for result in results if isinstance(result, str)] == ["a", "b"]
    assert await store.read(noted) == ["a", "b"]


async def test_connection_that_dies_in_a_unit_fails_the_group_and_the_next_one_works(store: Store) -> None:
    with pytest.raises(StoreBusy):
        await store.write(kill_own_connection)
    await store.write(noting("b"))
    assert await store.read(noted) == ["b"]


async def test_idle_connections_that_died_are_replaced_without_anybody_noticing(
    store: Store, postgres: PostgresServer
) -> None:
    await store.write(noting("a"))
    assert await store.read(noted) == ["a"]
    name = store.read(lambda tx: tx.execute("SELECT current_database()").fetchone()[0])
    postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{await name}'")
    await store.write(noting("b"))
    assert await store.read(noted) == ["a", "b"]


@pytest.mark.parametrize("committed", [True, False])
async def test_fate_of_a_commit_whose_answer_was_lost_is_learnt(
    store: Store, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    await store.write(noting("before"))
    simple = postgres_module._simple
    lost: list[str] = []

    def losing(connection: postgres_module.Connection, statements: str) -> object:
        if not lost and statements.endswith("; COMMIT"):
            lost.append(statements)
            if committed:
                simple(connection, statements)
            connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return simple(connection, statements)

    monkeypatch.setattr(postgres_module, "_simple", losing)
    writing = store.write(noting("a"))
    if committed:
        assert await writing == "a"
    else:
        with pytest.raises(StoreBusy):
            await writing
    assert lost
    assert await store.read(noted) == (["a", "before"] if committed else ["before"])
    await store.write(noting("b"))


async def test_while_a_commit_is_in_doubt_only_its_own_callers_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.write(noting("before"))
    simple, connect = postgres_module._simple, postgres_module._connect
    away = [True]
    asked = threading.Event()

    def losing(connection: postgres_module.Connection, statements: str) -> object:
        if away and statements.endswith("; COMMIT"):
            simple(connection, statements)
            connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return simple(connection, statements)

    def refusing(url: str, options: str) -> postgres_module.Connection:
        asked.set()
        if away:
            raise psycopg.OperationalError("connection refused")
        return connect(url, options)

    monkeypatch.setattr(postgres_module, "_simple", losing)
    monkeypatch.setattr(postgres_module, "_connect", refusing)
    doubtful = asyncio.ensure_future(store.write(noting("a")))
    assert await asyncio.to_thread(asked.wait, 10)
    with pytest.raises(StoreBusy):
        await store.write(lambda tx: None)
    assert not doubtful.done()
    away.clear()
    assert await doubtful == "a"
    assert await store.read(noted) == ["a", "before"]


async def test_readers_cannot_write_and_see_one_snapshot(store: Store) -> None:
    loop = asyncio.get_running_loop()

    def look_twice(tx: Transaction) -> tuple[list[str], list[str]]:
        before = noted(tx)
        asyncio.run_coroutine_threadsafe(store.write(noting("a")), loop).result(10)
        return before, noted(tx)

    assert await store.read(look_twice) == ([], [])
    assert await store.read(noted) == ["a"]
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        await store.read(lambda tx: tx.execute("DELETE FROM chain_cursor"))


SPEND = """
import asyncio, sys
from payments.ledger import transfers
from payments.ledger.transfers import InsufficientFunds
from payments.store import Store

async def main() -> None:
    store = Store(sys.argv[1])
    def debit(number):
        def unit(tx):
            transfers.post(tx, id=f"{sys.argv[2]}:{number}", debit="payer:0xa@USD", credit="revenue@USD", amount=7,
                           reference="r")
        return unit
    done = await asyncio.gather(*(store.write(debit(number)) for number in range(100)), return_exceptions=True)
    assert all(result is None or isinstance(result, InsufficientFunds) for result in done), done
    print(done.count(None))
    store.close()

asyncio.run(main())
"""


async def test_two_processes_never_spend_more_than_there_is(store: Store) -> None:
    await store.write(
        lambda tx: transfers.post(tx, id="f", debit="custody@USD", credit=PAYER, amount=500, reference="r")
    )
    spend = [sys.executable, "-c", SPEND, str(store.location)]
    spenders = [asyncio.to_thread(subprocess.check_output, [*spend, name]) for name in ("one", "two")]
    assert sum(int(output) for output in await asyncio.gather(*spenders)) == 71
    assert (await store.read(lambda tx: transfers.balance(tx, PAYER))).balance == 500 - 71 * 7
    assert await store.read(books.check) == []


SPEND_BY_TENDER = """
import asyncio, sys
from payments.errors import PaymentRefused
from payments.store import Store
from payments.tenders.account import AccountTender
from payments.tenders.base import Outcome
from payments.tenders.prepaid import PrepaidTender
from tests.payments.exact_samples import ASSET, PAYER, QUOTED, quote_of

async def main() -> None:
    store = Store(sys.argv[1])
    tenders = [PrepaidTender(store, PAYER, [ASSET]), AccountTender(store, "key", "team")]
    async def spend(number):
        try:
            hold = await tenders[number % 2].authorize(quote_of(), {})
        except PaymentRefused:
            return 0
        return (await hold.capture(QUOTED, Outcome())).charged_nano_usd
    charged = await asyncio.gather(*(spend(number) for number in range(200)))
    print(sum(charged[::2]), sum(charged[1::2]))
    store.close()

asyncio.run(main())
"""


async def test_two_processes_never_overdraw_a_wallet_or_a_pool(store: Store) -> None:
    def fund(tx: Transaction) -> None:
        account = payer_account(samples.PAYER, samples.ASSET)
        custody, credit = f"custody@{samples.ASSET}", 60 * samples.QUOTED + 1
        transfers.post(tx, id="credit", debit=custody, credit=account, amount=credit, reference="r")
        accounts.fund_pool(tx, "team", 41 * samples.QUOTED + 1, "first")

    await store.write(fund)
    spend = [sys.executable, "-c", SPEND_BY_TENDER, str(store.location)]
    spenders = [asyncio.to_thread(subprocess.check_output, spend) for _ in range(2)]
    charged = [[int(number) for number in output.split()] for output in await asyncio.gather(*spenders)]
    assert [sum(column) for column in zip(*charged, strict=True)] == [60 * samples.QUOTED, 41 * samples.QUOTED]
    for account in (payer_account(samples.PAYER, samples.ASSET), accounts.pool_account("team")):
        assert await store.read(lambda tx, account=account: transfers.balance(tx, account)) == Balance(1, 0)  # type: ignore[misc]
    assert await store.read(books.check) == []


async def test_notification_reaches_other_processes_once_it_is_committed(store: Store) -> None:
    other = Store(store.location)
    heard: asyncio.Queue[str] = asyncio.Queue()
    stop = await other.listen("orders", heard.put_nowait)

    def failing(tx: Transaction) -> None:
        tx.notify("orders", "never")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.write(failing)
    await store.write(lambda tx: tx.notify("others", "not for us"))
    await store.write(lambda tx: tx.notify("orders", "one\ntwo"))
    assert await asyncio.wait_for(heard.get(), 10) == "one\ntwo"
    stop()
    await asyncio.to_thread(other.close)
    assert heard.empty()


def test_unreachable_database_is_told_without_its_password() -> None:
    with pytest.raises(migrate.DatabaseUnreachable) as caught:
        migrate.upgrade("postgresql://farebox:hunter2@127.0.0.1:1/farebox")
    assert "hunter2" not in str(caught.value)
    assert "127.0.0.1:1" in str(caught.value)


def test_two_starts_at_once_make_one_schema(postgres: PostgresServer) -> None:
    postgres.execute("CREATE DATABASE bare")
    url = postgres.url("bare")
    script = "import sys; from payments import migrate; migrate.upgrade(sys.argv[1])"
    starts = [subprocess.Popen([sys.executable, "-c", script, url]) for _ in range(3)]
    assert [start.wait(60) for start in starts] == [0, 0, 0]
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(migrate.HEAD,)]
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(migrate.SchemaTooNew, match="newer Farebox"):
        migrate.upgrade(url)
    postgres.drop(url)
