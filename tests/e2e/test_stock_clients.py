"""Clients that were not written for Farebox pay it unchanged."""

from __future__ import annotations

import httpx
import openai
import orjson
from eth_account.signers.local import LocalAccount
from x402 import x402Client
from x402.http.clients import x402_httpx_transport
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner

from contracts.devnet import USDC, USDT, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, ask_and_sign, decoded
from tests.e2e.conftest import QUESTION


async def test_the_official_python_client_pays_usdc(stack: Stack, wallet: LocalAccount, simulator: Simulator) -> None:
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    client = register_exact_evm_client(x402Client(), EthAccountSigner(wallet))
    async with httpx.AsyncClient(
        transport=x402_httpx_transport(client), base_url=stack.gateway_url, timeout=30
    ) as http:
        answer = await http.post("/v1/chat/completions", content=orjson.dumps(QUESTION), headers=JSON)
        assert answer.status_code == 200, answer.text
        receipt = (await http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}")).json()
    assert answer.json()["choices"][0]["message"]["content"]
    response = decoded(answer.headers["payment-response"])
    assert response["success"] is True
    assert receipt["state"] == "captured"
    assert receipt["transaction"]["hash"] == response["transaction"]
    assert before > balance_of(stack.rpc_url, USDC, wallet.address)
    assert len(simulator.attempts()) == 1


async def test_the_official_python_client_streams(stack: Stack, wallet: LocalAccount, simulator: Simulator) -> None:
    client = register_exact_evm_client(x402Client(), EthAccountSigner(wallet))
    async with (
        httpx.AsyncClient(transport=x402_httpx_transport(client), base_url=stack.gateway_url, timeout=30) as http,
        http.stream(
            "POST", "/v1/chat/completions", content=orjson.dumps(QUESTION | {"stream": True}), headers=JSON
        ) as answer,
    ):
        assert answer.status_code == 200
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert lines[-2].startswith(": farebox-receipt ")
    receipt = orjson.loads(lines[-2].removeprefix(": farebox-receipt "))
    assert receipt["id"] == answer.headers["x-farebox-receipt"]
    text = "".join(
        choice["delta"].get("content") or ""
        for line in lines[:-2]
        for choice in orjson.loads(line.removeprefix("data: "))["choices"]
    )
    assert "sky" in text


def test_usdt_is_paid_through_permit2_by_the_official_client(
    stack: Stack, http: httpx.Client, wallet: LocalAccount, simulator: Simulator
) -> None:
    from contracts.devnet import approve_permit2

    approve_permit2(stack.rpc_url, USDT, wallet.key.hex())
    before = balance_of(stack.rpc_url, USDT, wallet.address)
    headers = ask_and_sign(http, wallet, QUESTION, token=USDT.address)
    answer = ask(http, QUESTION, headers)
    assert answer.status_code == 200, answer.text
    assert balance_of(stack.rpc_url, USDT, wallet.address) < before


def test_usdt_without_an_allowance_is_412_with_what_to_do(stack: Stack, http: httpx.Client) -> None:
    from eth_account import Account

    from contracts.devnet import mint

    stranger = Account.create()
    mint(stack.rpc_url, USDT, stranger.address, 10_000_000)
    answer = ask(http, QUESTION, ask_and_sign(http, stranger, QUESTION, token=USDT.address))
    assert answer.status_code == 412, answer.text
    error = answer.json()["error"]
    assert error["code"] == "permit2_allowance_required"
    assert "0x000000000022d473030f116ddee9f6b43ac78ba3" in error["message"].lower()


def test_the_openai_sdk_spends_from_a_pool_with_a_key(stack: Stack, simulator: Simulator) -> None:
    with openai.OpenAI(base_url=f"{stack.gateway_url}/v1", api_key=stack.api_key, max_retries=0) as client:
        whole = client.chat.completions.create(**QUESTION)
        assert whole.choices[0].message.content
        assert whole.model == QUESTION["model"]
        streamed = client.chat.completions.create(**QUESTION, stream=True, stream_options={"include_usage": True})
        chunks = list(streamed)
    assert chunks[-1].usage is not None
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert [attempt["outcome"] for attempt in simulator.attempts()] == ["ok", "ok"]
