"""How settlements for others are carried and proven. Nothing is booked, since the money never is ours; what failed is noted,
since the gas was."""

from __future__ import annotations

from typing import Any

from payments.facilitator import records
from payments.settlement import outbox
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import Kind
from payments.store import Transaction

EXACT = "facilitated"
UPTO = "facilitated_upto"


def kinds(*, batches: bool) -> dict[str, Kind]:
    """By name.

    Args:
        batches: Whether the operator has a batch contract on the network: nobody else can settle `upto`.
    """
    found = {EXACT: Kind(PaymentProof(), _paid, records.blame, outbox.order_gas, batchable=True)}
    if batches:
        found[UPTO] = Kind(PaymentProof(), _paid, records.blame, outbox.order_gas, batchable=True, through_batch=True)
    return found


def _paid(tx: Transaction, row: dict[str, Any]) -> None:
    # Whoever executes an authorization before us makes our transaction revert, and us pay for it.
    if row["state"] == "superseded":
        records.blame(tx, row)
