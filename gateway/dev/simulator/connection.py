"""One HTTP exchange with the means that a failing provider has: to wait, to fall silent, to break off, to reset."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.dev.simulator.wire import Headers

Message = MutableMapping[str, Any]
TRANSPORT: Final = "simulator.transport"
REQUEST_BYTES_MAX: Final = 64 * 1024 * 1024
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, for zero seconds: closing sends RST instead of FIN."""


class ClientGone(Exception):
    """The client closed the connection."""


class TransportProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which also tells the application about the transport below it."""

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["extensions"] = {TRANSPORT: {"transport": self.transport}}


class Connection:
    """The exchange of one request and its answer.

    Args:
        scope: The ASGI scope.
        receive: Likewise.
        send: Likewise.

    Every method raises `ClientGone` when the client is.
    """

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self._receive = receive
        self._send = send
        self._transport: asyncio.Transport = scope["extensions"][TRANSPORT]["transport"]
        self._gone: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """The whole request body. Who sends more than 64 MiB is cut off."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > REQUEST_BYTES_MAX:
                await self.break_off()
                raise ClientGone
            if not message.get("more_body", False):
                return b"".join([*chunks, chunk]) if chunks else chunk
            chunks.append(chunk)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""
        self._check()
        length = (b"content-length", str(len(body)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, status: int, headers: Headers) -> None:
        """Send headers; `write` and `end` follow."""
        self._check()
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        # The server may hold headers back until there is a body; an event loop's turn sends them.
        await asyncio.sleep(0)

    async def write(self, data: bytes) -> None:
        """Send a part of the body, by itself: uvloop joins what is written in one turn of the loop."""
        self._check()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(0)

    async def end(self) -> None:
        """End the body in order."""
        self._check()
        await self._send({"type": "http.response.body", "body": b""})

    async def pause(self, seconds: float) -> None:
        """Wait, while the client is there."""
        if seconds > 0:
            await asyncio.wait({self._watch()}, timeout=seconds)
        self._check()

    async def hang(self) -> None:
        """Do nothing until the client is gone; this alone does not raise."""
        await self._watch()

    async def break_off(self) -> None:
        """Close the connection after what was written, in the middle of the body."""
        self._transport.close()
        await self._watch()

    async def reset(self) -> None:
        """Send a TCP reset after what was written."""
        self._check()
        endpoint = self._transport.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self._transport.abort()
        await self._watch()

    async def release(self) -> None:
        """Stop watching the client."""
        if self._gone is not None and not self._gone.done():
            self._gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._gone

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._transport.is_closing()

    def _check(self) -> None:
        if self.gone:
            raise ClientGone

    def _watch(self) -> asyncio.Task[None]:
        if self._gone is None:
            self._gone = asyncio.get_running_loop().create_task(self._until_gone())
        return self._gone

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
