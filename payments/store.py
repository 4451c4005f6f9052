"""The database: durable writes grouped into few commits, and reads that never block the event loop.

A *unit* is a plain function of a `Transaction` that makes one atomic change. Units submitted while a commit is running
are committed together by the next one, each inside its own savepoint, so that a failing unit undoes only itself. When
`Store.write` returns, the change is on disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
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
BUSY_TIMEOUT_S = 30
_OUTAGES = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
})  # fmt: skip
SURELY_RETRY_S = 0.5
SURELY_WAIT_S = 10.0
"""How long a caller waits for a change that must not be lost, before it is left to the background."""

log = logging.getLogger(__name__)


class StoreBusy(Exception):
    """The database takes nothing now (queue or disk full, locked, closed); nothing was changed. The caller should answer 503
    and the client try again."""


class StoreOwned(Exception):
    """Another process serves from this database."""


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


def _nothing(_: object) -> None:
    return


@dataclass(slots=True)
class _Pending:
    unit: Unit[Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

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
        self._reading: list[sqlite3.Connection] = []
        self._owner_lock: int | None = None
        self._closed = False
        self._sure: set[asyncio.Task[Any]] = set()
        self._writer.start()

    async def write(self, unit: Unit[T], *, if_abandoned: Callable[[Transaction, T], object] | None = None) -> T:
        """Run `unit` atomically and return its result once it is durable.

        Args:
            unit: Makes the change. It may run on another thread, and must not wait for anything.
            if_abandoned: Undoes the change, given its result, in a unit of its own: for changes that somebody must end,
                when the caller is cancelled while they are being written and so never learns of them.

        Raises:
            StoreBusy: If too many writes are waiting, or the database cannot be written to.
            Exception: Whatever the unit raised; its changes are then undone.
        """
        future = self._submit(unit)
        try:
            # Shielded: a caller that hangs up does not take back what is queued.
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if if_abandoned is not None and not future.cancelled():
                future.add_done_callback(lambda written: self._undo(written, if_abandoned))
            raise

    async def write_surely(self, unit: Unit[T], done: Callable[[T], object] = _nothing) -> T:
        """Run a `unit` that ends something and so must not be lost: while the database takes nothing, it is tried again, for
        as long as this process lives, whether or not anybody waits for it any more.

        Args:
            unit: Makes the change, and changes nothing if it was made before.
            done: Called with the result once it is durable, also if the caller is cancelled or told to come back.

        Raises:
            StoreBusy: It is not durable after `SURELY_WAIT_S`, but goes on being tried; or the database is closed.
            Exception: Whatever the unit raised; `done` is not called.
        """
        task = asyncio.ensure_future(self._until_written(unit, done))
        self._sure.add(task)
        task.add_done_callback(self._sure_ended)
        try:
            async with asyncio.timeout(SURELY_WAIT_S):
                return await asyncio.shield(task)
        except TimeoutError:
            raise StoreBusy("the database cannot be written to now") from None

    async def _until_written(self, unit: Unit[T], done: Callable[[T], object]) -> T:
        while True:
            try:
                result = await self.write(unit)
            except StoreBusy as error:
                if self._closed:
                    raise
                log.warning("a change that must not be lost is tried again: %s", error)
                await asyncio.sleep(SURELY_RETRY_S)
            else:
                done(result)
                return result

    def _sure_ended(self, task: asyncio.Task[Any]) -> None:
        self._sure.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; if nobody does any more, nobody can be

    async def read(self, query: Unit[T]) -> T:
        """Run a read-only `query` on a reader thread, on one snapshot of the database, and return its result."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, query)
        except sqlite3.OperationalError as error:
            if _is_outage(error):
                raise _unusable(error) from error
            raise

    def own(self) -> None:
        """Become the one process that serves from this database, until `close`. Owning it again changes nothing.

        Raises:
            StoreOwned: If another process does; two would end each other's holds.
        """
        if self._owner_lock is not None:
            return
        # A lock on the database file itself would be dropped whenever SQLite closes any descriptor of that file.
        descriptor = os.open(
            self.path.with_name(self.path.name + ".owner"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreOwned(
                f"another gateway serves from {self.path}; stop it, or use another data directory"
            ) from None
        self._owner_lock = descriptor

    def close(self) -> None:
        """Finish every queued write, then stop the threads."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._readers.shutdown()
        for connection in self._reading:
            connection.close()
        if self._owner_lock is not None:
            os.close(self._owner_lock)
            self._owner_lock = None

    def _submit(self, unit: Unit[T]) -> asyncio.Future[T]:
        if self._closed:
            raise StoreBusy("the database is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        try:
            self._queue.put_nowait(_Pending(unit, loop, future))
        except queue.Full:
            raise StoreBusy("too many writes are waiting for the database") from None
        return future

    def _undo(self, written: asyncio.Future[T], if_abandoned: Callable[[Transaction, T], object]) -> None:
        if written.cancelled() or written.exception() is not None:
            return
        result = written.result()
        try:
            undone = self._submit(lambda tx: if_abandoned(tx, result))
        except StoreBusy:
            # The next start's recovery ends what nobody owns.
            log.warning("an abandoned write could not be undone now")
            return
        undone.add_done_callback(_report)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, timeout=BUSY_TIMEOUT_S, cached_statements=256, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _read(self, query: Unit[T]) -> T:
        connection = self._reader()
        connection.execute("BEGIN")
        try:
            return query(connection)
        finally:
            connection.execute("COMMIT")

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
            self._reading.append(connection)
        return connection

    def _write_forever(self) -> None:
        connection: sqlite3.Connection | None = None
        stopping = False
        while not stopping:
            group = [self._queue.get()]
            while len(group) < GROUP_MAX:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            # Whatever another thread queued behind the end is still written.
            stopping = None in group and self._queue.empty()
            if None in group and not stopping:
                self._queue.put(None)
            pending = [entry for entry in group if entry is not None]
            if pending:
                connection = self._commit(connection, pending)
                _tell(pending)
        if connection is not None:
            connection.close()

    def _commit(self, connection: sqlite3.Connection | None, group: list[_Pending]) -> sqlite3.Connection | None:
        try:
            if connection is None:
                connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")
            for entry in group:
                connection.execute("SAVEPOINT unit")
                try:
                    entry.result = entry.unit(connection)
                except Exception as error:  # noqa: BLE001 - handed to the unit's own caller
                    entry.error = _unusable(error) if _is_outage(error) else error
                    connection.execute("ROLLBACK TO unit")
                connection.execute("RELEASE unit")
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - handed to every caller: nothing of the group is durable
            told = _unusable(error) if isinstance(error, sqlite3.Error) else error
            for entry in group:
                entry.error = entry.error or told
            if connection is not None:
                # Closing rolls back, whatever state the connection is in; the next group opens a fresh one.
                connection.close()
                connection = None
        return connection


def _is_outage(error: Exception) -> bool:
    """Whether the database failed and not the statement: a full disk, another process's lock, a device that fails."""
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _OUTAGES


def _unusable(error: Exception) -> StoreBusy:
    """What callers are told of it; the operator finds the cause in the log."""
    log.error("the database failed: %s", error)
    busy = StoreBusy("the database cannot be used now")
    busy.__cause__ = error
    return busy


def _tell(group: list[_Pending]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Pending]] = {}
    for entry in group:
        by_loop.setdefault(entry.loop, []).append(entry)
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve_all, entries)
        except RuntimeError:
            # The loop was closed meanwhile; nobody is there to be told.
            log.debug("%d writes were finished for a closed event loop", len(entries))


def _resolve_all(entries: list[_Pending]) -> None:
    for entry in entries:
        entry.resolve()


def _report(undone: asyncio.Future[Any]) -> None:
    error = None if undone.cancelled() else undone.exception()
    if error is not None:
        log.error("an abandoned write could not be undone", exc_info=error)
