"""The stock OpenAI SDK over our agent, the real gateway behind a proxy that loses and spoils answers: one question is one
transfer and one inference, and its answer arrives.

The SDK calls again after 409, 5xx and time-outs; the agent sends the payment again rather than a new one; the gateway answers
a payment that it knows with its first outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest
from eth_account.signers.local import LocalAccount

from agents_sdk import Agent
from contracts.devnet import USDC, balance_of
from contracts.jsonrpc import rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import decoded
from tests.e2e.conftest import QUESTION
from tests.e2e.faults import Fault, FaultyProxy

IMPATIENT = httpx.Timeout(0.7, connect=5)
TRANSFER = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
"""keccak256("Transfer(address,address,uint256)"), the topic of ERC-20 transfers."""

FAULTS = [
    Fault(answer, forwarded)
    for answer in ("in_progress", 409, 500, 503, "silence", "reset")
    for forwarded in (False, True)
]


class Ask(Protocol):
    """Asks with the stock SDK, synchronous or not, and returns the words."""

    def __call__(self, agent: Agent, *, stream: bool, timeout: httpx.Timeout | None = None) -> str: ...


def ask_sync(agent: Agent, *, stream: bool, timeout: httpx.Timeout | None = None) -> str:
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    with agent.openai(**options) as client:
        if not stream:
            return client.chat.completions.create(**QUESTION).choices[0].message.content or ""
        chunks = client.chat.completions.create(**QUESTION, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def ask_async(agent: Agent, *, stream: bool, timeout: httpx.Timeout | None = None) -> str:
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    async with agent.async_openai(**options) as client:
        if not stream:
            return (await client.chat.completions.create(**QUESTION)).choices[0].message.content or ""
        chunks = await client.chat.completions.create(**QUESTION, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Either client; the asynchronous one in a loop of its own."""
    if request.param == "sync":
        return ask_sync

    def run(agent: Agent, *, stream: bool, timeout: httpx.Timeout | None = None) -> str:
        return asyncio.run(ask_async(agent, stream=stream, timeout=timeout))

    return run


@pytest.fixture(scope="module")
def proxy(stack: Stack) -> Iterator[FaultyProxy]:
    """Stands before the gateway, which has priced a first request, and so is quick, by now."""
    with FaultyProxy(stack.gateway_url) as proxy:
        assert httpx.post(f"{proxy.url}/v1/chat/completions", json=QUESTION, timeout=30).status_code == 402
        yield proxy


@pytest.fixture
def make_agent(proxy: FaultyProxy, wallet: LocalAccount, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Agents of the test's wallet, with one log."""
    agents: list[Agent] = []

    def make(**options: Any) -> Agent:
        agents.append(Agent(wallet, proxy.url, receipts=tmp_path / "agent.sqlite3", **{"backoff_s": 0.02, **options}))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


@pytest.fixture
def agent(make_agent: Callable[..., Agent]) -> Agent:
    """An agent with the defaults."""
    return make_agent()


@pytest.fixture
def transfers(stack: Stack, wallet: LocalAccount) -> Callable[[], list[int]]:
    """The wallet's transfers since the test began, as the chain logged them, which its balance confirms."""
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    block = int(rpc(stack.rpc_url, "eth_blockNumber"), 16)

    def read() -> list[int]:
        payer = "0x" + wallet.address.removeprefix("0x").lower().rjust(64, "0")
        recipient = "0x" + stack.pay_to.removeprefix("0x").lower().rjust(64, "0")
        query = {"address": USDC.address, "fromBlock": hex(block + 1), "topics": [TRANSFER, payer, recipient]}
        amounts = [int(log["data"], 16) for log in rpc(stack.rpc_url, "eth_getLogs", query)]
        assert before - balance_of(stack.rpc_url, USDC, wallet.address) == sum(amounts)
        return amounts

    return read


def assert_paid_once(proxy: FaultyProxy, transfers: Callable[[], list[int]], simulator: Simulator) -> None:
    """One signature, one transfer of exactly its amount, one inference."""
    [payment] = set(proxy.payments)
    assert transfers() == [int(decoded(payment)["accepted"]["amount"])]
    assert [attempt["outcome"] for attempt in simulator.attempts()] == ["ok"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_one_question_is_one_transfer_and_one_inference(
    proxy: FaultyProxy,
    agent: Agent,
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
    fault: Fault,
    stream: bool,
) -> None:
    proxy.plan([fault])
    assert "sky" in ask(agent, stream=stream, timeout=IMPATIENT if fault.answer == "silence" else None)
    assert len(proxy.payments) >= 2
    assert_paid_once(proxy, transfers, simulator)
    [receipt] = agent.receipts()
    assert receipt.transaction is not None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_misfortune_after_another(
    proxy: FaultyProxy,
    agent: Agent,
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
    stream: bool,
) -> None:
    proxy.plan([Fault(503, False), Fault("reset", True), Fault("in_progress", False), Fault(500, True)])
    assert "sky" in ask(agent, stream=stream)
    assert len(proxy.payments) == 5
    assert_paid_once(proxy, transfers, simulator)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.answer in ("silence", "reset")], ids=str)
def test_the_sdks_own_retry_sends_the_same_payment(
    proxy: FaultyProxy,
    make_agent: Callable[..., Agent],
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
    fault: Fault,
) -> None:
    """The agent gives up at once, so that it is the SDK that calls again."""
    proxy.plan([fault])
    agent = make_agent(tries_max=1)
    assert "sky" in ask(agent, stream=False, timeout=IMPATIENT)
    assert len(proxy.payments) >= 2
    assert_paid_once(proxy, transfers, simulator)


def test_an_answer_slower_than_the_clients_patience_is_waited_for_by_the_next_try(
    proxy: FaultyProxy,
    agent: Agent,
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
) -> None:
    """The gateway is at work on the first sending when the second one comes."""
    simulator.configure(QUESTION["model"], first_token_ms=1_000)
    proxy.plan([Fault("silence", True)])
    assert "sky" in ask(agent, stream=False, timeout=IMPATIENT)
    assert_paid_once(proxy, transfers, simulator)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_machine_that_dies_on_the_way_costs_an_inference_but_no_second_transfer(
    proxy: FaultyProxy,
    agent: Agent,
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
    stream: bool,
) -> None:
    """The gateway sees its caller hang up and stops the provider; the same payment then buys the answer anew."""
    simulator.configure(QUESTION["model"], first_token_ms=700)
    proxy.plan([Fault("drop", True)])
    assert "sky" in ask(agent, stream=stream)
    [payment] = set(proxy.payments)
    assert transfers() == [int(decoded(payment)["accepted"]["amount"])]
    assert [attempt["outcome"] for attempt in simulator.attempts()][-1] == "ok"
    assert len([attempt for attempt in simulator.attempts() if attempt["outcome"] == "ok"]) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_cut_on_its_way_is_had_by_asking_again(
    proxy: FaultyProxy,
    agent: Agent,
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
    stream: bool,
) -> None:
    """A stream that the caller has seen a part of cannot be begun anew behind its back: the SDK tells."""
    proxy.plan([Fault("cut", True)])
    if stream:
        with pytest.raises((openai.APIConnectionError, httpx.TransportError)):
            ask(agent, stream=True)
    assert "sky" in ask(agent, stream=stream)
    assert_paid_once(proxy, transfers, simulator)


def test_when_nothing_comes_back_the_next_process_uses_the_same_payment(
    proxy: FaultyProxy,
    make_agent: Callable[..., Agent],
    simulator: Simulator,
    transfers: Callable[[], list[int]],
    ask: Ask,
) -> None:
    proxy.plan([Fault(503, True)] * 2)
    with pytest.raises(openai.InternalServerError):
        ask(make_agent(tries_max=2), stream=False)
    assert "sky" in ask(make_agent(), stream=False)
    assert_paid_once(proxy, transfers, simulator)
