"""What was settled for others: each reserved once under its canonical identity, and each success told of once.

A row and its order in the settlement outbox are one commit, so no crash leaves the one without the other; how far the transfer
has come is in the settlement's state alone. Everything that several facilitators on one database must agree on is here: who is
told, and whose settlements failed (what a payer has under way: `payments.promises`). All of it runs inside store units.

A success is *granted*, durably, to the one call that is told of it: whatever a resource server serves for, it serves once. The
same call made again (the same client and `Idempotency-Key`) is told again; any other is told that it is a duplicate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from payments.promises import Cover
from payments.settlement import outbox, states
from payments.settlement.orders import SettlementOrder
from payments.sponsoring.sponsor import Approving
from payments.store import Transaction
from payments.tenders import authorizations

HOUR_MS = 3_600_000

_FIND = """
    SELECT facilitated.settlement_id, facilitated.granted_to, facilitated.asked_until_ms, settlement.state,
           settlement.transaction_hash, settlement.reason, settlement.call_to, settlement.call_data, settlement.value,
           settlement.received_value
    FROM facilitated_payment AS facilitated LEFT JOIN settlement ON settlement.id = facilitated.settlement_id
    WHERE facilitated.identity = ?
"""
_INSERT = (
    "INSERT INTO facilitated_payment (identity, settlement_id, client, asked_until_ms, grants, created_ms)"
    " VALUES (?, ?, ?, ?, 0, ?) ON CONFLICT (identity) DO NOTHING RETURNING identity"
)
_BEGIN_ANEW = (
    "UPDATE facilitated_payment SET settlement_id = ?, client = ?, asked_until_ms = ?, granted_to = NULL, granted_ms = NULL,"
    " grants = 0 WHERE identity = ? AND settlement_id = ? RETURNING identity"
)
Begun = Literal["begun", "known", "short"]


@dataclass(frozen=True, slots=True)
class Record:
    """Something that was begun, and what became of it so far."""

    settlement_id: str
    granted_to: str | None
    """The call that was told of its success."""
    asked: bool
    """Whether a call waits for its success right now, here or in another process."""
    state: str
    """Of its settlement, see `payments.settlement.states`; ``burnt`` if it was settled for nothing, without a transfer."""
    transaction_hash: str | None
    reason: str | None
    call: tuple[str, bytes] | None
    value: int
    received: int
    """What the evidence says that was moved, in atomic units; 0 before there is any."""

    @property
    def paid(self) -> bool:
        """Whether there is evidence that it was carried out."""
        return self.state in states.PAID

    @property
    def failed(self) -> bool:
        """Whether it cannot be paid any more."""
        return self.state == "failed"

    @property
    def open(self) -> bool:
        """Whether its fate is unknown."""
        return self.state in states.OPEN

    def is_same(self, calls: Collection[tuple[str, bytes]], value: int | None) -> bool:
        """Whether one of `calls` is this very payment, signature included: its terms alone are public once it is mined. What
        moves a `value` that only the chain can tell has it in its name already."""
        return value is None or (self.value == value and (self.call is None or self.call in calls))


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is to be begun, and for whom.

    `order` is None for an authorization that settles nothing: it is burnt at once.
    """

    identity: str
    order: SettlementOrder | None
    from_block: int
    """Before it nobody can have executed it, see `outbox.enqueue`."""
    client: str
    wait_ms: int
    """How long its caller waits for the outcome."""
    cover: Cover | None = None
    """What the payer had when the chain was asked; None if nothing is taken from its balance."""
    instead_of: str | None = None
    """The settlement that this one follows, which is decided; None for the first."""
    approval: Approving | None = None
    """What the order waits for."""


def settlement_id(identity: str) -> str:
    """The first settlement under an identity: one, whoever asks for it and however often."""
    return f"facilitate:{hashlib.sha256(identity.encode()).hexdigest()[:40]}"


def next_settlement_id(settlement: str) -> str:
    """The one that follows a settlement that failed, where another attempt makes sense."""
    first, _, number = settlement.removeprefix("facilitate:").partition(":")
    return f"facilitate:{first}:{int(number or 1) + 1}"


def find(tx: Transaction, identity: str) -> Record | None:
    """What was begun under an identity, or None."""
    row = tx.execute(_FIND, (identity,)).fetchone()
    if row is None:
        return None
    burnt = row[3] is None
    return Record(
        settlement_id=row[0],
        granted_to=row[1],
        asked=row[2] is not None and row[2] > tx.now_ms(),
        state="burnt" if burnt else row[3],
        transaction_hash=row[4],
        reason=row[5],
        call=None if burnt else (row[6], bytes(row[7])),
        value=0 if burnt else int(row[8]),
        received=int(row[9] or 0),
    )


def begin(tx: Transaction, wanted: Beginning) -> Begun:
    """Reserve a payment and write its order, in one.

    Returns:
        ``known``, with nothing changed, if it was begun before, or used to pay a gateway on the same database; ``short``, with
        nothing changed, if the payer's balance does not cover it beside what others have begun since the chain was asked.
    """
    if wanted.instead_of is None:
        if authorizations.is_known(tx, wanted.identity) or find(tx, wanted.identity) is not None:
            return "known"
        if wanted.cover is not None and not wanted.cover.holds(tx):
            return "short"
    return "begun" if _reserve(tx, wanted) else "known"


def _reserve(tx: Transaction, wanted: Beginning) -> bool:
    now, order = tx.now_ms(), wanted.order
    asked_until_ms = now + wanted.wait_ms
    if wanted.instead_of is not None:
        assert order is not None
        values = (order.id, wanted.client, asked_until_ms, wanted.identity, wanted.instead_of)
        return tx.execute(_BEGIN_ANEW, values).fetchone() is not None and outbox.enqueue(tx, order, wanted.from_block)
    name = settlement_id(wanted.identity) if order is None else order.id
    row = tx.execute(_INSERT, (wanted.identity, name, wanted.client, asked_until_ms, now)).fetchone()
    if row is None or order is None:
        return row is not None
    if wanted.approval is not None:
        wanted.approval.begin(tx, order)
        return True
    return outbox.enqueue(tx, order, wanted.from_block)


def ask(tx: Transaction, identity: str, wait_ms: int) -> None:
    """A call waits for the outcome of what was begun before: until then its success is to be told to somebody."""
    until = tx.now_ms() + wait_ms
    tx.execute(
        "UPDATE facilitated_payment SET asked_until_ms = ? WHERE identity = ? AND COALESCE(asked_until_ms, 0) < ?",
        (until, identity, until),
    )


def grant(tx: Transaction, identity: str, call: str) -> bool:
    """Let the call named `call` be the one that is told of the success, once more if it is made again.

    Returns:
        False if another one was.
    """
    row = tx.execute(
        "UPDATE facilitated_payment SET granted_to = ?, granted_ms = ?, grants = grants + 1 WHERE identity = ?"
        " AND (granted_to IS NULL OR granted_to = ?) RETURNING identity",
        (call, tx.now_ms(), identity, call),
    ).fetchone()
    return row is not None


def take_back(tx: Transaction, identity: str, call: str) -> None:
    """The call is gone, and was told nothing of what it was granted. Made before or since, it may have been told all the same:
    only when nothing of what it was granted is left, another one may be.
    """
    tx.execute(
        "UPDATE facilitated_payment SET grants = grants - 1, granted_to = CASE WHEN grants > 1 THEN granted_to END,"
        " granted_ms = CASE WHEN grants > 1 THEN granted_ms END WHERE identity = ? AND granted_to = ?",
        (identity, call),
    )


def blame(tx: Transaction, row: dict[str, Any]) -> None:
    """Note that a settlement cost gas for nothing; whose client it was has to wait after too many (`suspended_s`)."""
    found = tx.execute("SELECT client FROM facilitated_payment WHERE settlement_id = ?", (row["id"],)).fetchone()
    if found is None:
        return
    now = tx.now_ms()
    tx.execute("DELETE FROM facilitator_failure WHERE failed_ms <= ?", (now - HOUR_MS,))
    tx.execute(
        "INSERT INTO facilitator_failure (settlement_id, client, failed_ms) VALUES (?, ?, ?)"
        " ON CONFLICT (settlement_id) DO NOTHING",
        (row["id"], found[0], now),
    )


def suspended_s(tx: Transaction, client: str, failures_per_hour: int) -> int:
    """How many seconds a client must wait because so many of its settlements failed within the hour; 0 if it need not."""
    now = tx.now_ms()
    row = tx.execute(
        "SELECT failed_ms FROM facilitator_failure WHERE client = ? AND failed_ms > ? ORDER BY failed_ms DESC"
        " LIMIT 1 OFFSET ?",
        (client, now - HOUR_MS, failures_per_hour - 1),
    ).fetchone()
    return 0 if row is None else (row[0] + HOUR_MS - now) // 1000 + 1
