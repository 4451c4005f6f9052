"""A wallet's transfers in its own words: what came in, what was charged for, what left. Newest first, page by page.

The ledger's ids say what a transfer is (see `payments.tables.LedgerTransfer`); this is the one place that translates them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from payments.money import nano_to_usd
from payments.store import Transaction

PAGE_MAX = 200

WORDS = {
    "settle": "payment",
    "unsettle": "payment_reversed",
    "hold": "charge",
    "log": "deposit",
    "unlog": "deposit_reversed",
    "refund": "refund",
    "withdrawal": "withdrawal",
    "withdrawal-fee": "network_fee",
    "returned": "withdrawal_returned",
    "revived": "withdrawal",
    "loss": "adjustment",
    "made-good": "adjustment",
    "excess": "rounding",
    "repay": "debt_paid",
    "unrepay": "debt_returned",
}
"""By the part of a transfer's id before the first colon. A payment that was made to top up is a ``topup``, and
so is what a channel held for its payer. What an answer by ``upto`` cost never passes the balance: only the ``rounding`` does,
what the token's smallest unit brought beyond it, and a debt, if the wallet did not hold what was owed."""
OF_RECEIPTS = frozenset({"settle", "unsettle", "excess", "unrepay"})
"""Those of settlements that pay for a receipt."""

_SIDE = """
    SELECT transfer.created_ms, transfer.id, {sign}, transfer.amount, transfer.posted_amount, transfer.state,
           transfer.reference, account.asset
    FROM ledger_account AS account JOIN ledger_transfer AS transfer ON transfer.{side} = account.id
    WHERE account.kind = 'payer' AND account.owner = ? AND (transfer.created_ms, transfer.id) < (?, ?)
      AND (transfer.state = 'pending' OR transfer.posted_amount > 0)
"""
_PAGE = f"""
    {_SIDE.format(sign=-1, side="debit_account")} UNION ALL {_SIDE.format(sign=1, side="credit_account")}
    ORDER BY 1 DESC, 2 DESC LIMIT ?
"""
_END = (2**62, "")


class BadCursor(ValueError):
    """A page's cursor is not one that `page` gave."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a history. `amount_nano_usd` is positive for what came in; a held charge shows what is held."""

    id: str
    kind: str
    asset: str
    amount_nano_usd: int
    state: str
    """pending | posted"""
    created_ms: int
    receipt: str | None
    transaction_hash: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs and people."""
        return {
            "id": self.id,
            "type": self.kind,
            "asset": self.asset,
            "amount_usd": nano_to_usd(self.amount_nano_usd),
            "state": self.state,
            "time": datetime.fromtimestamp(self.created_ms / 1000, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "receipt": self.receipt,
            "transaction": self.transaction_hash,
        }


@dataclass(frozen=True, slots=True)
class Page:
    """Some lines, and the cursor for those before them; None if there are none."""

    entries: tuple[Entry, ...]
    next: str | None


def page(tx: Transaction, address: str, limit: int, before: str | None = None) -> Page:
    """One page of a wallet's history.

    Args:
        tx: A read's transaction.
        address: The wallet, lower-case hex.
        limit: Lines at most, from 1 to `PAGE_MAX`.
        before: The cursor that the last page gave; None for the newest lines.

    Raises:
        BadCursor: If `before` is not such a cursor.
    """
    assert 1 <= limit <= PAGE_MAX
    cursor = _END if before is None else _read_cursor(before)
    rows = tx.execute(_PAGE, (address, *cursor, address, *cursor, limit + 1)).fetchall()
    shown = rows[:limit]
    settled = _settlements(tx, [row[6] for row in shown])
    topups = _topups(tx, [reference for reference, _ in settled.values() if reference])
    entries = tuple(_entry(row, settled, topups) for row in shown)
    more = len(rows) > limit
    return Page(entries, _cursor(shown[-1][0], shown[-1][1]) if more else None)


def _entry(row: Sequence[Any], settled: dict[str, tuple[str, str | None]], topups: frozenset[str]) -> Entry:
    created_ms, id, sign, amount, posted, state, reference, asset = row
    prefix, _, name = id.partition(":")
    kind = WORDS.get(prefix, "adjustment")
    receipt, transaction = None, None
    if prefix == "hold":
        receipt = reference
        if sign > 0:
            kind = "topup"
    elif prefix == "repay":
        receipt = reference
    elif prefix in ("log", "unlog"):
        transaction = name.partition(":")[0]
    elif reference in settled:
        receipt, transaction = settled[reference]
        if prefix not in OF_RECEIPTS:
            receipt = None
        elif prefix == "settle" and receipt in topups:
            kind = "topup"
    return Entry(
        id=id,
        kind=kind,
        asset=asset,
        amount_nano_usd=sign * (amount if state == "pending" else posted),
        state=state,
        created_ms=created_ms,
        receipt=receipt,
        transaction_hash=transaction,
    )


def _settlements(tx: Transaction, ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """What each settlement was for, and the transaction that proves it."""
    if not ids:
        return {}
    rows = tx.execute(
        f"SELECT id, reference, transaction_hash FROM settlement WHERE id IN ({_marks(ids)})",  # noqa: S608 - only marks
        tuple(ids),
    ).fetchall()
    return {id: (reference, transaction_hash) for id, reference, transaction_hash in rows}


def _topups(tx: Transaction, receipt_ids: Sequence[str]) -> frozenset[str]:
    if not receipt_ids:
        return frozenset()
    rows = tx.execute(
        f"SELECT id, details FROM receipt WHERE id IN ({_marks(receipt_ids)})",  # noqa: S608 - only marks
        tuple(receipt_ids),
    ).fetchall()
    return frozenset(id for id, details in rows if orjson.loads(details).get("kind") == "topup")


def _marks(values: Sequence[str]) -> str:
    return ",".join("?" * len(values))


def _cursor(created_ms: int, id: str) -> str:
    return base64.urlsafe_b64encode(f"{created_ms}.{id}".encode()).rstrip(b"=").decode()


def _read_cursor(text: str) -> tuple[int, str]:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        created, _, id = raw.partition(".")
        created_ms = int(created)
    except (binascii.Error, ValueError):
        raise BadCursor("the cursor is not one that this gateway gave") from None
    if not 0 <= created_ms < _END[0]:
        raise BadCursor("the cursor is not one that this gateway gave")
    return created_ms, id
