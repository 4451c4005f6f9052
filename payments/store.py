"""The database: durable writes grouped into few commits, and reads that never block the event loop.

A *unit* is a plain function of a `Transaction` that makes one atomic change. Units submitted while a commit is running
are committed together by the next one, each inside its own savepoint, so that a failing unit undoes only itself. When
`Store.write` returns, the change is on disk.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

QUEUE_MAX = 10_000
GROUP_MAX = 256
READERS = 2


class StoreBusy(Exception):
    """The write queue is full; the caller should answer 503 and the client try again."""


class Rows(Protocol):
    """What a statement returned."""

    @property
    def rowcount(self) -> int:
        """How many rows a write changed."""

    def fetchone(self) -> Any:
        """The next row as a tuple, or None."""

    def fetchall(self) -> list[Any]:
        """All remaining rows as tuples."""


class Transaction(Protocol):
    """What a unit sees: statements inside one atomic change. Placeholders are ``?`` on every database."""

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Rows:
        """Run one statement and return its rows."""


Unit = Callable[[Transaction], T]


@dataclass(slots=True)
class _Pending:
    unit: Unit[Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None

    def resolve(self) -> None:
        if self.future.cancelled():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Store:
    """A SQLite database in WAL mode with full synchronisation: one writer thread, a few readers.

    Args:
        path: The database file. Its schema must be current (`payments.migrate.upgrade`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._queue: queue.Queue[_Pending | None] = queue.Queue(maxsize=QUEUE_MAX)
        self._writer = threading.Thread(target=self._write_forever, name="farebox-store-writer", daemon=True)
        self._readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="farebox-store-reader")
        self._local = threading.local()
        self._closed = False
        self._writer.start()

    async def write(self, unit: Unit[T]) -> T:
        """Run `unit` atomically and return its result once it is durable.

        Raises:
            StoreBusy: If too many writes are waiting.
            Exception: Whatever the unit raised; its changes are then undone.
        """
        if self._closed:
            raise StoreBusy("the database is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        try:
            self._queue.put_nowait(_Pending(unit, loop, future))
        except queue.Full:
            raise StoreBusy("too many writes are waiting for the database") from None
        # Shielded: a caller that hangs up must not leave the outcome of a write unknown to the code that awaits it.
        return await asyncio.shield(future)

    async def read(self, query: Unit[T]) -> T:
        """Run a read-only `query` on a reader thread and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: query(self._reader()))

    def close(self) -> None:
        """Finish every queued write, then stop the threads."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._readers.shutdown()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, cached_statements=256)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
        return connection

    def _write_forever(self) -> None:
        connection = self._connect()
        stopping = False
        while not stopping:
            group = [self._queue.get()]
            while len(group) < GROUP_MAX:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = None in group
            pending = [entry for entry in group if entry is not None]
            if pending:
                self._commit(connection, pending)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, group: list[_Pending]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for entry in group:
                connection.execute("SAVEPOINT unit")
                try:
                    entry.result = entry.unit(connection)
                except Exception as error:  # noqa: BLE001 - handed to the unit's own caller
                    entry.error = error
                    connection.execute("ROLLBACK TO unit")
                connection.execute("RELEASE unit")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # The commit itself failed: nothing of the group is durable, and everybody in it must know.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for entry in group:
                entry.error = error
        by_loop: dict[asyncio.AbstractEventLoop, list[_Pending]] = {}
        for entry in group:
            by_loop.setdefault(entry.loop, []).append(entry)
        for loop, entries in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve_all, entries)


def _resolve_all(entries: list[_Pending]) -> None:
    for entry in entries:
        entry.resolve()
