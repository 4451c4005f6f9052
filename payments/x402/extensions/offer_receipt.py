"""The extension `offer-receipt`: offers that the gateway signs in a 402, and a receipt that it signs for what was paid.

Both are EIP-712, signed with a key of their own that is derived from the gateway's secret: a leak of it moves no money. Its
address is published, so that whoever is shown a receipt can tell whose it is.

Source: x402 `specs/extensions/extension-offer-and-receipt.md`.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

import coincurve

from payments.chain.transactions import address_of
from payments.verification.signatures import keccak256
from payments.x402.requirements import Requirement
from payments.x402.wire import OFFER_RECEIPT

NAME = OFFER_RECEIPT
VERSION = 1
_DOMAIN = keccak256(b"EIP712Domain(string name,string version,uint256 chainId)")
_OFFER = keccak256(
    b"Offer(string resourceUrl,string scheme,string network,string asset,address payTo,string amount,"
    b"uint256 maxTimeoutSeconds,uint256 issuedAt)"
)
_RECEIPT = keccak256(b"Receipt(string network,string resourceUrl,string payer,uint256 issuedAt,string transaction)")
_SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"}


class OfferSigner:
    """Signs offers and receipts.

    Args:
        secret: The gateway's, the same on all replicas.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = coincurve.PrivateKey(hmac.digest(secret, b"farebox offer and receipt key", "sha256"))
        self.address = address_of(self._key)
        """Lower-case hex: what signatures recover to."""

    def offers(self, requirements: Sequence[Requirement], resource_url: str, now: int) -> dict[str, Any]:
        """The extension's part of a 402; `now` in Unix seconds."""
        signed = [self._offer(requirement, resource_url, now) for requirement in requirements]
        return {"info": {"version": VERSION, "offers": signed}, "schema": _SCHEMA}

    def receipt(self, network: str, resource_url: str, payer: str, transaction: str, now: int) -> dict[str, Any]:
        """The extension's part of `PAYMENT-RESPONSE`, for a payment that arrived.

        Args:
            network: In CAIP-2 form, whatever the payer's version calls it.
            resource_url: What was paid for.
            payer: Lower-case hex.
            transaction: The hash of the transaction that paid; empty where there is none.
            now: Unix seconds.
        """
        payload = {
            "network": network,
            "resourceUrl": resource_url,
            "payer": payer,
            "issuedAt": now,
            "transaction": transaction,
        }
        words = (_text(network), _text(resource_url), _text(payer), _number(now), _text(transaction))
        signed = self._signed("x402 receipt", network, _RECEIPT, words, payload)
        return {"info": {"version": VERSION, "receipt": signed}, "schema": _SCHEMA}

    def _offer(self, requirement: Requirement, resource_url: str, now: int) -> dict[str, Any]:
        payload = {
            "resourceUrl": resource_url,
            "scheme": requirement.scheme,
            "network": requirement.network,
            "asset": requirement.asset,
            "payTo": requirement.pay_to,
            "amount": str(requirement.amount),
            "maxTimeoutSeconds": requirement.max_timeout_s,
            "issuedAt": now,
        }
        words = (
            _text(resource_url),
            _text(requirement.scheme),
            _text(requirement.network),
            _text(requirement.asset),
            bytes(12) + bytes.fromhex(requirement.pay_to[2:]),
            _text(str(requirement.amount)),
            _number(requirement.max_timeout_s),
            _number(now),
        )
        return self._signed("x402 offer", requirement.network, _OFFER, words, payload)

    def _signed(
        self, domain: str, network: str, type_hash: bytes, words: Sequence[bytes], payload: dict[str, Any]
    ) -> dict[str, Any]:
        chain_id = int(network.removeprefix("eip155:"))
        separator = keccak256(_DOMAIN + _text(domain) + _text("1") + _number(chain_id))
        digest = keccak256(b"\x19\x01" + separator + keccak256(type_hash + b"".join(words)))
        raw = self._key.sign_recoverable(digest, hasher=None)
        signature = "0x" + raw[:64].hex() + f"{27 + raw[64]:02x}"
        return {"format": "eip712", "payload": payload, "signature": signature}


def _text(text: str) -> bytes:
    return keccak256(text.encode())


def _number(number: int) -> bytes:
    return number.to_bytes(32, "big")
