"""Signatures of contract wallets, as bytes. Whether they are good only the chain can tell: see `chain_state`.

A wallet that is not deployed yet wraps its signature together with the call that deploys it (ERC-6492). No token and no Permit2
knows that form, so we take it apart: the deployment is made with the transfer, in one transaction, and only by factories that
the operator has listed. What a stranger's factory does for our gas would be its own affair.

Source: ERC-1271, ERC-6492.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from payments.errors import PaymentMalformed, PaymentRefused

ERC6492_SUFFIX = bytes.fromhex("6492" * 16)
_WORD = 32


@dataclass(frozen=True, slots=True)
class Deployment:
    """The call that deploys a wallet. `factory` is lower-case hex."""

    factory: str
    data: bytes


def unwrap(signature: bytes) -> tuple[bytes, Deployment | None]:
    """The wallet's own signature, and what deploys the wallet first, if it is wrapped so.

    Raises:
        PaymentMalformed: ``malformed_signature``: it ends like an ERC-6492 wrapper and is none.
    """
    if not signature.endswith(ERC6492_SUFFIX):
        return signature, None
    body = signature[: -len(ERC6492_SUFFIX)]
    factory = body[:_WORD]
    if len(body) < 5 * _WORD or any(factory[:12]):
        raise _malformed()
    return _dynamic(body, 2), Deployment("0x" + factory[12:].hex(), _dynamic(body, 1))


def check_factory(signature: bytes, factories: Collection[str]) -> None:
    """Refuse a wallet that only a factory which is not listed could deploy.

    Args:
        signature: As the payer sent it.
        factories: Lower-case hex.

    Raises:
        PaymentRefused: ``unsupported_factory``.
        PaymentMalformed: ``malformed_signature``.
    """
    _, deployment = unwrap(signature)
    if deployment is not None and deployment.factory not in factories:
        raise PaymentRefused(
            "unsupported_factory",
            f"wallets of the factory {deployment.factory} are not deployed here; deploy the wallet and send the payment again",
        )


def _dynamic(body: bytes, place: int) -> bytes:
    """The `bytes` whose offset stands in the head at `place`."""
    at = int.from_bytes(body[place * _WORD : (place + 1) * _WORD], "big")
    if at + _WORD > len(body):
        raise _malformed()
    length = int.from_bytes(body[at : at + _WORD], "big")
    if at + _WORD + length > len(body):
        raise _malformed()
    return body[at + _WORD : at + _WORD + length]


def _malformed() -> PaymentMalformed:
    return PaymentMalformed("malformed_signature", "the signature ends like one of ERC-6492, but it is none")
