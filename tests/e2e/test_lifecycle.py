"""The life of a gateway: it starts alone, waits for the chain, gives back, tells numbers and no words, and ends in order."""

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
from typing import Any

import httpx
import orjson
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from prometheus_client.parser import text_string_to_metric_families

from contracts.devnet import USDC, balance_of
from contracts.jsonrpc import rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from payments import accounts
from payments.chain.signers import Signer
from payments.ledger import transfers
from payments.store import Store
from tests.e2e.clients import JSON, ask, ask_and_sign, available, decoded, sign_in, sse_text
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import check_books, wait_until

QUOTES_PER_MINUTE = 40
REFUND_THRESHOLD_USD = "0.01"
ENVIRONMENT = {
    "FAREBOX_LIMITS__QUOTES_PER_MINUTE": str(QUOTES_PER_MINUTE),
    "FAREBOX_PAYMENTS__SETTLEMENT_WAIT_S": "1",
    "FAREBOX_PAYMENTS__REFUND_THRESHOLD_USD": REFUND_THRESHOLD_USD,
}
DEV_FIELDS = {
    "gateway_url",
    "rpc_url",
    "chain_id",
    "network",
    "tokens",
    "pay_to",
    "wallets",
    "api_key",
    "admin_key",
    "batch_contract",
    "deposit_factory",
    "simulator_url",
    "database_url",
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


def with_key(stack: Stack) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.api_key}"}


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


def test_logs_hold_nothing_of_what_was_said_and_no_secret(
    stack: Stack,
    gateway: GatewayProcess,
    http: httpx.Client,
    wallet: LocalAccount,
    simulator: Simulator,
    data_dir: Path,
) -> None:
    body = QUESTION | {"messages": [{"role": "user", "content": "Tell me about zygomorphic tulips."}]}
    simulator.configure(QUESTION["model"], text="Quixotic words of the answer.")
    headers = ask_and_sign(http, wallet, body)
    paid = ask(http, body, headers)
    keyed = ask(http, body | {"stream": True}, with_key(stack))
    session = sign_in(http, wallet)
    refused = ask(http, body, {"PAYMENT-SIGNATURE": "zygomorphic"})
    wrong = http.post("/v1/chat/completions", content=b'{"model": "zygomorphic"', headers=JSON)
    assert [answer.status_code for answer in (paid, keyed, refused, wrong)] == [200, 200, 400, 400]
    assert "Quixotic" in paid.text
    assert "Quixotic" in sse_text(keyed.text)
    simulator.configure(QUESTION["model"], status=500)
    simulator.configure("qwen3.7-flash", status=500)
    ask(http, body, with_key(stack))

    log = (data_dir / "gateway.log").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert any(line.get("id") == paid.headers["x-request-id"] and line["status"] == 200 for line in lines)
    environment = gateway.environment
    secrets = {
        "the prompt": "zygomorphic",
        "the answer": "uixotic",
        "the payment": headers["PAYMENT-SIGNATURE"][:80],
        "its signature": decoded(headers["PAYMENT-SIGNATURE"])["payload"]["signature"][2:40],
        "the API key": stack.api_key,
        "the admin key": stack.admin_key,
        "the session": session["authorization"].split()[1],
        "the provider's key": environment["FAREBOX_DEV_PROVIDER_KEY"] + '"',
        "the gateway's secret": environment["FAREBOX_SECRET"],
        "the signer's key": json.loads(environment["FAREBOX_SIGNER_KEYS"])[0][2:],
        "the treasury's key": environment["FAREBOX_TREASURY_KEY"][2:],
        "the payer's key": stack.wallets[0]["private_key"][2:],
    }
    assert [name for name, secret in secrets.items() if secret.lower() in log.lower()] == []


def test_metrics_count_what_happened(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    """No name, address or key becomes a label: their values come from the configuration."""
    simulator.configure("gpt-5.4", status=503)
    before = metrics(http)
    body = QUESTION | {"model": "gpt-5.4"}
    headers = ask_and_sign(http, wallet, body)
    answer = ask(http, body, headers)
    assert answer.status_code == 200, answer.text
    ask(http, body, headers)
    after = metrics(http)
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0)

    chat, network = "/v1/chat/completions", {"network": stack.network}
    assert grown("farebox_requests_total", path=chat, status="402") == 1
    assert grown("farebox_requests_total", path=chat, status="200") == 2
    assert grown("farebox_request_seconds_count", path=chat) == 3
    assert grown("farebox_payments_required_total", code="payment_required") == 1
    assert grown("farebox_replayed_total") == 1
    assert grown("farebox_attempts_total", candidate="gpt-5.4@openai", status="failed") == 1
    assert grown("farebox_attempts_total", candidate="gpt-5.4@backup", status="ok") == 1
    assert grown("farebox_charged_usd_total", model="gpt-5.4") == pytest.approx(float(receipt["charged_usd"]))
    assert grown("farebox_credited_usd_total") == pytest.approx(float(receipt["credited_usd"]))
    tokens = receipt["usage"]
    assert grown("farebox_tokens_total", model="gpt-5.4", kind="input") == tokens["input_tokens"]
    assert grown("farebox_tokens_total", model="gpt-5.4", kind="output") == tokens["output_tokens"]
    assert grown("farebox_settlements_paid", **network) == 1
    assert grown("farebox_settlements_failed", **network) == 0
    assert grown("farebox_rpc_round_trips", **network) >= 2
    now = {name: value for (name, labels), value in after.items() if dict(labels).get("network") == stack.network}
    assert now["farebox_settlements_in_flight"] == 0
    assert now["farebox_rpc_available"] == 1
    assert now["farebox_signer_gas_native"] > 0


def metrics(http: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = http.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


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


# ---------------------------------------------------------------------- `farebox dev`


def start_dev(data_dir: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`farebox dev --json`, and the line that it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FAREBOX_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway.cli", "dev", "--json", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        return process, json.loads(line)
    except ValueError:
        raise AssertionError(f"not what was promised: {line!r} {end(process)}") from None


def children(pid: int) -> dict[int, str]:
    """Every process below this one, with its command."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found: dict[int, str] = {}
    parents = {pid}
    while parents:
        below = {int(row[0]): row[2] for row in rows if int(row[1]) in parents}
        found |= below
        parents = set(below)
    return found


def alive(pids: dict[int, str]) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    states = {int(pid): state for pid, state in (line.split() for line in listed.splitlines())}
    return [command for pid, command in pids.items() if not states.get(pid, "Z").startswith("Z")]


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """SIGTERM; what was still printed."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=30)
    finally:
        process.kill()


def test_farebox_dev_prints_one_line_ends_everything_and_goes_on_where_it_was(tmp_path: Path) -> None:
    process, first = start_dev(tmp_path)
    try:
        assert set(first) == DEV_FIELDS
        assert set(first["tokens"]) == {"USDC", "USDT"}
        for token in first["tokens"].values():
            assert set(token) == {"address", "decimals", "name", "version", "transfer_method"}
        assert all(set(wallet) == {"address", "private_key"} for wallet in first["wallets"])
        below = children(process.pid)
        for part in ("anvil", "gateway.dev.simulator", "gateway.cli serve"):
            assert any(part in command for command in below.values()), below
        wallet: LocalAccount = Account.from_key(first["wallets"][0]["private_key"])
        with httpx.Client(base_url=first["gateway_url"], timeout=30) as http:
            answer = ask(http, QUESTION, ask_and_sign(http, wallet, QUESTION))
            assert answer.status_code == 200, answer.text
            poll = f"/v1/receipts/{answer.headers['x-farebox-receipt']}"
            receipt = http.get(poll).json()
            credit = available(http, sign_in(http, wallet))
        left = balance_of(first["rpc_url"], USDC, wallet.address)
    finally:
        printed = end(process)
    assert process.returncode == 0
    assert printed == ("", "")
    assert alive(below) == []

    process, second = start_dev(tmp_path)
    try:
        below = children(process.pid)
        for name in DEV_FIELDS - {"gateway_url", "rpc_url", "simulator_url"}:
            assert second[name] == first[name], name
        with httpx.Client(base_url=second["gateway_url"], timeout=30) as http:
            later = http.get(poll).json()
            assert later["state"] == "captured"
            assert later["charged_usd"] == receipt["charged_usd"]
            assert later["transaction"]["hash"] == receipt["transaction"]["hash"]
            session = sign_in(http, wallet)
            assert float(credit["USDC"]) > 0
            assert available(http, session) == credit
            assert balance_of(second["rpc_url"], USDC, wallet.address) == left
            transaction = rpc(second["rpc_url"], "eth_getTransactionReceipt", receipt["transaction"]["hash"])
            assert transaction["status"] == "0x1"
            assert ask(http, QUESTION | {"max_tokens": 5}, session).status_code == 200
            assert ask(http, QUESTION, {"Authorization": f"Bearer {first['api_key']}"}).status_code == 200
    finally:
        end(process)
    assert alive(below) == []
