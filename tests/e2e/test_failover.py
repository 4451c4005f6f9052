"""Providers fail; the caller notices nothing, or is told and gets the money back."""

from __future__ import annotations

import time
from typing import Any

import httpx
import orjson
import pytest
from eth_account.signers.local import LocalAccount

from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, ask_and_sign, available, sign_in
from tests.e2e.conftest import QUESTION

TWO_PROVIDERS = QUESTION | {"model": "gpt-5.4"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_provider_is_passed_over(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator, stream: bool
) -> None:
    body = TWO_PROVIDERS | {"stream": stream}
    route = http.post("/v1/quote", json=body).json()["quote"]["route"]
    assert len(route) == 2
    fail_provider(simulator, http, body, status=503)
    answer = ask(http, body, ask_and_sign(http, wallet, body))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farebox-attempts"] == "2"
    assert answer.headers["x-farebox-provider"] == route[1]["provider"]
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    assert [attempt["status"] for attempt in receipt["attempts"]] == ["failed", "ok"]


def fail_provider(simulator: Simulator, http: httpx.Client, body: dict[str, Any], status: int) -> None:
    """Make the first provider of the route fail: providers are told apart by the upstream model's name."""
    simulator.configure("gpt-5.4", status=status)


def test_when_all_providers_fail_the_payer_is_credited_and_can_spend_the_credit(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    session = sign_in(http, wallet)
    before = float(available(http, session)["USDC"])
    headers = ask_and_sign(http, wallet, QUESTION)
    simulator.configure("deepseek-v4-flash", status=500)
    simulator.configure("qwen3.7-flash", status=500)
    answer = ask(http, QUESTION, headers)
    assert answer.status_code == 502, answer.text
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["code"] == "all_candidates_failed"
    assert "credited" in error["message"]
    credited = float(error["farebox"]["receipt"]["credited_usd"])
    assert credited > 0
    assert float(available(http, session)["USDC"]) == pytest.approx(before + credited, abs=1e-12)
    simulator.reset_behaviours()
    wait_for_breakers(http)
    spent = ask(http, QUESTION, session)
    assert spent.status_code == 200, spent.text
    assert float(available(http, session)["USDC"]) < before + credited


def wait_for_breakers(http: httpx.Client) -> None:
    """Until a breaker lets a probe through, at most some seconds."""
    for _ in range(100):
        if http.post("/v1/quote", json=QUESTION).status_code == 200:
            return
        time.sleep(0.1)


def test_a_stream_that_is_cut_ends_with_a_typed_error_and_costs_what_was_delivered(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    body = QUESTION | {"stream": True}
    headers = ask_and_sign(http, wallet, body)
    simulator.configure("deepseek-v4-flash", cut_after_tokens=5)
    answer = ask(http, body, headers)
    assert answer.status_code == 200
    frames = [frame for frame in answer.text.split("\n\n") if frame]
    assert "data: [DONE]" not in frames
    error = next(frame for frame in frames if '"error"' in frame)
    assert orjson.loads(error.removeprefix("data: "))["error"]["code"]
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    assert receipt["state"] == "captured"
    assert 0 < float(receipt["charged_usd"]) < float(receipt["quoted_usd"])


def test_a_caller_that_hangs_up_pays_for_what_was_delivered(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    body = QUESTION | {"stream": True, "max_tokens": 1000}
    headers = ask_and_sign(http, wallet, body) | JSON
    simulator.configure("deepseek-v4-flash", tokens_per_second=50, output_tokens=500)
    with http.stream("POST", "/v1/chat/completions", content=orjson.dumps(body), headers=headers) as answer:
        receipt_id = answer.headers["x-farebox-receipt"]
        for number, _ in enumerate(answer.iter_lines()):
            if number > 10:
                break
    receipt = settled_receipt(http, receipt_id)
    assert receipt["state"] == "captured"
    assert 0 < float(receipt["charged_usd"]) < float(receipt["quoted_usd"]) / 2
    assert simulator.attempts()[0]["outcome"] == "disconnected"


def settled_receipt(http: httpx.Client, receipt_id: str) -> dict[str, Any]:
    for _ in range(100):
        receipt: dict[str, Any] = http.get(f"/v1/receipts/{receipt_id}").json()
        if receipt["state"] != "open":
            return receipt
        time.sleep(0.05)
    raise AssertionError(f"{receipt_id} stays open")
