"""Our agent pays through channels: many requests on one deposit, several in flight, whatever gets lost on the way."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account.signers.local import LocalAccount

from agents_sdk import Agent, LimitExceeded, RequestRefused, SpendingPolicy
from contracts.devnet import USDC, USDT, DevToken, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests.e2e.agents import FUNDS, channels_of, deposits_of, new_wallet
from tests.e2e.clients import decoded
from tests.e2e.conftest import QUESTION
from tests.e2e.faults import Fault, FaultyProxy
from tests.e2e.grounds import wait_until

DEPOSIT = 10**6
POLICY = SpendingPolicy(schemes=("batch-settlement",), max_per_request="0.05")
MakeAgent = Callable[..., Agent]


@pytest.fixture
def payer(stack: Stack) -> LocalAccount:
    return new_wallet(stack)


@pytest.fixture
def make_agent(stack: Stack, payer: LocalAccount, tmp_path: Path) -> Iterator[MakeAgent]:
    """Agents of the test's wallet, with one log."""
    agents: list[Agent] = []

    def make(base_url: str = stack.gateway_url, **options: Any) -> Agent:
        given: dict[str, Any] = {
            "policy": POLICY,
            "receipts": tmp_path / "agent.sqlite3",
            "backoff_s": 0.05,
            "credit": "never",
        } | options
        agents.append(Agent(payer, base_url, **given))
        return agents[-1]

    yield make
    for agent in agents:
        agent.close()


def question(number: int) -> dict[str, Any]:
    return QUESTION | {"max_tokens": 64 + number, "stream": bool(number % 2)}


def ask(agent: Agent, number: int = 0) -> httpx.Response:
    with agent.http_client() as http:
        return http.post("/v1/chat/completions", json=question(number))


def assert_in_step(
    stack: Stack, agent: Agent, payer: LocalAccount, *, requests: int, token: DevToken = USDC, deposits: int = 1
) -> None:
    """One channel, one deposit on chain, and what the agent's receipts say was charged is what the gateway's say."""
    [channel] = channels_of(stack, payer)
    made = deposits_of(stack, payer)
    assert [deposit["state"] in ("mined", "final") for deposit in made] == [True] * deposits
    assert FUNDS - balance_of(stack.rpc_url, token, payer.address) == sum(int(deposit["value"]) for deposit in made)
    receipts = agent.receipts(limit=1000)
    assert {receipt.paid_with for receipt in receipts} == {"batch-settlement"}
    charged = {receipt.id: usd_to_nano(receipt.charged_usd or "0") for receipt in receipts}
    assert len(charged) == requests
    with httpx.Client(base_url=stack.gateway_url) as http:
        for receipt_id, amount in charged.items():
            told = http.get(f"/v1/receipts/{receipt_id}").json()
            assert (told["tender"], usd_to_nano(told["charged_usd"])) == ("channel", amount)
    assert channel["charged_nano_usd"] == sum(charged.values())
    [known] = [each for each in agent.wallet.channels() if usd_to_nano(each.charged_usd)]
    assert usd_to_nano(known.charged_usd) == channel["charged_nano_usd"]
    assert known.under_way_usd == "0.00"
    assert int(channel["voucher"]) * 1000 == usd_to_nano(known.claimable_usd)


def test_twenty_requests_from_threads_eight_in_flight(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    agent = make_agent()
    with agent.openai() as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> str:
            answer = client.chat.completions.create(**question(number))
            if not number % 2:
                return answer.choices[0].message.content or ""
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)

        answers = list(pool.map(ask, range(20)))
    assert all("sky" in answer for answer in answers)
    assert len(simulator.attempts()) == 20
    assert_in_step(stack, agent, payer, requests=20)
    assert FUNDS - balance_of(stack.rpc_url, USDC, payer.address) == DEPOSIT


async def test_twenty_requests_of_asyncio_eight_in_flight_in_usdt(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    agent = make_agent(policy=SpendingPolicy(schemes=("batch-settlement",), tokens=["USDT"]), rpc_url=stack.rpc_url)
    places = asyncio.Semaphore(8)
    async with agent.async_openai() as client:

        async def ask(number: int) -> str:
            async with places:
                answer = await client.chat.completions.create(**question(number))
                if not number % 2:
                    return answer.choices[0].message.content or ""
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])

        answers = await asyncio.gather(*map(ask, range(20)))
    assert all("sky" in answer for answer in answers)
    assert len(simulator.attempts()) == 20
    assert_in_step(stack, agent, payer, requests=20, token=USDT)


PROCESS = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
from agents_sdk import Agent, SpendingPolicy
key, url, log, questions = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
policy = SpendingPolicy(schemes=("batch-settlement",), max_per_request="0.05")
with Agent(key, url, policy=policy, receipts=log, credit="never", backoff_s=0.05) as agent, agent.http_client() as http:
    agent.wallet.channels()
    import x402.mechanisms.evm.batch_settlement.client, x402.http.utils
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: http.post("/v1/chat/completions", json=body), questions))
    print(json.dumps([answer.status_code for answer in answers]), flush=True)
"""


def start(payer: LocalAccount, url: str, log: Path, questions: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """Another process with the same wallet and log; it waits for a line before it asks."""
    arguments = ["0x" + payer.key.hex().removeprefix("0x"), url, str(log), json.dumps(questions)]
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def go(process: subprocess.Popen[str]) -> None:
    """Let it ask, once it is ready: it imports the x402 package, which takes its time."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_on_one_log_share_one_channel(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator, tmp_path: Path
) -> None:
    agent = make_agent()
    halves = [[question(number) for number in range(start, 12, 2)] for start in (0, 1)]
    processes = [start(payer, stack.gateway_url, tmp_path / "agent.sqlite3", half) for half in halves]
    for process in processes:
        go(process)
    told = [process.communicate(timeout=60)[0] for process in processes]
    assert [json.loads(each) for each in told] == [[200] * 6] * 2
    assert len(simulator.attempts()) == 12
    assert_in_step(stack, agent, payer, requests=12)


@pytest.mark.parametrize("first", [True, False], ids=["deposit", "voucher"])
def test_a_process_killed_before_its_answer_is_resumed_with_the_same_payment(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator, tmp_path: Path, first: bool
) -> None:
    with FaultyProxy(stack.gateway_url) as proxy:
        agent = make_agent(proxy.url)
        if not first:
            assert ask(agent, 2).status_code == 200
        proxy.plan([Fault("silence", True)])
        process = start(payer, proxy.url, tmp_path / "agent.sqlite3", [question(0)])
        go(process)
        wait_until(lambda: proxy.payments, "the payment is sent")
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Another question is not kept waiting, and needs no second deposit.
        assert ask(agent, 4).status_code == 200
        assert ask(agent, 0).status_code == 200
    payments = [decoded(payment) for payment in proxy.payments]
    assert payments[2] == payments[0]
    assert len({json.dumps(payment["payload"].get("deposit")) for payment in payments} - {"null"}) == int(first)
    assert len(simulator.attempts()) == 2 + (not first)
    assert_in_step(stack, agent, payer, requests=2 + (not first))


FAULTS = [Fault(answer, forwarded) for answer in ("in_progress", 503, "reset") for forwarded in (False, True)]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_lost_answer_is_one_deposit_and_one_inference(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator, fault: Fault
) -> None:
    with FaultyProxy(stack.gateway_url) as proxy:
        agent = make_agent(proxy.url)
        for number in (0, 1):
            proxy.plan([fault])
            assert ask(agent, number).status_code == 200
            [payment] = set(proxy.payments)
            assert len(proxy.payments) >= 2
            assert decoded(payment)["payload"]["type"] == ("voucher" if number else "deposit")
        # A stream that is sent again does not tell what it cost: the next request finds out.
        assert ask(agent, 2).status_code == 200
    assert len(simulator.attempts()) == 3
    assert_in_step(stack, agent, payer, requests=3)


def test_a_stream_cut_on_its_way_counts_in_full_until_its_receipt_is_read(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    agent = make_agent()
    with (
        agent.http_client() as http,
        http.stream("POST", "/v1/chat/completions", json=question(1)) as response,
    ):
        next(response.iter_bytes())  # the caller has seen enough
    [channel] = agent.wallet.channels()
    assert channel.charged_usd == agent.receipts()[0].quoted_usd
    assert ask(agent, 2).status_code == 200
    [channel] = agent.wallet.channels()
    assert usd_to_nano(channel.charged_usd) == channels_of(stack, payer)[0]["charged_nano_usd"]


def test_a_channel_that_runs_low_is_filled_up_again(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    policy = SpendingPolicy(schemes=("batch-settlement",), channel_deposit="0.0002")
    agent = make_agent(policy=policy)
    for number in range(30):
        assert ask(agent, 2 * number).status_code == 200
    made = deposits_of(stack, payer)
    assert len(made) > 1
    assert int(made[0]["value"]) == 200
    assert all(0 < int(deposit["value"]) <= 200 for deposit in made)
    assert_in_step(stack, agent, payer, requests=30, deposits=len(made))
    [channel] = agent.wallet.channels()
    assert usd_to_nano(channel.unspent_usd) <= usd_to_nano("0.0002")


def test_what_is_too_dear_for_a_channel_is_paid_by_exact_if_that_is_allowed(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    low = SpendingPolicy(schemes=("batch-settlement",), channel_deposit="0.00001")
    with pytest.raises(LimitExceeded, match=r"0\.00001 USD allowed per channel_deposit"):
        ask(make_agent(policy=low))
    both = SpendingPolicy(schemes=("batch-settlement", "exact"), channel_deposit="0.00001")
    agent = make_agent(policy=both)
    assert ask(agent).status_code == 200
    assert [receipt.paid_with for receipt in agent.receipts()] == ["exact"]
    assert deposits_of(stack, payer) == []


def test_a_deposit_counts_against_the_limits_and_so_does_what_is_spent_of_it(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    with pytest.raises(
        LimitExceeded, match=r"the deposit of the payment channel is 1\.00 USD, more than the 0\.50 USD"
    ):
        ask(make_agent(policy=SpendingPolicy(schemes=("batch-settlement",), max_per_day="0.5")))
    assert deposits_of(stack, payer) == []
    agent = make_agent(policy=SpendingPolicy(schemes=("batch-settlement",), max_per_day="1"))
    assert ask(agent).status_code == 200
    quoted = usd_to_nano(agent.receipts()[0].quoted_usd or "")
    assert usd_to_nano(agent.spent()) == quoted
    tight = SpendingPolicy(schemes=("batch-settlement",), max_per_hour=agent.spent(), max_per_day="1")
    with pytest.raises(LimitExceeded, match="per hour"):
        ask(make_agent(policy=tight), 2)
    assert len(simulator.attempts()) == 1


def test_what_is_left_in_a_channel_comes_back_and_the_channel_can_be_used_again(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    agent = make_agent()
    for number in range(3):
        assert ask(agent, number).status_code == 200
    before = balance_of(stack.rpc_url, USDC, payer.address)
    part = agent.wallet.refund_channel(usd="0.25")
    assert (part.refunded_usd, part.asset) == ("0.25", "eip155:84532/USDC")
    assert balance_of(stack.rpc_url, USDC, payer.address) - before == 250_000
    rest = agent.wallet.refund_channel()
    assert rest.transaction is not None
    [channel] = agent.wallet.channels()
    assert channel.unspent_usd == "0.00"
    assert balance_of(stack.rpc_url, USDC, payer.address) == FUNDS - -(-usd_to_nano(channel.charged_usd) // 1000)
    with pytest.raises(RequestRefused, match="nothing in this channel"):
        agent.wallet.refund_channel(channel.id)
    assert ask(agent, 4).status_code == 200
    assert len(deposits_of(stack, payer)) == 2


def test_a_gateway_that_has_moved_gives_back_what_is_left(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    with FaultyProxy(stack.gateway_url) as proxy:
        before = make_agent(proxy.url)
        assert ask(before).status_code == 200
        [known] = make_agent().wallet.channels()
        assert known.gateway == proxy.url
    agent = make_agent()
    assert ask(agent, 1).status_code == 200
    assert_in_step(stack, agent, payer, requests=2)
    refund = agent.wallet.refund_channel()
    assert refund.channel == known.id
    assert refund.transaction is not None
    [channel] = agent.wallet.channels()
    assert (channel.unspent_usd, channel.gateway) == ("0.00", stack.gateway_url)


def test_a_channel_is_filled_up_to_what_is_asked_for(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    agent = make_agent()
    agent.wallet.open_channel("0.5")
    opened = agent.wallet.open_channel("2", asset="eip155:84532/USDC")
    assert usd_to_nano("1.999") < usd_to_nano(opened.unspent_usd) <= usd_to_nano("2")
    assert agent.wallet.open_channel("2") == opened, "there is enough: nothing is asked"
    assert len(simulator.attempts()) == 2
    assert_in_step(stack, agent, payer, requests=2, deposits=2)


def test_a_refund_of_more_than_there_is_says_what_is_left(stack: Stack, make_agent: MakeAgent) -> None:
    agent = make_agent()
    left = agent.wallet.open_channel("0.5").unspent_usd
    with pytest.raises(RequestRefused, match=f"5.00 USD are asked for, and {left} USD are left in the channel"):
        agent.wallet.refund_channel(usd="5")


def test_a_refund_whose_answer_is_lost_is_found_to_be_done(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator
) -> None:
    with FaultyProxy(stack.gateway_url) as proxy:
        agent = make_agent(proxy.url)
        assert ask(agent).status_code == 200
        proxy.plan([Fault("reset", True)])
        refund = agent.wallet.refund_channel()
    [channel] = agent.wallet.channels()
    assert usd_to_nano(refund.refunded_usd) // 1000 == DEPOSIT - -(-usd_to_nano(channel.charged_usd) // 1000)
    assert balance_of(stack.rpc_url, USDC, payer.address) == FUNDS - -(-usd_to_nano(channel.charged_usd) // 1000)


def test_an_agent_that_lost_its_log_finds_its_channel_again(
    stack: Stack, make_agent: MakeAgent, payer: LocalAccount, simulator: Simulator, tmp_path: Path
) -> None:
    first = make_agent()
    for number in range(3):
        assert ask(first, number).status_code == 200
    second = make_agent(receipts=tmp_path / "new.sqlite3")
    for number in range(3):
        assert ask(second, number).status_code == 200
    assert len(deposits_of(stack, payer)) == 1
    [channel] = second.wallet.channels()
    assert channel.deposited_usd == "1.00"
    told = channels_of(stack, payer)[0]["charged_nano_usd"]
    assert 0 <= usd_to_nano(channel.charged_usd) - told < usd_to_nano("0.0002"), "but for the first voucher's rest"
