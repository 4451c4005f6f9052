"""A node between the gateway and its chain that fails, lies, or keeps silent, as the test wishes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Collection
from typing import Any, Self

import aiohttp
import orjson
from aiohttp import web

Lie = Callable[[dict[str, Any], Any], Any]
"""Makes another result of a call and its true one."""


class FaultyNode:
    """Forwards JSON-RPC, in a thread with an event loop of its own.

    Args:
        target: The chain's own node; may be set later.
    """

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.url = ""
        self.fault: str | None = None
        """One of ``status``, ``reset``, ``garbage``, ``truncated``, ``not a list``, ``no ids``, ``huge``, ``errors``, ``hang``,
        ``drip``."""
        self.only: Collection[str] | None = None
        """The methods that the fault befalls: a POST with one of them; None for every POST."""
        self.lies: dict[str, Lie] = {}
        """By method."""
        self.met: set[str] = set()
        """Methods that met a fault or a lie."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-node", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def heal(self) -> None:
        """Come to its senses: what hangs now hangs on, what comes next is answered truly."""
        self.fault, self.only, self.lies, self.met = None, None, {}, set()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        await self._runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listening).start()
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()
        # What was made to hang hangs still.
        hanging = asyncio.all_tasks() - {asyncio.current_task()}
        for task in hanging:
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        calls = orjson.loads(body)
        methods = {call["method"] for call in calls}
        if self.fault is not None and (self.only is None or methods & set(self.only)):
            self.met |= methods
            return await self._fail(self.fault, request, calls)
        async with self._session.post(self.target, data=body, headers={"content-type": "application/json"}) as answer:
            replies = {reply["id"]: reply for reply in orjson.loads(await answer.read())}
        for call in calls:
            lie = self.lies.get(call["method"])
            if lie is not None and "result" in replies[call["id"]]:
                self.met.add(call["method"])
                replies[call["id"]]["result"] = lie(call, replies[call["id"]]["result"])
        return web.json_response(list(replies.values()), dumps=lambda value: orjson.dumps(value).decode())

    async def _fail(self, fault: str, request: web.BaseRequest, calls: list[dict[str, Any]]) -> web.StreamResponse:
        if fault == "reset":
            _reset(request)
        elif fault == "hang":
            await asyncio.sleep(60)
        elif fault == "drip":
            return await self._drip(request)
        elif fault == "status":
            return web.Response(status=500, text="<html>Internal Server Error</html>", content_type="text/html")
        elif fault == "errors":
            refused = {"code": -32603, "message": "internal error"}
            return web.json_response([{"jsonrpc": "2.0", "id": call["id"], "error": refused} for call in calls])
        elif fault == "no ids":
            return web.json_response([{"jsonrpc": "2.0", "result": "0x1"} for _ in calls])
        texts = {
            "garbage": b"\x00\xff\xfe not JSON at all",
            "truncated": b'[{"jsonrpc":"2.0","id":0,"result":"0x',
            "not a list": b'{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"parse error"}}',
            "huge": b"[" + b'"' + b"a" * 64_000_000 + b'"]',
        }
        return web.Response(body=texts.get(fault, b""), content_type="application/json")

    async def _drip(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(600):
                await response.write(b" ")
                await asyncio.sleep(0.1)
        return response


def _reset(request: web.BaseRequest) -> None:
    """Close the connection with a reset, as a machine does that has forgotten it."""
    transport = request.transport
    if transport is not None:
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.close()
