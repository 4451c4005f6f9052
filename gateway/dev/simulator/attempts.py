"""What the simulator saw and did: one record per request, of which the newest are kept."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson

Outcome = Literal[
    "under_way",
    "ok",
    "error",  # an error status
    "reset",
    "silence",
    "cut",
    "stall",
    "malformed",
    "error_event",  # an error inside the stream
    "missing_end",
    "disconnected",  # the client left before the answer was complete
    "crashed",  # the simulator's own fault
]

ATTEMPTS_MAX: Final = 5_000
BODY_BYTES_MAX: Final = 64 * 1024 * 1024
"""Of all kept bodies together: load tests send many, and long ones."""

_HEADERS: Final = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"anthropic-beta",
        b"anthropic-version",
        b"content-type",
        b"idempotency-key",
        b"traceparent",
        b"user-agent",
        b"x-request-id",
        b"x-stainless-retry-count",
    }
)
"""Whose values are kept. Of all others only the names are: keys and payments do not belong in a log."""


@dataclass(slots=True)
class Attempt:
    """One request to a simulated provider. `model` and `stream` are None until the body was understood."""

    number: int
    dialect: str
    path: str
    authenticated: bool
    raw_headers: list[tuple[bytes, bytes]]
    raw_body: bytes
    time: float = field(default_factory=time.time)
    ended: float | None = None
    model: str | None = None
    stream: bool | None = None
    status: int | None = None
    """The HTTP status sent; None while, or if, there is none."""
    outcome: Outcome = "under_way"
    tokens_sent: int = 0
    client_disconnected: bool = False

    def as_json(self) -> dict[str, Any]:
        """The record as tests read it. Decoding and hashing wait until here, since most records are never read."""
        try:
            body = orjson.loads(self.raw_body)
        except orjson.JSONDecodeError:
            body = None
        return {
            "number": self.number,
            "time": self.time,
            "duration_ms": None if self.ended is None else round((self.ended - self.time) * 1000, 3),
            "dialect": self.dialect,
            "path": self.path,
            "model": self.model,
            "stream": self.stream,
            "authentication": "present" if self.authenticated else "absent",
            "headers": {
                name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers if name in _HEADERS
            },
            "header_names": sorted({name.decode("latin-1") for name, _ in self.raw_headers}),
            "body_sha256": hashlib.sha256(self.raw_body).hexdigest(),
            "body": body,
            "status": self.status,
            "outcome": self.outcome,
            "tokens_sent": self.tokens_sent,
            "client_disconnected": self.client_disconnected,
        }


class AttemptLog:
    """The newest attempts, bounded in number and in bytes.

    Args:
        attempts_max: How many are kept.
        body_bytes_max: Of their bodies together; the newest is kept whatever its size.
    """

    def __init__(self, attempts_max: int = ATTEMPTS_MAX, body_bytes_max: int = BODY_BYTES_MAX) -> None:
        self._kept: deque[Attempt] = deque()
        self._attempts_max = attempts_max
        self._body_bytes_max = body_bytes_max
        self._body_bytes = 0
        self._numbers = 0
        self.total = 0
        """Since the log was cleared, whether kept or not."""

    def open(
        self, *, dialect: str, path: str, authenticated: bool, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Attempt:
        """Begin the record of a request. The oldest ones give way."""
        self._numbers += 1
        self.total += 1
        attempt = Attempt(self._numbers, dialect, path, authenticated, headers, body)
        self._kept.append(attempt)
        self._body_bytes += len(body)
        while len(self._kept) > self._attempts_max or (self._body_bytes > self._body_bytes_max and len(self._kept) > 1):
            self._body_bytes -= len(self._kept.popleft().raw_body)
        return attempt

    def clear(self) -> None:
        """Forget everything, also what is under way."""
        self._kept.clear()
        self._body_bytes = 0
        self.total = 0

    def kept(self) -> list[Attempt]:
        """What is kept, oldest first."""
        return list(self._kept)
