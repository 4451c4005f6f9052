"""HTTP as the endpoints see it: a request that was read within limits, and responses written straight to ASGI.

Written by hand because it is on every request's path: Starlette's `StreamingResponse` alone costs a sixth of a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from gateway.api.errors import ApiError
from payments.x402.fields import is_deeper_than

BODY_TIMEOUT_S = 60
"""A request under way takes one of a limited number of places, from its head on: no body may hold it for ever."""
SEND_TIMEOUT_S = 60
"""A reader that takes nothing for this long has hung up, whatever its socket says."""


class CallerGone(Exception):
    """The caller closed the connection."""


@dataclass(slots=True)
class Call:
    """One HTTP request with its body, and the way back to the caller."""

    scope: Scope
    receive: Receive
    send: Send
    body: bytes
    headers: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The HTTP method, upper-case."""
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        """The decoded path, without the query."""
        return str(self.scope["path"])

    @property
    def client(self) -> str:
        """The peer's address, or an empty string for a unix socket."""
        client = self.scope.get("client")
        return str(client[0]) if client else ""

    def header(self, name: bytes) -> str | None:
        """The header's value, or None. `name` is lower-case."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def gone(self) -> None:
        """Return when the caller has hung up."""
        while (await self.receive())["type"] != "http.disconnect":
            continue


async def read_call(scope: Scope, receive: Receive, send: Send, body_bytes_max: int) -> Call:
    """Read a request's body.

    Raises:
        ApiError: 413 if it is longer than `body_bytes_max`, 408 if it does not arrive in `BODY_TIMEOUT_S`.
        CallerGone: If the caller hung up before its end.
    """
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        # A repeated payment or authorization header is ambiguous: which one was meant must not depend on who reads it.
        if name in headers and name in _SINGLE_HEADERS:
            raise ApiError(400, "repeated_header", f"the header {name.decode()} may be given only once")
        headers[name] = value
    too_large = ApiError(413, "body_too_large", f"the body may have at most {body_bytes_max} bytes")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > body_bytes_max:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    more = True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > body_bytes_max:
                    raise too_large
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, "body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S} s") from None
    return Call(scope, receive, send, chunks[0] if len(chunks) == 1 else b"".join(chunks), headers)


_SINGLE_HEADERS = frozenset({b"payment-signature", b"x-payment", b"authorization", b"idempotency-key"})


def read_json(body: bytes, depth_max: int) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ApiError: 400 if it is not JSON, not an object, or nested deeper than `depth_max`.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_json", "the body must be a JSON object")
    # Fewer brackets than levels allowed cannot nest too deeply, which settles nearly every request without a walk.
    if body.count(b"[") + body.count(b"{") > depth_max and is_deeper_than(value, depth_max):
        raise ApiError(400, "json_too_deep", f"the body may be nested at most {depth_max} levels deep")
    return value


def encode_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them. Characters outside latin-1 become question marks rather than an error."""
    return [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]


async def send_body(send: Send, status: int, body: bytes, headers: Mapping[str, str], content_type: str) -> None:
    """Send a complete response."""
    raw = encode_headers(headers)
    raw.append((b"content-type", content_type.encode()))
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """Send a complete JSON response; `value` is encoded unless it is bytes already."""
    body = value if isinstance(value, bytes) else orjson.dumps(value)
    await send_body(send, status, body, headers or {}, "application/json")


async def send_error(send: Send, error: ApiError) -> None:
    """Send an error in the one form that there is."""
    await send_json(send, error.status, error.body(), error.headers)


class EventStream:
    """A response of server-sent events. `start` sends the headers; a reader that stalls raises `CallerGone`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def start(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and the headers."""
        raw = encode_headers(headers)
        raw.append((b"content-type", b"text/event-stream; charset=utf-8"))
        raw.append((b"cache-control", b"no-store"))
        raw.append((b"x-accel-buffering", b"no"))
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Send some bytes now."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise CallerGone from None

    async def finish(self, data: bytes = b"") -> None:
        """Send the last bytes and end the response; a reader that does not take them is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send({"type": "http.response.body", "body": data, "more_body": False})
