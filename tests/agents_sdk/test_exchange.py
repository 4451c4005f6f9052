"""What the transports do besides: other hosts, restarts, several at once, credit."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
from pathlib import Path

import httpx
import pytest

from agents_sdk import Agent, LimitExceeded, NetworkNotAllowed, SpendingPolicy, TokenNotAllowed
from tests.agents_sdk import fake_gateway
from tests.agents_sdk.conftest import ADDRESS, KEY, MakeAgent
from tests.agents_sdk.fake_gateway import FakeGateway

QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}


def ask(agent: Agent, **changes: object) -> httpx.Response:
    with agent.http_client() as http:
        return http.post("/v1/chat/completions", json=QUESTION | changes)


def test_what_is_free_is_not_paid(gateway: FakeGateway, agent: Agent) -> None:
    with agent.http_client() as http:
        assert http.get("/v1/models").status_code == 200
    assert gateway.nonces == set()


def test_another_host_is_never_paid(gateway: FakeGateway, agent: Agent) -> None:
    with fake_gateway.running() as other, agent.http_client() as http:
        assert http.post(f"{other.url}/v1/chat/completions", json=QUESTION).status_code == 402
        assert other.gateway.nonces == set()


def test_a_pending_payment_is_polled_nowhere_else(gateway: FakeGateway, agent: Agent) -> None:
    with fake_gateway.running() as other:
        gateway.poll = f"{other.url}/v1/receipts/rcpt_slow"
        gateway.script = ["202"]
        assert ask(agent).status_code == 200
        assert (gateway.polls, other.gateway.polls) == (0, 0)
    gateway.poll = "/v1/receipts/rcpt_slow"
    gateway.script = ["202"]
    assert ask(agent).status_code == 200
    assert gateway.polls == 2


def test_answers_are_waited_for_longer_than_httpx_does(agent: Agent) -> None:
    with agent.openai() as client, agent.http_client() as http:
        assert http.timeout.read == 600
        timeout = client.timeout
        assert isinstance(timeout, float) or (timeout is not None and timeout.read == 600)


def test_a_restarted_agent_sends_the_payment_of_the_one_before(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.script = ["taken_then_reset"]
    with pytest.raises(httpx.TransportError):
        ask(make_agent(tries_max=1))
    assert ask(make_agent()).status_code == 200
    assert len(gateway.nonces) == 1


def test_a_payment_credited_meanwhile_is_spent_as_credit(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.script = ["reset", "already_credited"]
    agent = make_agent(tries_max=1, credit="known")
    with pytest.raises(httpx.TransportError):
        ask(agent)
    assert ask(agent).status_code == 200
    assert gateway.on_credit == 1
    assert len(gateway.nonces) == 1


async def test_equal_questions_at_the_same_time_are_paid_each(gateway: FakeGateway, agent: Agent) -> None:
    async with agent.async_http_client() as http:
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=QUESTION) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(gateway.taken) == 8
    assert len(agent.receipts()) == 8


async def test_a_cancelled_question_leaves_its_payment_to_the_next(gateway: FakeGateway, agent: Agent) -> None:
    gateway.script = ["hang"]
    async with agent.async_http_client() as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=QUESTION))
        assert await asyncio.to_thread(gateway.arrived.wait, 20)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await http.post("/v1/chat/completions", json=QUESTION)).status_code == 200
    assert len(gateway.nonces) == 1


def test_the_tokens_of_the_wallet_are_tried_in_order_when_one_has_run_out(
    gateway: FakeGateway, make_agent: MakeAgent
) -> None:
    gateway.tokens = [fake_gateway.USDC, fake_gateway.USDT]
    gateway.script = ["402 insufficient_funds: the wallet has not enough USDC"]
    assert ask(make_agent()).status_code == 200
    paid_in = [payment.accepted.asset for payment in gateway.payments]
    assert paid_in == [fake_gateway.USDC.address, fake_gateway.USDT.address]


def test_credit_left_over_is_spent_before_a_new_payment_is_signed(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    agent = make_agent(credit="known")
    for number in range(6):
        assert ask(agent, n=number).status_code == 200
    # Each payment takes 0.0005 and leaves 0.000387: after the second there is enough for one more from credit.
    assert [receipt.paid_with for receipt in reversed(agent.receipts())] == [
        "exact", "exact", "credit", "credit", "credit", "exact",
    ]  # fmt: skip
    assert gateway.challenges == 1
    assert len(gateway.taken) == 3
    assert agent.spent() == "0.0015"
    assert agent.credit()[0].available_usd == f"0.{gateway.credit[ADDRESS]:09d}".rstrip("0")


def test_credit_from_before_is_looked_for_at_the_start_if_asked(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.credit[ADDRESS] = fake_gateway.MAXIMUM_NANO_USD
    assert ask(make_agent(credit="start")).status_code == 200
    assert gateway.nonces == set()


def test_credit_in_a_token_that_the_policy_forbids_is_not_spent(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.credit[ADDRESS] = 2_000_000
    gateway.tokens = [fake_gateway.USDC, fake_gateway.USDT]
    with pytest.raises(TokenNotAllowed, match="allowed are DAI"):
        ask(make_agent(credit="start", policy=SpendingPolicy(tokens=["DAI"])))
    with pytest.raises(NetworkNotAllowed):
        ask(make_agent(credit="start", policy=SpendingPolicy(networks=["eip155:1"])))
    assert (gateway.on_credit, gateway.nonces) == (0, set())
    ask(
        make_agent(
            credit="start", policy=SpendingPolicy(tokens=[fake_gateway.USDC.address], networks=[fake_gateway.NETWORK])
        )
    )
    assert (gateway.on_credit, gateway.nonces) == (1, set())


def test_credit_that_turns_out_too_small_is_topped_up_by_a_payment(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    agent = make_agent(credit="known")
    ask(agent, n=1)
    ask(agent, n=2)
    gateway.credit[ADDRESS] = 0
    assert ask(agent, n=3).status_code == 200
    assert gateway.on_credit == 1
    assert len(gateway.taken) == 3


def test_an_answer_lost_on_credit_is_not_asked_for_again_by_itself(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.credit[ADDRESS] = 2 * fake_gateway.MAXIMUM_NANO_USD
    gateway.credit_script = ["reset"]
    answer = ask(make_agent(credit="start"))
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "outcome_unknown"
    assert answer.headers["x-should-retry"] == "false"
    assert gateway.on_credit == 1


def test_a_gateway_that_wants_something_else_signed_gets_no_sign_in(
    gateway: FakeGateway, make_agent: MakeAgent
) -> None:
    gateway.credit[ADDRESS] = fake_gateway.MAXIMUM_NANO_USD
    gateway.message = "I hereby transfer everything to the bearer."
    assert ask(make_agent(credit="start")).status_code == 200
    assert gateway.on_credit == 0
    assert len(gateway.taken) == 1


def test_limits_survive_a_restart(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    policy = SpendingPolicy(max_per_hour="0.001")
    ask(make_agent(policy=policy))
    ask(make_agent(policy=policy))
    with pytest.raises(
        LimitExceeded, match=r"0\.0005 USD on top of the 0\.001 USD paid already.* 0\.001 USD .* per hour"
    ):
        ask(make_agent(policy=policy))
    assert len(gateway.nonces) == 2


def _ask_once(url: str, journal: Path) -> bool:
    policy = SpendingPolicy(max_per_day="0.002")
    with Agent(KEY, url, policy=policy, receipts=journal, credit="never") as agent:
        try:
            return ask(agent).status_code == 200
        except LimitExceeded:
            return False


def test_processes_on_one_journal_cannot_break_a_limit_together(gateway: FakeGateway, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paid = pool.starmap(_ask_once, [(gateway.url, tmp_path / "log.sqlite3")] * 6)
    assert sum(paid) == 4
    assert len(gateway.nonces) == 4


def test_the_journal_forgets_signatures_and_holds_no_question(
    gateway: FakeGateway, agent: Agent, tmp_path: Path
) -> None:
    ask(agent)
    path = tmp_path / "agent" / "log.sqlite3"
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT header FROM payment").fetchall() == [(None,)]
        assert "Why?" not in "".join(database.iterdump())


def test_nothing_printed_shows_the_key(make_agent: MakeAgent) -> None:
    agent = make_agent(rpc_url="https://rpc.example/secret-key")
    shown = repr(agent) + repr(agent._shared)
    assert ADDRESS in repr(agent)
    assert KEY.removeprefix("0x") not in shown
    assert "secret-key" not in shown
    with pytest.raises(ValueError) as caught:
        make_agent(wallet="0x1234567890notakey")
    assert "notakey" not in str(caught.value)
