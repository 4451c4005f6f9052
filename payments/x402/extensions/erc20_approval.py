"""The extension `erc20ApprovalGasSponsoring`: a payer's own signed transaction that approves Permit2.

It is for tokens without EIP-2612. We bring it to the chain, having given the payer the coin for it where it has none, and take
the payment then.

Source: x402 `specs/extensions/erc20_gas_sponsoring.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.x402.extensions import allowances
from payments.x402.fields import malformed
from payments.x402.requirements import Requirement

NAME = "erc20ApprovalGasSponsoring"
TRANSACTION_BYTES_MAX = 512
"""A signed `approve` has some 180 bytes."""
DECLARATION = allowances.declaration(
    "A signed approval of Permit2 may come with the payment; its gas is paid for.", "signedTransaction"
)


@dataclass(frozen=True, slots=True)
class Erc20Approval:
    """An approval as it came: what the payer says of it, and the transaction itself. Addresses are lower-case hex."""

    owner: str
    asset: str
    spender: str
    amount: int
    raw: bytes


def helps(requirement: Requirement) -> bool:
    """Whether an approval may come with a payment for an offer: over Permit2, in a token that takes no permits."""
    return allowances.over_permit2(requirement) and "name" not in requirement.extra


def read(extensions: dict[str, Any]) -> Erc20Approval | None:
    """The approval that a payment's `extensions` bring, or None.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    found = allowances.read(extensions, NAME, "signedTransaction")
    if found is None:
        return None
    if len(found.signed) > TRANSACTION_BYTES_MAX:
        malformed(f"{found.field}.signedTransaction", f"at most {TRANSACTION_BYTES_MAX} bytes")
    return Erc20Approval(found.owner, found.asset, found.spender, found.amount, found.signed)
