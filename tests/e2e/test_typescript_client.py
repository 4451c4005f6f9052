"""The official TypeScript client, `@x402/fetch`, pays unchanged: a Node process per case, nothing in it made for Farebox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import sse_text
from tests.e2e.conftest import QUESTION

SCRIPT = Path(__file__).parent / "typescript" / "pay.mjs"


@contextmanager
def node(
    stack: Stack, wallet: LocalAccount, body: dict[str, Any], **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The script at work; its output is there as it prints it."""
    program = shutil.which("node")
    assert program is not None, "these tests need Node.js 20 or newer on PATH"
    process = subprocess.Popen(
        [program, str(SCRIPT)],
        env=os.environ
        | {
            "WALLET_KEY": "0x" + wallet.key.hex().removeprefix("0x"),
            "URL": f"{stack.gateway_url}/v1/chat/completions",
            "BODY": json.dumps(body),
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def next_event(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that the script prints; what it says on standard error if there is none."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    event: dict[str, Any] = json.loads(line)
    return event


@pytest.fixture
def paid_once(stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator) -> Any:
    """Checks what the client got back against the chain, the receipt and the providers' log."""
    before = balance_of(stack.rpc_url, USDC, wallet.address)

    def check(end: dict[str, Any]) -> None:
        assert end["statuses"] == [402, 200]
        paid = end["paymentResponse"]
        assert paid["success"] is True
        assert paid["network"] == stack.network
        assert paid["payer"].lower() == wallet.address.lower()
        receipt = http.get(f"/v1/receipts/{end['headers']['x-farebox-receipt']}").json()
        assert receipt["state"] == "captured"
        assert receipt["transaction"]["hash"] == paid["transaction"]
        assert before - balance_of(stack.rpc_url, USDC, wallet.address) == round(float(receipt["quoted_usd"]) * 10**6)
        assert len(simulator.attempts()) == 1

    return check


def test_it_pays_usdc(stack: Stack, wallet: LocalAccount, paid_once: Any) -> None:
    with node(stack, wallet, QUESTION) as process:
        end = next_event(process)
    answer = json.loads(end["text"])
    assert answer["model"] == end["headers"]["x-farebox-model"] == QUESTION["model"]
    assert "sky" in answer["choices"][0]["message"]["content"]
    paid_once(end)


def test_it_gets_a_stream_as_it_is_made(
    stack: Stack, wallet: LocalAccount, simulator: Simulator, paid_once: Any
) -> None:
    simulator.configure(QUESTION["model"], tokens_per_second=15)
    with node(stack, wallet, QUESTION | {"stream": True}) as process:
        assert next_event(process) == {"event": "answer", "status": 200}
        first = next_event(process)
        # The provider is still at it when the client has the first text.
        [attempt] = simulator.attempts()
        assert attempt["outcome"] == "under_way"
        assert '"content"' in first["text"]
        event = first
        while event["event"] != "end":
            event = next_event(process)
    assert event["chunks"] > 5
    lines = [line for line in event["text"].splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    receipt = json.loads(lines[-2].removeprefix(": farebox-receipt "))
    assert receipt["id"] == event["headers"]["x-farebox-receipt"]
    assert receipt["transaction"] == event["paymentResponse"]["transaction"]
    assert "sky" in sse_text(event["text"])
    paid_once(event)


def test_a_wallet_without_money_is_told_and_nothing_happens(stack: Stack, simulator: Simulator) -> None:
    with node(stack, Account.create(), QUESTION) as process:
        end = next_event(process)
    assert end["statuses"] == [402, 402]
    assert "insufficient_funds" in end["text"]
    assert end["paymentResponse"] is None
    assert simulator.attempts() == []
