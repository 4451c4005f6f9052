"""What the doctor finds on a network, and which alarms the running gateway raises."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from contracts.devnet import Devnet, rpc
from payments.chain.networks import EXACT_PERMIT2_PROXY_ADDRESS, MULTICALL3_ADDRESS, Network
from payments.chain.rpc import Rpc
from payments.doctor import Finding, TokenMismatch, examine, verify_tokens
from payments.settlement.alarms import Alarms
from payments.store import Store
from tests.databases import open_store
from tests.payments.nodes import LyingNode
from tests.payments.settling import PAY_TO, Books, engine, until

GAS_MINIMUM_WEI = 10**16


@pytest.fixture
async def node(chain: Devnet) -> AsyncIterator[Rpc]:
    async with Rpc([chain.rpc_url]) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


async def look(chain: Devnet, node: Rpc, network: Network) -> list[Finding]:
    treasury = chain.wallets[3].address
    return await examine(
        node,
        network,
        signers=[chain.wallets[0].address],
        pay_to=treasury,
        treasury_key_address=treasury.lower(),
        gas_minimum_wei=GAS_MINIMUM_WEI,
    )


def bad(findings: list[Finding]) -> list[str]:
    return [f"{finding.status}: {finding.what}" for finding in findings if finding.status != "ok"]


async def test_a_sound_network_has_no_bad_findings(chain: Devnet, network: Network, node: Rpc) -> None:
    before = rpc(chain.rpc_url, "eth_blockNumber")
    findings = await look(chain, node, network)
    assert bad(findings) == []
    assert any("Permit2" in finding.what for finding in findings)
    assert rpc(chain.rpc_url, "eth_blockNumber") == before
    await verify_tokens(node, network)


async def test_a_token_with_another_domain_or_decimals_is_refused(chain: Devnet, network: Network, node: Rpc) -> None:
    usdc, usdt = network.tokens
    wrong_name = dataclasses.replace(network, tokens=(dataclasses.replace(usdc, domain_name="USD Coin"), usdt))
    with pytest.raises(TokenMismatch, match="USD Coin"):
        await verify_tokens(node, wrong_name)
    wrong_decimals = dataclasses.replace(network, tokens=(usdc, dataclasses.replace(usdt, decimals=18)))
    with pytest.raises(TokenMismatch, match="set decimals = 6"):
        await verify_tokens(node, wrong_decimals)
    nothing_there = dataclasses.replace(network, tokens=(dataclasses.replace(usdc, address="0x" + "12" * 20),))
    with pytest.raises(TokenMismatch, match="no token"):
        await verify_tokens(node, nothing_there)
    no_eip3009 = dataclasses.replace(network, tokens=(dataclasses.replace(usdt, transfer_method="eip3009"),))
    with pytest.raises(TokenMismatch, match="no EIP-712 domain"):
        await verify_tokens(node, no_eip3009)


async def test_another_chain_or_no_chain_is_found(chain: Devnet, network: Network, node: Rpc) -> None:
    findings = await look(chain, node, dataclasses.replace(network, chain_id=8453))
    assert bad(findings)[0] == "fail: the nodes of chain 8453 say their chain is 84532"
    async with Rpc(["http://127.0.0.1:1"]) as nobody:
        findings = await look(chain, nobody, network)
    assert [finding.status for finding in findings] == ["fail"]


async def test_missing_contracts_gas_and_keys_are_found(chain: Devnet, network: Network, node: Rpc) -> None:
    rpc(chain.rpc_url, "anvil_setCode", EXACT_PERMIT2_PROXY_ADDRESS, "0x")
    rpc(chain.rpc_url, "anvil_setCode", MULTICALL3_ADDRESS, "0x")
    rpc(chain.rpc_url, "anvil_setBalance", chain.wallets[0].address, hex(GAS_MINIMUM_WEI - 1))
    rpc(chain.rpc_url, "anvil_setBalance", chain.wallets[1].address, "0x0")
    findings = await examine(
        node,
        network,
        signers=[chain.wallets[0].address, chain.wallets[1].address],
        pay_to=chain.wallets[3].address,
        treasury_key_address=chain.wallets[4].address,
        gas_minimum_wei=GAS_MINIMUM_WEI,
        treasury_minimum_nano_usd=10**15,
    )
    assert [line.partition(":")[0] for line in bad(findings)] == [
        "fail",
        "fail",
        "warn",
        "fail",
        "fail",
        "warn",
        "warn",
    ]
    assert all(finding.advice for finding in findings if finding.status != "ok")


async def test_alarms_are_raised_and_end(chain: Devnet, network: Network, store: Store) -> None:
    signer, treasury = chain.wallets[0], chain.wallets[3]
    async with engine(store, network, chain.rpc_url, [signer], Books(network)) as settlements:
        alarms = Alarms(
            settlements,
            treasury.address,
            gas_minimum_wei=GAS_MINIMUM_WEI,
            treasury_minimum_nano_usd=2_000 * 10**9,
        )
        rpc(chain.rpc_url, "anvil_setBalance", signer.address, hex(GAS_MINIMUM_WEI - 1))
        await alarms.look()
        raised = [(alarm.code, alarm.subject) for alarm in alarms.raised()]
        assert raised == [
            ("low_gas", signer.address.lower()),
            ("low_treasury", network.tokens[0].asset),
            ("low_treasury", network.tokens[1].asset),
        ]
        assert (alarms.gauges()[0][0], round(alarms.gauges()[0][3], 6)) == ("farebox_signer_gas_native", 0.01)
        rpc(chain.rpc_url, "anvil_setBalance", signer.address, hex(GAS_MINIMUM_WEI))
        await alarms.look()
        assert "low_gas" not in {alarm.code for alarm in alarms.raised()}


async def test_an_account_without_gas_is_told_of_though_a_node_answers_with_nothing(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.settlement.alarms.INTERVAL_S", 0.02)
    signer, node = chain.wallets[0], LyingNode(chain.rpc_url)
    node.results = {"eth_call": "0x"}
    async with node.serve() as url, engine(store, network, url, [signer], Books(network)) as settlements:
        alarms = Alarms(settlements, PAY_TO, gas_minimum_wei=10**30, treasury_minimum_nano_usd=1)
        await alarms.start()
        await until(lambda: node.told > 1)
        assert [alarm.code for alarm in alarms.raised()] == ["low_gas"]
        node.results = {}
        await until(lambda: len(alarms.raised()) == 3)
        await alarms.stop()
