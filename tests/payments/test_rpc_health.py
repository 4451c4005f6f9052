"""Several nodes of one chain: which are asked, which are passed over, and how soon."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web

import payments.chain.rpc
from payments.chain.nodes import REST_MAX_S, Node, Nodes
from payments.chain.rpc import SEND, Rpc, RpcError, RpcUnavailable
from tests.payments.settling import until

CHAIN_ID = 84532


class ScriptedNode:
    """A node that says what the test wants."""

    def __init__(self, head: int = 100, chain_id: int = CHAIN_ID) -> None:
        self.results: dict[str, Any] = {"eth_blockNumber": hex(head), "eth_chainId": hex(chain_id), SEND: "0x"}
        self.calls: list[str] = []
        self.errors: dict[str, int] = {}
        """Method → error code."""
        self.status = 200
        self.hang: asyncio.Event | None = None
        """If set: no answer before it is."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        calls = orjson.loads(await request.read())
        self.calls += [call["method"] for call in calls]
        if self.hang is not None:
            await self.hang.wait()
        answers = [{"jsonrpc": "2.0", "id": call["id"]} | self._answer(call["method"]) for call in calls]
        return web.json_response(answers, status=self.status)

    def _answer(self, method: str) -> dict[str, Any]:
        if method in self.errors:
            return {"error": {"code": self.errors[method], "message": "no"}}
        return {"result": self.results.get(method)}


@contextlib.asynccontextmanager
async def serving(*nodes: ScriptedNode, **options: Any) -> AsyncIterator[Rpc]:
    async with contextlib.AsyncExitStack() as cleanup:
        urls = []
        for node in nodes:
            runner = web.ServerRunner(web.Server(node.handle), shutdown_timeout=0.1)
            await runner.setup()
            cleanup.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        yield await cleanup.enter_async_context(Rpc(urls, chain_id=CHAIN_ID, **options))


async def looked(rpc: Rpc, done: Callable[[], bool]) -> None:
    """Have the nodes compared."""
    rpc._looked_at = float("-inf")
    with contextlib.suppress(RpcUnavailable):
        await rpc.call("eth_gasPrice")
    await until(done)


# --- health, by the clock ---------------------------------------------------------------------------------------------


def test_a_failed_node_rests_longer_each_time_and_then_leads_again() -> None:
    nodes = Nodes(["http://a", "http://b"], 5)
    a, b = nodes.all
    now, rests = 100.0, []
    for _ in range(10):
        assert nodes.in_order(now) == [a, b]
        a.failed(now, now, hung=False)
        assert nodes.in_order(now) == [b, a]
        start = now
        while a.resting(now):
            now += 0.25
        rests.append(now - start)
    assert rests == sorted(rests)
    assert rests[0] == 0.5
    assert rests[-1] == REST_MAX_S
    a.answered(0.01)
    a.failed(now, now, hung=False)
    assert not a.resting(now + 0.5)


def test_calls_that_fail_together_count_as_one_failure() -> None:
    node = Node("http://a")
    for _ in range(50):
        node.failed(100.0, 101.0, hung=False)
    assert not node.resting(101.5)


def test_a_node_that_hung_is_tried_by_one_call_at_a_time() -> None:
    nodes = Nodes(["http://a"], 5)
    (a,) = nodes.all
    a.failed(100.0, 103.0, hung=True)
    assert nodes.in_order(103.1) == []
    assert nodes.in_order(103.5) == [a]
    a.asked(103.5, 10.0)
    assert nodes.in_order(103.6) == []
    a.answered(0.1)
    assert nodes.in_order(103.7) == [a]


@pytest.mark.parametrize(
    ("heads", "astray"),
    [
        ([100, 100], []),
        ([90, 100], [0]),
        ([96, 100], []),
        ([10**9, 100, 101], [0]),
        ([90, 100, 101], [0]),
        ([0, 0, 100], []),
    ],
)
def test_a_head_far_from_the_others_is_astray(heads: list[int], astray: list[int]) -> None:
    nodes = Nodes([f"http://{place}" for place in range(len(heads))], 5)
    for node, head in zip(nodes.all, heads, strict=True):
        node.head = head
    nodes.compare_heads()
    assert [place for place, node in enumerate(nodes.all) if node.astray] == astray
    assert [nodes.in_order(0.0)[-1] is nodes.all[place] for place in astray] == [True] * len(astray)


# --- over sockets -----------------------------------------------------------------------------------------------------


async def test_a_late_node_is_passed_over_until_it_is_where_the_others_are() -> None:
    late, good = ScriptedNode(head=50), ScriptedNode(head=100)
    async with serving(late, good) as rpc:
        await looked(rpc, lambda: rpc.nodes.all[0].astray)
        assert await rpc.call("eth_blockNumber") == hex(100)
        late.results["eth_blockNumber"] = hex(99)
        await looked(rpc, lambda: not rpc.nodes.all[0].astray)
        assert await rpc.call("eth_blockNumber") == hex(99)


async def test_a_node_of_another_chain_is_never_asked() -> None:
    foreign, good = ScriptedNode(chain_id=1), ScriptedNode()
    async with serving(foreign, good) as rpc:
        await looked(rpc, lambda: rpc.nodes.all[0].foreign)
        good.status = 503
        with pytest.raises(RpcUnavailable):
            await rpc.call("eth_getBalance", ("0x" + "11" * 20, "latest"))
        assert "eth_getBalance" not in foreign.calls


@pytest.mark.parametrize(
    ("method", "params", "nonsense"),
    [
        ("eth_blockNumber", (), "0xzz"),
        ("eth_blockNumber", (), hex(2**60)),
        ("eth_getTransactionCount", ("0x" + "11" * 20, "latest"), None),
        ("eth_getLogs", ({},), [{"topics": None}]),
        ("eth_getBlockByNumber", ("0x1", False), {"number": "0x1"}),
        ("eth_getTransactionReceipt", ("0x" + "aa" * 32,), {"blockNumber": "0x1", "status": "0x1"}),
        ("eth_getTransactionReceipt", ("0x" + "aa" * 32,), {"transactionHash": "0x" + "bb" * 32}),
    ],
)
async def test_nonsense_is_no_answer_and_the_next_node_gives_one(method: str, params: Any, nonsense: Any) -> None:
    liar, good = ScriptedNode(), ScriptedNode()
    right: dict[str, Any] = {"eth_blockNumber": "0x64", "eth_getTransactionCount": "0x7", "eth_getLogs": []}
    liar.results[method], good.results[method] = nonsense, right.get(method)
    async with serving(liar, good) as rpc:
        assert await rpc.call(method, params) == right.get(method)
        assert rpc.nodes.all[0].failures == 1
    async with serving(liar) as rpc:
        with pytest.raises(RpcUnavailable, match=method):
            await rpc.call(method, params)


@pytest.mark.parametrize("code", [-32005, -32603], ids=["limits its callers", "internal error"])
async def test_a_node_that_answers_no_call_is_passed_over_but_its_answer_stands_where_it_is_alone(code: int) -> None:
    busy, good = ScriptedNode(), ScriptedNode()
    busy.errors["eth_gasPrice"] = code
    good.results["eth_gasPrice"] = "0x1"
    async with serving(busy, good) as rpc:
        assert await rpc.call("eth_gasPrice") == "0x1"
    async with serving(busy) as rpc:
        with pytest.raises(RpcError):
            await rpc.call("eth_gasPrice")


async def test_a_hung_node_delays_one_call_and_not_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payments.chain.rpc, "PATIENCE_S", 0.2)
    hung, good = ScriptedNode(), ScriptedNode()
    hung.hang = asyncio.Event()
    good.results["eth_gasPrice"] = "0x1"
    async with serving(hung, good) as rpc:
        assert await rpc.call("eth_gasPrice") == "0x1"
        asked = hung.calls.count("eth_gasPrice")
        started = time.monotonic()
        assert await asyncio.gather(*(rpc.call("eth_gasPrice") for _ in range(20))) == ["0x1"] * 20
        assert time.monotonic() - started < 0.2
        assert hung.calls.count("eth_gasPrice") == asked == 1
        hung.hang.set()


async def test_while_every_node_hangs_nobody_answers_and_nobody_waits_for_that() -> None:
    hung = ScriptedNode()
    hung.hang = asyncio.Event()
    async with serving(hung) as rpc:
        rpc.timeout_s = 0.1
        for said in ("TimeoutError", "every node hung"):
            with pytest.raises(RpcUnavailable, match=said):
                await rpc.batch([("eth_gasPrice", ())])
        assert hung.calls == ["eth_gasPrice"]
        hung.hang.set()


async def test_a_transaction_goes_to_every_healthy_node_though_the_first_hangs() -> None:
    hung, second, third, sick = (ScriptedNode() for _ in range(4))
    hung.hang = asyncio.Event()
    async with serving(hung, second, third, sick) as rpc:
        rpc.nodes.all[3].failed(time.monotonic(), time.monotonic() + 5, hung=False)
        sending = asyncio.ensure_future(rpc.batch([("eth_blockNumber", ()), (SEND, ("0x02",))]))
        await until(lambda: SEND in second.calls and SEND in third.calls)
        assert not sending.done()
        hung.hang.set()
        assert await sending == [hex(100), "0x"]
        assert SEND not in sick.calls


async def test_what_each_node_says_is_heard_apart() -> None:
    nodes = [ScriptedNode(head=head) for head in (100, 101, 102)]
    nodes[1].status = 503
    async with serving(*nodes) as rpc:
        assert sorted(await rpc.ask_each([("eth_blockNumber", ())])) == [[hex(100)], [hex(102)]]
