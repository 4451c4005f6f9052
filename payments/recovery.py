"""Putting right what a crash left behind, before anything else runs; and sweeping away what has expired.

A receipt says which instance works on it, and an instance lives as long as its lease. The open receipts of the others are
orphans, and what they held is freed: a signed payment's receipt is interrupted, to be taken up by the same payment sent
again, the others are released. On SQLite nobody else works on anything at a start; on PostgreSQL each gateway also looks now
and then, so that a replica that died is cleaned up by the others. Transfers that are under way are the settlement engine's:
when it finds one mined, the money becomes the payer's credit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from payments import receipts
from payments.leases import Leases, end_dead_instances, instance_name
from payments.store import Store, StoreBusy, Transaction
from payments.tenders import authorizations, closing, pledges

REASON = "gateway_restarted"

WATCHES_PER_TTL = 3
"""How often others are looked after, and its own life proven, while a lease lasts."""

_ORPHANED_HOLDS = """
    SELECT id FROM ledger_transfer WHERE state = 'pending' AND id LIKE 'hold:%' AND NOT EXISTS (
        SELECT 1 FROM receipt JOIN lease ON lease.name = 'instance:' || receipt.instance
        WHERE receipt.id = ledger_transfer.reference
    )
"""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much there was to put right."""

    voided_holds: int
    interrupted_payments: int
    released_requests: int
    forgotten_reservations: int


async def recover(store: Store) -> Recovered:
    """Begin to serve from the database and put right what dead processes left; before the settlement engine starts.

    Raises:
        StoreOwned: Another process serves from this database, which only one may do.
    """
    store.own()
    return await _put_right(store, alone=not store.shared)


@contextlib.asynccontextmanager
async def serving(store: Store) -> AsyncIterator[Leases]:
    """Serve from the database: put right what dead processes left, prove that this one lives, and look after the others. The
    leases of this process are given back at the end.

    Raises:
        StoreOwned: Another process serves from this database, which only one may do.
    """
    await recover(store)
    leases = Leases(store, store.instance)
    await leases.start()
    try:
        await leases.acquire(instance_name(store.instance))
        watcher = asyncio.create_task(watch(store, leases))
        try:
            yield leases
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
    finally:
        await leases.stop()


async def watch(store: Store, leases: Leases) -> None:
    """While this process serves: prove that it lives, and put right what other replicas leave when they die. For ever.

    Args:
        store: Owned.
        leases: Under way; this process's.
    """
    name = instance_name(store.instance)
    while True:
        await asyncio.sleep(leases.ttl_s / WATCHES_PER_TTL)
        try:
            if not leases.held(name):
                # It was stopped for longer than the lease lasts; what it was working on then is not its own any more.
                await leases.acquire(name)
            if store.shared:
                await _put_right(store, alone=False)
        except StoreBusy as error:
            log.warning("other replicas cannot be looked after now: %s", error)
        except Exception:
            # Without this loop others would take this process for dead, and nobody would look after theirs.
            log.exception("looking after other replicas failed")


async def _put_right(store: Store, *, alone: bool) -> Recovered:
    recovered = await store.write(lambda tx: put_right(tx, alone=alone))
    if recovered != Recovered(0, 0, 0, 0):
        log.warning("recovered from a crash: %s", recovered)
    return recovered


def put_right(tx: Transaction, *, alone: bool) -> Recovered:
    """End what belongs to no living process, as one unit; `alone`: no other process serves from this database."""
    end_dead_instances(tx, alone=alone)
    holds = [row[0] for row in tx.execute(_ORPHANED_HOLDS).fetchall()]
    for hold in holds:
        closing.void(tx, hold)
    forgotten = authorizations.forget_unwritten(tx)
    interrupted, released = receipts.end_orphans(tx, REASON)
    pledges.burn_orphans(tx)
    return Recovered(len(holds), interrupted, released, forgotten)


def sweep_expired(tx: Transaction, now_ms: int) -> int:
    """Delete kept answers and used sign-in nonces whose time is over.

    Returns:
        How many rows that were.
    """
    swept = tx.execute("DELETE FROM replay WHERE expires_ms <= ?", (now_ms,)).rowcount
    return swept + tx.execute("DELETE FROM sign_in_nonce WHERE expires_ms <= ?", (now_ms,)).rowcount
