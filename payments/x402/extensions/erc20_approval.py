"""The extension `erc20ApprovalGasSponsoring`: a payer's own signed transaction that approves Permit2.

It is for tokens without EIP-2612. We bring it to the chain, having given the payer the coin for it where it has none, and take
the payment then.

Source: x402 `specs/extensions/erc20_gas_sponsoring.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.x402.fields import malformed, read_address, read_object, read_signature, read_uint256
from payments.x402.requirements import Requirement

NAME = "erc20ApprovalGasSponsoring"
TRANSACTION_BYTES_MAX = 512
"""A signed `approve` has some 180 bytes."""
DECLARATION: dict[str, Any] = {
    "info": {
        "description": "A signed approval of Permit2 may come with the payment; its gas is paid for.",
        "version": "1",
    },
    "schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "required": ["from", "asset", "spender", "amount", "signedTransaction", "version"],
    },
}


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
    return requirement.extra.get("assetTransferMethod") == "permit2" and "name" not in requirement.extra


def read(extensions: dict[str, Any]) -> Erc20Approval | None:
    """The approval that a payment's `extensions` bring, or None.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    if not isinstance(extensions.get(NAME), dict):
        return None
    field = f"extensions.{NAME}.info"
    info: dict[str, Any] = read_object(extensions[NAME].get("info"), field)
    if "signedTransaction" not in info:
        return None  # the server's own declaration, echoed by a payer that needs no approval
    raw = read_signature(info["signedTransaction"], f"{field}.signedTransaction")
    if len(raw) > TRANSACTION_BYTES_MAX:
        malformed(f"{field}.signedTransaction", f"at most {TRANSACTION_BYTES_MAX} bytes")
    return Erc20Approval(
        owner=read_address(info.get("from"), f"{field}.from"),
        asset=read_address(info.get("asset"), f"{field}.asset"),
        spender=read_address(info.get("spender"), f"{field}.spender"),
        amount=read_uint256(info.get("amount"), f"{field}.amount"),
        raw=raw,
    )
