"""The seam between deciding and doing: what the exchange asks for, and what it gets back.

The logic (`exchange`, `permit2`) is written once, as generators that yield these commands and are sent the results; the
synchronous and the asynchronous transport each carry them out in their own way.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; the result is a `Reply` with its body still unread, or `Lost`."""

    method: str
    url: httpx.URL
    headers: httpx.Headers
    body: bytes
    extensions: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Read:
    """Read a reply's body to its end; the result is bytes, or `Lost`."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait; the result is None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer whose status and headers are here."""

    status: int
    headers: httpx.Headers
    response: httpx.Response = field(repr=False)


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer, or not all of it. `sent` is False if the request surely did not reach the server."""

    error: httpx.TransportError

    @property
    def sent(self) -> bool:
        """Whether the server may have seen the request."""
        return not isinstance(
            self.error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.UnsupportedProtocol
        )


Command = Send | Read | Sleep
Steps = Generator[Command, Any, T]

SIDE_TIMEOUTS: dict[str, Any] = {"timeout": {"connect": 10.0, "read": 30.0, "write": 30.0, "pool": 30.0}}
"""For the requests that the agent makes on its own account: signing in, polling, the chain."""


def fetch(
    method: str, url: httpx.URL, body: bytes = b"", headers: dict[str, str] | None = None
) -> Steps[tuple[Reply, bytes]]:
    """Send a small request and read its whole answer.

    Raises:
        httpx.TransportError: If there is none.
    """
    fields = httpx.Headers({"host": url.netloc.decode("ascii"), "accept": "application/json", **(headers or {})})
    if body:
        fields["content-type"] = "application/json"
    if body or method == "POST":
        fields["content-length"] = str(len(body))
    result = yield Send(method, url, fields, body, SIDE_TIMEOUTS)
    if isinstance(result, Reply):
        reply, result = result, (yield Read(result))
        if isinstance(result, bytes):
            return reply, result
    assert isinstance(result, Lost)
    raise result.error
