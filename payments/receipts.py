"""Receipts: what became of each request, for whoever knows its unguessable id. They hold no content.

This module owns a receipt's state. What closing one does to the ledger is `payments.tenders.closing`'s matter.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from payments.money import nano_to_usd
from payments.store import Transaction

State = Literal["open", "captured", "released", "interrupted"]

TRANSITIONS: dict[str, frozenset[str]] = {
    # Somebody is working on the request, in this process.
    "open": frozenset({"captured", "released", "interrupted"}),
    # Nobody is; the same payment sent again takes it up, and what was paid is the payer's credit meanwhile.
    "interrupted": frozenset({"open", "released"}),
    # Answered, and charged.
    "captured": frozenset(),
    # Not charged: what was paid is the payer's credit for good.
    "released": frozenset(),
}
CLOSED = frozenset({"captured", "released"})

_INSERT = (
    "INSERT INTO receipt (id, state, uses, tender, payer, asset, quoted_nano_usd, paid_nano_usd, spent_nano_usd, details,"
    " instance, created_ms) VALUES (?, 'open', 1, ?, ?, ?, ?, 0, 0, ?, ?, ?)"
)
_DELETE = "DELETE FROM receipt WHERE id = ? AND paid_nano_usd = 0 AND state IN ('open', 'interrupted')"
_CLOSE = (
    "UPDATE receipt SET state = ?, charged_nano_usd = CAST(? AS BIGINT) + spent_nano_usd, details = COALESCE(?, details),"
    " reason = ?, closed_ms = ? WHERE id = ? AND uses = ? AND state = 'open' RETURNING id"
)
_RELEASE_UNSETTLED = (
    "UPDATE receipt SET state = 'released', reason = ?, closed_ms = ?,"
    " charged_nano_usd = CASE WHEN paid_nano_usd > 0 THEN spent_nano_usd ELSE 0 END"
    " WHERE id = ? AND state IN ('open', 'interrupted')"
)
_REOPEN = (
    "UPDATE receipt SET state = 'open', uses = uses + 1, reason = NULL, instance = ?"
    " WHERE id = ? AND state = 'interrupted' RETURNING uses"
)
_SPEND = "UPDATE receipt SET spent_nano_usd = spent_nano_usd + ? WHERE id = ?"
_SET_PAID = "UPDATE receipt SET paid_nano_usd = ? WHERE id = ?"
_EXPLAIN = "UPDATE receipt SET reason = ? WHERE id = ? AND state = 'released'"
_INTERRUPT_ORPHANS = (
    "UPDATE receipt SET state = 'interrupted', reason = ? WHERE state = 'open' AND (tender = 'exact' OR (tender = 'upto'"
    " AND EXISTS (SELECT 1 FROM payment_authorization AS whole WHERE whole.receipt_id = receipt.id"
    " AND whole.state IN ('reserved', 'paid', 'failed'))))"
    " AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.name = 'instance:' || receipt.instance) RETURNING id"
)
_RELEASE_ORPHANS = (
    "UPDATE receipt SET state = 'released', charged_nano_usd = 0, reason = ?, closed_ms = ? WHERE state = 'open'"
    " AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.name = 'instance:' || receipt.instance) RETURNING id"
)
_STATE = "SELECT state FROM receipt WHERE id = ?"
_VIEW = """
    SELECT receipt.id, receipt.state, receipt.tender, receipt.payer, receipt.asset, receipt.quoted_nano_usd,
           receipt.paid_nano_usd, receipt.charged_nano_usd, receipt.spent_nano_usd, receipt.details, receipt.reason,
           receipt.created_ms, receipt.closed_ms, settlement.state, settlement.transaction_hash, settlement.chain_id,
           settlement.block_number
    FROM receipt
    LEFT JOIN settlement ON settlement.reference = receipt.id AND settlement.kind IN ('payment', 'upto', 'upto_topup')
    WHERE receipt.id = ?
"""


@dataclass(frozen=True, slots=True)
class ReceiptView:
    """A receipt as it stands, with the transaction that paid for it. Amounts are nano-USD, times milliseconds since 1970."""

    id: str
    state: State
    tender: str
    payer: str
    asset: str
    quoted_nano_usd: int
    paid_nano_usd: int
    charged_nano_usd: int | None
    spent_nano_usd: int
    """Of that, or as long as it is interrupted, for uses that the caller hung up on."""
    details: dict[str, Any]
    reason: str | None
    created_ms: int
    closed_ms: int | None
    settlement_state: str | None
    transaction_hash: str | None
    chain_id: int | None
    block_number: int | None

    @property
    def credited_nano_usd(self) -> int:
        """What became the payer's balance by it: what was paid beyond what is charged.

        What was only held or authorised and is not taken, of a balance, a pool, a channel or an ``upto``, is not credited.
        """
        if self.state == "open":
            return 0
        return max(
            self.paid_nano_usd - (self.spent_nano_usd if self.charged_nano_usd is None else self.charged_nano_usd), 0
        )

    @property
    def _comes_whole(self) -> bool:
        """Whether the whole payment arrives, and not only what is charged."""
        return self.tender == "exact" or self.details.get("kind") == "topup"

    def as_json(self) -> dict[str, Any]:
        """What `GET /v1/receipts/{id}` answers."""
        charged = self.charged_nano_usd if self.charged_nano_usd is not None else self.spent_nano_usd or None
        short = self.quoted_nano_usd - self.paid_nano_usd if self._comes_whole and self.paid_nano_usd else 0
        known = {
            "id": self.id,
            "state": self.state,
            # The same payment sent again takes an interrupted request up where it was.
            "resumable": self.state == "interrupted",
            "tender": self.tender,
            "payer": None if self.tender == "account" else self.payer,
            "asset": self.asset,
            "quoted_usd": nano_to_usd(self.quoted_nano_usd),
            "paid_usd": nano_to_usd(self.paid_nano_usd),
            "charged_usd": None if charged is None else nano_to_usd(charged),
            "credited_usd": nano_to_usd(self.credited_nano_usd),
            "transaction": self._transaction(),
            "reason": self.reason,
            "created": _timestamp(self.created_ms),
            "closed": None if self.closed_ms is None else _timestamp(self.closed_ms),
        }
        if short > 0:
            # A token that takes a fee on the way: less arrived than was signed for.
            known["short_usd"] = nano_to_usd(short)
        return {"model": None, "provider": None, "attempts": [], "usage": None} | self.details | known

    def _transaction(self) -> dict[str, Any] | None:
        if self.settlement_state is None:
            return None
        return {
            "hash": self.transaction_hash,
            "network": f"eip155:{self.chain_id}",
            "block_number": self.block_number,
            "state": self.settlement_state,
        }


def new_receipt_id() -> str:
    """An id with 160 random bits: knowing it is the permission to read it."""
    return f"rcpt_{secrets.token_hex(20)}"


def open_receipt(
    tx: Transaction,
    *,
    id: str,
    tender: Literal["exact", "upto", "channel", "prepaid", "account"],
    payer: str,
    asset: str,
    quoted_nano_usd: int,
    details: dict[str, Any],
) -> None:
    """Start a receipt.

    Args:
        tx: The unit's transaction.
        id: From `new_receipt_id`.
        tender: How it is paid.
        payer: A wallet's address in lower case, or ``key:<key id>``.
        asset: The ledger's name of what it is paid in.
        quoted_nano_usd: The most that it may cost.
        details: What is known of the request: itemised quote, model asked for. No content.
    """
    parameters = (id, tender, payer, asset, quoted_nano_usd, orjson.dumps(details).decode(), tx.instance, _now_ms())
    tx.execute(_INSERT, parameters)


def close_receipt(
    tx: Transaction,
    id: str,
    uses: int,
    to: Literal["captured", "released", "interrupted"],
    *,
    charged_nano_usd: int | None,
    details: dict[str, Any] | None = None,
    reason: str | None = None,
) -> bool:
    """End the use of an open receipt.

    Args:
        tx: The unit's transaction.
        id: The receipt's.
        uses: Which use of it ends: a later one, by the same payment sent again, is not ended by an earlier one.
        to: The new state.
        charged_nano_usd: What the payer is charged besides what interrupted uses have cost; None if it is only interrupted.
        details: Everything the receipt is to keep; None leaves what it has.
        reason: Why, if it was not captured.

    Returns:
        False, with nothing changed, if it is not open, or in a later use.
    """
    assert to in TRANSITIONS["open"]
    assert (charged_nano_usd is None) == (to == "interrupted")
    written = None if details is None else orjson.dumps(details).decode()
    closed_ms = None if to == "interrupted" else _now_ms()
    return tx.execute(_CLOSE, (to, charged_nano_usd, written, reason, closed_ms, id, uses)).fetchone() is not None


def reopen_receipt(tx: Transaction, id: str) -> int | None:
    """Take an interrupted request up again.

    Returns:
        Which use of the receipt this is; None, with nothing changed, if it is not interrupted (any more).
    """
    row = tx.execute(_REOPEN, (tx.instance, id)).fetchone()
    return None if row is None else int(row[0])


def spend(tx: Transaction, id: str, amount_nano_usd: int) -> None:
    """Count what a use has cost that was interrupted; what the receipt is charged in the end comes on top."""
    tx.execute(_SPEND, (amount_nano_usd, id))


def set_paid(tx: Transaction, id: str, paid_nano_usd: int) -> None:
    """Note what its on-chain payment brought in, whatever state the receipt is in."""
    tx.execute(_SET_PAID, (paid_nano_usd, id))


def explain(tx: Transaction, id: str, reason: str) -> None:
    """Give a receipt that was released another reason: something has happened since. Any other stays as it is."""
    tx.execute(_EXPLAIN, (reason, id))


def release_unsettled(tx: Transaction, id: str, reason: str) -> None:
    """Close a receipt whose payment did not come, or can serve no further use; one that is closed already stays as it is."""
    tx.execute(_RELEASE_UNSETTLED, (reason, _now_ms(), id))


def end_orphans(tx: Transaction, reason: str) -> tuple[int, int]:
    """End every open receipt whose instance has no lease, not even an expired one: nobody works on it any more.

    Returns:
        How many were interrupted, because the same payment can take them up, and how many released.
    """
    interrupted = tx.execute(_INTERRUPT_ORPHANS, (reason,)).fetchall()
    released = tx.execute(_RELEASE_ORPHANS, (reason, _now_ms())).fetchall()
    return len(interrupted), len(released)


def is_open(tx: Transaction, id: str) -> bool:
    """Whether somebody, in whatever process, works on the request."""
    row = tx.execute(_STATE, (id,)).fetchone()
    return row is not None and row[0] == "open"


def forget(tx: Transaction, id: str) -> None:
    """Take back a receipt that nobody was told of and that no money has moved for."""
    tx.execute(_DELETE, (id,))


def get(tx: Transaction, id: str) -> ReceiptView | None:
    """The receipt with this id, or None."""
    row = tx.execute(_VIEW, (id,)).fetchone()
    if row is None:
        return None
    return ReceiptView(*(*row[:9], orjson.loads(row[9]), *row[10:]))


def _timestamp(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
