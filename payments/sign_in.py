"""Signing in with a wallet (EIP-4361): a message to sign, its verification, and a short-lived session token.

The message is made here and must come back unchanged, so that verifying it is comparing it with the one grammar we write,
and its nonce carries an HMAC: handing out challenges stores nothing. A nonce works once; used ones are kept until they
would have expired. Contract wallets cannot sign in yet.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from payments.errors import PaymentError
from payments.store import Transaction
from payments.verification import signatures

CHALLENGE_TTL_S = 300
SESSION_PREFIX = "fbs_"
STATEMENT = "Sign in to Farebox to see and spend your balance. This does not move funds."
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_MESSAGE = re.compile(
    r"(?P<domain>[^\s]{1,255}) wants you to sign in with your Ethereum account:\n"
    r"(?P<address>0x[0-9a-fA-F]{40})\n\n"
    + re.escape(STATEMENT)
    + r"\n\nURI: (?P<uri>[^\s]{1,512})\nVersion: 1\nChain ID: (?P<chain_id>[0-9]{1,20})\n"
    r"Nonce: (?P<nonce>[0-9a-f]{56})\nIssued At: (?P<issued>[0-9TZ:-]{20})\nExpiration Time: (?P<expires>[0-9TZ:-]{20})",
    re.ASCII,
)


class SignInRefused(PaymentError):
    """The message, its signature or the session is not good. 401."""

    status = 401


class BadAddress(SignInRefused):
    """What is to sign in is no wallet's address. 400: nobody has tried to sign in yet."""

    status = 400


@dataclass(frozen=True, slots=True)
class Challenge:
    """A message to sign with `personal_sign`. `expires_at` is Unix seconds."""

    message: str
    nonce: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class Session:
    """A signed-in wallet. `address` is lower-case; `expires_at` is Unix seconds."""

    token: str
    address: str
    expires_at: int


class SignIn:
    """Makes and checks challenges and sessions.

    Args:
        secret: The gateway's secret, at least 32 bytes; the keys used here are derived from it.
        domain: The host (and port) that messages name.
        uri: The gateway's public URL.
        chain_id: The chain that messages name: the first one that payments are taken on.
        session_ttl_s: How long a session lives, in seconds.
    """

    def __init__(self, *, secret: bytes, domain: str, uri: str, chain_id: int, session_ttl_s: int) -> None:
        self._nonce_key = hmac.digest(secret, b"farebox sign-in nonce", "sha256")
        self._session_key = hmac.digest(secret, b"farebox session", "sha256")
        self._domain = domain
        self._uri = uri
        self._chain_id = chain_id
        self._session_ttl_s = session_ttl_s

    def challenge(self, address: str, now: int) -> Challenge:
        """Make the message that the wallet at `address` has to sign within five minutes of `now` (Unix seconds).

        Raises:
            BadAddress: If `address` is not one.
        """
        if not _ADDRESS.fullmatch(address):
            raise BadAddress("invalid_address", "`address` must be 0x followed by 40 hexadecimal digits")
        random = secrets.token_hex(12)
        expires_at = now + CHALLENGE_TTL_S
        nonce = random + self._nonce_mac(random, address, expires_at)
        message = self._message(address, nonce, expires_at)
        return Challenge(message=message, nonce=nonce, expires_at=expires_at)

    def verify(self, message: str, signature: str, now: int) -> tuple[str, str, int]:
        """Check a signed challenge, without using up its nonce.

        Returns:
            The wallet's address in lower case, the nonce, and the time it expires (Unix seconds).

        Raises:
            SignInRefused: Saying what is wrong.
        """
        parts = _MESSAGE.fullmatch(message)
        if parts is None or parts["domain"] != self._domain or parts["uri"] != self._uri:
            raise SignInRefused(
                "invalid_message", "the message is not one that this gateway made; ask for a new challenge"
            )
        address, nonce = parts["address"].lower(), parts["nonce"]
        expires_at = _parse_timestamp(parts["expires"])
        # The nonce's HMAC covers the address and the times; the rest is ours to say, so the message is compared as a whole.
        genuine = hmac.compare_digest(nonce[24:], self._nonce_mac(nonce[:24], address, expires_at))
        if not genuine or message != self._message(address, nonce, expires_at):
            raise SignInRefused("invalid_message", "the message was changed after it was made; ask for a new challenge")
        if now >= expires_at:
            raise SignInRefused("challenge_expired", "the challenge has expired; ask for a new one")
        if recover_personal(message, signature) != address:
            raise SignInRefused("bad_signature", f"the message was not signed by {address} with personal_sign")
        return address, nonce, expires_at

    def open_session(self, address: str, now: int) -> Session:
        """Make the token that stands for the signed-in wallet until it expires."""
        expires_at = now + self._session_ttl_s
        body = bytes.fromhex(address[2:]) + expires_at.to_bytes(5, "big")
        token = SESSION_PREFIX + base64.urlsafe_b64encode(body + self._session_mac(body)).rstrip(b"=").decode()
        return Session(token=token, address=address, expires_at=expires_at)

    def session(self, token: str, now: int) -> Session:
        """Read a session token.

        Raises:
            SignInRefused: If it is forged, malformed or expired.
        """
        encoded = token.removeprefix(SESSION_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        body, mac = raw[:25], raw[25:]
        if len(raw) != 41 or not hmac.compare_digest(mac, self._session_mac(body)):
            raise SignInRefused("invalid_session", "the session token is not valid; sign in again")
        expires_at = int.from_bytes(body[20:], "big")
        if now >= expires_at:
            raise SignInRefused("session_expired", "the session has expired; sign in again")
        return Session(token=token, address="0x" + body[:20].hex(), expires_at=expires_at)

    def _message(self, address: str, nonce: str, expires_at: int) -> str:
        # EIP-4361 wants the checksummed spelling of the address; wallets refuse or warn otherwise.
        return (
            f"{self._domain} wants you to sign in with your Ethereum account:\n"
            f"{signatures.checksum_address(address)}\n\n"
            f"{STATEMENT}\n\nURI: {self._uri}\nVersion: 1\nChain ID: {self._chain_id}\nNonce: {nonce}\n"
            f"Issued At: {_timestamp(expires_at - CHALLENGE_TTL_S)}\nExpiration Time: {_timestamp(expires_at)}"
        )

    def _nonce_mac(self, random: str, address: str, expires_at: int) -> str:
        text = f"{random}|{address.lower()}|{expires_at}|{self._domain}"
        return hmac.digest(self._nonce_key, text.encode(), "sha256")[:16].hex()

    def _session_mac(self, body: bytes) -> bytes:
        return hmac.digest(self._session_key, body, "sha256")[:16]


def use_nonce(tx: Transaction, nonce: str, expires_at: int) -> None:
    """Use a challenge's nonce up, durably.

    Raises:
        SignInRefused: If it was used before.
    """
    row = tx.execute(
        "INSERT INTO sign_in_nonce (nonce, expires_ms) VALUES (?, ?) ON CONFLICT DO NOTHING RETURNING nonce",
        (nonce, expires_at * 1000),
    ).fetchone()
    if row is None:
        raise SignInRefused("challenge_used", "this challenge was used already; ask for a new one")


def recover_personal(message: str, signature: str) -> str:
    """Who signed a text with `personal_sign` (EIP-191), lower-case hex; the signature in hex.

    Raises:
        SignInRefused: ``bad_signature``.
    """
    data = message.encode()
    try:
        raw = bytes.fromhex(signature.removeprefix("0x"))
    except ValueError:
        raise SignInRefused("bad_signature", "`signature` must be hexadecimal") from None
    # EIP-191, version 0x45.
    digest = signatures.keccak256(b"\x19Ethereum Signed Message:\n" + str(len(data)).encode() + data)
    try:
        return signatures.recover(digest, raw)
    except PaymentError as error:
        raise SignInRefused("bad_signature", error.message) from None


def _timestamp(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _parse_timestamp(text: str) -> int:
    try:
        return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise SignInRefused("invalid_message", f"{text!r} is not a time such as 2026-01-31T12:00:00Z") from None
