"""A gateway that was stopped for so long that it was taken for dead: what it was working on is answered with what to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import orjson
from eth_account.signers.local import LocalAccount

from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.recovery import Recovered, put_right
from payments.store import Store, Transaction
from tests.e2e.clients import ask, ask_and_sign
from tests.e2e.conftest import QUESTION


def take_for_dead(stack: Stack) -> Recovered:
    """As another replica does with one that does not prove that it lives."""

    def unit(tx: Transaction) -> Recovered:
        tx.execute("DELETE FROM lease WHERE name LIKE 'instance:%'")
        return put_right(tx, alone=False)

    async def write() -> Recovered:
        store = Store(Path(stack.database_url.removeprefix("sqlite:///")))
        try:
            return await store.write(unit)
        finally:
            store.close()

    return asyncio.run(write())


def while_it_is_answered(simulator: Simulator, ask_once: Callable[[], httpx.Response], stack: Stack) -> httpx.Response:
    """Take the gateway for dead while an upstream answers."""
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(ask_once)
        deadline = time.monotonic() + 20
        while not simulator.under_way():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # The money has arrived and is held by now, or arrives while nobody works on the request.
        time.sleep(0.5)
        assert take_for_dead(stack) != Recovered(0, 0, 0, 0)
        return asking.result(30)


def test_an_answer_whose_request_was_given_up_is_not_shown_and_the_same_payment_gets_one(
    stack: Stack, simulator: Simulator, http: httpx.Client, wallet: LocalAccount
) -> None:
    question = QUESTION | {"messages": [{"role": "user", "content": "Interrupted, in whole"}]}
    payment = ask_and_sign(http, wallet, question)
    simulator.configure(QUESTION["model"], first_token_ms=2_000)
    answer = while_it_is_answered(simulator, lambda: ask(http, question, payment), stack)
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "request_interrupted"
    assert "same payment" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    simulator.reset_behaviours()
    again = ask(http, question, payment)
    assert again.status_code == 200, again.text
    assert again.headers["x-farebox-receipt"] == answer.headers["x-farebox-receipt"]
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    assert receipt["state"] == "captured"


def test_a_stream_whose_request_was_given_up_ends_with_an_error(
    stack: Stack, simulator: Simulator, http: httpx.Client, wallet: LocalAccount
) -> None:
    question = QUESTION | {"stream": True, "messages": [{"role": "user", "content": "Interrupted, in pieces"}]}
    payment = ask_and_sign(http, wallet, question)
    simulator.configure(QUESTION["model"], first_token_ms=1, tokens_per_second=8)
    answer = while_it_is_answered(simulator, lambda: ask(http, question, payment), stack)
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert "[DONE]" not in events
    assert orjson.loads(events[-1])["error"]["code"] == "request_interrupted"
    simulator.reset_behaviours()
    again = ask(http, question, payment)
    assert again.status_code == 200
    assert again.text.rstrip().endswith("[DONE]")


def test_a_key_s_request_that_was_given_up_is_charged_nothing(
    stack: Stack, simulator: Simulator, http: httpx.Client
) -> None:
    key = {"authorization": f"Bearer {stack.api_key}"}
    question = QUESTION | {"messages": [{"role": "user", "content": "Interrupted, with a key"}]}
    simulator.configure(QUESTION["model"], first_token_ms=2_000)
    answer = while_it_is_answered(simulator, lambda: ask(http, question, key), stack)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "request_interrupted"), answer.text
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    assert (receipt["state"], receipt["charged_usd"]) == ("released", "0.00")
