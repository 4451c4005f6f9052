"""Putting right what a crash left behind, before anything else runs; and sweeping away what has expired.

At a start nobody works on any request, so every open receipt is an orphan. What they held is freed: a signed payment's
receipt is interrupted, to be taken up by the same payment sent again, the others are released. Transfers that are under
way are the settlement engine's: when it finds one mined, the money becomes the payer's credit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from payments import receipts
from payments.ledger import transfers
from payments.store import Store, Transaction
from payments.tenders import authorizations, pledges

REASON = "gateway_restarted"

_ORPHANED_HOLDS = "SELECT id FROM ledger_transfer WHERE state = 'pending' AND id LIKE 'hold:%'"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much there was to put right."""

    voided_holds: int
    interrupted_payments: int
    released_requests: int
    forgotten_reservations: int


async def recover(store: Store) -> Recovered:
    """Become the database's one owner and put right what the last one left; before the settlement engine starts.

    Raises:
        StoreOwned: Another process serves from this database.
    """
    store.own()
    recovered = await store.write(put_right)
    if recovered != Recovered(0, 0, 0, 0):
        log.warning("recovered from a crash: %s", recovered)
    return recovered


def put_right(tx: Transaction) -> Recovered:
    """What `recover` does, as one unit."""
    holds = [row[0] for row in tx.execute(_ORPHANED_HOLDS).fetchall()]
    for hold in holds:
        transfers.void(tx, hold)
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
