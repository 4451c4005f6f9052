"""The extension `eip2612GasSponsoring`: a permit that comes with a Permit2 payment of a payer that never approved Permit2.

The contract that takes the payment gives the allowance in the same call, so nothing is sponsored without being paid.

Source: x402 `specs/extensions/eip2612_gas_sponsoring.md`, EIP-2612.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.x402.fields import malformed, read_address, read_object, read_signature, read_uint256
from payments.x402.requirements import Requirement

NAME = "eip2612GasSponsoring"
_ECDSA_BYTES = 65
DECLARATION: dict[str, Any] = {
    "info": {"description": "A permit for Permit2 may come with the payment; its gas is paid for.", "version": "1"},
    "schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "required": ["from", "asset", "spender", "amount", "nonce", "deadline", "signature", "version"],
    },
}


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
    return requirement.extra.get("assetTransferMethod") == "permit2" and "name" in requirement.extra


def read(extensions: dict[str, Any]) -> Eip2612Permit | None:
    """The permit that a payment's `extensions` bring, or None.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    if not isinstance(extensions.get(NAME), dict):
        return None
    field = f"extensions.{NAME}.info"
    info: dict[str, Any] = read_object(extensions[NAME].get("info"), field)
    if "signature" not in info:
        return None  # the server's own declaration, echoed by a payer that needs no permit
    signature = read_signature(info["signature"], f"{field}.signature")
    if len(signature) != _ECDSA_BYTES:
        malformed(f"{field}.signature", f"{_ECDSA_BYTES} bytes")
    return Eip2612Permit(
        owner=read_address(info.get("from"), f"{field}.from"),
        asset=read_address(info.get("asset"), f"{field}.asset"),
        spender=read_address(info.get("spender"), f"{field}.spender"),
        value=read_uint256(info.get("amount"), f"{field}.amount"),
        nonce=read_uint256(info.get("nonce"), f"{field}.nonce"),
        deadline=read_uint256(info.get("deadline"), f"{field}.deadline"),
        signature=signature,
    )
