"""One payment is one inference and one transfer, however often and however concurrently it is sent."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import orjson
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, ask_and_sign, decoded, encoded, sign
from tests.e2e.conftest import QUESTION

AT_ONCE = 50


async def test_fifty_copies_at_once_are_one_inference_and_one_transfer(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    headers = ask_and_sign(http, wallet, QUESTION) | JSON
    async with httpx.AsyncClient(
        base_url=stack.gateway_url, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE)
    ) as many:
        answers = await asyncio.gather(
            *(
                many.post("/v1/chat/completions", content=orjson.dumps(QUESTION), headers=headers)
                for _ in range(AT_ONCE)
            )
        )
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 409}, statuses
    assert statuses[200] >= 1
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert len({answer.headers["x-farebox-receipt"] for answer in answers}) == 1
    assert all(answer.headers["x-should-retry"] == "false" for answer in answers)
    assert len(simulator.attempts()) == 1
    amount = int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == amount


def test_the_same_payment_again_gets_the_same_answer(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    headers = ask_and_sign(http, wallet, QUESTION)
    first = ask(http, QUESTION, headers)
    again = ask(http, QUESTION, headers)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers["x-farebox-replayed"] == "true"
    assert again.headers["payment-response"] == first.headers["payment-response"]
    assert len(simulator.attempts()) == 1


def test_a_stream_sent_again_is_the_same_stream(http: httpx.Client, wallet: LocalAccount, simulator: Simulator) -> None:
    body = QUESTION | {"stream": True}
    headers = ask_and_sign(http, wallet, body)
    first = ask(http, body, headers).text.split("\n\n")
    again = ask(http, body, headers).text.split("\n\n")
    assert [frame for frame in first if not frame.startswith(":")] == [
        frame for frame in again if not frame.startswith(":")
    ]
    assert len(simulator.attempts()) == 1


def test_the_same_nonce_with_another_payload_is_409(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    headers = ask_and_sign(http, wallet, QUESTION)
    assert ask(http, QUESTION, headers).status_code == 200
    payment = decoded(headers["PAYMENT-SIGNATURE"])
    payment["resource"] = None
    answer = ask(http, QUESTION, {"PAYMENT-SIGNATURE": encoded(payment)})
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["code"] == "authorization_reused"
    assert len(simulator.attempts()) == 1


def test_the_same_nonce_for_another_request_is_409(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    """The other request's own valid quote is put beside the used authorization: same amount, other words."""
    other = QUESTION | {"messages": [{"role": "user", "content": "Why is the sea blue?"}]}
    headers = ask_and_sign(http, wallet, QUESTION)
    assert ask(http, QUESTION, headers).status_code == 200
    mixed = decoded(sign(wallet, ask(http, other))["PAYMENT-SIGNATURE"])
    mixed["payload"] = decoded(headers["PAYMENT-SIGNATURE"])["payload"]
    answer = ask(http, other, {"PAYMENT-SIGNATURE": encoded(mixed)})
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["code"] == "authorization_reused"
    assert len(simulator.attempts()) == 1
