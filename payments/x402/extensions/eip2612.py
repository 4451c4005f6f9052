"""The extension `eip2612GasSponsoring`: a permit that comes with a Permit2 payment of a payer that never approved Permit2.

The contract that takes the payment gives the allowance in the same call, so nothing is sponsored without being paid.

Source: x402 `specs/extensions/eip2612_gas_sponsoring.md`, EIP-2612.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.x402.extensions import allowances
from payments.x402.fields import malformed, read_uint256
from payments.x402.requirements import Requirement

NAME = "eip2612GasSponsoring"
_ECDSA_BYTES = 65
DECLARATION = allowances.declaration(
    "A permit for Permit2 may come with the payment; its gas is paid for.", "nonce", "deadline", "signature"
)


@dataclass(frozen=True, slots=True)
class Eip2612Permit:
    """A permit that a payer signed for its token. Addresses are lower-case hex, integers uint256, times Unix seconds."""

    owner: str
    asset: str
    spender: str
    value: int
    nonce: int
    deadline: int
    signature: bytes
    """r, s, v: 65 bytes."""


def helps(requirement: Requirement) -> bool:
    """Whether a permit may come with a payment for an offer: over Permit2, in a token that the offer names the domain of."""
    return allowances.over_permit2(requirement) and "name" in requirement.extra


def read(extensions: dict[str, Any]) -> Eip2612Permit | None:
    """The permit that a payment's `extensions` bring, or None.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    found = allowances.read(extensions, NAME, "signature")
    if found is None:
        return None
    if len(found.signed) != _ECDSA_BYTES:
        malformed(f"{found.field}.signature", f"{_ECDSA_BYTES} bytes")
    return Eip2612Permit(
        owner=found.owner,
        asset=found.asset,
        spender=found.spender,
        value=found.amount,
        nonce=read_uint256(found.info.get("nonce"), f"{found.field}.nonce"),
        deadline=read_uint256(found.info.get("deadline"), f"{found.field}.deadline"),
        signature=found.signed,
    )
