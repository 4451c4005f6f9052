"""Leases: which process does what only one may do at a time, among all that share a database.

A lease is a row that its owner renews; who stops renewing loses it. A process that was stopped (SIGSTOP, a suspended
machine) cannot know how long, so it believes it holds a lease only for as long as its own clock proves it, and a unit that
must not run without one asks the database itself (`require`): there all writers are serialised, so nobody can take the lease
between the question and the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable

from payments.store import Store, StoreBusy, Transaction

BEATS_PER_TTL = 3
"""How often a lease is renewed while it lasts: one beat may be lost."""
MARGIN = 0.2
"""The part of the time to live by which its owner gives a lease up early: for clocks that run differently, and for the time
between the question and what is done upon the answer."""

_TAKE = """
    INSERT INTO lease (name, owner, expires_ms) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_ms = excluded.expires_ms
    WHERE lease.owner = excluded.owner OR lease.expires_ms <= ?
    RETURNING name
"""
_RENEW = "UPDATE lease SET expires_ms = ? WHERE name = ? AND owner = ? RETURNING name"
_SEIZE = """
    INSERT INTO lease (name, owner, expires_ms) VALUES (?, ?, ?)
    ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, expires_ms = excluded.expires_ms
"""
_GIVE_BACK = "DELETE FROM lease WHERE name = ? AND owner = ? RETURNING name"
_END_INSTANCES = "DELETE FROM lease WHERE (name LIKE 'instance:%' OR name LIKE 'wish:%') AND expires_ms <= ?"
_REQUIRE = "SELECT 1 FROM lease WHERE name = ? AND owner = ? AND expires_ms > ?"
_HOLDER = "SELECT owner FROM lease WHERE name = ? AND expires_ms > ?"
_LIVING = "SELECT name FROM lease WHERE name LIKE ? AND expires_ms > ?"
FREED = "lease"
"""The channel on which everybody is told the name of a lease that was given back."""
FOR_EVER_MS = 2**53

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Somebody else does now what this process wanted to do; nothing was changed. `name` is the lease."""

    def __init__(self, name: str, owner: str) -> None:
        super().__init__(f"{name} is not {owner}'s any more")
        self.name = name


class Leases:
    """The leases of one process.

    Args:
        store: The database.
        owner: This process, e.g. its instance id; no other process has the same.
        ttl_s: How long a lease outlives its owner, in seconds; as the store says unless given.
    """

    def __init__(self, store: Store, owner: str, ttl_s: float | None = None) -> None:
        self.owner = owner
        self.ttl_s = store.lease_s if ttl_s is None else ttl_s
        assert self.ttl_s > 0
        self._store = store
        self._until: dict[str, float] = {}
        self._heart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to renew what is held, and what will be."""
        assert self._heart is None
        self._heart = asyncio.get_running_loop().create_task(self._beat_forever())

    async def stop(self) -> None:
        """Give everything back, so that others need not wait until it expires."""
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
            self._heart = None
        names = list(self._until)
        self._until.clear()
        with contextlib.suppress(StoreBusy):
            await self._store.write(lambda tx: _give_back(tx, names, self.owner))

    async def acquire(self, name: str) -> bool:
        """Take a lease that nobody holds, or hold on to it. False if somebody else has it.

        Raises:
            StoreBusy: It could not be asked for.
        """
        asked = _elapsed_s()
        ttl_ms = self._ttl_ms()
        taken = await self._store.write(
            lambda tx: _take(tx, name, self.owner, ttl_ms),
            if_abandoned=lambda tx, taken: _give_back(tx, [name] if taken else [], self.owner),
        )
        if taken:
            self._until[name] = self._proven_until(asked)
        return taken

    async def seize(self, name: str) -> None:
        """Take a lease, whoever had it, and for good: where nobody else can be alive, as on SQLite.

        Raises:
            StoreBusy: It could not be taken.
        """
        assert not self._store.shared
        await self._store.write(lambda tx: tx.execute(_SEIZE, (name, self.owner, FOR_EVER_MS)))
        self._until[name] = math.inf

    def lost(self, name: str) -> None:
        """A unit found that somebody else has it."""
        self._until.pop(name, None)

    def held(self, name: str) -> bool:
        """Whether this process certainly has the lease now. No input or output; ask again after every wait."""
        return _elapsed_s() < self._until.get(name, 0.0)

    async def release(self, name: str) -> None:
        """Give a lease back. One that is not held is left alone.

        Raises:
            StoreBusy: It could not be given back and expires by itself.
        """
        if self._until.pop(name, None) is not None:
            await self._store.write(lambda tx: _give_back(tx, [name], self.owner))

    async def beat(self) -> None:
        """Renew everything held, in one unit; what somebody else has taken meanwhile is lost."""
        names = [name for name, until in self._until.items() if until != math.inf]
        if not names:
            return
        asked = _elapsed_s()
        ttl_ms = self._ttl_ms()
        renewed = await self._store.write(lambda tx: _renew(tx, names, self.owner, ttl_ms))
        for name in names:
            if name not in self._until:
                continue  # given back meanwhile
            if name in renewed:
                self._until[name] = self._proven_until(asked)
            else:
                del self._until[name]
                log.warning("the lease %s is lost", name)

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(self.ttl_s / BEATS_PER_TTL)
            try:
                await self.beat()
            except StoreBusy as error:
                log.warning("leases cannot be renewed now: %s", error)
            except Exception:
                log.exception("leases could not be renewed")

    def _proven_until(self, asked: float) -> float:
        # Counted from the question, not from the answer: the row was written somewhere between the two.
        return asked + self.ttl_s * (1 - MARGIN)

    def _ttl_ms(self) -> int:
        return round(self.ttl_s * 1000)


def require(tx: Transaction, name: str, owner: str) -> None:
    """Let a unit go on only if `owner` has the lease when it commits.

    Raises:
        LeaseLost: It has not; the unit is undone.
    """
    if tx.execute(_REQUIRE, (name, owner, _now_ms(tx))).fetchone() is None:
        raise LeaseLost(name, owner)


def signer_name(chain_id: int, address: str) -> str:
    """The lease of whoever sends transactions of an account, lower-case hex: its nonces are one sequence."""
    return f"signer:{chain_id}:{address}"


def living_signers(tx: Transaction, chain_id: int) -> set[str]:
    """The accounts that some process sends with now."""
    prefix = signer_name(chain_id, "")
    return {name[len(prefix) :] for (name,) in tx.execute(_LIVING, (f"{prefix}%", _now_ms(tx))).fetchall()}


def wish_name(name: str, owner: str) -> str:
    """The lease that says that a living process wants another one."""
    return f"wish:{name}:{owner}"


def wishes(tx: Transaction, name: str) -> int:
    """How many living processes want a lease, whoever has it."""
    return len(tx.execute(_LIVING, (wish_name(name, "%"), _now_ms(tx))).fetchall())


def instance_name(instance: str) -> str:
    """The lease that says that a process lives."""
    return f"instance:{instance}"


def end_dead_instances(tx: Transaction, *, alone: bool) -> None:
    """Forget the processes that have stopped renewing; from here on they cannot renew either, but must begin anew.

    Args:
        tx: The unit's transaction.
        alone: Nobody else serves from this database, so that all leases are a dead process's.
    """
    if alone:
        tx.execute("DELETE FROM lease")
    else:
        tx.execute(_END_INSTANCES, (_now_ms(tx),))


def holder(tx: Transaction, name: str) -> str | None:
    """Who has the lease now, or None."""
    row = tx.execute(_HOLDER, (name, _now_ms(tx))).fetchone()
    return None if row is None else str(row[0])


def _take(tx: Transaction, name: str, owner: str, ttl_ms: int) -> bool:
    now = _now_ms(tx)
    return tx.execute(_TAKE, (name, owner, now + ttl_ms, now)).fetchone() is not None


def _renew(tx: Transaction, names: Iterable[str], owner: str, ttl_ms: int) -> set[str]:
    # An expired lease that nobody took is still its owner's: nobody else can have acted under it.
    until = _now_ms(tx) + ttl_ms
    return {name for name in names if tx.execute(_RENEW, (until, name, owner)).fetchone() is not None}


def _give_back(tx: Transaction, names: Iterable[str], owner: str) -> None:
    for name in names:
        if tx.execute(_GIVE_BACK, (name, owner)).fetchone() is not None:
            tx.notify(FREED, name)


def _elapsed_s() -> float:
    """A clock that is never set, and where there is one, one that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _now_ms(tx: Transaction) -> int:
    # The database's own clock: those of several machines differ.
    return tx.now_ms()
