"""Approving Permit2 for a USDT-like token on a real chain: once, bounded, and only with an RPC server and gas."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from agents_sdk import Agent, ApprovalFailed, ApprovalNeeded, SpendingPolicy, Token
from contracts.devnet import Devnet, allowance, approve_permit2, rpc
from tests.agents_sdk import fake_gateway
from tests.agents_sdk.conftest import KEY, MakeAgent
from tests.agents_sdk.fake_gateway import FakeGateway

QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}
USDT_ONLY = SpendingPolicy(tokens=["USDT"])
HUNDRED_USD = 100_000_000


def ask(agent: Agent) -> int:
    with agent.http_client() as http:
        return http.post("/v1/chat/completions", json=QUESTION).status_code


def offer_usdt(gateway: FakeGateway, chain: Devnet) -> Token:
    token = Token("USDT", fake_gateway.NETWORK, chain.usdt.address, 6, "permit2", "Tether USD", "1")
    gateway.tokens = [token]
    return token


def approved(chain: Devnet) -> int:
    return allowance(chain.rpc_url, chain.usdt, chain.wallets[3].address, chain.permit2)


def transactions(chain: Devnet) -> int:
    return int(rpc(chain.rpc_url, "eth_getTransactionCount", chain.wallets[3].address, "latest"), 16)


def payer(
    chain: Devnet, make_agent: MakeAgent, policy: SpendingPolicy = USDT_ONLY, rpc_url: str | None = None
) -> Agent:
    return make_agent(wallet=chain.wallets[3].private_key, policy=policy, rpc_url=rpc_url or chain.rpc_url, tokens=())


def test_permit2_is_approved_once_and_for_a_bounded_amount(
    gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet
) -> None:
    offer_usdt(gateway, chain)
    before = transactions(chain)
    agent = payer(chain, make_agent)
    assert [ask(agent), ask(agent), ask(payer(chain, make_agent))] == [200, 200, 200]
    assert approved(chain) == HUNDRED_USD
    assert transactions(chain) == before + 1


def test_an_allowance_that_has_run_low_is_set_to_zero_first(
    gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet
) -> None:
    offer_usdt(gateway, chain)
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[3].private_key, 7)
    before = transactions(chain)
    assert ask(payer(chain, make_agent)) == 200
    assert approved(chain) == HUNDRED_USD
    assert transactions(chain) == before + 2


def test_an_unlimited_approval_has_to_be_asked_for(gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet) -> None:
    offer_usdt(gateway, chain)
    assert ask(payer(chain, make_agent, SpendingPolicy(tokens=["USDT"], permit2_allowance="unlimited"))) == 200
    assert approved(chain) == 2**256 - 1


async def test_questions_at_the_same_time_share_one_approval(
    gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet
) -> None:
    offer_usdt(gateway, chain)
    before = transactions(chain)
    async with payer(chain, make_agent).async_http_client() as http:
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=QUESTION) for _ in range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert transactions(chain) == before + 1


def test_a_412_is_cured_and_the_same_payment_sent_again(
    gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet
) -> None:
    offer_usdt(gateway, chain)
    gateway.script = ["412"]
    assert ask(payer(chain, make_agent)) == 200
    assert len(gateway.seen) == 2
    assert len(gateway.nonces) == 1


def test_without_an_rpc_server_a_412_says_what_to_do(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.tokens = [fake_gateway.USDT]
    gateway.script = ["412"]
    with pytest.raises(ApprovalNeeded, match="give the agent an rpc_url"):
        ask(make_agent())


def test_what_needs_an_approval_may_be_paid_otherwise_by_the_next_attempt(
    gateway: FakeGateway, make_agent: MakeAgent
) -> None:
    gateway.tokens = [fake_gateway.USDT]
    gateway.script = ["412"]
    agent = make_agent()
    with pytest.raises(ApprovalNeeded):
        ask(agent)
    gateway.tokens = [fake_gateway.USDC]
    assert ask(agent) == 200
    assert agent.receipts(1)[0].asset == fake_gateway.USDC.asset


def test_without_gas_nothing_is_paid(gateway: FakeGateway, chain: Devnet, tmp_path: Path) -> None:
    offer_usdt(gateway, chain)
    policy = SpendingPolicy(tokens=["USDT"])
    with (
        Agent(
            KEY, gateway.url, policy=policy, rpc_url=chain.rpc_url, receipts=tmp_path / "log", credit="never"
        ) as agent,
        pytest.raises(ApprovalFailed, match=r"costs up to .* wei of gas on eip155:84532, and .* has 0"),
    ):
        ask(agent)
    assert gateway.nonces == set()


def test_an_rpc_server_of_another_chain_is_refused(gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet) -> None:
    gateway.tokens = [Token("USDT", "eip155:8453", "0xfde4C96c8593536E31F229EA8f37b2ADa2699bb2", 6, "permit2")]
    with pytest.raises(ApprovalFailed, match="of chain 84532, but USDT is on 8453"):
        ask(payer(chain, make_agent))
    assert gateway.nonces == set()


def test_an_rpc_server_that_is_down_fails_the_question_not_the_money(
    gateway: FakeGateway, make_agent: MakeAgent, chain: Devnet
) -> None:
    offer_usdt(gateway, chain)
    with pytest.raises(httpx.ConnectError):
        ask(payer(chain, make_agent, rpc_url="http://127.0.0.1:9"))
    assert gateway.nonces == set()
