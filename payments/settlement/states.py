"""The states of a settlement. This table says which follow which, and `move` is the only thing that assigns one.

queued      written, not yet signed (a refund waiting for its signer)
submitted   signed, with a signer's nonce; the bytes are durable and are, or will be, broadcast
mined       evidence stands in a block: our own transaction moved the money
superseded  evidence stands in a block: somebody else submitted the authorization; paid all the same
final       mined and deeper than the network's confirmations
failed      no evidence, and none expected: reverted, cancelled or expired
"""

from __future__ import annotations

import time
from typing import Any

from payments.store import Transaction

TRANSITIONS: dict[str, frozenset[str]] = {
    "queued": frozenset({"submitted", "failed"}),
    "submitted": frozenset({"mined", "superseded", "failed"}),
    # Back to submitted when a reorganisation took the block away.
    "mined": frozenset({"final", "submitted"}),
    "superseded": frozenset({"submitted"}),
    # Money that arrives after we gave up is the payer's all the same.
    "failed": frozenset({"mined", "superseded"}),
    "final": frozenset(),
}
OPEN = frozenset({"queued", "submitted"})
PAID = frozenset({"mined", "superseded", "final"})

_SOURCES = {
    target: tuple(source for source, targets in TRANSITIONS.items() if target in targets) for target in TRANSITIONS
}
_COLUMNS = frozenset({
    "signer", "signer_nonce", "raw_transaction", "transaction_hash", "transfer_log_index", "received_value", "broadcasts",
    "block_number", "reason",
})  # fmt: skip


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


def move(tx: Transaction, settlement_id: str, to: str, **columns: Any) -> bool:
    """Move a settlement to a state that may follow its own, and set `columns` with it.

    Returns:
        False, with nothing changed, if it is not in a state that `to` may follow: somebody else was here before.
    """
    assert columns.keys() <= _COLUMNS
    sources = _SOURCES[to]
    assignments = "".join(f", {column}=?" for column in columns)
    marks = ",".join("?" * len(sources))
    rows = tx.execute(
        f"UPDATE settlement SET state=?, updated_ms=?{assignments} WHERE id=? AND state IN ({marks})",  # noqa: S608 - names from this module
        (to, now_ms(), *columns.values(), settlement_id, *sources),
    )
    return rows.rowcount == 1
