"""The payments that were settled for others: each reserved once under its canonical identity, and each told of once.

A row and its order in the settlement outbox are one commit, so no crash leaves the one without the other; how far the transfer
has come is in the settlement's state alone. Everything here runs inside store units.

A success is *granted*, durably, to the one call that is told of it: whatever a resource server serves for, it serves once. The
same call made again (the same client and `Idempotency-Key`) is told again; any other is told that it is a duplicate.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from payments.settlement import outbox, states
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import Kind, SettlementOrder
from payments.store import Transaction
from payments.tenders import authorizations

KIND = "facilitated"

_FIND = """
    SELECT facilitated.settlement_id, facilitated.granted_to, settlement.state, settlement.transaction_hash,
           settlement.reason, settlement.call_to, settlement.call_data, settlement.value
    FROM facilitated_payment AS facilitated JOIN settlement ON settlement.id = facilitated.settlement_id
    WHERE facilitated.identity = ?
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A payment that was begun, and what became of it so far."""

    settlement_id: str
    granted: bool
    """Whether somebody was told of its success."""
    state: str
    """Of its settlement, see `payments.settlement.states`."""
    transaction_hash: str | None
    reason: str | None
    call: tuple[str, bytes]
    value: int

    @property
    def paid(self) -> bool:
        """Whether there is evidence that it was paid."""
        return self.state in states.PAID

    @property
    def failed(self) -> bool:
        """Whether it cannot be paid any more."""
        return self.state == "failed"

    def is_same(self, calls: Collection[tuple[str, bytes]], value: int) -> bool:
        """Whether one of `calls` is this very payment, signature included: its terms alone are public once it is mined."""
        return self.call in calls and self.value == value


def kind() -> Kind:
    """How these settlements are carried and proven. Nothing is booked: the money never was ours."""
    return Kind(PaymentProof(), _nothing, _nothing, outbox.order_gas, batchable=True)


def _nothing(tx: Transaction, row: dict[str, Any]) -> None:
    return


def settlement_id(identity: str) -> str:
    """The settlement of a payment: one, whoever asks for it and however often."""
    return f"facilitate:{hashlib.sha256(identity.encode()).hexdigest()[:40]}"


def find(tx: Transaction, identity: str) -> Record | None:
    """What was begun under an identity, or None."""
    row = tx.execute(_FIND, (identity,)).fetchone()
    if row is None:
        return None
    return Record(
        settlement_id=row[0],
        granted=row[1] is not None,
        state=row[2],
        transaction_hash=row[3],
        reason=row[4],
        call=(row[5], bytes(row[6])),
        value=int(row[7]),
    )


def begin(tx: Transaction, identity: str, order: SettlementOrder, client: str) -> bool:
    """Reserve a payment and write its order, in one.

    Returns:
        False, with nothing changed, if it was begun before, or used to pay a gateway on the same database.
    """
    if authorizations.is_known(tx, identity):
        return False
    row = tx.execute(
        "INSERT INTO facilitated_payment (identity, settlement_id, client, created_ms) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (identity) DO NOTHING RETURNING identity",
        (identity, order.id, client, _now_ms()),
    ).fetchone()
    return row is not None and outbox.enqueue(tx, order)


def grant(tx: Transaction, identity: str, call: str) -> bool:
    """Let the call named `call` be the one that is told of the success.

    Returns:
        False if another one was.
    """
    row = tx.execute(
        "UPDATE facilitated_payment SET granted_to = ?, granted_ms = ? WHERE identity = ?"
        " AND (granted_to IS NULL OR granted_to = ?) RETURNING identity",
        (call, _now_ms(), identity, call),
    ).fetchone()
    return row is not None


def take_back(tx: Transaction, identity: str, call: str) -> None:
    """Nobody was told after all: the call that it was granted to is gone."""
    tx.execute(
        "UPDATE facilitated_payment SET granted_to = NULL, granted_ms = NULL WHERE identity = ? AND granted_to = ?",
        (identity, call),
    )


def open_settlements(tx: Transaction) -> list[tuple[str, int, str, str, int, str]]:
    """The settlements whose fate is not known: id, chain id, token, payer, value in atomic units, and who asked first."""
    marks = ",".join("?" * len(states.OPEN))
    rows = tx.execute(
        "SELECT settlement.id, chain_id, token, payer, value, client FROM settlement"  # noqa: S608 - only marks
        " JOIN facilitated_payment ON facilitated_payment.settlement_id = settlement.id"
        f" WHERE settlement.state IN ({marks}) ORDER BY settlement.created_ms",
        tuple(sorted(states.OPEN)),
    ).fetchall()
    return [(row[0], row[1], row[2], row[3], int(row[4]), row[5]) for row in rows]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
