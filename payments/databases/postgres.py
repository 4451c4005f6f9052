"""PostgreSQL: any number of processes, one writer in each, a few readers.

Every group of units is one transaction that begins by waiting for one advisory lock, the same for all processes: all writers
of all replicas are serialised, as they are on SQLite, so that what a unit reads stays true until it is committed. Statements
see what was committed before the lock was theirs (READ COMMITTED takes a snapshot per statement). Readers never wait: each
query has one snapshot of its own.

A connection that dies during COMMIT leaves its fate unknown, and neither "done" nor "not done" may be guessed where money is
concerned. Each group therefore leaves a mark with its number, in the same transaction; on a new connection the writer first
waits for the lock, which the old transaction has until it is over, and then looks for the mark. A mark is a row and not a
transaction id because it stays true on a standby that took over.
"""

from __future__ import annotations

import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types.numeric import Int8Dumper

from payments.databases.base import (
    PAYLOAD_BYTES_MAX,
    CommitUnknown,
    Deliver,
    Pending,
    Rows,
    StoreBusy,
    Unit,
    unusable,
)

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

WRITERS_LOCK = 0x66617265626F78
CHANNEL = "farebox"
RETRY_S = 0.2
NOTIFICATION_POLL_S = 0.25
PREPARED_MAX = 1_000
_SESSION = {
    "connect_timeout": 5,
    "application_name": "farebox",
    # A server that vanished without a word is noticed.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_WRITER_OPTIONS = (
    "-c synchronous_commit=on -c default_transaction_isolation=read\\ committed"
    " -c lock_timeout=20s -c statement_timeout=30s"
)
_READER_OPTIONS = (
    "-c default_transaction_isolation=repeatable\\ read -c default_transaction_read_only=on"
    " -c idle_in_transaction_session_timeout=60s -c statement_timeout=60s"
)
_BEGIN = f"BEGIN; SELECT pg_advisory_xact_lock({WRITERS_LOCK})"
_MARK = (
    "INSERT INTO commit_mark (writer, number, written_ms)"
    " VALUES ('{writer}', {number}, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)"
    " ON CONFLICT (writer) DO UPDATE SET number = excluded.number, written_ms = excluded.written_ms"
)

log = logging.getLogger(__name__)


class _IntegerLoader(Loader):
    """SUM over a bigint is a numeric: an integer again, as on SQLite."""

    def load(self, data: Buffer) -> int | Decimal:
        text = bytes(data).decode()
        return Decimal(text) if "." in text else int(text)


class _Transaction:
    """What a unit sees."""

    def __init__(self, connection: Connection, instance: str) -> None:
        self.instance = instance
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Rows:
        return self._connection.cursor().execute(_translated(sql), parameters, prepare=True)

    def notify(self, channel: str, payload: str) -> None:
        assert len(payload.encode()) <= PAYLOAD_BYTES_MAX
        self.execute("SELECT pg_notify(?, ?)", (CHANNEL, f"{channel}\n{payload}"))

    def now_ms(self) -> int:
        row = self.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").fetchone()
        return int(row[0])


class Postgres:
    """A PostgreSQL database. Its schema must be current (`payments.migrate.upgrade`).

    Args:
        url: ``postgresql://…``.
        instance: This process's name; no other process has the same.
        deliver: Takes notifications.
        idle_s: For how long a process that was stopped inside a transaction may keep the others from writing.
    """

    shared = True
    readers = 4

    def __init__(self, url: str, instance: str, deliver: Deliver, idle_s: float) -> None:
        self._url = url
        self._writer_options = f"{_WRITER_OPTIONS} -c idle_in_transaction_session_timeout={round(idle_s * 1000)}ms"
        self._deliver = deliver
        self._instance = instance
        self._writer = secrets.token_hex(12)
        self._number = 0
        self._writing: Connection | None = None
        self._local = threading.local()
        self._reading: list[Connection] = []
        self._listener: threading.Thread | None = None
        self._listening = threading.Event()
        self._closed = threading.Event()

    def commit(self, group: list[Pending], in_doubt: Callable[[], bool]) -> None:
        """Run a group of units: one round trip begins and waits for the lock, one ends."""
        self._number += 1
        mark = _MARK.format(writer=self._writer, number=self._number)
        try:
            connection = self._begin()
            _run(_Transaction(connection, self._instance), connection, group)
        except Exception as error:  # noqa: BLE001 - handed to every caller: nothing was committed
            self._fail(group, error)
            return
        try:
            _simple(connection, f"{mark}; COMMIT")
        except Exception as error:  # noqa: BLE001
            # A server that answered "no" has undone everything.
            if not _dead(connection) or not self._was_committed(error, in_doubt, group):
                self._fail(group, error)

    def read(self, query: Unit[T]) -> T:
        """Run a query on one snapshot; a connection that had died meanwhile is replaced once."""
        for _ in range(2):
            known = getattr(self._local, "connection", None)
            connection: Connection | None = None
            try:
                connection = known or self._open_reader()
                _simple(connection, "BEGIN")
                try:
                    return query(_Transaction(connection, self._instance))
                finally:
                    if not _dead(connection):
                        _simple(connection, "ROLLBACK")
            except psycopg.Error as error:
                if connection is None or _dead(connection):
                    self._local.connection = None
                    if known is not None:
                        continue
                if connection is None or _dead(connection) or isinstance(error, psycopg.OperationalError):
                    raise unusable(error) from error
                raise
        raise StoreBusy("the database cannot be used now")

    def own(self) -> None:
        """Several processes serve from one database: their leases say who does what."""

    def listen(self) -> None:
        """Start the thread that listens, and wait until it does, for a few seconds."""
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen_forever, name="farebox-store-listener", daemon=True)
            self._listener.start()
        if not self._listening.wait(5):
            log.warning("notifications cannot be listened to yet")

    def end_writing(self) -> None:
        """Close the writer's connection."""
        if self._writing is None:
            return
        try:
            # Whoever ends in order leaves nothing to ask about.
            _simple(self._writing, f"DELETE FROM commit_mark WHERE writer = '{self._writer}'")  # noqa: S608 - random hex
        except psycopg.Error as error:
            log.debug("the last mark stays: %s", error)
        self._drop()

    def close(self) -> None:
        """Close all other connections."""
        self._closed.set()
        for connection in self._reading:
            connection.close()
        if self._listener is not None:
            self._listener.join(5)

    def _begin(self) -> Connection:
        """A transaction in which this process is the only one that writes."""
        if self._writing is not None:
            try:
                _simple(self._writing, _BEGIN)
            except psycopg.Error as error:
                if not _dead(self._writing):
                    raise
                # The server was restarted meanwhile, perhaps: nothing has been done yet.
                log.warning("the database is connected to again: %s", error)
                self._drop()
        if self._writing is None:
            self._writing = _connect(self._url, self._writer_options)
            _simple(self._writing, _BEGIN)
        return self._writing

    def _fail(self, group: list[Pending], error: Exception) -> None:
        told = unusable(error) if isinstance(error, psycopg.Error) else error
        for entry in group:
            entry.error = entry.error or told
        self._drop()

    def _drop(self) -> None:
        # Closing rolls back, whatever state the connection is in; the next group opens a fresh one.
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def _was_committed(self, cause: Exception, in_doubt: Callable[[], bool], group: list[Pending]) -> bool:
        """Whether the last group is durable, asked for as long as it takes: nobody may be told either before it is certain."""
        log.error("the connection died during a commit; its fate is looked up: %s", cause)
        self._drop()
        while True:
            try:
                connection = self._begin()
                query = f"SELECT number FROM commit_mark WHERE writer = '{self._writer}'"  # noqa: S608 - random hex
                row = _simple(connection, query).fetchone()
                _simple(connection, "ROLLBACK")
            except psycopg.Error as error:
                log.warning("the fate of a commit is not known yet: %s", error)
                self._drop()
            else:
                return row is not None and int(row[0]) == self._number
            if in_doubt():
                unknown = CommitUnknown("the database did not say whether a change was committed")
                for entry in group:
                    entry.error = entry.error or unknown
                return True
            time.sleep(RETRY_S)

    def _open_reader(self) -> Connection:
        connection: Connection = _connect(self._url, _READER_OPTIONS)
        self._reading = [known for known in self._reading if not known.closed]
        self._reading.append(connection)
        self._local.connection = connection
        return connection

    def _listen_forever(self) -> None:
        while not self._closed.is_set():
            try:
                with _connect(self._url, "") as connection:
                    _simple(connection, f"LISTEN {CHANNEL}")
                    self._listening.set()
                    while not self._closed.is_set():
                        for notice in connection.notifies(timeout=NOTIFICATION_POLL_S):
                            channel, _, payload = notice.payload.partition("\n")
                            self._deliver(channel, payload)
            except psycopg.Error as error:
                self._listening.clear()
                log.warning("notifications are missed until the database is back: %s", error)
                self._closed.wait(1)


def _run(transaction: _Transaction, connection: Connection, group: list[Pending]) -> None:
    """Run the units of a group, each standing or falling by itself."""
    alone = len(group) == 1
    if not alone:
        _simple(connection, "SAVEPOINT unit")
    for number, entry in enumerate(group, 1):
        try:
            entry.result = entry.unit(transaction)
            if not alone:
                # Also notices a unit that has swallowed a database error.
                _simple(connection, "RELEASE unit" if number == len(group) else "RELEASE unit; SAVEPOINT unit")
        except Exception as error:
            entry.error = unusable(error) if _is_outage(error, connection) else error
            if _dead(connection):
                raise
            _simple(connection, f"ROLLBACK; {_BEGIN}" if alone else "ROLLBACK TO unit")


def _connect(url: str, options: str) -> Connection:
    connection: Connection = psycopg.connect(
        url,
        autocommit=True,
        cursor_factory=psycopg.RawCursor,
        **_SESSION,  # type: ignore[arg-type]
        **({"options": options} if options else {}),  # type: ignore[arg-type]
    )
    connection.prepared_max = PREPARED_MAX
    # One type for all integers, or a statement would be prepared for every size of number.
    connection.adapters.register_dumper(int, Int8Dumper)
    connection.adapters.register_loader("numeric", _IntegerLoader)
    return connection


def _simple(connection: Connection, statements: str) -> psycopg.Cursor[tuple[Any, ...]]:
    """Run one or several statements without parameters in one round trip."""
    return connection.execute(statements, prepare=False)


def _dead(connection: Connection) -> bool:
    return connection.closed or connection.broken


def _is_outage(error: Exception, connection: Connection) -> bool:
    """Whether the database failed and not the statement."""
    if not isinstance(error, psycopg.Error):
        return False
    return isinstance(error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction) or _dead(connection)


@functools.cache
def _translated(sql: str) -> bytes:
    """The statement with the database's own placeholders. Text constants hold no question marks here."""
    parts = sql.split("?")
    return "".join(f"{part}${number}" for number, part in enumerate(parts[:-1], 1)).encode() + parts[-1].encode()
