"""JSON-RPC to a chain's nodes: concurrent calls leave together as one batch, and a node that fails is passed over.

Two kinds of failure are kept apart, because money depends on the difference: `RpcError` is the node's answer to a call,
`RpcUnavailable` means that nobody answered, so that the call may or may not have had its effect.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp
import orjson

from payments.chain.nodes import Node, Nodes
from payments.chain.replies import Reply, Request, RpcError, read_replies

__all__ = ["BATCH_MAX", "Reply", "Request", "Rpc", "RpcError", "RpcUnavailable"]

log = logging.getLogger(__name__)

BATCH_MAX = 100
"""Calls in one POST; public nodes refuse more."""
ANSWER_BYTES_MAX = 32_000_000
"""Of one POST: a node that sends more, meaning it or not, does not get to use up our memory."""
PATIENCE_S = 3.0
"""How long a POST may take where another healthy node could answer it."""
LOOK_INTERVAL_S = 5.0
"""Between two comparisons of the nodes, where there are several."""
SEND = "eth_sendRawTransaction"
PROBE: Sequence[Request] = (("eth_chainId", ()), ("eth_blockNumber", ()))


class RpcUnavailable(Exception):
    """No node answered: unreachable, too slow, or not speaking JSON-RPC. Whether the call took effect is unknown."""


class Rpc:
    """A chain, reached through one or more nodes in order of preference.

    Transactions are sent to all healthy nodes at once: the same bytes twice do no harm, and one node that keeps them for
    itself does not delay them.

    Args:
        urls: HTTP endpoints; the next is tried when one does not answer, and passed-over ones are tried last.
        timeout_s: How long one POST may take where no other node could answer it.
        chain_id: A node of another chain is not asked; None trusts the operator.
        lag_blocks_max: A node whose head is further from the others' is asked after them.
    """

    def __init__(
        self, urls: Sequence[str], timeout_s: float = 10.0, *, chain_id: int | None = None, lag_blocks_max: int = 5
    ) -> None:
        self.nodes = Nodes(urls, lag_blocks_max)
        self.timeout_s = timeout_s
        self.round_trips = 0
        self.failures = 0
        """POSTs that no node answered."""
        self.available = True
        """Whether the last POST was answered."""
        self._chain_id = chain_id
        self._looked_at = time.monotonic()
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

    async def ask_each(self, requests: Sequence[Request]) -> list[list[Reply]]:
        """Ask every node that may be asked, at once: what one of them says is checked by what the others say.

        Returns:
            The replies of each node that answered; of those that did not, nothing.
        """
        now = time.monotonic()
        answers = (self._ask(node, requests, self.timeout_s) for node in self.nodes.in_order(now))
        found = await asyncio.gather(*answers, return_exceptions=True)
        return [replies for replies in found if not isinstance(replies, BaseException)]

    def gauges(self) -> list[tuple[str, str, dict[str, str], float]]:
        """Name, help, labels and value of what the metrics show of each node, which its place in the configuration names."""
        now = time.monotonic()
        return [
            row
            for place, node in enumerate(self.nodes.all)
            for labels in [{"node": str(place)}]
            for row in (
                ("farebox_rpc_node_healthy", "1 if a node is asked as preferred", labels, float(node.healthy(now))),
                ("farebox_rpc_node_failures", "POSTs that a node failed since the start", labels, node.failures),
                ("farebox_rpc_node_seconds", "How long a node takes to answer, on average", labels, node.latency_s),
            )
        ]

    async def aclose(self) -> None:
        """Drop what is under way and close the connections."""
        for flight in self._flights:
            flight.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _depart(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._spawn(self._fly(waiting))

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
        now = time.monotonic()
        nodes = self.nodes.in_order(now)
        if len(self.nodes.all) > 1:
            self._look(now)
            self._echo([request for request in requests if request[0] == SEND], nodes[1:], now)
        problems = []
        for place, node in enumerate(nodes):
            following = next(iter(nodes[place + 1 :]), None)
            self.round_trips += 1
            may_wait = following is None or not following.healthy(now)
            try:
                replies = await self._ask(node, requests, self.timeout_s if may_wait else PATIENCE_S)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                problems.append(f"{node.host}: {str(error) or type(error).__name__}")
                continue
            if following is not None and any(isinstance(r, RpcError) and r.is_the_nodes_own for r in replies):
                problems.append(f"{node.host}: limits its callers, or is broken inside")
                node.failed(now, time.monotonic(), hung=False)
                continue
            self.available = True
            return replies
        self.failures += 1
        self.available = False
        raise RpcUnavailable("; ".join(problems) or "every node hung or is on another chain; asked again soon")

    async def _ask(self, node: Node, requests: Sequence[Request], timeout_s: float) -> list[Reply]:
        """One POST to one node, whose health it changes."""
        body = orjson.dumps(
            [
                {"jsonrpc": "2.0", "id": index, "method": method, "params": params}
                for index, (method, params) in enumerate(requests)
            ]
        )
        asked_at = time.monotonic()
        node.asked(asked_at, timeout_s)
        try:
            replies = read_replies(await self._send(node.url, body, timeout_s), requests)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            node.failed(asked_at, time.monotonic(), hung=isinstance(error, TimeoutError))
            raise
        node.answered(time.monotonic() - asked_at)
        return replies

    async def _send(self, url: str, body: bytes, timeout_s: float) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=32, ttl_dns_cache=60),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"content-type": "application/json"},
            )
        async with self._session.post(url, data=body, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            if response.status != 200:
                raise ValueError(f"answered HTTP {response.status}")
            answer = bytearray()
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > ANSWER_BYTES_MAX:
                    raise ValueError("answered without end")
            return bytes(answer)

    # --- several nodes ------------------------------------------------------------------------------------------------

    def _echo(self, sends: Sequence[Request], others: Sequence[Node], now: float) -> None:
        if sends:
            for node in others:
                if node.healthy(now):
                    self._spawn(self._ask_quietly(node, sends))

    def _look(self, now: float) -> None:
        if now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._spawn(self._compare(now))

    async def _compare(self, now: float) -> None:
        """Learn where each node is. One that rests is left alone: the next call that needs it finds out."""
        nodes = [node for node in self.nodes.all if not node.resting(now)]
        answers = await asyncio.gather(*(self._ask_quietly(node, PROBE) for node in nodes))
        for node in self.nodes.all:
            node.head = 0
        for node, replies in zip(nodes, answers, strict=True):
            if replies is None or any(isinstance(reply, RpcError) for reply in replies):
                continue
            chain_id, head = (int(str(reply), 16) for reply in replies)
            foreign = self._chain_id is not None and chain_id != self._chain_id
            if foreign and not node.foreign:
                log.error("%s is a node of chain %d, not of %s", node.host, chain_id, self._chain_id)
            node.foreign, node.head = foreign, head
        self.nodes.compare_heads()

    async def _ask_quietly(self, node: Node, requests: Sequence[Request]) -> list[Reply] | None:
        try:
            return await self._ask(node, requests, PATIENCE_S)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        flight = asyncio.get_running_loop().create_task(work)
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)
