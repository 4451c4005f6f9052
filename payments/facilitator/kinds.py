"""How settlements for others are carried and proven. Nothing is booked, since the money never is ours; what failed is noted,
since the gas was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from payments.chain.channel_contract import (
    GAS_CLAIM_BASE,
    GAS_CLAIM_EACH,
    GAS_DEPOSIT,
    GAS_REFUND,
    GAS_SETTLE,
)
from payments.chain.transactions import WORD
from payments.channels.kinds import DepositProof, RefundProof, deposit_nonce, gas_of_claim
from payments.facilitator import records
from payments.facilitator.channel_proofs import ClaimedProof, SettledProof
from payments.settlement import outbox
from payments.settlement.evidence import PaymentProof, payment_nonce
from payments.settlement.orders import Kind, Proof, SettlementOrder
from payments.store import Transaction

EXACT = "facilitated"
UPTO = "facilitated_upto"
DEPOSIT = "facilitated_deposit"
CLAIM = "facilitated_claim"
SETTLE = "facilitated_settle"
REFUND = "facilitated_refund"


def kinds() -> dict[str, Kind]:
    """By name."""
    channels: dict[str, tuple[Proof, Any]] = {
        CLAIM: (ClaimedProof(), gas_of_claim),
        SETTLE: (SettledProof(), lambda _: GAS_SETTLE),
        REFUND: (RefundProof(), gas_of_refund),
    }
    found = {name: Kind(proof, _paid, records.blame, gas, batchable=True) for name, (proof, gas) in channels.items()}
    found[DEPOSIT] = Kind(
        DepositProof(), _paid, records.blame, lambda _: GAS_DEPOSIT, batchable=True, nonce=deposit_nonce
    )
    found[EXACT] = Kind(PaymentProof(), _paid, records.blame, outbox.order_gas, batchable=True, nonce=payment_nonce)
    found[UPTO] = replace(found[EXACT], through=outbox.order_facilitator)
    return found


def gas_of_refund(order: SettlementOrder) -> int:
    """The most gas that a refund uses, with the claims that may precede it in the same call: each is at least 16 words."""
    claims = len(order.call_data) // (16 * WORD)
    return GAS_REFUND + (GAS_CLAIM_BASE + GAS_CLAIM_EACH * claims if claims else 0)


def _paid(tx: Transaction, row: dict[str, Any]) -> None:
    # Whoever does before us what we were asked to makes our transaction do nothing, and us pay for it.
    if row["state"] == "superseded":
        records.blame(tx, row)
