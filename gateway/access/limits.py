"""What may come in at all: header bytes counted while they arrive, requests under way, and unpaid quotes per address."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api.errors import ApiError, error_object
from payments.buckets import Buckets

LINGER_S, LINGER_BYTES = 1.0, 2_000_000
"""How long, and how much, of the rest of a refused request is read and thrown away, so that its sender reads the answer."""
HEAD_S = 20.0
"""How long a request line and its headers may take to arrive, from the connection's beginning or their own: whoever says
nothing, or a byte at a time, would hold connections open for ever."""


def guarded_protocol(header_bytes_max: int) -> type[HttpToolsProtocol]:
    """uvicorn's httptools protocol with a limit on the request head, which httptools itself does not have.

    Args:
        header_bytes_max: Request line and headers together, in bytes; beyond it the answer is 431 and the connection closes.
    """
    message = f"request line and headers may have at most {header_bytes_max} bytes together"
    too_large = _last_answer(431, "Request Header Fields Too Large", "headers_too_large", message)
    not_http = _last_answer(
        400, "Bad Request", "invalid_http", "this is no HTTP request, or one that two readers would read differently"
    )

    message = f"request line and headers must arrive within {HEAD_S:.0f} s"
    too_slow = _last_answer(408, "Request Timeout", "headers_too_slow", message)

    class GuardedProtocol(HttpToolsProtocol):
        """Counts what arrives and is no body (heads, trailers, chunk extensions); beyond the limit it reaches no buffer."""

        _head_timer: asyncio.TimerHandle | None = None

        _bytes_beside_bodies = 0
        _bytes_thrown_away = 0
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_no_head()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_head()

        def _expect_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self._refuse, too_slow)

        def _expect_no_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def on_headers_complete(self) -> None:
            self._expect_no_head()
            self._bytes_beside_bodies = 0
            if self._refused:
                # Pipelined behind what was refused: nobody would get its answer.
                return
            if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > header_bytes_max:
                self._refuse()
                return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._bytes_beside_bodies = 0
            if not self._refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._bytes_beside_bodies = 0
            if not self._refused:
                super().on_message_complete()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                self._bytes_thrown_away += len(data)
                if self._bytes_thrown_away > LINGER_BYTES:
                    self.transport.close()
                return
            # Whole reads are counted until a head, a piece of a body or a request is complete, and then none of them.
            if self._bytes_beside_bodies > header_bytes_max:
                self._refuse()
                return
            self._bytes_beside_bodies += len(data)
            super().data_received(data)

        def send_400_response(self, msg: str) -> None:
            self._refuse(not_http)

        def _refuse(self, answer: bytes = too_large) -> None:
            self._refused = True
            if self.transport.is_closing():
                return
            # While a request is under way the refusal would be taken for its answer.
            if self.cycle is not None and not self.cycle.response_complete:
                self.transport.close()
                return
            self.transport.write(answer)
            # Closed at once, with bytes of the peer's still coming in, TCP would reset the connection, and the answer be lost.
            self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)

    return GuardedProtocol


def _last_answer(status: int, phrase: str, code: str, message: str) -> bytes:
    """An answer in the one form that errors have, after which the connection closes."""
    body = orjson.dumps({"error": error_object(status, code, message)})
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class QuoteLimiter:
    """A token bucket per client address, so that asking for prices cannot be used to load the gateway.

    Args:
        per_minute: Quotes that one address may ask for in a minute; as many may come at once.
        clock: Seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = Buckets(per_minute, 60, clock)

    def take(self, address: str) -> None:
        """Count one quote.

        Raises:
            ApiError: 429 with `Retry-After`, if the address has asked for too many.
        """
        self.check(address)
        self.count(address)

    def check(self, address: str) -> None:
        """See whether the address may ask for another quote, before any work is done for it.

        Raises:
            ApiError: 429 with `Retry-After`, if it has asked for too many.
        """
        wait_s = self._buckets.wait_s(address)
        if wait_s:
            raise ApiError(
                429,
                "too_many_quotes",
                f"this address asked for too many unpaid quotes; wait {wait_s} s, or use an API key or a balance",
                headers={"retry-after": str(wait_s)},
            )

    def count(self, address: str) -> None:
        """Count one quote, or anything else that was asked without being paid."""
        self._buckets.take(address)
