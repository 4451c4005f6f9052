"""An upstream on a real socket that does exactly what a test's script says, down to resets and cuts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        """The body, decoded."""
        value = orjson.loads(self.raw)
        assert isinstance(value, dict)
        return value


class Wire:
    """The answering side of one request."""

    def __init__(self, writer: asyncio.StreamWriter, upstream: ScriptedUpstream) -> None:
        self._writer = writer
        self._upstream = upstream

    async def json(self, value: object, status: int = 200, **headers: str) -> None:
        """A complete answer."""
        await self.body(orjson.dumps(value), status, **headers)

    async def body(self, data: bytes, status: int = 200, **headers: str) -> None:
        """A complete answer of any bytes."""
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(data)}", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.bytes("\r\n".join([*lines, "", ""]).encode() + data)

    async def stream_head(self) -> None:
        """The headers of an event stream."""
        await self.bytes(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )

    async def events(self, *events: object) -> None:
        """Events in one HTTP chunk: JSON values, or bytes as they are."""
        data = b"".join(
            event if isinstance(event, bytes) else b"data: " + orjson.dumps(event) + b"\n\n" for event in events
        )
        await self.bytes(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        """The regular end of the body."""
        await self.bytes(b"0\r\n\r\n")

    async def bytes(self, data: bytes) -> None:
        """Raw bytes."""
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def cut(self) -> None:
        """Close in the middle."""
        self._writer.close()

    async def hang(self) -> None:
        """Say nothing until the gateway goes away."""
        await self._upstream.gone.wait()


Script = Callable[[Seen, Wire], Awaitable[None]]


@dataclass
class ScriptedUpstream:
    """A listening upstream.

    `arrived` is set by the first request, `gone` when a client has closed a connection in the middle of an answer.
    """

    script: Script
    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, any number of requests."""
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                seen = Seen(head[0].split()[1], headers, raw)
                self.seen.append(seen)
                self.arrived.set()
                answer = asyncio.ensure_future(self.script(seen, Wire(writer, self)))
                watch = asyncio.ensure_future(reader.read(1))
                await asyncio.wait([answer, watch], return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() or answer.exception() is not None:
                    self.gone.set()
                with contextlib.suppress(ConnectionError):
                    await answer
                if writer.is_closing():
                    watch.cancel()
                    break
                if watch.done():
                    break
                watch.cancel()
                await asyncio.wait([watch])
        with contextlib.suppress(ConnectionError):
            writer.close()


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[ScriptedUpstream]:
    """Run an upstream on a free port."""
    upstream = ScriptedUpstream(script)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield upstream
    finally:
        upstream.gone.set()
        server.close()
