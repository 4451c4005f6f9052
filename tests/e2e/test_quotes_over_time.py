"""Time passes between a quote, its payment and the same payment again: quotes expire, prices move, models disappear."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of
from gateway.dev.models import dev_models
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import GatewayProcess, Stack, running
from payments.chain.networks import Token
from payments.quotes import Quote, QuoteSealer, request_digest
from tests.e2e.clients import ask, ask_and_sign, decoded, encoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import check_books
from tests.payments.x402_samples import eip3009_message

ROUTE = ("deepseek-v4-flash@openai",)
AUTO = QUESTION | {"model": "auto"}


@dataclass
class World:
    """A stack of this module's own, whose gateway can be started again with other models."""

    stack: Stack
    gateway: GatewayProcess
    http: httpx.Client
    simulator: Simulator
    wallets: Iterator[LocalAccount]
    """Each has funds, and nobody has used it."""
    offered: list[dict[str, Any]] = field(default_factory=dev_models)

    def offer(self, models: list[dict[str, Any]]) -> None:
        """Start the gateway again with other models."""
        if models != self.offered:
            self.gateway.stop()
            self.gateway.environment["FAREBOX_MODELS"] = json.dumps(models)
            self.gateway.start()
            self.offered = models

    def usdc(self, wallet: LocalAccount) -> int:
        return balance_of(self.stack.rpc_url, USDC, wallet.address)

    def receipt(self, answer: httpx.Response) -> dict[str, Any]:
        receipt: dict[str, Any] = self.http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
        return receipt


@pytest.fixture(scope="module")
def one_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with (
        running(tmp_path_factory.mktemp("time")) as (stack, gateway),
        httpx.Client(base_url=stack.gateway_url, timeout=30) as http,
    ):
        wallets: Iterator[LocalAccount] = (Account.from_key(wallet["private_key"]) for wallet in stack.wallets)
        yield World(stack, gateway, http, Simulator.attach(stack.simulator_url), wallets)


@pytest.fixture
def world(one_world: World) -> World:
    one_world.simulator.clear()
    return one_world


def models(*names: str, times: int = 1) -> list[dict[str, Any]]:
    """The development stack's models of these names, at so many times their price."""
    return [
        model | {"input_usd": _times(model["input_usd"], times), "output_usd": _times(model["output_usd"], times)}
        for model in dev_models()
        if model["id"] in names
    ]


def _times(price: str, times: int) -> str:
    return f"{float(price) * times:.6f}"


def forge(world: World, payment: dict[str, Any], *, expires_at: int, body: dict[str, Any] = QUESTION) -> dict[str, str]:
    """Put a quote of the same amount and request into a payment that expires at another time: we know the gateway's secret."""
    quote = Quote(
        id=f"quote_{secrets.token_hex(10)}",
        items=(),
        maximum_nano_usd=int(payment["accepted"]["amount"]) * 1_000,
        route=ROUTE,
        request_digest=request_digest("POST", "/v1/chat/completions", orjson.dumps(body)),
        expires_at=expires_at,
    )
    sealer = QuoteSealer(world.gateway.environment["FAREBOX_SECRET"].encode())
    payment["extensions"]["farebox"]["quote"] = sealer.seal(quote)
    return {"PAYMENT-SIGNATURE": encoded(payment)}


def sign_until(world: World, wallet: LocalAccount, payment: dict[str, Any], valid_before: int) -> dict[str, str]:
    """The payment with an authorization that holds until another time."""
    known = world.stack.tokens["USDC"]
    token = Token("USDC", world.stack.chain_id, known["address"].lower(), 6, "eip3009", known["name"], known["version"])
    authorization = payment["payload"]["authorization"]
    authorization["validBefore"] = str(valid_before)
    signed = wallet.sign_message(eip3009_message(authorization, token))
    payment["payload"]["signature"] = f"0x{signed.signature.hex()}"
    return {"PAYMENT-SIGNATURE": encoded(payment)}


def signed_payment(world: World, wallet: LocalAccount, body: dict[str, Any] = QUESTION) -> dict[str, Any]:
    payment: dict[str, Any] = decoded(ask_and_sign(world.http, wallet, body)["PAYMENT-SIGNATURE"])
    return payment


def amount_of(headers: dict[str, str]) -> int:
    return int(decoded(headers["PAYMENT-SIGNATURE"])["accepted"]["amount"])


def sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.time()))


def refused_with(answer: httpx.Response) -> str:
    assert answer.status_code == 402, answer.text
    error: str = decoded(answer.headers["payment-required"])["error"]
    return error.partition(":")[0]


def test_a_quote_that_has_expired_does_not_pay(world: World) -> None:
    world.offer(dev_models())
    wallet = next(world.wallets)
    before = world.usdc(wallet)
    payment = signed_payment(world, wallet)
    answer = ask(world.http, QUESTION, forge(world, payment, expires_at=int(time.time()) - 1))
    assert refused_with(answer) == "quote_expired"
    assert answer.headers["x-should-retry"] == "false"
    assert world.usdc(wallet) == before
    assert world.simulator.attempts() == []
    # The very same payment with a quote that still holds pays: nothing but the time was wrong.
    assert ask(world.http, QUESTION, forge(world, payment, expires_at=int(time.time()) + 60)).status_code == 200


def test_a_quote_sealed_with_another_secret_does_not_pay(world: World) -> None:
    world.offer(dev_models())
    wallet = next(world.wallets)
    before = world.usdc(wallet)
    real = world.gateway.environment["FAREBOX_SECRET"]
    world.gateway.environment["FAREBOX_SECRET"] = "0" * 64
    try:
        headers = forge(world, signed_payment(world, wallet), expires_at=int(time.time()) + 60)
    finally:
        world.gateway.environment["FAREBOX_SECRET"] = real
    assert refused_with(ask(world.http, QUESTION, headers)) == "quote_mismatch"
    assert world.usdc(wallet) == before
    assert world.simulator.attempts() == []


def test_a_payment_sent_again_after_its_time_gets_its_first_answer(world: World) -> None:
    """Once with an expired quote, once with an expired authorization, and once with one that nobody used in time."""
    world.offer(dev_models())
    by_quote, by_authorization, unused = next(world.wallets), next(world.wallets), next(world.wallets)
    before = {wallet.address: world.usdc(wallet) for wallet in (by_quote, by_authorization, unused)}
    signed = [signed_payment(world, wallet) for wallet in (by_quote, by_authorization, unused)]
    now = int(time.time())
    sent = [
        forge(world, signed[0], expires_at=now + 2),
        # Less than six seconds before its end an authorization is not taken any more.
        sign_until(world, by_authorization, signed[1], now + 6 + 2),
    ]
    late = sign_until(world, unused, signed[2], now + 6 + 2)
    first = [ask(world.http, QUESTION, headers) for headers in sent]
    assert [answer.status_code for answer in first] == [200, 200], [answer.text for answer in first]
    sleep_until(now + 3.1)

    again = [ask(world.http, QUESTION, headers) for headers in sent]
    assert [answer.status_code for answer in again] == [200, 200], [answer.text for answer in again]
    assert [answer.content for answer in again] == [answer.content for answer in first]
    assert {answer.headers["x-farebox-replayed"] for answer in again} == {"true"}
    assert refused_with(ask(world.http, QUESTION, late)) == "expired"

    assert len(world.simulator.attempts()) == 2
    for wallet, headers in ((by_quote, sent[0]), (by_authorization, sent[1])):
        assert before[wallet.address] - world.usdc(wallet) == amount_of(headers)
    assert world.usdc(unused) == before[unused.address]


def test_a_quoted_price_is_honoured_after_prices_have_risen(world: World) -> None:
    world.offer(dev_models())
    wallet = next(world.wallets)
    before = world.usdc(wallet)
    headers = ask_and_sign(world.http, wallet, QUESTION)
    world.offer(models("deepseek-v4-flash", "qwen3.7-flash", times=10))
    dearer = int(decoded(ask(world.http, QUESTION).headers["payment-required"])["accepts"][0]["amount"])
    assert dearer > 5 * amount_of(headers)

    answer = ask(world.http, QUESTION, headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farebox-model"] == QUESTION["model"]
    receipt = world.receipt(answer)
    assert round(float(receipt["quoted_usd"]) * 1e6) == amount_of(headers)
    # At the rates of the quote as well: at ten times them the whole payment would be gone.
    assert 0 < float(receipt["charged_usd"]) < float(receipt["quoted_usd"])
    assert before - world.usdc(wallet) == amount_of(headers)
    check_books(world.gateway)


def test_a_route_that_is_gone_is_replaced_by_one_that_costs_no_more_or_nothing_is_taken(world: World) -> None:
    rich, poor, quick = next(world.wallets), next(world.wallets), next(world.wallets)
    before = {wallet.address: world.usdc(wallet) for wallet in (rich, poor, quick)}

    world.offer(models("claude-opus-4.7"))
    dear = ask_and_sign(world.http, rich, AUTO)

    world.offer(models("deepseek-v4-flash"))
    answer = ask(world.http, AUTO, dear)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farebox-model"] == "deepseek-v4-flash"
    receipt = world.receipt(answer)
    # Paid for the dear one, charged for the cheap one.
    assert round(float(receipt["paid_usd"]) * 1e6) == amount_of(dear) == before[rich.address] - world.usdc(rich)
    assert 0 < float(receipt["charged_usd"]) < float(receipt["quoted_usd"]) / 5
    cheap, used = ask_and_sign(world.http, poor, AUTO), ask_and_sign(world.http, quick, AUTO)
    first = ask(world.http, AUTO, used)
    assert first.status_code == 200, first.text

    world.offer(models("claude-opus-4.7"))
    world.simulator.clear()
    assert refused_with(ask(world.http, AUTO, cheap)) == "route_gone"
    assert world.usdc(poor) == before[poor.address]
    # Whoever paid while the model was there gets what was paid for.
    again = ask(world.http, AUTO, used)
    assert (again.status_code, again.content) == (200, first.content)
    assert world.simulator.attempts() == []
    check_books(world.gateway)


def test_an_answer_that_was_paid_for_is_given_again_though_its_model_is_gone(world: World) -> None:
    world.offer(dev_models())
    wallet = next(world.wallets)
    before = world.usdc(wallet)
    headers = ask_and_sign(world.http, wallet, QUESTION)
    first = ask(world.http, QUESTION, headers)
    assert first.status_code == 200, first.text

    world.offer(models("claude-opus-4.7"))
    assert ask(world.http, QUESTION).status_code == 404
    again = ask(world.http, QUESTION, headers)
    assert again.status_code == 200, again.text
    assert again.content == first.content
    other = ask(world.http, QUESTION | {"max_tokens": 63}, headers)
    assert other.status_code == 404, other.text
    assert before - world.usdc(wallet) == amount_of(headers)
