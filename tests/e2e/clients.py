"""Paying with the official client by hand, so that tests can keep, change and resend what it signed; and other ways to ask."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount
from prometheus_client.parser import text_string_to_metric_families
from x402.client import x402ClientSync
from x402.http import x402HTTPClientSync
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.mechanisms.evm.upto import UptoEvmClientScheme

from gateway.dev.stack import Stack

JSON = {"content-type": "application/json"}
UPTO = {"accept-payment": "upto"}
"""A 402 then offers it too."""


def official_client(account: LocalAccount, token: str | None = None) -> x402ClientSync:
    """The official client; with a token address it pays in that token, which may be one that it does not know."""
    client = x402ClientSync()
    register_exact_evm_client(client, EthAccountSigner(account))
    if token is not None:
        wanted = token.lower()
        client.set_spend_controls({"allowed_assets": True})

        def only_wanted(_version: int, requirements: Sequence[Any]) -> list[Any]:
            return [requirement for requirement in requirements if requirement.asset.lower() == wanted]

        client.register_policy(only_wanted)
    return client


def sign(account: LocalAccount, asked: httpx.Response, token: str | None = None) -> dict[str, str]:
    """The headers that pay a 402 answer."""
    assert asked.status_code == 402, asked.text
    client = official_client(account, token)
    wrapped = x402HTTPClientSync(client)
    required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
    return dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))


def sign_upto(account: LocalAccount, asked: httpx.Response) -> dict[str, str]:
    """The headers that pay a 402 answer by `upto`."""
    client = x402ClientSync()
    client.register("eip155:*", UptoEvmClientScheme(EthAccountSigner(account)))
    wrapped = x402HTTPClientSync(client)
    required = wrapped.get_payment_required_response(asked.headers.get, asked.json())
    return dict(wrapped.encode_payment_signature_header(client.create_payment_payload(required)))


def ask(http: httpx.Client, body: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
    """Send a chat completion."""
    return http.post("/v1/chat/completions", content=orjson.dumps(body), headers=JSON | (headers or {}))


def ask_and_sign(
    http: httpx.Client, account: LocalAccount, body: dict[str, Any], token: str | None = None
) -> dict[str, str]:
    """Ask for a quote and sign it."""
    return sign(account, ask(http, body), token)


def decoded(header: str) -> Any:
    """The JSON inside an x402 header."""
    return orjson.loads(base64.b64decode(header))


def encoded(value: Any) -> str:
    """An x402 header from JSON."""
    return base64.b64encode(orjson.dumps(value)).decode()


def sse_text(stream: str) -> str:
    """The words of a streamed chat completion."""
    return "".join(
        choice["delta"].get("content") or ""
        for line in stream.splitlines()
        if line.startswith("data: {")
        for choice in orjson.loads(line.removeprefix("data: "))["choices"]
    )


def sign_in(http: httpx.Client, wallet: LocalAccount) -> dict[str, str]:
    """Sign in with the wallet, as any wallet software does; returns the header that spends its balance."""
    challenge = http.post("/v1/wallet/challenges", json={"address": wallet.address}).json()
    signed = wallet.sign_message(encode_defunct(text=challenge["message"]))
    session = http.post(
        "/v1/wallet/sessions", json={"message": challenge["message"], "signature": "0x" + bytes(signed.signature).hex()}
    )
    assert session.status_code == 200, session.text
    return {"authorization": f"Bearer {session.json()['token']}"}


def available(http: httpx.Client, headers: dict[str, str]) -> dict[str, str]:
    """A wallet's balances by symbol, in dollars."""
    balances = http.get("/v1/wallet", headers=headers).json()["balances"]
    return {balance["symbol"]: balance["available_usd"] for balance in balances}


def with_key(stack: Stack) -> dict[str, str]:
    """The headers that pay with the stack's API key."""
    return {"Authorization": f"Bearer {stack.api_key}"}


def metrics(http: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What `/metrics` says, by name and labels."""
    text = http.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
