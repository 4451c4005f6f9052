"""JSON-RPC to a chain's nodes: concurrent calls leave together as one batch, and a node that fails is passed over.

Two kinds of failure are kept apart, because money depends on the difference: `RpcError` is the node's answer to a call,
`RpcUnavailable` means that nobody answered, so that the call may or may not have had its effect.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

BATCH_MAX = 100
"""Calls in one POST; public nodes refuse more."""

Request = tuple[str, Sequence[Any]]


class RpcUnavailable(Exception):
    """No node answered: unreachable, too slow, or not speaking JSON-RPC. Whether the call took effect is unknown."""


class RpcError(Exception):
    """A node's own error answer to one call."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        """Keep JSON-RPC's code, message and data."""
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.data = data


Reply = Any | RpcError


class Rpc:
    """A chain, reached through one or more nodes in order of preference.

    Args:
        urls: HTTP endpoints; the next is tried when one does not answer.
        timeout_s: How long one POST may take.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float = 10.0) -> None:
        assert urls
        self.urls = tuple(urls)
        self.timeout_s = timeout_s
        self.round_trips = 0
        self.failures = 0
        """POSTs that no node answered."""
        self.available = True
        """Whether the last POST was answered."""
        self._preferred = 0
        self._session: aiohttp.ClientSession | None = None
        self._waiting: list[tuple[Request, asyncio.Future[Any]]] = []
        self._flights: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Rpc:
        """For `async with`."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    async def call(self, method: str, params: Sequence[Any] = ()) -> Any:
        """Make one call; calls made in the same turn of the event loop share a POST.

        Raises:
            RpcError: The node answered with an error.
            RpcUnavailable: No node answered.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._depart)
        self._waiting.append(((method, params), future))
        return await future

    async def batch(self, requests: Sequence[Request]) -> list[Reply]:
        """Make many calls in as few POSTs as the batch limit allows, sent one after the other.

        Returns:
            One result or `RpcError` (returned, not raised) per request, in order.

        Raises:
            RpcUnavailable: No node answered one of the POSTs.
        """
        replies: list[Reply] = []
        for start in range(0, len(requests), BATCH_MAX):
            replies += await self._post(requests[start : start + BATCH_MAX])
        return replies

    async def ask(self, requests: Sequence[Request]) -> list[Any]:
        """Make many calls as `batch` does, of which every one must succeed.

        Raises:
            RpcError: A node answered one of them with an error.
            RpcUnavailable: No node answered one of the POSTs.
        """
        replies = await self.batch(requests)
        for reply in replies:
            if isinstance(reply, RpcError):
                raise reply
        return replies

    async def aclose(self) -> None:
        """Drop what is under way and close the connections."""
        for flight in self._flights:
            flight.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _depart(self) -> None:
        waiting, self._waiting = self._waiting, []
        flight = asyncio.get_running_loop().create_task(self._fly(waiting))
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)

    async def _fly(self, waiting: list[tuple[Request, asyncio.Future[Any]]]) -> None:
        try:
            replies = await self.batch([request for request, _ in waiting])
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            failure = error
            if isinstance(error, asyncio.CancelledError):
                failure = RpcUnavailable("the connection was closed")
            elif not isinstance(error, RpcUnavailable):
                failure = RpcUnavailable(f"the calls could not be made: {error!r}")
            for _, future in waiting:
                if not future.done():
                    future.set_exception(failure)
            return
        for (_, future), reply in zip(waiting, replies, strict=True):
            if future.done():
                continue
            if isinstance(reply, RpcError):
                future.set_exception(reply)
            else:
                future.set_result(reply)

    async def _post(self, requests: Sequence[Request]) -> list[Reply]:
        body = orjson.dumps(
            [
                {"jsonrpc": "2.0", "id": index, "method": method, "params": params}
                for index, (method, params) in enumerate(requests)
            ]
        )
        problems = []
        for attempt in range(len(self.urls)):
            at = (self._preferred + attempt) % len(self.urls)
            self.round_trips += 1
            try:
                replies = _read_replies(await self._send(self.urls[at], body), len(requests))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                problems.append(f"{_without_secrets(self.urls[at])}: {error or type(error).__name__}")
                continue
            self._preferred = at
            self.available = True
            return replies
        self.failures += 1
        self.available = False
        raise RpcUnavailable("; ".join(problems))

    async def _send(self, url: str, body: bytes) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self.timeout_s),
                connector=aiohttp.TCPConnector(limit=32, ttl_dns_cache=60),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"content-type": "application/json"},
            )
        async with self._session.post(url, data=body) as response:
            if response.status != 200:
                raise ValueError(f"answered HTTP {response.status}")
            return await response.read()


def _read_replies(content: bytes, count: int) -> list[Reply]:
    answers = orjson.loads(content)
    if isinstance(answers, dict):  # a node that refuses the whole batch answers with one object
        error = answers.get("error")
        raise ValueError(f"refused the batch: {error}")
    if not isinstance(answers, list) or len(answers) != count:
        raise ValueError("the batch was answered in part")
    replies: dict[int, Reply] = {}
    for answer in answers:
        if not isinstance(answer, dict) or type(answer.get("id")) is not int:
            raise ValueError("an answer is not an object with the id of its call")
        error = answer.get("error")
        replies[answer["id"]] = answer.get("result") if error is None else _error(error)
    if len(replies) != count or not all(index in replies for index in range(count)):
        raise ValueError("the answers do not belong to the calls")
    return [replies[index] for index in range(count)]


def _error(error: Any) -> RpcError:
    if not isinstance(error, dict):
        return RpcError(0, str(error))
    code = 0
    with contextlib.suppress(TypeError, ValueError):
        code = int(error.get("code", 0))
    return RpcError(code, str(error.get("message", "")), error.get("data"))


def _without_secrets(url: str) -> str:
    """Node URLs carry keys in their path or user part; errors and logs name the host alone."""
    return urlsplit(url).hostname or "the node"
