"""Settlements told to people: found by what is known of them, and one told whole. Reads the tables, changes nothing but a wish.

The wish is that the engine looks at a settlement again (`ask_again`): it sends the same bytes once more and searches the chain
for evidence. It never signs anew because of it, so asking too often costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from payments.settlement import states
from payments.store import Transaction

_LISTED = "id, kind, state, payer, pay_to, token, value, chain_id, transaction_hash, reason, created_ms, updated_ms"
_SETTLEMENT = (
    "id, kind, reference, chain_id, state, token, payer, pay_to, value, authorization_nonce, call_to, valid_before,"
    " transaction_id, position, attempts, transaction_hash, transfer_log_index, received_value, from_block, block_number,"
    " reason, look_again_ms, watch_again_ms, created_ms, updated_ms"
)
_TRANSACTION = (
    "id, kind, state, signer, signer_nonce, broadcasts, inclusions, block_number, gas_used, fee_wei, updated_ms"
)


def search(
    tx: Transaction,
    *,
    wanted: Sequence[str] = (),
    kind: str | None = None,
    payer: str | None = None,
    created_before_ms: int | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """Settlements, newest first.

    Args:
        tx: The unit's transaction.
        wanted: States; empty for all.
        kind: Such as ``payment``.
        payer: A wallet's address in any spelling.
        created_before_ms: Only those that are at least so old.
        limit: At most so many.
    """
    filters: list[tuple[str, Sequence[Any]]] = [("1=1", ())]
    if wanted:
        filters.append((f"state IN ({','.join('?' * len(wanted))})", wanted))
    if kind is not None:
        filters.append(("kind=?", (kind,)))
    if payer is not None:
        filters.append(("payer=?", (payer.lower(),)))
    if created_before_ms is not None:
        filters.append(("created_ms<=?", (created_before_ms,)))
    conditions = " AND ".join(condition for condition, _ in filters)
    values = [value for _, given in filters for value in given]
    rows = tx.execute(
        f"SELECT {_LISTED} FROM settlement WHERE {conditions} ORDER BY created_ms DESC, id LIMIT ?",  # noqa: S608 - names from this module
        (*values, limit),
    ).fetchall()
    return [_named(_LISTED, row) for row in rows]


def tell(tx: Transaction, settlement_id: str) -> dict[str, Any] | None:
    """Everything about one settlement: the order, what carries it, the evidence or why there is none, and what happens next."""
    row = tx.execute(f"SELECT {_SETTLEMENT} FROM settlement WHERE id=?", (settlement_id,)).fetchone()  # noqa: S608
    if row is None:
        return None
    settlement = _named(_SETTLEMENT, row)
    return {
        "settlement": settlement,
        "transaction": _transaction(tx, settlement["transaction_id"]),
        "evidence": _evidence(settlement),
        "transfers": _transfers(tx, settlement),
        "next": what_happens_next(settlement),
    }


def ask_again(tx: Transaction, settlement_id: str) -> str | None:
    """Wish that the engine looks at a settlement again; returns its state, or None if there is no such settlement.

    Of one that is paid nothing is wished: there is nothing left to do.
    """
    row = tx.execute("SELECT state FROM settlement WHERE id=?", (settlement_id,)).fetchone()
    if row is None:
        return None
    if row[0] not in states.PAID:
        tx.execute("UPDATE settlement SET look_again_ms=? WHERE id=?", (states.now_ms(), settlement_id))
    return str(row[0])


def what_happens_next(settlement: dict[str, Any]) -> str:
    """One sentence for people."""
    deadline = settlement["valid_before"]
    until = f" until {moment(deadline * 1000)}" if deadline else ""
    match settlement["state"]:
        case "queued" if settlement["attempts"]:
            return "the transaction that carried it executed nothing of it; it goes out alone next"
        case "queued":
            return "it waits for a signer; a running gateway takes it up"
        case "submitted":
            end = "; without evidence it fails then" if deadline else ""
            return f"a running gateway sends these bytes and looks for their receipt{until}{end}"
        case "mined":
            return "it is final once enough blocks are on top of its own; if a reorganisation takes it away it is sent again"
        case "superseded":
            return "nothing: somebody else submitted the payer's authorization, and it is paid all the same"
        case "failed":
            watched = settlement["watch_again_ms"]
            looked = "" if watched is None else f"; a running gateway looks again from {moment(watched)} on"
            again = ", or sends it again if it would be paid then" if watched and settlement["kind"] == "upto" else ""
            return f"nothing is sent now; if somebody executes the authorization all the same, it counts{looked}{again}"
        case _:
            return "nothing: it is paid for good"


def moment(ms: int) -> str:
    """A time for people."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _transaction(tx: Transaction, transaction_id: str | None) -> dict[str, Any] | None:
    row = tx.execute(f"SELECT {_TRANSACTION} FROM chain_transaction WHERE id=?", (transaction_id,)).fetchone()  # noqa: S608
    if row is None:
        return None
    told = _named(_TRANSACTION, row)
    told["broadcasts"] = orjson.loads(told["broadcasts"])
    carries = tx.execute("SELECT COUNT(*) FROM settlement WHERE transaction_id=?", (transaction_id,)).fetchone()
    return told | {"settlements": carries[0]}


def _evidence(settlement: dict[str, Any]) -> dict[str, Any] | None:
    if settlement["state"] not in states.PAID:
        return None
    names = ("transaction_hash", "block_number", "transfer_log_index", "received_value")
    return {name: settlement[name] for name in names}


def _transfers(tx: Transaction, settlement: dict[str, Any]) -> list[dict[str, Any]]:
    columns = "id, debit_account, credit_account, amount, posted_amount, state"
    rows = tx.execute(
        f"SELECT {columns} FROM ledger_transfer WHERE reference IN (?, ?) OR id=? ORDER BY created_ms, id",  # noqa: S608
        (settlement["id"], settlement["reference"], settlement["reference"]),
    ).fetchall()
    return [_named(columns, row) for row in rows]


def _named(columns: str, row: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(columns.split(", "), row, strict=True))
