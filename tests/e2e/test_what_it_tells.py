"""A gateway's log and metrics: numbers of all that happens, and nothing of what was said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from eth_account.signers.local import LocalAccount

from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from tests.e2e.clients import JSON, ask, ask_and_sign, decoded, metrics, sign_in, sse_text, with_key
from tests.e2e.conftest import QUESTION


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("telling")


@pytest.fixture(scope="module")
def telling(data_dir: Path) -> Iterator[tuple[Stack, GatewayProcess]]:
    with running(data_dir) as (stack, gateway):
        yield stack, gateway


@pytest.fixture
def stack(telling: tuple[Stack, GatewayProcess]) -> Stack:
    """In place of the shared one, whose log and metrics are about more than what happens here."""
    return telling[0]


@pytest.fixture
def gateway(telling: tuple[Stack, GatewayProcess]) -> GatewayProcess:
    return telling[1]


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
