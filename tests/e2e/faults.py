"""A reverse proxy in front of the gateway that does to paid requests what real ones do on a bad day.

It stands where a load balancer would: it forwards or not, and answers with an error, with silence, or with a reset connection.
Requests without a payment always pass, and so does everything once the planned faults are used up.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import aiohttp
from aiohttp import web

PAYMENT_HEADER = "payment-signature"
DROP_AFTER_S = 0.3
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "date", "server"})
_IN_PROGRESS = {
    "error": {
        "message": "this payment's first use is still under way; send it again later",
        "type": "conflict_error",
        "code": "payment_in_progress",
        "param": None,
    }
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one paid request.

    Args:
        answer: An error status; ``in_progress`` is a 409 as the gateway itself words it, a plain 409 is one that some other
            machine on the way made. ``silence`` never answers, ``reset`` resets the connection, ``cut`` resets it in the
            middle of the gateway's answer, ``drop`` both connections before it has come, as a machine that dies does.
        forwarded: Whether the gateway gets the request, and answers it, before.
    """

    answer: int | Literal["in_progress", "silence", "reset", "cut", "drop"]
    forwarded: bool

    def __str__(self) -> str:
        return f"{self.answer}-{'after' if self.forwarded else 'instead'}"


class FaultyProxy:
    """The proxy, in a thread with an event loop of its own, so that synchronous clients can be tested too.

    Args:
        gateway_url: Where it forwards to.
    """

    def __init__(self, gateway_url: str) -> None:
        self.url = ""
        self.payments: list[str] = []
        """The payment headers that came, in order, forwarded or not."""
        self._gateway_url = gateway_url
        self._faults: deque[Fault] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._silent: set[asyncio.Future[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def plan(self, faults: Sequence[Fault]) -> None:
        """Meet the next paid requests with these, one each, and start a new list of payments."""
        asyncio.run_coroutine_threadsafe(self._plan(faults), self._loop).result(10)

    @property
    def left(self) -> int:
        """How many planned faults did not happen yet."""
        return len(self._faults)

    async def _plan(self, faults: Sequence[Fault]) -> None:
        self._end_silences()
        self._faults = deque(faults)
        self.payments = []

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(limit=0)
        )
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listening).start()
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    async def _stop(self) -> None:
        self._end_silences()
        await self._runner.cleanup()
        await self._session.close()

    def _end_silences(self) -> None:
        for silence in self._silent:
            silence.set_result(None)
        self._silent.clear()

    # ------------------------------------------------------------------ one request

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        fault = None
        if PAYMENT_HEADER in request.headers:
            self.payments.append(request.headers[PAYMENT_HEADER])
            fault = self._faults.popleft() if self._faults else None
        if fault is None:
            return await self._pass_on(request, body)
        if fault.answer == "cut":
            return await self._cut(request, body)
        if fault.answer == "drop":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DROP_AFTER_S), self._forward(request, body) as answer:
                    await answer.read()
            _reset(request)
            return web.Response()
        if fault.forwarded:
            async with self._forward(request, body) as answer:
                await answer.read()
        if fault.answer == "in_progress":
            return web.json_response(_IN_PROGRESS, status=409, headers={"x-should-retry": "false"})
        if fault.answer == "reset":
            _reset(request)
        elif fault.answer == "silence":
            silence = self._loop.create_future()
            self._silent.add(silence)
            await silence
        else:
            # As load balancers word it: not JSON, and none of the gateway's headers.
            return web.Response(
                status=fault.answer, text=f"<html><h1>{fault.answer}</h1></html>", content_type="text/html"
            )
        return web.Response()

    def _forward(
        self, request: web.BaseRequest, body: bytes
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        # With the Host that the client used: the gateway's quotes name it.
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP]
        return self._session.request(
            request.method, self._gateway_url + request.path_qs, headers=headers, data=body, allow_redirects=False
        )

    async def _pass_on(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        async with self._forward(request, body) as answer:
            response = _head(answer)
            with contextlib.suppress(ConnectionResetError):  # the client left, and so do we: the gateway sees it
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            return response

    async def _cut(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        async with self._forward(request, body) as answer:
            content = await answer.read()
            response = _head(answer)
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
        await asyncio.sleep(0.05)  # a reset overtakes what the client has not read yet
        _reset(request)
        return response


def _head(answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _HOP_BY_HOP:
            response.headers.add(name, value)
    return response


def _reset(request: web.BaseRequest) -> None:
    transport = request.transport
    if transport is None:
        return
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
    transport.abort()
