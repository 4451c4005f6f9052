"""The states of settlements and of the transactions that carry them. These tables say which follow which, and `move` and
`move_transaction` are the only things that assign one.

A settlement:

queued      written, waiting for a transaction to carry it
submitted   carried by a signed transaction, whose bytes are durable and are, or will be, broadcast
mined       evidence stands in a block: our own transaction moved the money
superseded  evidence stands in a block: somebody else submitted the authorization; paid all the same
final       mined and deeper than the network's confirmations
failed      no evidence, and none expected by itself: reverted, cancelled or expired

A transaction:

signed      with a signer's nonce; carried to the nodes until one of its broadcasts is in a block
included    in a block, whatever it did there
lost        somebody else used its nonce with our key, and nothing depends on it any more
"""

from __future__ import annotations

import time
from typing import Any

from payments.store import Transaction

TRANSITIONS: dict[str, frozenset[str]] = {
    # Straight to superseded when somebody had executed the authorization before we could.
    "queued": frozenset({"submitted", "superseded", "failed"}),
    # Back to queued when the transaction that carried it among others reverted as a whole.
    "submitted": frozenset({"mined", "superseded", "failed", "queued"}),
    # Back to submitted when a reorganisation took the block away.
    "mined": frozenset({"final", "submitted"}),
    # Back to queued if we had sent nothing for it.
    "superseded": frozenset({"submitted", "queued"}),
    # Money that arrives after we gave up is the payer's all the same. Back to queued if it is worth another transaction.
    "failed": frozenset({"mined", "superseded", "queued"}),
    "final": frozenset(),
}
TRANSACTION_TRANSITIONS: dict[str, frozenset[str]] = {
    "signed": frozenset({"included", "lost"}),
    # Back to signed when a reorganisation took the block away.
    "included": frozenset({"signed"}),
    "lost": frozenset(),
}
OPEN = frozenset({"queued", "submitted"})
PAID = frozenset({"mined", "superseded", "final"})

_COLUMNS = frozenset({
    "transaction_id", "position", "attempts", "from_block", "transaction_hash", "transfer_log_index", "received_value",
    "block_number", "reason", "watch_again_ms", "waits_for",
})  # fmt: skip
_TRANSACTION_COLUMNS = frozenset({"inclusions", "block_number", "gas_used", "fee_wei"})


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def move(tx: Transaction, settlement_id: str, to: str, **columns: Any) -> bool:
    """Move a settlement to a state that may follow its own, and set `columns` with it.

    Returns:
        False, with nothing changed, if it is not in a state that `to` may follow: somebody else was here before.
    """
    assert columns.keys() <= _COLUMNS
    return _move(tx, "settlement", TRANSITIONS, settlement_id, to, columns)


def move_transaction(tx: Transaction, transaction_id: str, to: str, **columns: Any) -> bool:
    """Move a transaction to a state that may follow its own; arguments and result as for `move`."""
    assert columns.keys() <= _TRANSACTION_COLUMNS
    return _move(tx, "chain_transaction", TRANSACTION_TRANSITIONS, transaction_id, to, columns)


def _move(
    tx: Transaction, table: str, transitions: dict[str, frozenset[str]], row_id: str, to: str, columns: dict[str, Any]
) -> bool:
    sources = tuple(source for source, targets in transitions.items() if to in targets)
    assignments = "".join(f", {column}=?" for column in columns)
    marks = ",".join("?" * len(sources))
    rows = tx.execute(
        f"UPDATE {table} SET state=?, updated_ms=?{assignments} WHERE id=? AND state IN ({marks})",  # noqa: S608 - names from this module
        (to, now_ms(), *columns.values(), row_id, *sources),
    )
    return rows.rowcount == 1
