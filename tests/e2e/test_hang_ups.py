"""A caller that hangs up before the first token pays what the provider bills for the input, by whatever it pays; no more."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from typing import Any

import httpx
import orjson
import pytest
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, approve_permit2, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, UPTO, ask, ask_and_sign, sign_upto
from tests.e2e.conftest import QUESTION

LONG = QUESTION | {"messages": [{"role": "user", "content": "Why is the sky blue? " * 50}], "max_tokens": 1_000}


def hang_up(http: httpx.Client, simulator: Simulator, headers: dict[str, str], body: dict[str, Any] = LONG) -> None:
    """Ask, and be gone as soon as the provider has the question."""
    asked = len(simulator.attempts())

    async def ask_and_go() -> None:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as impatient:
            request = impatient.post("/v1/chat/completions", content=orjson.dumps(body), headers=JSON | headers)
            asking = asyncio.ensure_future(request)
            async with asyncio.timeout(30):
                while len(await asyncio.to_thread(simulator.attempts)) == asked:
                    assert not asking.done(), asking.result().text
                    await asyncio.sleep(0.05)
            asking.cancel()

    asyncio.run(ask_and_go())
    assert len(simulator.attempts()) == asked + 1


def receipts_of(stack: Stack, tender: str) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(stack.database_url.removeprefix("sqlite:///"), timeout=10)) as database:
        database.row_factory = sqlite3.Row
        rows = database.execute("SELECT * FROM receipt WHERE tender = ? ORDER BY created_ms DESC", (tender,))
        return [dict(row) for row in rows.fetchall()]


def newest(stack: Stack, tender: str, *states: str) -> dict[str, Any]:
    """The newest receipt of a tender, once it is in one of `states`."""
    deadline = time.monotonic() + 20
    while (found := receipts_of(stack, tender)[0])["state"] not in states:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@pytest.fixture
def slow(simulator: Simulator) -> Simulator:
    simulator.configure(QUESTION["model"], first_token_ms=20_000)
    return simulator


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_by_exact_the_same_payment_gets_its_answer_and_pays_for_both(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, slow: Simulator, stream: bool
) -> None:
    body = LONG | {"stream": stream}
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    headers = ask_and_sign(http, wallet, body)
    hang_up(http, slow, headers, body)
    left = newest(stack, "exact", "interrupted")
    assert 0 < left["spent_nano_usd"] < left["quoted_nano_usd"]
    assert http.get(f"/v1/receipts/{left['id']}").json()["resumable"]
    slow.reset_behaviours()
    answer = ask(http, body, headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farebox-receipt"] == left["id"]
    paid = newest(stack, "exact", "captured")
    assert paid["spent_nano_usd"] == left["spent_nano_usd"]
    # The input of both (once by our own count, once by the provider's), the output of one.
    assert 1.5 * paid["spent_nano_usd"] < paid["charged_nano_usd"] < paid["quoted_nano_usd"]
    # Sent once more it is the same answer, and one transfer paid for it all.
    assert ask(http, body, headers).headers["x-farebox-replayed"] == "true"
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == paid["paid_nano_usd"] // 1000


def test_by_upto_the_input_is_settled_and_the_same_payment_gets_its_receipt(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, slow: Simulator
) -> None:
    approve_permit2(stack.rpc_url, USDC, wallet.key.hex())
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    headers = sign_upto(wallet, ask(http, LONG, UPTO))
    hang_up(http, slow, headers)
    paid = newest(stack, "upto", "captured")
    assert 0 < paid["charged_nano_usd"] < paid["quoted_nano_usd"]
    slow.reset_behaviours()
    again = ask(http, LONG, headers)
    assert (again.status_code, again.headers["x-farebox-receipt"]) == (409, paid["id"])
    deadline = time.monotonic() + 20
    while balance_of(stack.rpc_url, USDC, wallet.address) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == -(-paid["charged_nano_usd"] // 1000)


def test_a_key_pays_for_the_input_however_often_it_hangs_up(stack: Stack, http: httpx.Client, slow: Simulator) -> None:
    key = {"authorization": f"Bearer {stack.api_key}"}
    for _ in range(2):
        hang_up(http, slow, key)
    newest(stack, "account", "captured")
    first, second = receipts_of(stack, "account")[:2]
    assert first["charged_nano_usd"] == second["charged_nano_usd"] > 0
