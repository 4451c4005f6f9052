"""Payments for the tests of the wire and of verification: signed by eth-account, which this code does not use."""

from __future__ import annotations

import base64
import copy
import json
import secrets
from typing import Any

from eth_account import Account
from eth_account.messages import encode_typed_data
from eth_account.signers.local import LocalAccount

from payments.chain.networks import (
    EXACT_PERMIT2_PROXY_ADDRESS,
    KNOWN_NETWORKS,
    PERMIT2_ADDRESS,
    Network,
    Token,
)
from payments.quotes import Quote, QuoteItem
from payments.x402.wire import HeaderName, Payment, Requirement, decode_payment, requirement_for

NOW = 1_790_000_000
PAY_TO = "0x" + "7e" * 20
AMOUNT_NANO_USD = 12_345_000
PAYER: LocalAccount = Account.from_key("0x" + "11" * 32)
PAYER_ADDRESS = PAYER.address.lower()
RESOURCE_URL = "https://gateway.example/v1/chat/completions"

USDC = KNOWN_NETWORKS[84532].tokens[0]
USDT = Token("USDT", 84532, "0x" + "da" * 20, 6, "permit2", "Tether USD", "1")
NETWORK = Network(84532, "base-sepolia", (USDC, USDT))
USDC_OFFER = requirement_for(USDC, NETWORK, AMOUNT_NANO_USD, PAY_TO, 300)
USDT_OFFER = requirement_for(USDT, NETWORK, AMOUNT_NANO_USD, PAY_TO, 300)

REMOVED = object()
"""Stands for no value at all in `changed`."""

EIP3009_TYPES = {
    "TransferWithAuthorization": [
        {"name": "from", "type": "address"},
        {"name": "to", "type": "address"},
        {"name": "value", "type": "uint256"},
        {"name": "validAfter", "type": "uint256"},
        {"name": "validBefore", "type": "uint256"},
        {"name": "nonce", "type": "bytes32"},
    ]
}
PERMIT2_TYPES = {
    "PermitWitnessTransferFrom": [
        {"name": "permitted", "type": "TokenPermissions"},
        {"name": "spender", "type": "address"},
        {"name": "nonce", "type": "uint256"},
        {"name": "deadline", "type": "uint256"},
        {"name": "witness", "type": "Witness"},
    ],
    "TokenPermissions": [{"name": "token", "type": "address"}, {"name": "amount", "type": "uint256"}],
    "Witness": [{"name": "to", "type": "address"}, {"name": "validAfter", "type": "uint256"}],
}


def eip3009_message(authorization: dict[str, str], token: Token) -> Any:
    """The EIP-712 message of an EIP-3009 authorization in its wire form, for eth-account."""
    domain = {
        "name": token.domain_name,
        "version": token.domain_version,
        "chainId": token.chain_id,
        "verifyingContract": token.address,
    }
    integers = {name: int(authorization[name]) for name in ("value", "validAfter", "validBefore")}
    message = {**authorization, **integers, "nonce": bytes.fromhex(authorization["nonce"][2:])}
    return encode_typed_data(domain, EIP3009_TYPES, message)


def permit2_message(authorization: dict[str, Any], chain_id: int) -> Any:
    """The EIP-712 message of a Permit2 authorization in its wire form, for eth-account."""
    domain = {"name": "Permit2", "chainId": chain_id, "verifyingContract": PERMIT2_ADDRESS}
    message = {
        "permitted": {
            "token": authorization["permitted"]["token"],
            "amount": int(authorization["permitted"]["amount"]),
        },
        "spender": authorization["spender"],
        "nonce": int(authorization["nonce"]),
        "deadline": int(authorization["deadline"]),
        "witness": {
            "to": authorization["witness"]["to"],
            "validAfter": int(authorization["witness"]["validAfter"]),
        },
    }
    return encode_typed_data(domain, PERMIT2_TYPES, message)


def usdc_payload(
    changed: dict[str, str] | None = None, *, signer: LocalAccount = PAYER, token: Token = USDC, **changes: str
) -> dict[str, Any]:
    """A signed EIP-3009 payload; `changed` and `changes` are made before signing."""
    authorization = {
        "from": PAYER.address,
        "to": PAY_TO,
        "value": str(USDC_OFFER.amount),
        "validAfter": "0",
        "validBefore": str(NOW + 300),
        "nonce": "0x" + secrets.token_hex(32),
        **(changed or {}),
        **changes,
    }
    signature = signer.sign_message(eip3009_message(authorization, token)).signature
    return {"authorization": authorization, "signature": "0x" + bytes(signature).hex()}


def usdt_payload(
    changed: dict[str, str] | None = None, *, signer: LocalAccount = PAYER, chain_id: int = 84532, **changes: str
) -> dict[str, Any]:
    """A signed Permit2 payload; changes (`token`, `amount`, `to`, `validAfter`, or a top member) are made before signing."""
    changes = {**(changed or {}), **changes}
    authorization: dict[str, Any] = {
        "from": changes.get("from", PAYER.address),
        "permitted": {
            "token": changes.get("token", USDT.address),
            "amount": changes.get("amount", str(USDT_OFFER.amount)),
        },
        "spender": changes.get("spender", EXACT_PERMIT2_PROXY_ADDRESS),
        "nonce": changes.get("nonce", str(secrets.randbits(256))),
        "deadline": changes.get("deadline", str(NOW + 300)),
        "witness": {"to": changes.get("to", PAY_TO), "validAfter": changes.get("validAfter", "0")},
    }
    signature = signer.sign_message(permit2_message(authorization, chain_id)).signature
    return {"permit2Authorization": authorization, "signature": "0x" + bytes(signature).hex()}


def offer_json(offer: Requirement) -> dict[str, Any]:
    """An offer as a v2 client sends it back."""
    return {
        "scheme": offer.scheme,
        "network": offer.network,
        "asset": offer.asset,
        "amount": str(offer.amount),
        "payTo": offer.pay_to,
        "maxTimeoutSeconds": offer.max_timeout_s,
        "extra": copy.deepcopy(offer.extra),
    }


def v2_document(payload: dict[str, Any], offer: Requirement, quote_token: str | None = None) -> dict[str, Any]:
    """A v2 payment as JSON."""
    document: dict[str, Any] = {"x402Version": 2, "payload": payload, "accepted": offer_json(offer)}
    if quote_token is not None:
        document["extensions"] = {"farebox": {"quote": quote_token}}
    return document


def v1_document(payload: dict[str, Any], network: str = "base-sepolia") -> dict[str, Any]:
    """A v1 payment as JSON."""
    return {"x402Version": 1, "scheme": "exact", "network": network, "payload": payload}


def changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of the document with the member at the dotted path set or removed."""
    copied = copy.deepcopy(document)
    *parents, last = path.split(".")
    target = copied
    for parent in parents:
        target = target[parent]
    if value is REMOVED:
        del target[last]
    else:
        target[last] = value
    return copied


def header_of(document: Any) -> str:
    """JSON in base64."""
    return base64.b64encode(json.dumps(document).encode()).decode()


def quote_for(request_digest: bytes, route: tuple[str, ...] = ("model-a@one", "model-b@two")) -> Quote:
    """A quote of `AMOUNT_NANO_USD`."""
    return Quote(
        id="quote_" + secrets.token_hex(10),
        items=(QuoteItem("inference", AMOUNT_NANO_USD - 345_000), QuoteItem("network_fee", 345_000)),
        maximum_nano_usd=AMOUNT_NANO_USD,
        route=route,
        request_digest=request_digest,
        expires_at=NOW + 300,
    )


def decode_transfer(header: str, header_name: HeaderName) -> Payment:
    """Read a payment that is one signed transfer."""
    payment = decode_payment(header, header_name)
    assert isinstance(payment, Payment)
    return payment
