"""A node between what is tested and its chain, which says of some things what the test wishes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from aiohttp import web


class LyingNode:
    """Forwards to Anvil, and replaces the results of some methods."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.results: dict[str, Any] = {}
        self.told = 0
        self.ids_are_lists = False

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        async with aiohttp.ClientSession() as self._session:
            runner = web.ServerRunner(web.Server(self._handle))
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            try:
                yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        calls = orjson.loads(await request.read())
        async with self._session.post(self._target, json=calls) as response:
            answers = {answer["id"]: answer for answer in await response.json()}
        for call in calls:
            if call["method"] in self.results:
                self.told += 1
                answers[call["id"]] = {"jsonrpc": "2.0", "id": call["id"], "result": self.results[call["method"]]}
        if self.ids_are_lists:
            self.told += 1
            return web.json_response([answer | {"id": []} for answer in answers.values()])
        return web.json_response(list(answers.values()))
