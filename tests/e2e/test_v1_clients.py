"""Clients of x402's first version pay unchanged: they know the 402's body, X-PAYMENT and X-PAYMENT-RESPONSE only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests import AS_IT_WAS
from tests.e2e.clients import ask, available, decoded, sign_in, sse_text
from tests.e2e.conftest import QUESTION

HERE = Path(__file__).parent
LOCK_FILE = HERE / "v1-requirements.lock"

# The first run downloads the old client and all that it needs.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def v1_python() -> Path:
    """The interpreter of an environment that has what the lock file names; made when that changed, by one process at a time."""
    environment = Path(sys.prefix) / "x402-v1"
    python, stamp = environment / "bin" / "python", environment / "lock-file.sha256"
    wanted = f"{sys.version_info[:2]} {hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()}"
    with (Path(sys.prefix) / "x402-v1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
            assert uv is not None, "the test of x402 v1 clients needs uv, which scripts/test installs"
            _run(uv, "venv", "--clear", "--python", sys.executable, str(environment))
            _run(uv, "pip", "install", "--require-hashes", "--python", str(python), "-r", str(LOCK_FILE))
            stamp.write_text(wanted)
    return python


def _run(*command: str) -> str:
    done = subprocess.run(command, env=AS_IT_WAS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _paid(v1_python: Path, client: str, wallet: LocalAccount, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the old client was answered, and had sent, when it had paid."""
    done = subprocess.run(
        [str(v1_python), str(HERE / "v1" / "pay.py"), client, url, json.dumps(body)],
        env=os.environ | {"WALLET_KEY": wallet.key.hex()},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("client", ["httpx", "requests"])
def test_a_v1_client_pays_usdc(
    stack: Stack,
    http: httpx.Client,
    wallet: LocalAccount,
    simulator: Simulator,
    v1_python: Path,
    client: str,
    stream: bool,
) -> None:
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    body = QUESTION | {"stream": True} if stream else QUESTION
    answer = _paid(v1_python, client, wallet, f"{stack.gateway_url}/v1/chat/completions", body)
    assert answer["status"] == 200, answer["text"]
    assert "payment-response" not in answer["headers"]

    paid = answer["payment_response"]
    assert paid["success"] is True
    assert paid["network"] == "base-sepolia"
    assert paid["payer"].lower() == wallet.address.lower()
    receipt = http.get(f"/v1/receipts/{answer['headers']['x-farebox-receipt']}").json()
    assert receipt["state"] == "captured"
    assert receipt["transaction"]["hash"] == paid["transaction"]
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == round(float(receipt["quoted_usd"]) * 10**6)
    assert len(simulator.attempts()) == 1

    if stream:
        lines = [line for line in answer["text"].splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        assert "sky" in sse_text(answer["text"])
    else:
        assert "sky" in json.loads(answer["text"])["choices"][0]["message"]["content"]


@pytest.mark.parametrize("client", ["httpx", "requests"])
def test_a_v1_client_tops_up_its_wallet(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, v1_python: Path, client: str
) -> None:
    before, session = balance_of(stack.rpc_url, USDC, wallet.address), sign_in(http, wallet)
    had = usd_to_nano(available(http, session).get("USDC", "0"))
    url, body = f"{stack.gateway_url}/v1/wallet/topups", {"amount_usd": "0.25"}
    answer = _paid(v1_python, client, wallet, url, body)
    assert answer["status"] == 200, answer["text"]
    paid, told = answer["payment_response"], json.loads(answer["text"])
    assert (paid["success"], paid["network"], told["credited_usd"]) == (True, "base-sepolia", "0.25")
    assert paid["transaction"] == told["transaction"]

    again = http.post("/v1/wallet/topups", content=json.dumps(body), headers={"X-PAYMENT": answer["sent"]})
    assert (again.status_code, again.json()["receipt"]) == (200, told["receipt"]), again.text
    assert decoded(again.headers["x-payment-response"]) == paid
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) == 250_000
    assert usd_to_nano(available(http, session)["USDC"]) - had == 250_000_000


def test_the_v1_body_and_the_v2_header_ask_for_the_same(http: httpx.Client) -> None:
    answer = ask(http, QUESTION)
    body, header = answer.json(), decoded(answer.headers["payment-required"])
    assert body["x402Version"] == 1
    assert isinstance(body["error"], str)
    [v1] = body["accepts"]  # USDT moves through Permit2, which v1 does not know
    [v2] = [offer for offer in header["accepts"] if offer["extra"]["assetTransferMethod"] == "eip3009"]
    assert v1["network"] == "base-sepolia"
    assert v1["resource"] == header["resource"]["url"]
    assert (v1["maxAmountRequired"], v1["payTo"], v1["asset"], v1["extra"]) == (
        v2["amount"],
        v2["payTo"],
        v2["asset"],
        v2["extra"],
    )
