"""The life of a gateway: it starts alone, waits for the chain, gives back, holds to its limits, and ends in order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from contracts.jsonrpc import rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from payments import accounts
from payments.chain.signers import Signer
from payments.ledger import transfers
from payments.store import Store
from tests.e2e.clients import JSON, ask, ask_and_sign, available, decoded, metrics, sign_in, sse_text, with_key
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import check_books, wait_until

QUOTES_PER_MINUTE = 40
REFUND_THRESHOLD_USD = "0.01"
ENVIRONMENT = {
    "FAREBOX_LIMITS__QUOTES_PER_MINUTE": str(QUOTES_PER_MINUTE),
    "FAREBOX_PAYMENTS__SETTLEMENT_WAIT_S": "1",
    "FAREBOX_PAYMENTS__REFUND_THRESHOLD_USD": REFUND_THRESHOLD_USD,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lifecycle")


@pytest.fixture(scope="module")
def living(data_dir: Path) -> Iterator[tuple[Stack, GatewayProcess]]:
    with running(data_dir, environment=ENVIRONMENT) as (stack, gateway):
        yield stack, gateway


@pytest.fixture
def stack(living: tuple[Stack, GatewayProcess]) -> Stack:
    """In place of the shared one, which must not be stopped."""
    return living[0]


@pytest.fixture
def gateway(living: tuple[Stack, GatewayProcess]) -> GatewayProcess:
    return living[1]


def usdc(stack: Stack, wallet: LocalAccount) -> int:
    return balance_of(stack.rpc_url, USDC, wallet.address)


def amount_of(headers: dict[str, str]) -> int:
    return int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])


def serve(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Start a gateway that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", "serve"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_sigterm_lets_a_stream_finish_and_be_charged(
    stack: Stack, gateway: GatewayProcess, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    body = QUESTION | {"stream": True, "max_tokens": 30}
    simulator.configure(QUESTION["model"], output_tokens=30, tokens_per_second=15)
    headers = ask_and_sign(http, wallet, body) | JSON
    with http.stream("POST", "/v1/chat/completions", content=orjson.dumps(body), headers=headers) as answer:
        receipt_id = answer.headers["x-farebox-receipt"]
        lines = answer.iter_lines()
        begin = [next(lines)]
        os.kill(gateway.pid, signal.SIGTERM)
        wait_until(lambda: _refuses(stack.gateway_url), "nobody new is let in")
        assert simulator.under_way(), "the stream ended before it could be interrupted"
        text = "\n".join([*begin, *lines])
    assert text.rstrip().endswith("data: [DONE]")
    assert len(sse_text(text).split()) >= 15
    wait_until(lambda: gateway.exit_status() is not None, "the process ends")
    assert gateway.exit_status() == 0
    assert simulator.attempts()[0]["outcome"] == "ok"

    gateway.start()
    receipt = http.get(f"/v1/receipts/{receipt_id}").json()
    assert receipt["state"] == "captured"
    assert receipt["usage"]["output_tokens"] == 30
    assert f'"id":"{receipt_id}"' in text
    check_books(gateway)


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", timeout=5)
    except httpx.TransportError:
        return True
    return False


def test_a_second_gateway_on_the_same_database_does_not_start(gateway: GatewayProcess, http: httpx.Client) -> None:
    ended = serve(gateway.environment | {"FAREBOX_PORT": "0"})
    assert ended.returncode not in (0, None)
    assert "another gateway serves from" in ended.stderr
    assert "give this one another data_dir" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert http.get("/healthz").status_code == 200


def test_a_transfer_that_is_not_mined_in_time_is_202_and_is_never_paid_twice(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    before = usdc(stack, wallet)
    headers = ask_and_sign(http, wallet, QUESTION)
    rpc(stack.rpc_url, "evm_setAutomine", False)
    try:
        waiting = [ask(http, QUESTION, headers) for _ in range(2)]
        for answer in waiting:
            assert answer.status_code == 202, answer.text
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["status"] == "pending"
            assert answer.json()["poll"] == f"/v1/receipts/{answer.json()['receipt']}"
        assert waiting[0].json()["receipt"] == waiting[1].json()["receipt"]
        poll = waiting[0].json()["poll"]
        receipt = http.get(poll)
        assert receipt.status_code == 200
        assert receipt.json()["state"] == "interrupted"
        assert float(receipt.json()["paid_usd"]) == 0
        assert usdc(stack, wallet) == before
        assert int(rpc(stack.rpc_url, "txpool_status")["pending"], 16) == 1
        rpc(stack.rpc_url, "evm_mine")
    finally:
        rpc(stack.rpc_url, "evm_setAutomine", True)
    wait_until(lambda: float(http.get(poll).json()["paid_usd"]) > 0, "the transfer is found")
    answers = [ask(http, QUESTION, headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].content == answers[1].content
    assert {answer.headers["x-farebox-receipt"] for answer in answers} == {waiting[0].json()["receipt"]}
    assert before - usdc(stack, wallet) == amount_of(headers)
    assert [attempt["outcome"] for attempt in simulator.attempts()].count("ok") >= 1
    assert http.get(poll).json()["state"] == "captured"


def test_credit_above_the_threshold_comes_back_on_chain_by_itself(
    stack: Stack, gateway: GatewayProcess, http: httpx.Client, wallet: LocalAccount
) -> None:
    dear = QUESTION | {"model": "claude-opus-4.7", "max_tokens": 2_000}
    before = usdc(stack, wallet)
    headers = ask_and_sign(http, wallet, dear)
    answer = ask(http, dear, headers)
    assert answer.status_code == 200, answer.text
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    credited = int(float(receipt["credited_usd"]) * 1e6 + 1e-6)
    assert credited > float(REFUND_THRESHOLD_USD) * 1e6
    wait_until(lambda: before - usdc(stack, wallet) == amount_of(headers) - credited, "the credit is back on chain")
    session = sign_in(http, wallet)
    wait_until(lambda: float(available(http, session)["USDC"]) < 1e-6, "the books know")
    check_books(gateway)


def test_too_many_unpaid_quotes_are_429_for_that_address_alone(stack: Stack, http: httpx.Client) -> None:
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=stack.gateway_url, transport=elsewhere, timeout=30) as other:
        answers = [ask(other, QUESTION) for _ in range(QUOTES_PER_MINUTE + 20)]
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {402, 429}, statuses
        refused = answers[-1]
        assert refused.json()["error"]["code"] == "too_many_quotes"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert other.post("/v1/quote", json=QUESTION).status_code == 429
        # Who pays otherwise needs no quote.
        assert ask(other, QUESTION, with_key(stack)).status_code == 200
    assert ask(http, QUESTION).status_code == 402


def _maximum_nano_usd(http: httpx.Client) -> int:
    return round(float(http.post("/v1/quote", json=QUESTION).json()["quote"]["maximum_usd"]) * 1e9)


async def test_a_key_used_many_times_at_once_never_overdraws_its_pool(
    stack: Stack, http: httpx.Client, simulator: Simulator, data_dir: Path
) -> None:
    maximum = _maximum_nano_usd(http)
    funded = maximum * 7 // 2
    store = Store(data_dir / "farebox.db")
    try:
        await store.write(lambda tx: accounts.fund_pool(tx, "tiny", funded, "test"))
        _, key = await store.write(lambda tx: accounts.create_key(tx, "busy", "tiny"))
        # All thirty are there before the first is answered.
        simulator.configure(QUESTION["model"], first_token_ms=1_500)
        async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=60) as many:
            body, headers = orjson.dumps(QUESTION), JSON | {"Authorization": f"Bearer {key}"}
            asked = [
                asyncio.create_task(many.post("/v1/chat/completions", content=body, headers=headers)) for _ in range(30)
            ]
            lowest = funded
            while not all(task.done() for task in asked):
                seen = await store.read(lambda tx: transfers.balance(tx, accounts.pool_account("tiny")))
                lowest = min(lowest, seen.available)
                await asyncio.sleep(0.02)
        answers = [task.result() for task in asked]
        left = await store.read(lambda tx: transfers.balance(tx, accounts.pool_account("tiny")))
    finally:
        store.close()
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 402}, statuses
    assert 0 <= lowest < funded - 2 * maximum, "three held at once, and never a fourth"
    served = [answer for answer in answers if answer.status_code == 200]
    spent = sum(round(float(answer.headers["x-farebox-cost-usd"]) * 1e9) for answer in served)
    assert (left.balance, left.pending_out) == (funded - spent, 0)
    for answer in answers:
        if answer.status_code == 402:
            error = answer.json()["error"]
            assert error["code"] == "insufficient_pool"
            assert "'tiny'" in error["message"]
    assert len(simulator.attempts()) == len(served)


def test_a_signer_without_gas_raises_an_alarm(stack: Stack, gateway: GatewayProcess, http: httpx.Client) -> None:
    signer = Signer.from_hex(json.loads(gateway.environment["FAREBOX_SIGNER_KEYS"])[0]).address
    assert http.get("/readyz").json() == {"status": "ready", "alarms": []}
    full = rpc(stack.rpc_url, "eth_getBalance", signer, "latest")
    gateway.stop()
    rpc(stack.rpc_url, "anvil_setBalance", signer, "0x0")
    gateway.start()
    try:
        wait_until(lambda: http.get("/readyz").status_code == 503, "the alarm is raised")
        answer = http.get("/readyz").json()
        assert answer["status"] == "alarm"
        assert [(alarm["code"], alarm["subject"].lower()) for alarm in answer["alarms"]] == [
            ("low_gas", signer.lower())
        ]
        assert http.get("/healthz").status_code == 200
        assert metrics(http)["farebox_alarms", frozenset({("network", stack.network)})] == 1
        # API keys need no gas.
        assert ask(http, QUESTION, with_key(stack)).status_code == 200
    finally:
        # It looks again within half a minute; nothing here waits for that, so this comes last on this stack.
        rpc(stack.rpc_url, "anvil_setBalance", signer, full)
