"""Learns what other processes do to a network's settlements: from their news at once, and by looking into the database now and
then, since news can be lost.

On a database of one process nothing happens without this process's own knowledge; there it only finds the orders that units of
other parts have written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection

from payments.settlement import news, outbox, states
from payments.settlement.news import Decision
from payments.settlement.outbox import Entry
from payments.settlement.outcomes import Outcomes
from payments.store import Store, StoreBusy, Transaction

log = logging.getLogger(__name__)

ENTRIES_MAX = 500
"""Rows in one look."""
MORE_AFTER_S = 0.2
"""Until the next look, if there were more."""


class Lookout:
    """The eyes of one network's engine.

    Args:
        store: The database.
        chain_id: Of the network.
        outcomes: Who waits in this process.
        serves: Says which kinds of orders this process could sign for now.
        waiting: Tells the entries that this process believes to be queued.
        take: Called with a queued entry that this process could sign for; it may be known already.
        decided: Called with what another process decided.
        found: Called with the row of something awaited or believed to be queued.
        interval_s: Between looks, where there are other processes.
    """

    def __init__(
        self,
        store: Store,
        chain_id: int,
        outcomes: Outcomes,
        *,
        serves: Callable[[], Collection[str]],
        waiting: Callable[[], Collection[str]],
        take: Callable[[Entry], None],
        decided: Callable[[Decision], None],
        found: Callable[[Entry], None],
        interval_s: float,
    ) -> None:
        self._store, self._chain_id, self._outcomes = store, chain_id, outcomes
        self._serves, self._waiting = serves, waiting
        self._take, self._decided, self._found = take, decided, found
        self._interval_s = interval_s if store.shared else None
        self._wake = asyncio.Event()
        self._queued = False
        self._told: set[str] = set()
        self._unlisten: Callable[[], None] | None = None

    async def start(self) -> None:
        """Begin to hear the news; to be followed by `run`."""
        if self._store.shared:
            self._unlisten = await self._store.listen(news.channel(self._chain_id), self._hear)

    def stop(self) -> None:
        """Hear no more."""
        if self._unlisten is not None:
            self._unlisten()
            self._unlisten = None

    def look_for_queued(self) -> None:
        """Something may be queued that this process can sign for."""
        self._queued = True
        self._wake.set()

    async def run(self) -> None:
        """Look when there is news, and now and then, until cancelled."""
        loop = asyncio.get_running_loop()
        next_s = None if self._interval_s is None else loop.time() + self._interval_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_s):
                    await self._wake.wait()
            self._wake.clear()
            if next_s is not None and self._interval_s is not None and loop.time() >= next_s:
                # Whatever the news may have missed.
                next_s = loop.time() + self._interval_s
                self._queued = True
                self._told |= self._outcomes.awaited | set(self._waiting())
            try:
                await self._look()
            except StoreBusy as error:
                log.warning("settlements of other processes cannot be looked at now: %s", error)
                await asyncio.sleep(MORE_AFTER_S)
                self.look_for_queued()
            except Exception:
                # Without this loop nothing that others decide would ever be told.
                log.exception("looking at settlements of other processes failed")
                await asyncio.sleep(MORE_AFTER_S)
                self.look_for_queued()

    async def _look(self) -> None:
        kinds = sorted(self._serves()) if self._queued else []
        ids = sorted(self._told)[:ENTRIES_MAX]
        self._queued = False
        self._told.difference_update(ids)
        if not kinds and not ids:
            return
        queued, known = await self._store.read(lambda tx: self._read(tx, kinds, ids))
        for entry in queued:
            try:
                self._take(entry)
            except Exception:
                # An order that nobody can carry; the others can be.
                log.exception("the queued settlement %s cannot be taken up", entry.id)
        for entry in known:
            self._found(entry)
        if self._told:
            self._wake.set()
        if len(queued) == ENTRIES_MAX:
            asyncio.get_running_loop().call_later(MORE_AFTER_S, self.look_for_queued)

    def _read(self, tx: Transaction, kinds: list[str], ids: list[str]) -> tuple[list[Entry], list[Entry]]:
        queued = outbox.load_queued(tx, self._chain_id, kinds, ENTRIES_MAX) if kinds else []
        return queued, outbox.find_all(tx, ids) if ids else []

    def _hear(self, payload: str) -> None:
        if payload == news.QUEUED:
            self.look_for_queued()
            return
        instance, decisions = news.read(payload)
        if instance == self._store.instance:
            return
        awaited = self._outcomes.awaited
        for decision in decisions:
            self._decided(decision)
            if decision.state not in states.OPEN and decision.settlement_id in awaited:
                self._told.add(decision.settlement_id)
                self._wake.set()
