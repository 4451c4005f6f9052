"""Receipts: what a request cost, read off the headers or out of the stream without touching what the caller reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import httpx

from agents_sdk.money import usd_to_nano

if TYPE_CHECKING:
    from x402.schemas import SettleResponse

COMMENT = b": farebox-receipt "
LINE_BYTES_MAX = 65_536
Ending = Literal["whole", "left", "broken"]
"""How an answer ended: read to its end, left by the caller, or cut off."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one paid request. Amounts are dollar texts; None means that it is not known.

    `paid_with` is ``exact`` or ``upto`` (payments on chain), ``batch-settlement`` (from a channel; only the deposit has a
    transaction) or ``credit`` (what earlier payments left with the gateway).
    """

    id: str
    at: datetime
    gateway: str
    paid_with: str
    model: str | None = None
    provider: str | None = None
    attempts: int | None = None
    quoted_usd: str | None = None
    charged_usd: str | None = None
    credited_usd: str | None = None
    transaction: str | None = None
    asset: str | None = None

    @classmethod
    def read(cls, created_ms: int, document: dict[str, Any]) -> Receipt:
        """Build one from a row of the journal."""
        known = {name: document.get(name) for name in cls.__slots__ if name != "at"}
        return cls(at=datetime.fromtimestamp(created_ms / 1000, UTC), **known)  # type: ignore[arg-type]


def document_of(headers: httpx.Headers, comment: dict[str, Any]) -> dict[str, Any]:
    """What an answer says about itself, from its headers and (for a stream) its receipt comment. Only what can be trusted
    to have the right form is kept: it goes into the journal."""
    document: dict[str, Any] = {
        "id": headers.get("x-farebox-receipt"),
        "model": headers.get("x-farebox-model"),
        "provider": headers.get("x-farebox-provider"),
        "attempts": headers.get("x-farebox-attempts"),
        "quoted_usd": headers.get("x-farebox-quoted-usd"),
        "charged_usd": headers.get("x-farebox-cost-usd"),
        "transaction": _transaction(headers),
    }
    for name in ("id", "model", "provider", "attempts", "quoted_usd", "charged_usd", "credited_usd", "transaction"):
        if comment.get(name) is not None:
            document[name] = comment[name]
    attempts = str(document["attempts"])
    document["attempts"] = int(attempts) if attempts.isascii() and attempts.isdigit() and len(attempts) < 4 else None
    for name in ("id", "model", "provider", "transaction"):
        document[name] = document[name][:256] if isinstance(document[name], str) else None
    for name in ("quoted_usd", "charged_usd", "credited_usd"):
        if amount_of(document.get(name)) is None:
            document[name] = None
    return document


def amount_of(text: object) -> int | None:
    """A dollar text as nano-USD, or None if it is not one."""
    try:
        return usd_to_nano(text) if isinstance(text, str) else None
    except ValueError:
        return None


class Watch:
    """Looks at an answer's bytes as they pass, and says once how it ended.

    Args:
        headers: The answer's headers.
        on_end: Called once with how it ended and the receipt comment (empty if there was none).
    """

    def __init__(self, headers: httpx.Headers, on_end: Callable[[Ending, dict[str, Any]], None]) -> None:
        self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        self._on_end: Callable[[Ending, dict[str, Any]], None] | None = on_end
        self._line = bytearray()
        self._done = False
        self._comment: dict[str, Any] = {}

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes."""
        if not self._is_stream:
            return
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._line += line
            self._end_line(bytes(self._line))
            self._line.clear()
        # Only the beginning of a line matters: a very long one is not kept.
        self._line += rest[: max(0, LINE_BYTES_MAX - len(self._line))]

    def finish(self, ending: Ending) -> None:
        """The answer is over. A stream that is left after its last event was whole."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end("whole" if self._done else ending, self._comment)

    def _end_line(self, line: bytes) -> None:
        if line.startswith(COMMENT):
            try:
                comment = json.loads(line[len(COMMENT) :])
            except ValueError:
                return
            if isinstance(comment, dict):
                self._comment = comment
        elif line.rstrip() == b"data: [DONE]":
            self._done = True


def settled_in(headers: httpx.Headers) -> SettleResponse | None:
    """What an answer's x402 header says of its payment, or None."""
    from x402.http.utils import decode_payment_response_header

    header = headers.get("payment-response")
    if header is None:
        return None
    try:
        return decode_payment_response_header(header)
    except ValueError:  # base64, UTF-8, JSON and pydantic errors all are
        return None


def _transaction(headers: httpx.Headers) -> str | None:
    """The settlement's transaction, or None."""
    settled = settled_in(headers)
    return None if settled is None else settled.transaction or None
