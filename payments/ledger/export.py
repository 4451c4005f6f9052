"""The books as rows for accountants, oldest first, in pages, so that any number of them takes little memory."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from payments.money import nano_to_usd
from payments.store import Transaction

PAGE_ROWS = 5_000

COLUMNS = ("time", "transfer", "debit_account", "credit_account", "asset", "amount", "state", "reference")
Row = tuple[str, str, str, str, str, str, str, str]
Position = tuple[int, str]
"""The time in milliseconds and the id of the last row that was seen."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which transfers: made from `from_ms` on and before `to_ms`, of one account if `account` names it."""

    from_ms: int
    to_ms: int
    account: str | None = None
    unposted: bool = False
    """Also what is held, and holds that were freed; both move nothing."""


def first(selection: Selection) -> Position:
    """Where to begin."""
    return selection.from_ms, ""


def page(tx: Transaction, selection: Selection, after: Position) -> tuple[list[Row], Position | None]:
    """The next rows, and where to go on; None at the end. Amounts are dollars, or the coin's own unit for gas accounts."""
    conditions, parameters = ["(created_ms, id) > (?, ?)", "created_ms < ?"], [*after, selection.to_ms]
    if selection.account is not None:
        conditions.append("(debit_account = ? OR credit_account = ?)")
        parameters += [selection.account, selection.account]
    if not selection.unposted:
        conditions.append("state = 'posted' AND posted_amount > 0")
    rows = tx.execute(
        "SELECT created_ms, id, debit_account, credit_account, COALESCE(posted_amount, amount), state, reference"  # noqa: S608 - conditions from this module
        f" FROM ledger_transfer WHERE {' AND '.join(conditions)} ORDER BY created_ms, id LIMIT {PAGE_ROWS}",
        parameters,
    ).fetchall()
    shown: list[Row] = [
        (_time(at), id, debit, credit, debit.rpartition("@")[2], nano_to_usd(amount), state, reference)
        for at, id, debit, credit, amount, state, reference in rows
    ]
    return shown, (rows[-1][0], rows[-1][1]) if len(rows) == PAGE_ROWS else None


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
