"""Receipts that a gateway signs (x402's extension `offer-receipt`): evidence for third parties that it was paid, and by whom.

A gateway sends one with a paid answer to whoever had asked for signed offers (``Accept-Payment: offer-receipt``), and publishes
the address that it signs with at ``/.well-known/farebox-keys``.

Source: x402 `specs/extensions/extension-offer-and-receipt.md`, sections 3 and 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

EXTENSION = "offer-receipt"
_NETWORK = re.compile(r"eip155:([1-9][0-9]{0,18})")
_TYPES = {
    "Receipt": [
        {"name": "network", "type": "string"},
        {"name": "resourceUrl", "type": "string"},
        {"name": "payer", "type": "string"},
        {"name": "issuedAt", "type": "uint256"},
        {"name": "transaction", "type": "string"},
    ]
}
_KINDS = {"network": str, "resourceUrl": str, "payer": str, "issuedAt": int, "transaction": str}


class ReceiptInvalid(ValueError):
    """There is no signed receipt, or it is not what it must be."""


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """What a gateway says, with its signature, that it was paid for. `issued_at` is Unix seconds."""

    signer: str
    """Lower-case hex."""
    network: str
    resource_url: str
    payer: str
    issued_at: int
    transaction: str
    """Its hash, or empty."""


def read_signed_receipt(payment_response: str, signer: str) -> SignedReceipt:
    """Read and verify the signed receipt of an answer.

    Args:
        payment_response: The answer's header `PAYMENT-RESPONSE`.
        signer: The address that must have signed it, as the gateway publishes it.

    Raises:
        ReceiptInvalid: Saying why.
    """
    from x402.http.utils import decode_payment_response_header

    try:
        extensions = decode_payment_response_header(payment_response).extensions or {}
        artifact = extensions[EXTENSION]["info"]["receipt"]
        payload, signature = artifact["payload"], artifact["signature"]
        if artifact["format"] != "eip712" or payload.keys() != _KINDS.keys():
            raise ReceiptInvalid("the receipt is not in the form eip712")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ReceiptInvalid):
            raise
        raise ReceiptInvalid("the answer carries no signed receipt") from None
    if not all(type(payload[name]) is kind for name, kind in _KINDS.items()):
        raise ReceiptInvalid("a member of the receipt has the wrong type")
    found = _signer(payload, signature)
    if found != signer.lower():
        raise ReceiptInvalid(f"the receipt was signed by {found}, not by {signer.lower()}")
    return SignedReceipt(
        signer=found,
        network=payload["network"],
        resource_url=payload["resourceUrl"],
        payer=payload["payer"],
        issued_at=payload["issuedAt"],
        transaction=payload["transaction"],
    )


def _signer(payload: dict[str, Any], signature: Any) -> str:
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    network = _NETWORK.fullmatch(payload["network"])
    if network is None:
        raise ReceiptInvalid("the receipt's network is none that is signed for")
    domain = {"name": "x402 receipt", "version": "1", "chainId": int(network[1])}
    try:
        signable = encode_typed_data(domain_data=domain, message_types=_TYPES, message_data=payload)
        return str(Account.recover_message(signable, signature=signature)).lower()
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise, it is no signature
        raise ReceiptInvalid(f"the receipt's signature cannot be read: {type(error).__name__}") from None
