"""Payment channels with the official Python client, unchanged: deposit, vouchers, streams, claim and refund."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from eth_account.signers.local import LocalAccount
from x402 import x402Client
from x402.http.clients import x402_httpx_transport
from x402.mechanisms.evm.batch_settlement.client import (
    BatchSettlementEvmScheme,
    BatchSettlementEvmSchemeOptions,
    InMemoryClientChannelStorage,
)
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC

from contracts.devnet import USDC, USDT, approve_permit2, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack, running
from payments.money import usd_to_nano
from tests.e2e.clients import JSON, available, decoded, encoded, sign_in
from tests.e2e.conftest import QUESTION

ASKING = JSON | {"accept-payment": "batch-settlement"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environment = {"FAREBOX_PAYMENTS__CHANNEL_CLAIM_AGE_S": "2", "FAREBOX_WALLET__WITHDRAWAL_MINIMUM_USD": "0.01"}
    with running(tmp_path_factory.mktemp("channels"), environment=environment) as (stack, _):
        yield stack


class _Remembering(httpx.AsyncHTTPTransport):
    """Keeps what the client sends."""

    def __init__(self, sent: list[httpx.Request]) -> None:
        super().__init__()
        self._sent = sent

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._sent.append(request)
        return await super().handle_async_request(request)


class Payer:
    """The official client with a channel of its own."""

    def __init__(self, stack: Stack, wallet: LocalAccount, token: str | None = None) -> None:
        self.storage = InMemoryClientChannelStorage()
        self.scheme = BatchSettlementEvmScheme(
            EthAccountSignerWithRPC(wallet, stack.rpc_url), BatchSettlementEvmSchemeOptions(storage=self.storage)
        )
        self.client = x402Client()
        self.client.register(f"eip155:{stack.chain_id}", self.scheme)
        if token is not None:
            self.client.set_spend_controls({"allowed_assets": True})
            self.client.register_policy(
                lambda _, offers: [offer for offer in offers if offer.asset.lower() == token.lower()]
            )
        self.sent: list[httpx.Request] = []
        self.http = httpx.AsyncClient(
            transport=x402_httpx_transport(self.client, _Remembering(self.sent)), base_url=stack.gateway_url, timeout=30
        )

    async def ask(self, body: dict[str, Any] | None = None) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", content=orjson.dumps(body or QUESTION), headers=ASKING)


def row(stack: Stack, payer: str) -> dict[str, Any]:
    """The channel of a payer, as the gateway's database has it."""
    with sqlite3.connect(stack.database_url.removeprefix("sqlite:///")) as database:
        database.row_factory = sqlite3.Row
        found = database.execute("SELECT * FROM channel WHERE payer = ?", (payer.lower(),)).fetchone()
    return dict(found)


async def until_claimed(stack: Stack, payer: str) -> dict[str, Any]:
    end = time.monotonic() + 20
    while (channel := row(stack, payer))["claimed_nano_usd"] <= channel["charged_nano_usd"] - 1000:
        assert time.monotonic() < end, channel
        await asyncio.sleep(0.1)
    return channel


async def test_a_deposit_ten_vouchers_a_claim_and_a_refund(
    stack: Stack, wallet: LocalAccount, simulator: Simulator
) -> None:
    payer = Payer(stack, wallet)
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    treasury = balance_of(stack.rpc_url, USDC, stack.pay_to)
    charged = 0
    for index in range(11):
        answer = await payer.ask(QUESTION | {"max_tokens": 64 + index})
        assert answer.status_code == 200, answer.text
        told = decoded(answer.headers["payment-response"])
        assert told["success"] is True
        assert (told["transaction"] != "") == (index == 0), "only the first request has a transaction"
        charged += int(told["extra"]["chargedAmount"])
        assert int(told["extra"]["channelState"]["chargedCumulativeAmount"]) == charged
    assert len(simulator.attempts()) == 11
    channel = await until_claimed(stack, wallet.address)
    assert channel["claimed_nano_usd"] // 1000 <= charged
    assert channel["charged_nano_usd"] <= charged * 1000
    assert balance_of(stack.rpc_url, USDC, stack.pay_to) - treasury == channel["claimed_nano_usd"] // 1000

    refunded = await asyncio.to_thread(payer.scheme.refund, f"{stack.gateway_url}/v1/chat/completions")
    assert refunded.success
    assert before - balance_of(stack.rpc_url, USDC, wallet.address) <= charged


async def test_a_stream_announces_its_maximum_and_the_next_answer_makes_up_for_it(
    stack: Stack, wallet: LocalAccount, simulator: Simulator
) -> None:
    payer = Payer(stack, wallet)
    streamed = await payer.ask(QUESTION | {"stream": True})
    assert streamed.status_code == 200
    announced = int(decoded(streamed.headers["payment-response"])["extra"]["chargedAmount"])
    channel = row(stack, wallet.address)
    assert 0 < channel["charged_nano_usd"] < announced * 1000
    whole = await payer.ask()
    assert whole.status_code == 200, whole.text
    told = decoded(whole.headers["payment-response"])["extra"]
    actual = -(-row(stack, wallet.address)["charged_nano_usd"] // 1000)
    assert announced + int(told["chargedAmount"]) == actual


async def test_usdt_is_deposited_through_permit2(stack: Stack, wallet: LocalAccount, simulator: Simulator) -> None:
    approve_permit2(stack.rpc_url, USDT, wallet.key.hex())
    payer = Payer(stack, wallet, USDT.address)
    for _ in range(2):
        answer = await payer.ask()
        assert answer.status_code == 200, answer.text
    assert (await until_claimed(stack, wallet.address))["token"] == USDT.address.lower()


async def test_requests_at_once_of_a_client_that_signs_one_voucher_are_all_served(
    stack: Stack, wallet: LocalAccount, simulator: Simulator
) -> None:
    payer = Payer(stack, wallet)
    assert (await payer.ask()).status_code == 200
    answers = await asyncio.gather(*(payer.ask(QUESTION | {"max_tokens": 64 + index}) for index in range(3)))
    served = [answer for answer in answers if answer.status_code == 200]
    assert served
    for answer in answers:
        if answer.status_code != 200:
            assert answer.status_code == 402
            error = decoded(answer.headers["payment-required"])["error"]
            assert error == "invalid_batch_settlement_evm_cumulative_amount_mismatch"
    assert len(simulator.attempts()) == 1 + len(served)


async def test_the_same_voucher_for_the_same_request_is_one_inference(
    stack: Stack, wallet: LocalAccount, simulator: Simulator
) -> None:
    payer = Payer(stack, wallet)
    await payer.ask()
    first = await payer.ask()
    header = payer.sent[-1].headers["payment-signature"]
    async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=30) as http:
        headers = ASKING | {"payment-signature": header}
        again = await asyncio.gather(
            *(http.post("/v1/chat/completions", content=orjson.dumps(QUESTION), headers=headers) for _ in range(5))
        )
        assert [each.status_code for each in again] == [200] * 5
        assert {each.text for each in again} == {first.text}
        assert len(simulator.attempts()) == 2

        # For another request, with its quote left out, the voucher is stale.
        payment = decoded(header)
        del payment["extensions"]
        other = await http.post(
            "/v1/chat/completions",
            content=orjson.dumps(QUESTION | {"seed": 7}),
            headers=ASKING | {"payment-signature": encoded(payment)},
        )
    assert other.status_code == 402
    required = decoded(other.headers["payment-required"])
    assert required["error"] == "invalid_batch_settlement_evm_cumulative_amount_mismatch"
    state = required["accepts"][0]["extra"]["channelState"]
    assert int(state["chargedCumulativeAmount"]) > 0
    assert len(simulator.attempts()) == 2


async def test_a_deposit_and_a_voucher_top_up_a_balance_once_and_it_is_withdrawn_when_it_is_claimed(
    stack: Stack, wallet: LocalAccount
) -> None:
    payer = Payer(stack, wallet)
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    with httpx.Client(base_url=stack.gateway_url, timeout=30) as signed_in:
        session = sign_in(signed_in, wallet)
        had = usd_to_nano(available(signed_in, session).get("USDC", "0"))
        body, receipts = {"amount_usd": "0.25"}, set()
        for index in range(2):
            first = await payer.http.post("/v1/wallet/topups", json=body, headers=ASKING)
            assert (first.status_code, first.json()["credited_usd"]) == (200, "0.25"), first.text
            told = decoded(first.headers["payment-response"])
            assert (told["success"], told["extra"]["chargedAmount"]) == (True, "250000")
            assert (told["transaction"] != "") == (index == 0), "a voucher has no transaction"
            headers = ASKING | {"payment-signature": payer.sent[-1].headers["payment-signature"]}
            async with httpx.AsyncClient(base_url=stack.gateway_url, timeout=30) as http:
                again = await asyncio.gather(
                    *(http.post("/v1/wallet/topups", content=payer.sent[-1].content, headers=headers) for _ in range(6))
                )
                assert {each.status_code for each in again} == {200}, [each.text for each in again]
                assert {each.json()["receipt"] for each in again} == {first.json()["receipt"]}
                assert {each.headers["payment-response"] for each in again} == {first.headers["payment-response"]}
                as_request = await http.post("/v1/chat/completions", content=orjson.dumps(QUESTION), headers=headers)
                assert as_request.status_code == 402
            receipts.add(first.json()["receipt"])
        assert len(receipts) == 2
        assert usd_to_nano(available(signed_in, session)["USDC"]) - had == 500_000_000
        # The next request is paid with the voucher that follows.
        assert (await payer.ask()).status_code == 200
        await until_claimed(stack, wallet.address)
        taken = await asyncio.to_thread(
            signed_in.post,
            "/v1/wallet/withdrawals",
            json={"asset": "USDC", "amount_usd": "0.50"},
            headers=session | {"idempotency-key": "all"},
        )
        assert taken.status_code == 200, taken.text
        deposited, end = int(row(stack, wallet.address)["balance"]), time.monotonic() + 20
        while before - balance_of(stack.rpc_url, USDC, wallet.address) != deposited - 500_000:
            assert time.monotonic() < end, "what was withdrawn has not arrived"
            await asyncio.sleep(0.1)


def test_the_official_typescript_client_deposits_pays_and_is_refunded(
    stack: Stack, wallet: LocalAccount, simulator: Simulator
) -> None:
    program = shutil.which("node")
    assert program is not None, "this test needs Node.js 20 or newer on PATH"
    before = balance_of(stack.rpc_url, USDC, wallet.address)
    done = subprocess.run(
        [program, str(Path(__file__).parent / "typescript" / "channel.mjs")],
        env=os.environ
        | {
            "WALLET_KEY": "0x" + wallet.key.hex().removeprefix("0x"),
            "RPC_URL": stack.rpc_url,
            "URL": f"{stack.gateway_url}/v1/chat/completions",
            "BODY": orjson.dumps(QUESTION).decode(),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = orjson.loads(done.stdout)
    assert [payment["success"] for payment in result["payments"]] == [True] * 11
    assert [payment["transaction"] != "" for payment in result["payments"]] == [True] + [False] * 10
    assert result["refund"]["success"] is True
    charged = sum(int(payment["extra"]["chargedAmount"]) for payment in result["payments"])
    assert 0 < before - balance_of(stack.rpc_url, USDC, wallet.address) <= charged
    assert len(simulator.attempts()) == 11
