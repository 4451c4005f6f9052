"""The price of one request before it is made, and the short token that carries it to the payer and back.

A quote touches no database and no chain. Its token holds the quote id, the expiry and the route; the amount and the request's
digest are recomputed when it comes back and are covered by the token's HMAC, so any replica can verify it without state.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
import secrets
import struct
from dataclasses import dataclass
from functools import lru_cache

from payments.errors import PaymentRefused
from payments.money import divide_up

CHARGE_UNIT_NANO_USD = 1_000
"""Maxima are whole micro-dollars, so that they are exact in every token and can be recomputed from a payment's amount."""
SECRET_BYTES_MIN = 32
ROUTE_CANDIDATES_MAX = 16

_ID_PREFIX = "quote_"
_HEAD = struct.Struct(">B10sI")
_TOKEN_VERSION = 1
_MARK_BYTES = 6
_TAG_BYTES = 16
_UNITS_BYTES = 8
_UNITS_MAX = 2 ** (8 * _UNITS_BYTES) - 1
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
_TOKEN_CHARACTERS_MAX = 4 * divide_up(_HEAD.size + ROUTE_CANDIDATES_MAX * _MARK_BYTES + _TAG_BYTES, 3)
_TO_URL = bytes.maketrans(b"+/", b"-_")
_FROM_URL = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, slots=True)
class QuoteItem:
    """One line of a quote: ``inference``, ``network_fee`` or ``minimum_charge`` (what is missing to the minimum)."""

    name: str
    amount_nano_usd: int


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request may cost at most, for whom it is good, and until when.

    `route` lists candidate ids in the order of preference. `request_digest` is SHA-256 over method, path and raw body.
    """

    id: str
    items: tuple[QuoteItem, ...]
    maximum_nano_usd: int
    route: tuple[str, ...]
    request_digest: bytes
    expires_at: int
    """Unix seconds."""

    @property
    def network_fee_nano_usd(self) -> int:
        """The part that is charged whatever was used."""
        return sum(item.amount_nano_usd for item in self.items if item.name == "network_fee")


def make_quote(
    *,
    inference_nano_usd: int,
    network_fee_nano_usd: int,
    minimum_nano_usd: int,
    route: tuple[str, ...],
    request_digest: bytes,
    expires_at: int,
) -> Quote:
    """Itemise and total a quote; the total rounds up to whole micro-dollars and reaches the minimum charge."""
    total = max(inference_nano_usd + network_fee_nano_usd, minimum_nano_usd, CHARGE_UNIT_NANO_USD)
    items = [QuoteItem("inference", inference_nano_usd)]
    if network_fee_nano_usd:
        items.append(QuoteItem("network_fee", network_fee_nano_usd))
    shortfall_nano_usd = minimum_nano_usd - inference_nano_usd - network_fee_nano_usd
    if shortfall_nano_usd > 0:
        items.append(QuoteItem("minimum_charge", shortfall_nano_usd))
    return Quote(
        id=f"quote_{secrets.token_hex(10)}",
        items=tuple(items),
        maximum_nano_usd=divide_up(total, CHARGE_UNIT_NANO_USD) * CHARGE_UNIT_NANO_USD,
        route=route,
        request_digest=request_digest,
        expires_at=expires_at,
    )


class QuoteInvalid(PaymentRefused):
    """The quote that came with a payment does not hold for it: `quote_malformed`, `quote_expired` or `quote_mismatch`."""


@dataclass(frozen=True, slots=True)
class QuoteClaim:
    """What a returned token proves that we once quoted, for this very request and amount."""

    id: str
    route_marks: tuple[bytes, ...]
    """`route_mark` of each candidate, in the order of preference."""
    expires_at: int
    """Unix seconds."""


class QuoteSealer:
    """Turns quotes into short tokens and back. Any replica with the same secret can open what another one sealed.

    A token is version, quote id, expiry, route marks and a truncated HMAC-SHA256, in base64url without padding. The HMAC covers
    these, the amount and the request's digest.
    """

    def __init__(self, secret: bytes) -> None:
        """Derive the key from the gateway's secret (at least 32 bytes), so that its other uses cannot forge a quote."""
        assert len(secret) >= SECRET_BYTES_MIN
        self._key = hmac.digest(secret, b"farebox quote token v1", hashlib.sha256)

    def seal(self, quote: Quote) -> str:
        """Make the token that a 402 carries. `quote` comes from `make_quote`: its maximum is whole micro-dollars.

        Of a longer route the first `ROUTE_CANDIDATES_MAX` candidates are named, to keep the 402 small.
        """
        units, dust = divmod(quote.maximum_nano_usd, CHARGE_UNIT_NANO_USD)
        assert dust == 0
        head = _HEAD.pack(_TOKEN_VERSION, bytes.fromhex(quote.id.removeprefix(_ID_PREFIX)), quote.expires_at)
        claims = head + b"".join([route_mark(candidate_id) for candidate_id in quote.route[:ROUTE_CANDIDATES_MAX]])
        return _to_base64url(claims + self._tag(claims, units, quote.request_digest))

    def open(self, token: str, *, amount_nano_usd: int, request_digest: bytes, now: int) -> QuoteClaim:
        """Check a token that came back with a payment.

        Args:
            token: As the payer sent it.
            amount_nano_usd: What the payment pays.
            request_digest: `request_digest` of the request that it came with.
            now: Unix seconds.

        Returns:
            What was quoted. It holds up to and including the second `expires_at`.

        Raises:
            QuoteInvalid: ``quote_malformed`` if it is not a token at all; ``quote_mismatch`` if we did not issue it for this
                request and amount; ``quote_expired``.
        """
        sealed = _from_base64url(token)
        claims, tag = sealed[:-_TAG_BYTES], sealed[-_TAG_BYTES:]
        marks = claims[_HEAD.size :]
        if len(claims) < _HEAD.size or len(marks) % _MARK_BYTES or claims[0] != _TOKEN_VERSION:
            raise _not_a_token()
        _, quote_id, expires_at = _HEAD.unpack_from(claims)
        units, dust = divmod(amount_nano_usd, CHARGE_UNIT_NANO_USD)
        if dust or units > _UNITS_MAX or not hmac.compare_digest(tag, self._tag(claims, units, request_digest)):
            raise QuoteInvalid(
                "quote_mismatch",
                "the quote was not made for this request and amount; pay the new one, with exactly the request that it is for",
            )
        if now > expires_at:
            raise QuoteInvalid("quote_expired", "the quote has expired; pay the new one")
        return QuoteClaim(
            id=_ID_PREFIX + quote_id.hex(),
            route_marks=tuple(marks[at : at + _MARK_BYTES] for at in range(0, len(marks), _MARK_BYTES)),
            expires_at=expires_at,
        )

    def _tag(self, claims: bytes, units: int, digest: bytes) -> bytes:
        assert len(digest) == hashlib.sha256().digest_size
        # The two parts of fixed length come first, so that no two messages have the same bytes.
        message = units.to_bytes(_UNITS_BYTES, "big") + digest + claims
        return hmac.digest(self._key, message, hashlib.sha256)[:_TAG_BYTES]


@lru_cache(maxsize=4096)
def route_mark(candidate_id: str) -> bytes:
    """The short name (6 bytes) of a candidate within a token. Among ten thousand candidates two coincide with p = 2e-7."""
    return hashlib.blake2b(candidate_id.encode(), digest_size=_MARK_BYTES).digest()


def request_digest(method: str, path: str, body: bytes) -> bytes:
    """SHA-256 over the method (any case), the path and the raw body: what a quote and a payment are bound to."""
    head = f"{method.upper()}\n{path}".encode()
    return hashlib.sha256(len(head).to_bytes(4, "big") + head + body).digest()


def _to_base64url(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).translate(_TO_URL, b"=").decode("ascii")


def _from_base64url(token: str) -> bytes:
    if not _TOKEN.fullmatch(token) or len(token) > _TOKEN_CHARACTERS_MAX or len(token) % 4 == 1:
        raise _not_a_token()
    raw = binascii.a2b_base64(token.encode("ascii").translate(_FROM_URL) + b"=" * (-len(token) % 4))
    if _to_base64url(raw) != token:  # the last character's unused bits would give one token several spellings
        raise _not_a_token()
    return raw


def _not_a_token() -> QuoteInvalid:
    return QuoteInvalid(
        "quote_malformed", "the quote is not one that this gateway made; pay the new one, echoing it unchanged"
    )
