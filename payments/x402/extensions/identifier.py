"""The extension `payment-identifier`: the payer's own name for what it pays for, which at most one of its payments may bear.

The same payment sent again needs no name; this is for an agent that lost everything but the name, and would pay a second time.

Source: x402 `specs/extensions/payment_identifier.md`.
"""

from __future__ import annotations

import re
from typing import Any

from payments.errors import PaymentConflict
from payments.store import Transaction
from payments.x402.fields import malformed, read_object

NAME = "payment-identifier"
_ID = re.compile(r"[a-zA-Z0-9_-]{16,128}")
_FREE = """
    DELETE FROM payment_identifier WHERE payer = ? AND identifier = ? AND (
        NOT EXISTS (
            SELECT 1 FROM receipt WHERE receipt.id = payment_identifier.receipt_id AND receipt.state <> 'released'
        )
        OR EXISTS (
            SELECT 1 FROM payment_authorization AS used
            WHERE used.receipt_id = payment_identifier.receipt_id AND used.state = 'failed'
        )
    )
"""
_FIND = "SELECT receipt_id FROM payment_identifier WHERE payer = ? AND identifier = ?"
_INSERT = "INSERT INTO payment_identifier (payer, identifier, receipt_id) VALUES (?, ?, ?)"
DECLARATION: dict[str, Any] = {
    "info": {"required": False},
    "schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "required": {"type": "boolean"},
            "id": {"type": "string", "minLength": 16, "maxLength": 128, "pattern": "^[a-zA-Z0-9_-]+$"},
        },
        "required": ["required"],
    },
}


def read(extensions: dict[str, Any]) -> str | None:
    """The name that a payment bears, or None.

    Raises:
        PaymentMalformed: ``malformed_payment``: it is not one.
    """
    if NAME not in extensions:
        return None
    field = f"extensions.{NAME}"
    info = read_object(read_object(extensions[NAME], field).get("info"), f"{field}.info")
    if info.get("id") is None:
        return None
    if not isinstance(info["id"], str) or not _ID.fullmatch(info["id"]):
        malformed(f"{field}.info.id", "16 to 128 letters, digits, - or _")
    return str(info["id"])


def check(tx: Transaction, payer: str, identifier: str) -> None:
    """Return if a payment of `payer` (lower-case hex) may bear a name; raises as `bind` does, and changes nothing else."""
    tx.execute(_FREE, (payer, identifier))
    first = tx.execute(_FIND, (payer, identifier)).fetchone()
    if first is not None:
        raise PaymentConflict(
            "payment_identifier_used",
            "another payment of yours bears this identifier; nothing was taken: look at its receipt, or send that very payment",
            str(first[0]),
        )


def bind(tx: Transaction, payer: str, identifier: str, receipt_id: str) -> None:
    """Let a payment bear a name of its payer's, in the unit that reserves it.

    Raises:
        PaymentConflict: ``payment_identifier_used``, with the first payment's receipt: another payment bears it, whose transfer
            has not failed, and whose request was not released.
    """
    check(tx, payer, identifier)
    tx.execute(_INSERT, (payer, identifier, receipt_id))
