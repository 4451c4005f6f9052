"""Payments made to break things: they are refused with the reason, never answered with a 500, and pay for nothing."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import aiohttp
import httpx
import orjson
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, mint
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, encoded
from tests.e2e.conftest import QUESTION

STRANGER = "0x000000000000000000000000000000000000dEaD"
_TYPES = {
    "TransferWithAuthorization": [
        {"name": "from", "type": "address"},
        {"name": "to", "type": "address"},
        {"name": "value", "type": "uint256"},
        {"name": "validAfter", "type": "uint256"},
        {"name": "validBefore", "type": "uint256"},
        {"name": "nonce", "type": "bytes32"},
    ]
}


def offer_in_usdc(http: httpx.Client) -> dict[str, Any]:
    """The x402 v1 offer for the question in USDC."""
    accepts = ask(http, QUESTION).json()["accepts"]
    return next(offer for offer in accepts if offer["asset"].lower() == USDC.address.lower())


def pay_v1(
    wallet: LocalAccount, offer: dict[str, Any], nonce: bytes, *, value: int | None = None, to: str | None = None
) -> dict[str, str]:
    """A v1 payment with a true signature, whatever it is over."""
    message = {
        "from": wallet.address,
        "to": to or offer["payTo"],
        "value": int(offer["maxAmountRequired"]) if value is None else value,
        "validAfter": 0,
        "validBefore": int(time.time()) + 300,
        "nonce": nonce,
    }
    domain = {"name": USDC.name, "version": USDC.version, "chainId": 84532, "verifyingContract": USDC.address}
    signed = wallet.sign_typed_data(domain_data=domain, message_types=_TYPES, message_data=message)
    numbers = {name: str(message[name]) for name in ("value", "validAfter", "validBefore")}
    authorization = message | numbers | {"nonce": "0x" + nonce.hex()}
    payload = {"signature": "0x" + signed.signature.hex().removeprefix("0x"), "authorization": authorization}
    payment = {"x402Version": 1, "scheme": "exact", "network": offer["network"], "payload": payload}
    return {"x-payment": encoded(payment)}


@pytest.mark.parametrize(
    ("value", "to"),
    [(1, None), (1, STRANGER), (2**256 - 1, None), (0, STRANGER)],
    ids=["value", "both", "huge", "none"],
)
def test_a_used_nonce_with_another_amount_is_a_conflict_and_a_new_one_is_refused(
    http: httpx.Client, wallet: LocalAccount, simulator: Simulator, value: int, to: str | None
) -> None:
    offer, nonce = offer_in_usdc(http), secrets.token_bytes(32)
    unused = ask(http, QUESTION, pay_v1(wallet, offer, secrets.token_bytes(32), value=value, to=to))
    assert unused.status_code == 402
    assert unused.json()["error"].startswith("wrong_amount")
    assert ask(http, QUESTION, pay_v1(wallet, offer, nonce)).status_code == 200
    changed = ask(http, QUESTION, pay_v1(wallet, offer, nonce, value=value, to=to))
    assert changed.status_code == 409
    assert changed.json()["error"]["code"] == "authorization_reused"
    assert len(simulator.attempts()) == 1


async def test_a_refused_amount_buys_nothing_while_the_right_one_comes_and_goes(
    stack: Stack, http: httpx.Client, simulator: Simulator
) -> None:
    """The wallet cannot pay the price: each right payment is reserved, refused by the chain, and forgotten. One with the same
    nonce over a single unit arrives meanwhile, so that it may find the reservation at first and none a moment later."""
    offer = offer_in_usdc(http)
    wallet: LocalAccount = Account.create()
    mint(stack.rpc_url, USDC, wallet.address, 5)
    body = orjson.dumps(QUESTION)
    async with aiohttp.ClientSession(stack.gateway_url, headers=JSON) as session:

        async def send(payment: dict[str, str], after_s: float) -> int:
            await asyncio.sleep(after_s)
            async with session.post("/v1/chat/completions", data=body, headers=payment) as answer:
                return answer.status

        for _ in range(10):
            nonce = secrets.token_bytes(32)
            right, wrong = pay_v1(wallet, offer, nonce), pay_v1(wallet, offer, nonce, value=1)
            statuses = await asyncio.gather(send(right, 0), *(send(wrong, 0.0005 * step) for step in range(16)))
            assert set(statuses) <= {402, 409}
    assert simulator.attempts() == []
