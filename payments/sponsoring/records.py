"""The approvals that are brought to the chain for their payers: what may be given away for them, and how far each has come.

A payer is given coin once per token, whatever becomes of it, and no more than the budget of an hour is given away on a chain.
Everything here runs inside store units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.foreign_transactions import ForeignTransaction
from payments.chain.signers import WEI_PER_GWEI
from payments.errors import AllowanceRequired, SettlementUnavailable
from payments.money import divide_up
from payments.settlement import outbox, states
from payments.settlement.orders import SettlementOrder
from payments.sponsoring import funding
from payments.store import Transaction

TRANSITIONS: dict[str, frozenset[str]] = {
    # The coin for it is on its way to the payer.
    "funding": frozenset({"approving", "failed"}),
    # The payer's transaction is on its way.
    "approving": frozenset({"approved", "failed"}),
    # Brought to the chain once more, by coin that the payer has, if it was taken back since, or did not come through.
    "approved": frozenset({"funding", "approving"}),
    "failed": frozenset({"funding", "approving"}),
}
HOUR_MS = 3_600_000
LOSSES_MAX = 5
"""Fundings within an hour after which no approval came; then nobody is funded for the rest of it."""
CLIENT_SHARE = 2
"""One resource server uses up at most one part of so many of an hour's budget."""

_COLUMNS = (
    "id, chain_id, token, payer, state, nonce, raw_transaction, needed, permit2_nonce, settlement_id, funding_id, give_up_ms,"
    " reason"
)
_INSERT = (
    "INSERT INTO sponsored_approval (id, chain_id, token, payer, state, nonce, raw_transaction, needed, permit2_nonce,"
    " settlement_id, client, give_up_ms, created_ms, updated_ms, cost_gwei)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)"
)
_AGAIN = (
    "UPDATE sponsored_approval SET nonce = ?, raw_transaction = ?, needed = ?, permit2_nonce = ?, settlement_id = ?,"
    " client = ?, give_up_ms = ?, updated_ms = ? WHERE id = ?"
)
_FUND = "UPDATE sponsored_approval SET funding_id = ?, cost_gwei = ?, funded_ms = ? WHERE id = ?"
_SPENT = "SELECT COALESCE(SUM(cost_gwei), 0) FROM sponsored_approval WHERE chain_id = ? AND funded_ms > ?"
_LOST = "SELECT COUNT(*) FROM sponsored_approval WHERE chain_id = ? AND funded_ms > ? AND state = 'failed'"


@dataclass(frozen=True, slots=True)
class Wanted:
    """An approval that would come through, and the payment after it."""

    token: str
    transaction: ForeignTransaction
    needed: int
    """The allowance that the payment needs, in atomic units."""
    permit2_nonce: int
    """Of the payment."""
    funding_wei: int
    """What its payer lacks for it; 0 if nothing."""
    cost_wei: int
    """What giving that costs us in all, at most."""
    give_up_ms: int
    client: str = ""

    @property
    def name(self) -> str:
        """Of the row, and of what orders wait for."""
        return name_of(self.transaction.chain_id, self.token, self.transaction.sender)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be given away on one chain, in wei."""

    hourly_wei: int
    payer_wei: int
    """To one payer for one token."""


@dataclass(frozen=True, slots=True)
class Sponsored:
    """A row."""

    id: str
    chain_id: int
    token: str
    payer: str
    state: str
    nonce: int
    raw: bytes
    needed: int
    permit2_nonce: int
    settlement_id: str | None
    funding_id: str | None
    give_up_ms: int
    reason: str | None


def name_of(chain_id: int, token: str, payer: str) -> str:
    """The name of a payer's approval for a token; addresses in lower-case hex."""
    return f"approval:{chain_id}:{token}:{payer}"


def begin(
    tx: Transaction, wanted: Wanted, budget: Budget, order: SettlementOrder | None, from_block: int
) -> str | None:
    """Write that an approval is to be brought to the chain, the order that gives its payer the coin, and the order of the
    payment, which waits for it: in one.

    Args:
        tx: The unit's transaction.
        wanted: What was found good on the chain.
        budget: What may be given away.
        order: What settles the payment; None for a payment that is settled later, if at all.
        from_block: Before it nobody can have executed that, see `outbox.enqueue`.

    Returns:
        The settlement that funds it, for the engine to take up; None if nothing has to be given.

    Raises:
        AllowanceRequired: ``sponsored_before`` or ``sponsoring_exhausted``: the payer has to pay for its approval itself.
        SettlementUnavailable: ``approval_under_way``: another payment of the payer's brought one a moment ago.
    """
    before = find(tx, wanted.name)
    if before is not None and before.state in ("funding", "approving"):
        message = "this wallet's approval of Permit2 is on its way already; send the same payment again in a moment"
        raise SettlementUnavailable("approval_under_way", message)
    funding_order = None
    if wanted.funding_wei:
        if before is not None and before.funding_id is not None:
            raise AllowanceRequired(
                "sponsored_before",
                "this wallet was given the coin for an approval of this token before; approve Permit2 with coin of its own",
            )
        _check_budget(tx, wanted, budget)
        funding_order = funding.order(
            wanted.name, wanted.transaction.chain_id, wanted.transaction.sender, wanted.funding_wei
        )
        outbox.enqueue(tx, funding_order)
    _write(tx, wanted, before, None if funding_order is None else funding_order.id, order)
    if order is not None:
        outbox.enqueue(tx, order, from_block, waits_for=wanted.name)
    return None if funding_order is None else funding_order.id


def find(tx: Transaction, name: str) -> Sponsored | None:
    """One row, or None."""
    row = tx.execute(f"SELECT {_COLUMNS} FROM sponsored_approval WHERE id = ?", (name,)).fetchone()  # noqa: S608 - columns from here
    return None if row is None else _sponsored(row)


def under_way(tx: Transaction, chain_id: int) -> list[tuple[Sponsored, str | None]]:
    """Every approval of a chain that is not decided, oldest first, each with the state of the settlement that funds it."""
    columns = ", ".join(f"sponsored_approval.{column}" for column in _COLUMNS.split(", "))
    rows = tx.execute(
        f"SELECT {columns}, settlement.state FROM sponsored_approval"  # noqa: S608 - columns from here
        " LEFT JOIN settlement ON settlement.id = sponsored_approval.funding_id"
        " WHERE sponsored_approval.chain_id = ? AND sponsored_approval.state IN ('funding', 'approving')"
        " ORDER BY sponsored_approval.created_ms",
        (chain_id,),
    ).fetchall()
    return [(_sponsored(row), row[-1]) for row in rows]


def move(tx: Transaction, name: str, to: str, reason: str | None = None) -> bool:
    """Move an approval to a state that may follow its own. False, with nothing changed, if somebody else was here before."""
    sources = tuple(source for source, targets in TRANSITIONS.items() if to in targets)
    marks = ",".join("?" * len(sources))
    row = tx.execute(
        f"UPDATE sponsored_approval SET state = ?, reason = ?, updated_ms = ? WHERE id = ? AND state IN ({marks}) RETURNING id",  # noqa: S608 - names from here
        (to, reason, states.now_ms(), name, *sources),
    ).fetchone()
    return row is not None


def approved(tx: Transaction, sponsored: Sponsored) -> bool:
    """The allowance is there: let the payment go."""
    if not move(tx, sponsored.id, "approved"):
        return False
    if sponsored.settlement_id is not None:
        outbox.release(tx, sponsored.settlement_id)
    return True


def _check_budget(tx: Transaction, wanted: Wanted, budget: Budget) -> None:
    chain_id, since = wanted.transaction.chain_id, states.now_ms() - HOUR_MS
    cost = divide_up(wanted.cost_wei, WEI_PER_GWEI)
    spent = int(tx.execute(_SPENT, (chain_id, since)).fetchone()[0])
    of_client = 0
    if wanted.client:
        of_client = int(tx.execute(f"{_SPENT} AND client = ?", (chain_id, since, wanted.client)).fetchone()[0])
    hourly = budget.hourly_wei // WEI_PER_GWEI
    if (
        spent + cost > hourly
        or (wanted.client and of_client + cost > hourly // CLIENT_SHARE)
        or int(tx.execute(_LOST, (chain_id, since)).fetchone()[0]) >= LOSSES_MAX
    ):
        raise AllowanceRequired(
            "sponsoring_exhausted",
            "no more approvals are paid for within this hour; approve Permit2 with coin of the wallet's own, or come back",
        )


def _write(
    tx: Transaction, wanted: Wanted, before: Sponsored | None, funding_id: str | None, order: SettlementOrder | None
) -> None:
    transaction, now = wanted.transaction, states.now_ms()
    settlement_id = None if order is None else order.id
    state = "approving" if funding_id is None else "funding"
    what: tuple[Any, ...] = (transaction.nonce, transaction.raw, str(wanted.needed), str(wanted.permit2_nonce))
    if before is None:
        payer = (transaction.chain_id, wanted.token, transaction.sender, state)
        times = (wanted.give_up_ms, now, now)
        tx.execute(_INSERT, (wanted.name, *payer, *what, settlement_id, wanted.client, *times))
    else:
        moved = move(tx, wanted.name, state)
        assert moved  # it was decided, and writers take turns
        tx.execute(_AGAIN, (*what, settlement_id, wanted.client, wanted.give_up_ms, now, wanted.name))
    if funding_id is not None:
        tx.execute(_FUND, (funding_id, divide_up(wanted.cost_wei, WEI_PER_GWEI), now, wanted.name))


def _sponsored(row: Sequence[Any]) -> Sponsored:
    return Sponsored(
        id=row[0],
        chain_id=row[1],
        token=row[2],
        payer=row[3],
        state=row[4],
        nonce=row[5],
        raw=bytes(row[6]),
        needed=int(row[7]),
        permit2_nonce=int(row[8]),
        settlement_id=row[9],
        funding_id=row[10],
        give_up_ms=row[11],
        reason=row[12],
    )
