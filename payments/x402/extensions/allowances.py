"""What the extensions have in common by which Permit2 gets its allowance with a payment: their form, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.x402.fields import read_address, read_object, read_signature, read_uint256
from payments.x402.requirements import Requirement


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a payer says that it signed. Addresses are lower-case hex, amounts uint256."""

    field: str
    """Where it stands in the payment, for what is wrong with it."""
    info: dict[str, Any]
    owner: str
    asset: str
    spender: str
    amount: int
    signed: bytes


def declaration(description: str, *members: str) -> dict[str, Any]:
    """What a server says of such an extension; `members` are its own beside those that all have."""
    return {
        "info": {"description": description, "version": "1"},
        "schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "additionalProperties": {"type": "string"},
            "required": ["from", "asset", "spender", "amount", *members, "version"],
        },
    }


def over_permit2(requirement: Requirement) -> bool:
    """Whether an offer is paid through Permit2."""
    return requirement.extra.get("assetTransferMethod") == "permit2"


def read(extensions: dict[str, Any], name: str, signed: str) -> Allowance | None:
    """What a payment's `extensions` bring under `name`; `signed` is the member that the payer signed.

    None if there is nothing, or only the server's own declaration, echoed by a payer that has its allowance.

    Raises:
        PaymentMalformed: ``malformed_payment``, naming the member.
    """
    if not isinstance(extensions.get(name), dict):
        return None
    field = f"extensions.{name}.info"
    info: dict[str, Any] = read_object(extensions[name].get("info"), field)
    if signed not in info:
        return None
    return Allowance(
        field=field,
        info=info,
        owner=read_address(info.get("from"), f"{field}.from"),
        asset=read_address(info.get("asset"), f"{field}.asset"),
        spender=read_address(info.get("spender"), f"{field}.spender"),
        amount=read_uint256(info.get("amount"), f"{field}.amount"),
        signed=read_signature(info[signed], f"{field}.{signed}"),
    )
