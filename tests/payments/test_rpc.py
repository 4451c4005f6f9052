"""JSON-RPC: batches, failing nodes, lost answers; and transactions and calls as bytes, against the usual libraries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import coincurve
import pytest
from aiohttp import web
from eth_abi.abi import encode
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from contracts.devnet import Devnet, balance_of
from payments.chain.networks import Network
from payments.chain.rlp import rlp_encode
from payments.chain.rpc import BATCH_MAX, Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import (
    Call,
    Fees,
    address_of,
    decode_aggregate3,
    decode_revert,
    encode_aggregate3,
    encode_proxy_settle,
    encode_transfer,
    encode_transfer_with_authorization,
    selector,
    sign_transaction,
)
from payments.store import Store
from payments.x402.wire import Eip3009Authorization, Permit2Authorization
from tests.databases import open_store
from tests.payments.settling import PAY_TO, Books, engine, order_for, pay

KEY = "0x" + "4b" * 32
words = st.integers(0, 2**256 - 1)
four_words = st.lists(words, min_size=4, max_size=4)
addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())


class Proxy:
    """A node between us and Anvil that misbehaves on request."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.refuse = 0
        """So many POSTs get 503 without reaching the node."""
        self.lose = 0
        """So many POSTs reach the node, and their answers are lost."""
        self.answer: Any = None
        """If set: the answer to everything."""
        self.posts = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.posts += 1
        body = await request.read()
        if self.refuse > 0:
            self.refuse -= 1
            return web.Response(status=503)
        if self.answer is not None:
            return web.json_response(self.answer)
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.target, data=body, headers={"content-type": "application/json"}) as response,
        ):
            content = await response.read()
        if self.lose > 0:
            self.lose -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=content, content_type="application/json")

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application(client_max_size=10_000_000)
        app.router.add_post("/", self.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
        finally:
            await runner.cleanup()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


async def test_calls_made_at_once_are_one_post(devnet: Devnet) -> None:
    async with Rpc([devnet.rpc_url]) as rpc:
        replies = await asyncio.gather(*(rpc.call("eth_chainId") for _ in range(BATCH_MAX)))
        assert replies == [hex(devnet.chain_id)] * BATCH_MAX
        assert rpc.round_trips == 1


async def test_an_error_reaches_only_the_call_that_it_answers(devnet: Devnet) -> None:
    async with Rpc([devnet.rpc_url]) as rpc:
        calls = (rpc.call("eth_chainId"), rpc.call("eth_getBalance", ["nobody"]))
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert replies[0] == hex(devnet.chain_id)
        assert isinstance(replies[1], RpcError)
        assert rpc.round_trips == 1


async def test_a_node_that_does_not_answer_is_passed_over(devnet: Devnet) -> None:
    proxy = Proxy(devnet.rpc_url)
    proxy.refuse = 1
    async with proxy.serve() as url, Rpc([url, devnet.rpc_url]) as rpc:
        assert await rpc.call("eth_chainId") == hex(devnet.chain_id)
        assert await rpc.call("eth_chainId") == hex(devnet.chain_id)
        assert proxy.posts == 1
        assert rpc.available


async def test_no_node_at_all_is_unavailable_and_the_url_is_not_told(devnet: Devnet) -> None:
    async with Rpc(["http://127.0.0.1:1/v2/secret-key"]) as rpc:
        with pytest.raises(RpcUnavailable) as raised:
            await rpc.call("eth_chainId")
        assert "secret" not in str(raised.value)
        assert not rpc.available


@pytest.mark.parametrize(
    "answer",
    [
        {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "batch too large"}},
        [],
        [{"jsonrpc": "2.0", "id": 7, "result": "0x1"}],
        ["0x1"],
        "hello",
        [None],
    ],
)
async def test_an_answer_that_is_none_is_unavailable(devnet: Devnet, answer: Any) -> None:
    proxy = Proxy(devnet.rpc_url)
    proxy.answer = answer
    async with proxy.serve() as url, Rpc([url]) as rpc:
        with pytest.raises(RpcUnavailable):
            await rpc.call("eth_chainId")


@pytest.mark.parametrize(("refuse", "lose"), [(3, 0), (0, 3)])
async def test_failing_posts_leave_no_gap_and_pay_nothing_twice(
    chain: Devnet, network: Network, store: Store, refuse: int, lose: int
) -> None:
    usdc, books = network.tokens[0], Books(network)
    orders = [order_for(pay(chain.wallets[1], usdc, 100 + i), usdc) for i in range(20)]
    proxy = Proxy(chain.rpc_url)
    async with (
        proxy.serve() as url,
        engine(store, network, url, [chain.wallets[0]], books) as settlements,
    ):
        proxy.refuse, proxy.lose = refuse, lose
        for order in orders[:10]:
            await settlements.submit(order)
        await asyncio.gather(*(settlements.submit(order) for order in orders[10:]))
        outcomes = await asyncio.gather(*(settlements.outcome(order.id, 30) for order in orders))
        assert all(outcome.paid for outcome in outcomes)
        assert settlements.rpc.failures == 3
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == sum(order.value for order in orders)
    assert len(books.mined) == 20


# --- bytes ------------------------------------------------------------------------------------------------------------


@given(
    nonce=st.integers(0, 2**63),
    max_fee=st.integers(0, 2**80),
    priority=st.integers(0, 2**64),
    data=st.binary(max_size=300),
)
def test_a_signed_transaction_is_what_eth_account_signs(nonce: int, max_fee: int, priority: int, data: bytes) -> None:
    key = coincurve.PrivateKey(bytes.fromhex(KEY[2:]))
    call = Call("0x" + "ab" * 20, data, 120_000)
    ours = sign_transaction(key, chain_id=84532, nonce=nonce, call=call, fees=Fees(max_fee, priority))
    theirs = Account.sign_transaction(
        {
            "type": 2,
            "chainId": 84532,
            "nonce": nonce,
            "to": bytes.fromhex(call.to[2:]),
            "value": 0,
            "data": data,
            "gas": call.gas,
            "maxFeePerGas": max_fee,
            "maxPriorityFeePerGas": priority,
        },
        KEY,
    )
    assert ours.raw == bytes(theirs.raw_transaction)
    assert ours.hash == "0x" + bytes(theirs.hash).hex()
    assert address_of(key) == Account.from_key(KEY).address.lower()


@pytest.mark.parametrize(
    ("item", "encoded"),
    [(0, "80"), (127, "7f"), (128, "8180"), (b"", "80"), (b"dog", "83646f67"), ([], "c0"), ([[], [[]]], "c3c0c1c0")],
)
def test_rlp_is_as_the_yellow_paper_has_it(item: Any, encoded: str) -> None:
    assert rlp_encode(item).hex() == encoded


@given(
    payer=addresses,
    to=addresses,
    numbers=four_words,
    signature=st.binary(min_size=65, max_size=65),
)
def test_transfer_with_authorization_is_abi_encoded(payer: str, to: str, numbers: list[int], signature: bytes) -> None:
    value, after, before, nonce = numbers
    types = ["address", "address", "uint256", "uint256", "uint256", "bytes32", "uint8", "bytes32", "bytes32"]
    expected = encode(
        types,
        [payer, to, value, after, before, nonce.to_bytes(32, "big"), signature[64], signature[:32], signature[32:64]],
    )
    authorization = Eip3009Authorization(payer, to, value, after, before, nonce)
    encoded = encode_transfer_with_authorization(authorization, signature)
    assert encoded == selector(f"transferWithAuthorization({','.join(types)})") + expected


@given(
    payer=addresses,
    to=addresses,
    token=addresses,
    numbers=four_words,
    signature=st.binary(max_size=200),
)
def test_proxy_settle_is_abi_encoded(payer: str, to: str, token: str, numbers: list[int], signature: bytes) -> None:
    amount, nonce, deadline, after = numbers
    types = ["((address,uint256),uint256,uint256)", "address", "(address,uint256)", "bytes"]
    expected = encode(types, [((token, amount), nonce, deadline), payer, (to, after), signature])
    authorization = Permit2Authorization(payer, token, amount, "0x" + "00" * 20, nonce, deadline, to, after)
    assert encode_proxy_settle(authorization, signature) == selector(f"settle({','.join(types)})") + expected


@given(to=addresses, value=words)
def test_transfer_is_abi_encoded(to: str, value: int) -> None:
    types = ["address", "uint256"]
    assert encode_transfer(to, value) == selector("transfer(address,uint256)") + encode(types, [to, value])


@given(calls=st.lists(st.tuples(addresses, st.binary(max_size=100)), max_size=5))
def test_aggregate3_is_abi_encoded(calls: list[tuple[str, bytes]]) -> None:
    expected = encode(["(address,bool,bytes)[]"], [[(to, True, data) for to, data in calls]])
    assert encode_aggregate3(calls) == selector("aggregate3((address,bool,bytes)[])") + expected


@given(results=st.lists(st.tuples(st.booleans(), st.binary(max_size=100)), max_size=5))
def test_aggregate3s_answer_is_decoded(results: list[tuple[bool, bytes]]) -> None:
    answer = encode(["(bool,bytes)[]"], [results])
    assert decode_aggregate3(answer, len(results)) == results
    with pytest.raises(ValueError):
        decode_aggregate3(answer, len(results) + 1)
    if any(data for _, data in results):
        with pytest.raises(ValueError):
            decode_aggregate3(answer[:64], len(results))


def test_a_revert_says_why() -> None:
    assert decode_revert(selector("Error(string)") + encode(["string"], ["not today"])) == "not today"
    assert decode_revert(selector("Panic(uint256)") + encode(["uint256"], [0x11])) == "panic 0x11"
    assert decode_revert(selector("InvalidAmount()")) == f"error 0x{selector('InvalidAmount()').hex()}"
    assert decode_revert(b"") == "reverted without a reason"
    assert decode_revert(selector("Error(string)")) == "a malformed revert"
