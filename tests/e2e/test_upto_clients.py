"""Paying what an answer cost, with clients that were not written for Farebox."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from x402 import x402Client
from x402.http.clients import x402_httpx_transport
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.mechanisms.evm.upto import UptoEvmClientScheme

from agents_sdk import Agent, SpendingPolicy
from contracts.devnet import USDC, approve_permit2, balance_of, mint, rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests.e2e.clients import JSON, UPTO, ask, available, decoded, sign_in, sign_upto
from tests.e2e.conftest import QUESTION
from tests.e2e.test_failover import wait_for_breakers
from tests.e2e.test_typescript_client import next_event, node


@pytest.fixture
def approved(stack: Stack, wallet: LocalAccount) -> LocalAccount:
    approve_permit2(stack.rpc_url, USDC, wallet.key.hex())
    return wallet


def settled(http: httpx.Client, receipt_id: str) -> dict[str, Any]:
    """The receipt once its transfer is mined."""
    deadline = time.monotonic() + 20
    while True:
        receipt: dict[str, Any] = http.get(f"/v1/receipts/{receipt_id}").json()
        if receipt["transaction"] is not None and receipt["transaction"]["state"] in ("mined", "final"):
            return receipt
        assert time.monotonic() < deadline, receipt
        time.sleep(0.05)


def atomic(usd: str) -> int:
    """Dollars as atomic units of a token with 6 decimals, rounded up."""
    whole, _, part = usd.partition(".")
    return -(-int(whole + part.ljust(9, "0")[:9]) // 1000)


async def test_the_official_python_client_pays_what_the_answer_cost(
    stack: Stack, http: httpx.Client, approved: LocalAccount, simulator: Simulator
) -> None:
    before = balance_of(stack.rpc_url, USDC, approved.address)
    client = x402Client()
    client.register("eip155:*", UptoEvmClientScheme(EthAccountSigner(approved)))
    async with httpx.AsyncClient(
        transport=x402_httpx_transport(client), base_url=stack.gateway_url, timeout=30, headers=JSON | UPTO
    ) as paying:
        answer = await paying.post("/v1/chat/completions", content=orjson.dumps(QUESTION))
    assert answer.status_code == 200, answer.text
    response = decoded(answer.headers["payment-response"])
    assert response["success"] is True
    receipt = settled(http, answer.headers["x-farebox-receipt"])
    assert receipt["tender"] == "upto"
    assert float(receipt["charged_usd"]) < float(receipt["quoted_usd"])
    assert int(response["amount"]) == atomic(receipt["charged_usd"])
    assert before - balance_of(stack.rpc_url, USDC, approved.address) == atomic(receipt["charged_usd"])
    assert len(simulator.attempts()) == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_official_typescript_client_pays_what_the_answer_cost(
    stack: Stack, http: httpx.Client, approved: LocalAccount, simulator: Simulator, stream: bool
) -> None:
    before = balance_of(stack.rpc_url, USDC, approved.address)
    with node(stack, approved, QUESTION | {"stream": stream}, ACCEPT_PAYMENT="upto") as process:
        event = next_event(process)
        while event["event"] != "end":
            event = next_event(process)
    assert event["statuses"] == [402, 200]
    receipt = settled(http, event["headers"]["x-farebox-receipt"])
    assert receipt["tender"] == "upto"
    if stream:
        told = next(line for line in event["text"].splitlines() if line.startswith(": farebox-receipt "))
        assert json.loads(told.removeprefix(": farebox-receipt "))["charged_usd"] == receipt["charged_usd"]
    else:
        assert int(event["paymentResponse"]["amount"]) == atomic(receipt["charged_usd"])
    assert before - balance_of(stack.rpc_url, USDC, approved.address) == atomic(receipt["charged_usd"])
    assert len(simulator.attempts()) == 1


def test_upto_is_offered_to_whoever_asks_for_it(stack: Stack, http: httpx.Client) -> None:
    offers = decoded(ask(http, QUESTION, UPTO).headers["payment-required"])["accepts"]
    assert {offer["scheme"] for offer in offers} == {"upto", "exact"}
    offer = offers[0]
    assert offer["scheme"] == "upto"
    assert offer["extra"]["facilitatorAddress"] == stack.batch_contract
    assert offer["extra"]["assetTransferMethod"] == "permit2"
    assert {each["scheme"] for each in decoded(ask(http, QUESTION).headers["payment-required"])["accepts"]} == {"exact"}


def test_the_same_authorization_finds_its_answer_and_buys_no_other(
    stack: Stack, http: httpx.Client, approved: LocalAccount, simulator: Simulator
) -> None:
    headers = UPTO | sign_upto(approved, ask(http, QUESTION, UPTO))
    first = ask(http, QUESTION, headers)
    assert first.status_code == 200, first.text
    again = ask(http, QUESTION, headers)
    assert again.headers["x-farebox-replayed"] == "true"
    assert again.content == first.content
    other = ask(http, QUESTION | {"max_tokens": 63}, headers)
    assert other.status_code in (402, 409)
    assert len(simulator.attempts()) == 1


def test_a_failed_request_costs_nothing_and_burns_the_authorization(
    stack: Stack, http: httpx.Client, approved: LocalAccount, simulator: Simulator
) -> None:
    before = balance_of(stack.rpc_url, USDC, approved.address)
    headers = UPTO | sign_upto(approved, ask(http, QUESTION, UPTO))
    for model in (QUESTION["model"], "qwen3.7-flash"):
        simulator.configure(model, status=500)
    failed = ask(http, QUESTION, headers)
    assert failed.status_code == 502, failed.text
    assert "nothing is taken" in failed.json()["error"]["message"]
    simulator.reset_behaviours()
    wait_for_breakers(http)
    again = ask(http, QUESTION, headers)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "authorization_spent")
    assert balance_of(stack.rpc_url, USDC, approved.address) == before


def test_a_top_up_takes_the_whole_authorization_once(stack: Stack, http: httpx.Client, approved: LocalAccount) -> None:
    def top_up(headers: dict[str, str]) -> httpx.Response:
        return http.post("/v1/wallet/topups", json={"amount_usd": "0.75"}, headers=UPTO | headers)

    before, session = balance_of(stack.rpc_url, USDC, approved.address), sign_in(http, approved)
    had = usd_to_nano(available(http, session).get("USDC", "0"))
    asked = top_up({})
    offers = decoded(asked.headers["payment-required"])["accepts"]
    assert offers[0]["scheme"] == "upto"
    assert {offer["scheme"] for offer in offers} == {"upto", "exact"}
    payment = sign_upto(approved, asked)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: top_up(payment), range(8)))
    answers.append(top_up(payment))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert len({answer.json()["receipt"] for answer in answers}) == 1
    assert {answer.json()["credited_usd"] for answer in answers} == {"0.75"}
    (header,) = {answer.headers["payment-response"] for answer in answers}
    told = decoded(header)
    assert (told["success"], told["amount"]) == (True, "750000")
    assert ["x-farebox-replayed" in answer.headers for answer in answers].count(False) == 1
    assert before - balance_of(stack.rpc_url, USDC, approved.address) == 750_000
    assert usd_to_nano(available(http, session)["USDC"]) - had == 750_000_000
    receipt = settled(http, answers[0].json()["receipt"])
    assert (receipt["tender"], receipt["paid_usd"], receipt["charged_usd"]) == ("upto", "0.75", "0.00")
    assert told["transaction"] == receipt["transaction"]["hash"] == answers[0].json()["transaction"]
    as_answer = ask(http, QUESTION, UPTO | payment)
    assert (as_answer.status_code, "quote_mismatch" in as_answer.text) == (402, True), as_answer.text


def test_beyond_the_limit_the_402_asks_for_exact_and_says_why(
    stack: Stack, http: httpx.Client, approved: LocalAccount, simulator: Simulator
) -> None:
    dear = QUESTION | {"model": "claude-opus-4.7", "max_tokens": 16_000}
    asked = ask(http, dear, UPTO)
    assert asked.status_code == 402, asked.text
    refused = ask(http, dear, UPTO | sign_upto(approved, asked))
    assert refused.status_code == 402
    assert "exposure_exceeded" in refused.text
    assert {offer["scheme"] for offer in decoded(refused.headers["payment-required"])["accepts"]} == {"exact"}
    assert simulator.attempts() == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_our_agent_approves_permit2_and_pays_what_the_answer_cost(
    stack: Stack, http: httpx.Client, simulator: Simulator, tmp_path: Path, stream: bool
) -> None:
    account: LocalAccount = Account.create()
    mint(stack.rpc_url, USDC, account.address, 10**7)
    rpc(stack.rpc_url, "anvil_setBalance", account.address, hex(10**18))
    agent = Agent(
        account,
        stack.gateway_url,
        policy=SpendingPolicy(schemes=("upto", "exact")),
        receipts=tmp_path / "agent.sqlite3",
        rpc_url=stack.rpc_url,
    )
    with agent.openai() as client:
        answer = client.chat.completions.create(**QUESTION, stream=stream)
        if stream:
            list(answer)
    [receipt] = agent.receipts(limit=1)
    told = settled(http, receipt.id)
    assert (receipt.paid_with, told["tender"], receipt.charged_usd) == ("upto", "upto", told["charged_usd"])
    assert receipt.credited_usd in ("0", "0.00")
    assert 10**7 - balance_of(stack.rpc_url, USDC, account.address) == atomic(told["charged_usd"])
    assert len(simulator.attempts()) == 1


def test_our_agent_pays_by_exact_where_upto_is_too_much(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator, tmp_path: Path
) -> None:
    policy = SpendingPolicy(schemes=("upto", "exact"))
    agent = Agent(wallet, stack.gateway_url, policy=policy, receipts=tmp_path / "a.sqlite3", rpc_url=stack.rpc_url)
    with agent.openai() as client:
        client.chat.completions.create(**QUESTION | {"model": "claude-opus-4.7", "max_tokens": 16_000})
    [receipt] = agent.receipts(limit=1)
    assert receipt.paid_with == "exact"
    assert len(simulator.attempts()) == 1
