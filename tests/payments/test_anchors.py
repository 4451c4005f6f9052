"""A database stays with its chain and its tokens."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.anvil import Anvil
from contracts.devnet import Devnet
from contracts.jsonrpc import rpc as contract_rpc
from payments.anchors import AnotherChain, hold_fast
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from tests.databases import open_store
from tests.payments.settling import mine, until


async def test_the_same_chain_is_known_again_however_long_it_has_grown(
    chain: Devnet, network: Network, tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    async with Rpc([chain.rpc_url]) as rpc:
        await hold_fast(store, rpc, network)
        mine(chain.rpc_url, 3)
        await hold_fast(store, rpc, network)
    store.close()


async def test_a_chain_that_was_begun_anew_is_refused(chain: Devnet, network: Network, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    began = int(contract_rpc(chain.rpc_url, "eth_getBlockByNumber", "0x0", False)["timestamp"], 16)
    await until(lambda: time.time() > began + 1)  # two that Anvil begins in one second are the same
    with Anvil(chain_id=network.chain_id) as another:
        async with Rpc([chain.rpc_url]) as rpc, Rpc([another.rpc_url]) as anew:
            await hold_fast(store, rpc, network)
            for _ in range(2):
                with pytest.raises(AnotherChain, match="begun anew"):
                    await hold_fast(store, anew, network)
            await hold_fast(store, rpc, network)
    store.close()


async def test_another_contract_under_an_old_name_is_refused(chain: Devnet, network: Network, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    usdc, usdt = network.tokens
    exchanged = replace(network, tokens=(replace(usdc, address="0x" + "66" * 20), usdt))
    async with Rpc([chain.rpc_url]) as rpc:
        await hold_fast(store, rpc, network)
        with pytest.raises(AnotherChain, match="USDC"):
            await hold_fast(store, rpc, exchanged)
        await hold_fast(store, rpc, replace(network, tokens=(usdc,)))
    store.close()
