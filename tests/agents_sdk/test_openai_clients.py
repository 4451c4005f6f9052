"""The stock OpenAI SDK over the paying transport: whatever goes wrong, one payment for one question."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from agents_sdk import Agent
from tests.agents_sdk.conftest import ADDRESS, MakeAgent
from tests.agents_sdk.fake_gateway import FakeGateway

ANSWER = "Light scatters."
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Why is the sky blue?"}]
SHORT = httpx.Timeout(0.4, connect=5)


def ask_sync(agent: Agent, stream: bool, timeout: httpx.Timeout | None = None) -> str:
    with agent.openai(timeout=timeout) if timeout else agent.openai() as client:
        if not stream:
            completion = client.chat.completions.create(model="auto", messages=MESSAGES)
            return completion.choices[0].message.content or ""
        chunks = client.chat.completions.create(model="auto", messages=MESSAGES, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def ask_async(agent: Agent, stream: bool, timeout: httpx.Timeout | None = None) -> str:
    async with agent.async_openai(timeout=timeout) if timeout else agent.async_openai() as client:
        if not stream:
            completion = await client.chat.completions.create(model="auto", messages=MESSAGES)
            return completion.choices[0].message.content or ""
        chunks = await client.chat.completions.create(model="auto", messages=MESSAGES, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Asks with either client; the asynchronous one in a loop of its own."""
    if request.param == "sync":
        return ask_sync

    def run(agent: Agent, stream: bool, timeout: httpx.Timeout | None = None) -> str:
        import asyncio

        return asyncio.run(ask_async(agent, stream, timeout))

    return run


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script",
    [
        [],
        ["500"],
        ["503", "500"],
        ["in_progress", "in_progress"],
        ["reset"],
        ["taken_then_reset"],
        ["202"],
        ["500", "202", "in_progress"],
    ],
    ids=lambda script: "-".join(script) or "fine",
)
def test_one_question_is_paid_once(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str], script: list[str], stream: bool
) -> None:
    gateway.script = list(script)
    assert ask(agent, stream) == ANSWER
    assert len(gateway.nonces) == 1
    assert len(gateway.seen) == len(script) + 1
    assert gateway.taken == {gateway.seen[0]: ADDRESS}
    [receipt] = agent.receipts()
    assert (receipt.charged_usd, receipt.credited_usd, receipt.model) == ("0.000113", "0.000387", "sim-fast")
    assert receipt.transaction is not None
    assert agent.spent() == "0.0005"


def test_a_time_out_sends_the_same_payment_again(gateway: FakeGateway, agent: Agent, ask: Callable[..., str]) -> None:
    gateway.script = ["hang"]
    assert ask(agent, False, SHORT) == ANSWER
    assert len(gateway.seen) == 2
    assert len(gateway.nonces) == 1


def test_the_sdks_own_retry_after_lost_answers_uses_the_same_payment(
    gateway: FakeGateway, make_agent: MakeAgent, ask: Callable[..., str]
) -> None:
    agent = make_agent(tries_max=1)
    gateway.script = ["taken_then_reset", "hang"]
    assert ask(agent, False, SHORT) == ANSWER
    assert len(gateway.seen) == 3
    assert len(gateway.nonces) == 1


def test_when_tries_are_used_up_the_last_answer_stops_the_sdk_from_retrying(
    gateway: FakeGateway, make_agent: MakeAgent, ask: Callable[..., str]
) -> None:
    agent = make_agent(tries_max=2)
    gateway.script = ["500"] * 10
    with pytest.raises(openai.InternalServerError):
        ask(agent, False)
    assert len(gateway.seen) == 2
    assert len(gateway.nonces) == 1


def test_a_payment_still_settling_when_patience_ends_is_an_error_that_names_its_receipt(
    gateway: FakeGateway, make_agent: MakeAgent, ask: Callable[..., str]
) -> None:
    agent = make_agent(patience_s=0)
    gateway.script = ["202"]
    with pytest.raises(openai.InternalServerError) as caught:
        ask(agent, False)
    assert caught.value.status_code == 504
    assert caught.value.code == "payment_pending"
    assert "rcpt_slow" in str(caught.value.body)
    assert ask(agent, False) == ANSWER
    assert len(gateway.nonces) == 1


def test_all_providers_failing_is_told_once_and_its_credit_noted(
    gateway: FakeGateway, make_agent: MakeAgent, ask: Callable[..., str]
) -> None:
    agent = make_agent(credit="known")
    gateway.script = ["failed"]
    with pytest.raises(openai.InternalServerError, match="all_candidates_failed"):
        ask(agent, False)
    assert len(gateway.seen) == 1
    assert ask(agent, False) == ANSWER
    assert gateway.on_credit == 1
    assert len(gateway.seen) == 1


def test_an_expired_quote_is_paid_anew_once(gateway: FakeGateway, agent: Agent, ask: Callable[..., str]) -> None:
    gateway.script = ["402 quote_expired: the quote has expired"]
    assert ask(agent, False) == ANSWER
    assert len(gateway.taken) == 1
    assert len(gateway.nonces) == 2


def test_a_gateway_that_refuses_every_payment_gets_two_signatures_at_most(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str]
) -> None:
    gateway.script = ["402 quote_expired: again"] * 9
    with pytest.raises(openai.APIStatusError) as caught:
        ask(agent, False)
    assert caught.value.status_code == 402
    assert len(gateway.nonces) == 2
    # A refusal is the gateway's word: until they expire, both signatures could still be used.
    assert agent.spent() == "0.001"


def test_a_payment_refused_for_good_is_not_signed_again(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str]
) -> None:
    gateway.script = ["402 bad_signature: no"]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(agent, False)
    assert caught.value.response.json()["error"] == "bad_signature: no"
    assert len(gateway.seen) == 1


def test_a_lost_answer_followed_by_an_expired_quote_is_not_paid_again(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str]
) -> None:
    gateway.script = ["taken_then_reset", "402 quote_expired: too late"]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(agent, False)
    assert caught.value.status_code == 402
    assert len(gateway.nonces) == 1


def test_the_same_question_asked_twice_is_two_payments(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str]
) -> None:
    assert ask(agent, True) == ask(agent, True) == ANSWER
    assert len(gateway.taken) == 2


def test_a_used_payment_is_reported_once_and_then_forgotten(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str]
) -> None:
    gateway.script = ["taken_then_reset", "used"]
    with pytest.raises(openai.ConflictError, match="payment_already_used"):
        ask(agent, False)
    assert len(gateway.nonces) == 1
    assert ask(agent, False) == ANSWER
    assert len(gateway.nonces) == 2


def test_the_sdks_placeholder_key_is_not_sent(gateway: FakeGateway, agent: Agent, ask: Callable[..., str]) -> None:
    ask(agent, False)
    assert set(gateway.authorizations) == {None}


def test_a_stream_reaches_the_caller_as_it_arrives(gateway: FakeGateway, agent: Agent) -> None:
    gateway.script = ["gated"]
    with agent.openai() as client:
        chunks = client.chat.completions.create(model="auto", messages=MESSAGES, stream=True)
        first = next(iter(chunks))
        assert first.choices[0].delta.content == "Light "
        gateway.released.set()  # only now does the gateway go on
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "scatters."
    assert agent.receipts()[0].charged_usd == "0.000113"


async def test_an_asynchronous_stream_reaches_the_caller_as_it_arrives(gateway: FakeGateway, agent: Agent) -> None:
    gateway.script = ["gated"]
    async with agent.async_openai() as client:
        chunks = await client.chat.completions.create(model="auto", messages=MESSAGES, stream=True)
        first = await anext(aiter(chunks))
        assert first.choices[0].delta.content == "Light "
        gateway.released.set()
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "scatters."
    assert agent.receipts()[0].charged_usd == "0.000113"


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_stream_is_an_error_and_asking_again_uses_the_same_payment(
    gateway: FakeGateway, agent: Agent, ask: Callable[..., str], stream: bool
) -> None:
    gateway.script = ["cut"]
    if stream:
        with pytest.raises(openai.APIConnectionError):
            ask(agent, True)
        assert agent.receipts() == []
    assert ask(agent, stream) == ANSWER
    assert len(gateway.nonces) == 1
