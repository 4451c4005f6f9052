"""A node that answers nonsense: nobody is paid twice, nobody waits for ever, and all goes on when it comes to its senses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import payments.settlement.courier
from contracts.devnet import Devnet, balance_of
from payments.chain.networks import Network
from payments.chain.rpc import Rpc, RpcUnavailable
from payments.errors import SettlementUnavailable
from payments.store import Store
from payments.verification.chain_state import ChainStates
from tests.databases import open_store
from tests.payments.nodes import LyingNode
from tests.payments.settling import PAY_TO, Books, engine, order_for, pay, receipt

NONSENSE: list[Any] = [None, "0xzz", "0x", "hello", {}, [1], 7, "0x" + "ff" * 640]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
async def test_a_check_that_gets_nonsense_is_unavailable_for_all_that_shared_it(
    chain: Devnet, network: Network, nonsense: Any
) -> None:
    usdc = network.tokens[0]
    node = LyingNode(chain.rpc_url)
    node.results = {"eth_call": nonsense}
    async with node.serve() as url, Rpc([url]) as rpc:
        states = ChainStates(rpc, network)
        checks = (states.check(pay(chain.wallets[1], usdc, 100 + i), usdc, PAY_TO) for i in range(3))
        verdicts = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(verdict) for verdict in verdicts] == [SettlementUnavailable] * 3


async def test_answers_without_the_ids_of_their_calls_are_no_answers(chain: Devnet) -> None:
    node = LyingNode(chain.rpc_url)
    node.ids_are_lists = True
    async with node.serve() as url, Rpc([url]) as rpc:
        with pytest.raises(RpcUnavailable):
            async with asyncio.timeout(5):
                await rpc.call("eth_chainId")


@pytest.mark.parametrize(
    "nonsense", [*NONSENSE, {"blockNumber": "0x1"}, {"blockNumber": {}, "status": "0x1"}], ids=repr
)
@pytest.mark.parametrize("method", ["eth_blockNumber", "eth_getTransactionReceipt", "eth_feeHistory"])
async def test_a_settlement_outlives_nonsense_and_pays_once(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch, method: str, nonsense: Any
) -> None:
    monkeypatch.setattr(payments.settlement.courier, "RETRY_S", 0.05)
    usdc, books, node = network.tokens[0], Books(network), LyingNode(chain.rpc_url)
    async with node.serve() as url, engine(store, network, url, [chain.wallets[9]], books) as settlements:
        settlements.fees._ttl_s = 0  # so that fees are asked for in every turn
        settlements.courier._resend_s = 0.1
        node.results = {method: nonsense}
        order = order_for(pay(chain.wallets[1], usdc, 4_000), usdc)
        await settlements.submit(order)
        async with asyncio.timeout(10):
            while not node.told:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.005)
        node.results = {}
        outcome = await settlements.outcome(order.id, 15)
        assert outcome.paid
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 4_000
    assert len(books.mined) == 1


async def test_a_node_that_says_gas_is_dear_makes_nobody_offer_more_than_the_cap(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, books, node = network.tokens[0], Books(network), LyingNode(chain.rpc_url)
    node.results = {"eth_feeHistory": {"baseFeePerGas": [hex(10**18)], "reward": [[hex(10**17)]]}}
    async with node.serve() as url, engine(store, network, url, [chain.wallets[9]], books) as settlements:
        order = order_for(pay(chain.wallets[1], usdc, 4_000), usdc)
        await settlements.submit(order)
        assert settlements.fees.capped
        outcome = await settlements.outcome(order.id, 15)
        assert outcome.paid
    sent = receipt(chain.rpc_url, outcome.transaction_hash)
    assert int(sent["effectiveGasPrice"], 16) <= network.max_fee_gwei * 10**9
