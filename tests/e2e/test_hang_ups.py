"""A caller that hangs up before the first token pays what the provider bills for the input, by whatever it pays; no more."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Coroutine
from typing import Any

import httpx
import orjson
import pytest
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, approve_permit2, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests.e2e.agents import new_wallet
from tests.e2e.clients import JSON, UPTO, ask, ask_and_sign, available, sign, sign_in, sign_upto
from tests.e2e.conftest import QUESTION
from tests.e2e.test_channels import Payer, row

LONG = QUESTION | {"messages": [{"role": "user", "content": "Why is the sky blue? " * 50}], "max_tokens": 1_000}


def hang_up(http: httpx.Client, simulator: Simulator, headers: dict[str, str], body: dict[str, Any] = LONG) -> None:
    """Ask, and be gone as soon as the provider has the question."""

    async def ask_and_go() -> None:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60) as impatient:
            await go(
                simulator, impatient.post("/v1/chat/completions", content=orjson.dumps(body), headers=JSON | headers)
            )

    asyncio.run(ask_and_go())


async def go(simulator: Simulator, request: Coroutine[Any, Any, httpx.Response]) -> None:
    """Make a request, and be gone as soon as the provider has the question."""
    asked = len(await asyncio.to_thread(simulator.attempts))
    asking = asyncio.ensure_future(request)
    async with asyncio.timeout(30):
        while len(await asyncio.to_thread(simulator.attempts)) == asked:
            assert not asking.done(), asking.result().text
            await asyncio.sleep(0.05)
    asking.cancel()
    await asyncio.wait({asking})
    assert len(await asyncio.to_thread(simulator.attempts)) == asked + 1


def receipts_of(stack: Stack, tender: str, payer: str = "", state: str = "") -> list[dict[str, Any]]:
    """The receipts of a tender, newest first; of one payer and in one state, where that is said."""
    with contextlib.closing(sqlite3.connect(stack.database_url.removeprefix("sqlite:///"), timeout=10)) as database:
        database.row_factory = sqlite3.Row
        rows = database.execute(
            "SELECT * FROM receipt WHERE tender = ? AND ? IN (payer, '') AND ? IN (state, '') ORDER BY created_ms DESC",
            (tender, payer.lower(), state),
        )
        return [dict(row) for row in rows.fetchall()]


def newest(stack: Stack, tender: str, *states: str) -> dict[str, Any]:
    """The newest receipt of a tender, once it is in one of `states`."""
    deadline = time.monotonic() + 20
    while (found := receipts_of(stack, tender)[0])["state"] not in states:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@pytest.fixture
def wallet(stack: Stack) -> LocalAccount:
    return new_wallet(stack)


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


@pytest.mark.parametrize("opened", [False, True], ids=["with its deposit", "with a voucher"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_by_a_channel_the_input_is_charged_once_and_the_next_voucher_covers_it(
    stack: Stack, wallet: LocalAccount, simulator: Simulator, opened: bool, stream: bool
) -> None:
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    payer = Payer(stack, wallet)
    if opened:
        assert (await payer.ask(LONG)).status_code == 200
    simulator.configure(QUESTION["model"], first_token_ms=20_000)
    await go(simulator, payer.ask(LONG | {"stream": stream}))
    left = await asyncio.to_thread(newest, stack, "channel", "captured", "released")
    assert left["state"] == "captured"
    assert 0 < left["charged_nano_usd"] < left["quoted_nano_usd"] // 2
    charged = row(stack, wallet.address)["charged_nano_usd"]
    # The same voucher buys nothing more, and costs nothing more.
    simulator.reset_behaviours()
    gone = payer.sent[-1]
    async with httpx.AsyncClient(timeout=30) as http:
        again = await http.post(str(gone.url), content=gone.content, headers=gone.headers)
    assert (again.status_code, again.headers["x-farebox-receipt"]) == (409, left["id"]), again.text
    assert row(stack, wallet.address)["charged_nano_usd"] == charged
    # The client was told of nothing; it is put right, and goes on.
    assert (await payer.ask(LONG)).status_code == 200
    assert len(simulator.attempts()) == 2 + opened
    charges = [receipt["charged_nano_usd"] for receipt in receipts_of(stack, "channel", wallet.address)]
    assert len(charges) == 2 + opened
    assert row(stack, wallet.address)["charged_nano_usd"] == sum(charges)
    refunded = await asyncio.to_thread(payer.scheme.refund, f"{stack.gateway_url}/v1/chat/completions")
    assert refunded.success
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == -(-sum(charges) // 1000)


@pytest.mark.parametrize("with_key", [False, True], ids=["signed in", "with a key"])
def test_a_balance_pays_for_the_input_however_often_it_hangs_up(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, slow: Simulator, with_key: bool
) -> None:
    session = sign_in(http, wallet)
    asked = http.post("/v1/wallet/topups", json={"amount_usd": "1.00"})
    paid = http.post("/v1/wallet/topups", json={"amount_usd": "1.00"}, headers=sign(wallet, asked))
    assert paid.status_code == 200, paid.text
    had, spender = usd_to_nano(available(http, session)["USDC"]), session
    if with_key:
        key = http.post("/v1/wallet/keys", json={"name": "laptop"}, headers=session).json()["key"]
        spender = {"authorization": f"Bearer {key}"}
    for number in range(2):
        hang_up(http, slow, spender, LONG | {"stream": bool(number)})
    deadline = time.monotonic() + 20
    while len(receipts_of(stack, "prepaid", wallet.address, "captured")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first, second = receipts_of(stack, "prepaid", wallet.address)
    assert first["charged_nano_usd"] == second["charged_nano_usd"] > 0
    assert first["charged_nano_usd"] < first["quoted_nano_usd"] // 2
    assert had - usd_to_nano(available(http, session)["USDC"]) == 2 * first["charged_nano_usd"]
    (balance,) = [
        each for each in http.get("/v1/wallet", headers=session).json()["balances"] if each["symbol"] == "USDC"
    ]
    assert usd_to_nano(balance["held_usd"]) == 0
