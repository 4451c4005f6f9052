"""The extension `sign-in-with-x`: a wallet that has credit here is let in by a signature instead of a payment.

What it grants is exactly one thing: this request may be paid from the signing wallet's prepaid credit. Without enough of it the
answer is the 402 again. The 402 brings the challenge, whose nonce carries an HMAC, so that asking stores nothing; a nonce works
once, and used ones are kept until they would have expired.

Source: x402 `sign-in-with-x` extension; CAIP-122, EIP-4361 (the message), EIP-191 (its signature).
"""

from __future__ import annotations

import binascii
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from payments.sign_in import SignInRefused, recover_personal
from payments.verification.signatures import checksum_address

NAME = "sign-in-with-x"
HEADER = b"sign-in-with-x"
TTL_S = 300
STATEMENT = "Pay for this request from your balance. This does not move funds on a chain."
_CHARACTERS_MAX = 8_192
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_NONCE = re.compile(r"[0-9a-f]{48}")
_RANDOM = 16
_TEXTS = ("domain", "address", "uri", "version", "chainId", "nonce", "issuedAt", "expirationTime", "signature")


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A wallet that signed a challenge of ours: lower-case address, the nonce to use up, and its end in Unix seconds."""

    address: str
    nonce: str
    expires_at: int


class SignInWithX:
    """Makes and checks challenges.

    Args:
        secret: The gateway's; the key used here is derived from it.
        networks: In CAIP-2 form, which messages may name.
    """

    def __init__(self, secret: bytes, networks: Sequence[str]) -> None:
        self._key = hmac.digest(secret, b"farebox sign-in-with-x nonce", "sha256")
        self._networks = tuple(networks)

    def declaration(self, resource_url: str, domain: str, now: int) -> dict[str, Any]:
        """The extension's part of a 402 for `resource_url` at the host `domain`; `now` in Unix seconds."""
        expires = _timestamp(now + TTL_S)
        random = secrets.token_hex(_RANDOM // 2)
        return {
            "info": {
                "domain": domain,
                "uri": resource_url,
                "statement": STATEMENT,
                "version": "1",
                "nonce": random + self._mac(random, domain, resource_url, expires),
                "issuedAt": _timestamp(now),
                "expirationTime": expires,
            },
            "supportedChains": [{"chainId": network, "type": "eip191"} for network in self._networks],
            "schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("statement", *_TEXTS)},
                "required": [name for name in _TEXTS if name != "expirationTime"],
            },
        }

    def verify(self, header: str, resource_url: str, domain: str, now: int) -> SignedIn:
        """Read the header `SIGN-IN-WITH-X`: base64 of the challenge with the wallet's address and signature.

        Raises:
            SignInRefused: Saying what is wrong.
        """
        proof = _read(header)
        expires_at = _seconds(proof["expirationTime"])
        genuine = self._mac(proof["nonce"][:_RANDOM], domain, resource_url, proof["expirationTime"])
        if (
            not _NONCE.fullmatch(proof["nonce"])
            or not hmac.compare_digest(proof["nonce"][_RANDOM:], genuine)
            or (proof["domain"], proof["uri"], proof["version"]) != (domain, resource_url, "1")
        ):
            raise SignInRefused("invalid_message", "the challenge is not one that this gateway made for this request")
        if now >= expires_at:
            raise SignInRefused("challenge_expired", "the challenge has expired; ask for a new one")
        if proof["chainId"] not in self._networks:
            raise SignInRefused("invalid_chain", f"chainId must be one of: {', '.join(self._networks)}")
        address = proof["address"].lower()
        if recover_personal(_message(proof), proof["signature"]) != address:
            raise SignInRefused("bad_signature", f"the message was not signed by {address} with personal_sign")
        return SignedIn(address, proof["nonce"], expires_at)

    def _mac(self, random: str, domain: str, uri: str, expires: str) -> str:
        text = "\n".join((random, domain, uri, expires))
        return hmac.digest(self._key, text.encode(), "sha256")[:16].hex()


def _read(header: str) -> dict[str, str]:
    try:
        if len(header) > _CHARACTERS_MAX:
            raise ValueError
        proof = orjson.loads(binascii.a2b_base64(header, strict_mode=True))
    except ValueError:
        proof = None
    if not isinstance(proof, dict) or not all(isinstance(proof.get(name), str) for name in _TEXTS):
        raise SignInRefused(
            "invalid_message", f"SIGN-IN-WITH-X must be base64 of JSON with the texts {', '.join(_TEXTS)}"
        )
    others = {name for name in ("notBefore", "requestId", "resources") if proof.get(name) is not None}
    if others or proof.get("statement") != STATEMENT or not _ADDRESS.fullmatch(proof["address"]):
        raise SignInRefused("invalid_message", "the challenge was changed, or its address is none")
    return proof


def _message(proof: dict[str, str]) -> str:
    """The EIP-4361 text that the wallet signed. The address is spelled with its checksum, as the standard wants."""
    return (
        f"{proof['domain']} wants you to sign in with your Ethereum account:\n{checksum_address(proof['address'])}\n\n"
        f"{STATEMENT}\n\nURI: {proof['uri']}\nVersion: 1\nChain ID: {proof['chainId'].removeprefix('eip155:')}\n"
        f"Nonce: {proof['nonce']}\nIssued At: {proof['issuedAt']}\nExpiration Time: {proof['expirationTime']}"
    )


def _timestamp(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _seconds(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise SignInRefused("invalid_message", "expirationTime is not the challenge's") from None
