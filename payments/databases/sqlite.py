"""SQLite in WAL mode with full synchronisation: one process, one writer, a few readers."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from payments.databases.base import Deliver, Pending, StoreOwned, Unit, unusable

T = TypeVar("T")

BUSY_TIMEOUT_S = 30
_OUTAGES = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
})  # fmt: skip


class Connection(sqlite3.Connection):
    """A connection is the transaction that units see; what they notify of waits for the commit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instance = ""
        self.notices: list[tuple[str, str]] = []

    def notify(self, channel: str, payload: str) -> None:
        self.notices.append((channel, payload))

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


class Sqlite:
    """A database file. Its schema must be current (`payments.migrate.upgrade`).

    Args:
        path: The file.
        instance: This process's name.
        deliver: Takes notifications.
    """

    shared = False
    readers = 2

    def __init__(self, path: Path, instance: str, deliver: Deliver) -> None:
        self._path = path
        self._instance = instance
        self._deliver = deliver
        self._writing: Connection | None = None
        self._local = threading.local()
        self._reading: list[Connection] = []
        self._owner_lock: int | None = None

    def commit(self, group: list[Pending], in_doubt: Callable[[], bool]) -> None:
        """Run a group of units. A commit on a file is never in doubt."""
        notices: list[tuple[str, str]] = []
        try:
            if self._writing is None:
                self._writing = self._connect()
            connection = self._writing
            connection.execute("BEGIN IMMEDIATE")
            for entry in group:
                connection.notices = []
                connection.execute("SAVEPOINT unit")
                try:
                    entry.result = entry.unit(connection)
                    notices += connection.notices
                except Exception as error:  # noqa: BLE001 - handed to the unit's own caller
                    entry.error = unusable(error) if _is_outage(error) else error
                    connection.execute("ROLLBACK TO unit")
                connection.execute("RELEASE unit")
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - handed to every caller: nothing of the group is durable
            told = unusable(error) if isinstance(error, sqlite3.Error) else error
            for entry in group:
                entry.error = entry.error or told
            # Closing rolls back, whatever state the connection is in; the next group opens a fresh one.
            self.end_writing()
        else:
            for channel, payload in notices:
                self._deliver(channel, payload)

    def read(self, query: Unit[T]) -> T:
        """Run a query on one snapshot."""
        try:
            connection = self._reader()
            connection.execute("BEGIN")
            try:
                return query(connection)
            finally:
                connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if _is_outage(error):
                raise unusable(error) from error
            raise

    def own(self) -> None:
        """Lock the database for this process."""
        if self._owner_lock is not None:
            return
        # A lock on the database file itself would be dropped whenever SQLite closes any descriptor of that file.
        lock_path = self._path.with_name(self._path.name + ".owner")
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StoreOwned(
                f"another gateway serves from {self._path}; stop it, use another data directory, or PostgreSQL"
            ) from None
        self._owner_lock = descriptor

    def listen(self) -> None:
        """Every commit delivers by itself."""

    def end_writing(self) -> None:
        """Close the writer's connection."""
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def close(self) -> None:
        """Close the readers' connections and give up the lock."""
        for connection in self._reading:
            connection.close()
        if self._owner_lock is not None:
            os.close(self._owner_lock)
            self._owner_lock = None

    def _connect(self) -> Connection:
        connection = sqlite3.connect(
            self._path,
            isolation_level=None,
            timeout=BUSY_TIMEOUT_S,
            cached_statements=256,
            check_same_thread=False,
            factory=Connection,
        )
        connection.instance = self._instance
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _reader(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
            self._reading.append(connection)
        return connection


def _is_outage(error: Exception) -> bool:
    """Whether the database failed and not the statement: a full disk, another process's lock, a device that fails."""
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _OUTAGES
