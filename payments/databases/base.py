"""What the store asks of a database, and what units see of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class StoreBusy(Exception):
    """The database takes nothing now (queue or disk full, locked, away, closed); nothing was changed. The caller should answer
    503 and the client try again."""


class StoreOwned(Exception):
    """Another process serves from this database."""


class CommitUnknown(Exception):
    """The connection died while a change was being committed, and the store was closed before the database could say whether it
    was. The next process finds it made or not made, never half."""


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

    instance: str
    """The process that makes the change."""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Rows:
        """Run one statement and return its rows."""

    def notify(self, channel: str, payload: str) -> None:
        """Tell everybody who listens on `channel`, in every process of this database, once the change is committed.

        Args:
            channel: A name without a line break.
            payload: At most `PAYLOAD_BYTES_MAX` bytes.
        """

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC by the one clock that all processes of this database share."""


Unit = Callable[[Transaction], T]
Deliver = Callable[[str, str], None]
"""Takes a channel and a payload, on any thread."""

PAYLOAD_BYTES_MAX = 7_000
LEASE_S = 15.0
"""How long what a process holds outlives it (`payments.leases`), unless the operator says otherwise."""


@dataclass(slots=True)
class Pending:
    """A unit that waits to be written, or has been, and who is to be told."""

    unit: Unit[Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None

    def resolve(self) -> None:
        """Tell the caller; on its own event loop."""
        if self.future.cancelled():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Database(Protocol):
    """One database, as `payments.store` uses it."""

    shared: bool
    """Whether several processes may serve from it."""
    readers: int
    """How many reads may run at once."""

    def commit(self, group: list[Pending], in_doubt: Callable[[], bool]) -> None:
        """Run all units of a group and commit them at once, each standing or falling by itself; sets their results and errors.
        Called by the writer's thread alone.

        Args:
            group: The units.
            in_doubt: Called now and then while the fate of the commit cannot be learnt; says whether to give up.
        """

    def read(self, query: Unit[T]) -> T:
        """Run a query on one snapshot. Called by the readers' threads.

        Raises:
            StoreBusy: The database cannot be asked now.
        """

    def own(self) -> None:
        """See `payments.store.Store.own`."""

    def listen(self) -> None:
        """Have every notification delivered from here on. It may take seconds. Again: nothing."""

    def end_writing(self) -> None:
        """The writer's thread writes no more."""

    def close(self) -> None:
        """Nobody reads any more either."""


def unusable(error: Exception) -> StoreBusy:
    """What callers are told of an outage; the operator finds the cause in the log."""
    log.error("the database failed: %s", error)
    busy = StoreBusy("the database cannot be used now")
    busy.__cause__ = error
    return busy
