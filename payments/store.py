"""The database: durable writes grouped into few commits, and reads that never block the event loop.

A *unit* is a plain function of a `Transaction` that makes one atomic change. Units submitted while a commit is running
are committed together by the next one, each inside its own savepoint, so that a failing unit undoes only itself. When
`Store.write` returns, the change is on disk. All writers of a database are serialised, whatever process they are in: what a
unit reads stays true until it is committed, so reading and then deciding is safe.

SQLite is for one serving process, PostgreSQL for any number (`payments.databases`); the same units run on both.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from payments.databases.base import (
    LEASE_S,
    CommitUnknown,
    Database,
    Deliver,
    Pending,
    Rows,
    StoreBusy,
    StoreOwned,
    Transaction,
    Unit,
)

__all__ = ["CommitUnknown", "Rows", "Store", "StoreBusy", "StoreOwned", "Transaction", "Unit", "is_postgres"]

T = TypeVar("T")

QUEUE_MAX = 10_000
GROUP_MAX = 256
SURELY_RETRY_S = 0.5
SURELY_WAIT_S = 10.0
"""How long a caller waits for a change that must not be lost, before it is left to the background."""

log = logging.getLogger(__name__)


def is_postgres(location: Path | str) -> bool:
    """Whether `location` is a PostgreSQL URL, and not a SQLite file."""
    return isinstance(location, str) and location.startswith(("postgresql://", "postgres://"))


def _nothing(_: object) -> None:
    return


class Store:
    """A database: one writer thread, a few readers.

    Args:
        location: A SQLite file, or a ``postgresql://`` URL. Its schema must be current (`payments.migrate.upgrade`).
        lease_s: How long the leases of a process outlive it. One that is stopped in the middle of a change keeps the others
            from writing for a third of that at most, so that they lose no lease by it.
    """

    def __init__(self, location: Path | str, *, lease_s: float = LEASE_S) -> None:
        self.location = location
        self.lease_s = lease_s
        self.instance = secrets.token_hex(8)
        """This process, in receipts and leases."""
        self._database = _open(location, self.instance, self._deliver, lease_s / 3)
        self.shared = self._database.shared
        """Whether other processes may serve from the same database."""
        self._queue: queue.Queue[Pending | None] = queue.Queue(maxsize=QUEUE_MAX)
        self._writer = threading.Thread(target=self._write_forever, name="farebox-store-writer", daemon=True)
        self._readers = ThreadPoolExecutor(
            max_workers=self._database.readers, thread_name_prefix="farebox-store-reader"
        )
        self._closed = False
        self._sure: set[asyncio.Task[Any]] = set()
        self._listeners: dict[str, list[_Listener]] = {}
        self._writer.start()

    async def write(
        self,
        unit: Unit[T],
        *,
        done: Callable[[T], object] | None = None,
        if_abandoned: Callable[[Transaction, T], object] | None = None,
    ) -> T:
        """Run `unit` atomically and return its result once it is durable.

        Args:
            unit: Makes the change. It may run on another thread, and must not wait for anything.
            done: Called with the result once it is durable, also if the caller is cancelled meanwhile.
            if_abandoned: Undoes the change, given its result, in a unit of its own: for changes that somebody must end,
                when the caller is cancelled while they are being written and so never learns of them.

        Raises:
            StoreBusy: If too many writes are waiting, or the database cannot be written to.
            Exception: Whatever the unit raised; its changes are then undone.
        """
        future = self._submit(unit)
        if done is not None:
            future.add_done_callback(lambda written: _tell_if_written(written, done))
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
        """Run a read-only `query` on a reader thread, on one snapshot of the database, and return its result.

        Raises:
            StoreBusy: The database cannot be asked now.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._database.read, query)

    async def listen(self, channel: str, callback: Callable[[str], object]) -> Callable[[], None]:
        """Have `callback` called on this event loop with the payload of every notification of `channel` that any process
        commits (`Transaction.notify`). While the database is away notifications are lost: look into it now and then as well.

        Returns:
            Ends it.
        """
        listener = _Listener(asyncio.get_running_loop(), callback)
        self._listeners.setdefault(channel, []).append(listener)
        await asyncio.to_thread(self._database.listen)
        return lambda: self._listeners[channel].remove(listener)

    def own(self) -> None:
        """Become a process that serves from this database, until `close`: on SQLite the only one. Again: nothing.

        Raises:
            StoreOwned: If another process does and the database is not shared; two would end each other's holds.
        """
        self._database.own()

    def close(self) -> None:
        """Finish every queued write, then stop the threads."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        self._readers.shutdown()
        self._database.close()

    def _submit(self, unit: Unit[T]) -> asyncio.Future[T]:
        if self._closed:
            raise StoreBusy("the database is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        try:
            self._queue.put_nowait(Pending(unit, loop, future))
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

    def _write_forever(self) -> None:
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
                self._database.commit(pending, self._refuse_queued)
                _tell(pending)
        self._database.end_writing()

    def _refuse_queued(self) -> bool:
        """While the database is away and a commit in doubt: only its own callers wait. Says whether the store is closing."""
        refused = []
        while True:
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                break
            if entry is not None:
                entry.error = StoreBusy("the database cannot be used now")
                refused.append(entry)
        _tell(refused)
        if self._closed:
            self._queue.put(None)
        return self._closed

    def _deliver(self, channel: str, payload: str) -> None:
        for listener in list(self._listeners.get(channel, ())):
            listener.call(payload)


class _Listener:
    """A callback and the event loop that it belongs to."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[str], object]) -> None:
        self._loop = loop
        self._callback = callback

    def call(self, payload: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self._callback, payload)
        except RuntimeError:
            log.debug("a notification came for a closed event loop")


def _open(location: Path | str, instance: str, deliver: Deliver, idle_s: float) -> Database:
    if is_postgres(location):
        from payments.databases.postgres import Postgres

        return Postgres(str(location), instance, deliver, idle_s)
    from payments.databases.sqlite import Sqlite

    return Sqlite(Path(location), instance, deliver)


def _tell(group: list[Pending]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[Pending]] = {}
    for entry in group:
        by_loop.setdefault(entry.loop, []).append(entry)
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve_all, entries)
        except RuntimeError:
            # The loop was closed meanwhile; nobody is there to be told.
            log.debug("%d writes were finished for a closed event loop", len(entries))


def _resolve_all(entries: list[Pending]) -> None:
    for entry in entries:
        entry.resolve()


def _tell_if_written(written: asyncio.Future[T], done: Callable[[T], object]) -> None:
    if not written.cancelled() and written.exception() is None:
        done(written.result())


def _report(undone: asyncio.Future[Any]) -> None:
    error = None if undone.cancelled() else undone.exception()
    if error is not None:
        log.error("an abandoned write could not be undone", exc_info=error)
