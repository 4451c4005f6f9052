"""Double-entry transfers, at once or in two phases, as functions of a store transaction.

A transfer has an id that makes it idempotent: made again with the same content it changes nothing, with other content it is
refused. A balance is enforced by the one UPDATE that changes it; nothing reads a balance to decide about it. Whatever
raises here has changed nothing, so a unit may catch it and go on.

Read-committed isolation is enough: the row locks of the UPDATEs put concurrent transfers of one account in order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from payments.ledger.accounts import ensure_account, may_overdraw
from payments.store import Transaction

__all__ = [
    "Balance",
    "InsufficientFunds",
    "Transfer",
    "TransferConflict",
    "balance",
    "capture",
    "count",
    "ensure_account",
    "find",
    "hold",
    "moved",
    "next_id",
    "post",
    "void",
]

State = Literal["pending", "posted", "voided"]

TRANSITIONS: dict[str, frozenset[str]] = {
    "pending": frozenset({"posted", "voided"}),
    "posted": frozenset(),
    "voided": frozenset(),
}

_INSERT = (
    "INSERT INTO ledger_transfer"
    " (id, debit_account, credit_account, amount, posted_amount, state, reference, created_ms, updated_ms)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING RETURNING id"
)
_FIND = (
    "SELECT debit_account, credit_account, amount, posted_amount, state, reference FROM ledger_transfer WHERE id = ?"
)
_FINISH = (
    "UPDATE ledger_transfer SET state = ?, posted_amount = ?, updated_ms = ?"
    " WHERE id = ? AND state = 'pending' AND amount >= ? RETURNING debit_account, credit_account, amount"
)
_TAKE = (
    "UPDATE ledger_account SET balance = balance - ? WHERE id = ? AND (overdraft OR balance - pending_out >= ?)"
    " RETURNING id"
)
_RESERVE = (
    "UPDATE ledger_account SET pending_out = pending_out + ?"
    " WHERE id = ? AND (overdraft OR balance - pending_out >= ?) RETURNING id"
)
_UNRESERVE = "UPDATE ledger_account SET pending_out = pending_out - ? WHERE id = ? RETURNING id"
_TAKE_RESERVED = (
    "UPDATE ledger_account SET balance = balance - ?, pending_out = pending_out - ? WHERE id = ? RETURNING id"
)
_GIVE = "UPDATE ledger_account SET balance = balance + ? WHERE id = ? RETURNING id"
_BALANCE = "SELECT balance, pending_out FROM ledger_account WHERE id = ?"
_MOVED = (
    "SELECT COALESCE(SUM(posted_amount), 0) FROM ledger_transfer"
    " WHERE reference = ? AND debit_account = ? AND credit_account = ? AND state = 'posted'"
)
_COUNT = "SELECT COUNT(*) FROM ledger_transfer WHERE reference = ? AND SUBSTR(id, 1, CAST(? AS INTEGER)) = ?"


class InsufficientFunds(Exception):
    """The debit account has less available than the transfer needs."""


class TransferConflict(Exception):
    """This transfer exists with other content, or is in a state from which it cannot go where it should."""


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's balance in nano-USD: `balance` is posted, `pending_out` of it is held."""

    balance: int
    pending_out: int

    @property
    def available(self) -> int:
        """What can be spent or held."""
        return self.balance - self.pending_out


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer as it stands. `posted_amount` is None unless it is posted."""

    debit: str
    credit: str
    amount: int
    posted_amount: int | None
    state: State
    reference: str


def post(tx: Transaction, *, id: str, debit: str, credit: str, amount: int, reference: str) -> bool:
    """Move `amount` nano-USD from `debit` to `credit` at once.

    Args:
        tx: The unit's transaction.
        id: The idempotency key.
        debit: The account that gives.
        credit: The account that receives; opened if it is not there.
        amount: More than 0.
        reference: What it is for: a receipt, a settlement, a deposit's log.

    Returns:
        False if it was made before.

    Raises:
        InsufficientFunds: If `debit` has less than `amount` available, or is not there.
        TransferConflict: If `id` exists with other content.
    """
    if not _make(tx, _TAKE, _GIVE, id, debit, credit, amount, "posted", reference):
        return False
    _apply(tx, _GIVE, (amount, credit))
    return True


def hold(tx: Transaction, *, id: str, debit: str, credit: str, amount: int, reference: str) -> bool:
    """Set `amount` nano-USD of `debit` aside for `credit`, to be ended by `capture` or `void`.

    Arguments, result and errors are those of `post`. A hold that was ended meanwhile still counts as made before.
    """
    return _make(tx, _RESERVE, _UNRESERVE, id, debit, credit, amount, "pending", reference)


def capture(tx: Transaction, id: str, amount: int) -> bool:
    """Post `amount` nano-USD of a hold and free the rest.

    Args:
        tx: The unit's transaction.
        id: The hold's.
        amount: From 0 to what is held.

    Returns:
        False if it was captured with this amount before.

    Raises:
        TransferConflict: If there is no such hold, it is smaller, or it ended otherwise.
    """
    assert amount >= 0
    row = _finish(tx, id, "posted", amount)
    if row is None:
        found = find(tx, id)
        if found is not None and found.state == "posted" and found.posted_amount == amount:
            return False
        raise TransferConflict(f"the transfer {id} cannot be captured with {amount} nano-USD: it is {found}")
    debit, credit, held = row
    _apply(tx, _TAKE_RESERVED, (amount, held, debit))
    _apply(tx, _GIVE, (amount, credit))
    return True


def void(tx: Transaction, id: str) -> bool:
    """Free a hold.

    Returns:
        False if it was voided before.

    Raises:
        TransferConflict: If there is no such hold, or it was captured.
    """
    row = _finish(tx, id, "voided", None)
    if row is None:
        found = find(tx, id)
        if found is not None and found.state == "voided":
            return False
        raise TransferConflict(f"the transfer {id} cannot be voided: it is {found}")
    debit, _, held = row
    _apply(tx, _TAKE_RESERVED, (0, held, debit))
    return True


def find(tx: Transaction, id: str) -> Transfer | None:
    """The transfer with this id, or None."""
    row = tx.execute(_FIND, (id,)).fetchone()
    return None if row is None else Transfer(*row)


def count(tx: Transaction, reference: str, prefix: str) -> int:
    """How many transfers for `reference` have an id that begins with `prefix`: what is done once more, as after a
    reorganisation, needs a name that no earlier round has."""
    return int(tx.execute(_COUNT, (reference, len(prefix), prefix)).fetchone()[0])


def next_id(tx: Transaction, reference: str, id: str) -> str:
    """`id`, or if transfers for `reference` have it already, the one for the next round of the same; for whoever knows that
    there is one, since this is idempotent no more."""
    rounds = count(tx, reference, id)
    return f"{id}:{rounds}" if rounds else id


def moved(tx: Transaction, reference: str, debit: str, credit: str) -> int:
    """What was moved for `reference` from `debit` to `credit` in all, in nano-USD; holds that were not captured are not."""
    return int(tx.execute(_MOVED, (reference, debit, credit)).fetchone()[0])


def balance(tx: Transaction, account: str) -> Balance:
    """What an account holds; zero for one that was never opened."""
    row = tx.execute(_BALANCE, (account,)).fetchone()
    return Balance(0, 0) if row is None else Balance(*row)


def _make(
    tx: Transaction,
    take: str,
    undo: str,
    id: str,
    debit: str,
    credit: str,
    amount: int,
    state: State,
    reference: str,
) -> bool:
    assert amount > 0
    assert debit != credit
    assert debit.rpartition("@")[2] == credit.rpartition("@")[2], "a transfer stays within one asset"
    if may_overdraw(debit):
        ensure_account(tx, debit)
    if tx.execute(take, (amount, debit, amount)).fetchone() is None:
        # Made again, it may find what it has itself taken missing.
        found = find(tx, id)
        if found is None:
            raise InsufficientFunds(f"{debit} has less than {amount} nano-USD available")
        _require_same(id, found, debit, credit, amount, state, reference)
        return False
    ensure_account(tx, credit)
    now = _now_ms()
    posted_amount = amount if state == "posted" else None
    inserted = tx.execute(_INSERT, (id, debit, credit, amount, posted_amount, state, reference, now, now)).fetchone()
    if inserted is None:
        _apply(tx, undo, (amount, debit))
        found = find(tx, id)
        assert found is not None
        _require_same(id, found, debit, credit, amount, state, reference)
    return inserted is not None


def _require_same(id: str, found: Transfer, debit: str, credit: str, amount: int, state: State, reference: str) -> None:
    # A hold is the same hold after it was ended; a transfer made at once is posted in full.
    same_kind = state == "pending" or found.posted_amount == found.amount
    if not same_kind or (found.debit, found.credit, found.amount, found.reference) != (
        debit,
        credit,
        amount,
        reference,
    ):
        raise TransferConflict(f"the transfer {id} exists with other content: {found}")


def _finish(tx: Transaction, id: str, to: State, posted_amount: int | None) -> tuple[str, str, int] | None:
    assert to in TRANSITIONS["pending"]
    row = tx.execute(_FINISH, (to, posted_amount, _now_ms(), id, posted_amount or 0)).fetchone()
    return None if row is None else (row[0], row[1], row[2])


def _apply(tx: Transaction, sql: str, parameters: tuple[Any, ...]) -> None:
    changed = tx.execute(sql, parameters).fetchone()
    assert changed is not None, "a transfer names an account that is not there"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
