"""A wallet's account over HTTP: its keys, its history, and who may do what."""

from __future__ import annotations

from typing import Any

import httpx
from eth_account.messages import encode_defunct
from eth_account.signers.local import LocalAccount

from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import ask, ask_and_sign
from tests.e2e.conftest import QUESTION


def sign_in(http: httpx.Client, wallet: LocalAccount) -> dict[str, str]:
    """The header of a session."""
    challenge = http.post("/v1/wallet/challenges", json={"address": wallet.address}).json()
    signed = wallet.sign_message(encode_defunct(text=challenge["message"]))
    session = http.post(
        "/v1/wallet/sessions", json={"message": challenge["message"], "signature": "0x" + bytes(signed.signature).hex()}
    )
    assert session.status_code == 200, session.text
    return {"authorization": f"Bearer {session.json()['token']}"}


def available(http: httpx.Client, headers: dict[str, str]) -> dict[str, str]:
    return {
        entry["symbol"]: entry["available_usd"] for entry in http.get("/v1/wallet", headers=headers).json()["balances"]
    }


def history(http: httpx.Client, headers: dict[str, str]) -> list[dict[str, Any]]:
    answer = http.get("/v1/wallet/history", headers=headers)
    assert answer.status_code == 200, answer.text
    lines: list[dict[str, Any]] = answer.json()["history"]
    return lines


def test_a_wallets_key_spends_what_a_payment_left_and_can_do_nothing_else(
    http: httpx.Client, stack: Stack, simulator: Simulator, wallet: LocalAccount
) -> None:
    costly = QUESTION | {"max_tokens": 16_000}
    paid = ask(http, costly, ask_and_sign(http, wallet, costly))
    assert paid.status_code == 200, paid.text
    session = sign_in(http, wallet)
    made = http.post("/v1/wallet/keys", headers=session, json={"name": "my agent"}).json()
    key = {"authorization": f"Bearer {made['key']}"}
    assert available(http, key) == available(http, session)

    answer = ask(http, QUESTION, key)
    assert answer.status_code == 200, answer.text
    receipt = http.get(f"/v1/receipts/{answer.headers['x-farebox-receipt']}").json()
    assert (receipt["tender"], receipt["payer"]) == ("prepaid", wallet.address.lower())
    newest, *_ = history(http, key)
    assert (newest["type"], newest["receipt"]) == ("charge", receipt["id"])
    assert newest["amount_usd"] == f"-{receipt['charged_usd']}"

    for method, path in (
        ("GET", "/v1/wallet/keys"),
        ("POST", "/v1/wallet/keys"),
        ("DELETE", f"/v1/wallet/keys/{made['id']}"),
    ):
        refused = http.request(method, path, headers=key, json={"name": "another"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "sign_in_required")
    listed = http.get("/v1/wallet/keys", headers=session).json()["keys"]
    assert made["id"] in [entry["id"] for entry in listed]
    assert made["key"] not in str(listed)

    assert http.delete(f"/v1/wallet/keys/{made['id']}", headers=session).json()["revoked_ms"]
    assert ask(http, QUESTION, key).json()["error"]["code"] == "revoked_api_key"


def test_nobody_looks_into_anothers_wallet(http: httpx.Client, stack: Stack, wallet: LocalAccount) -> None:
    for path in ("/v1/wallet", "/v1/wallet/history", "/v1/wallet/keys"):
        for headers in ({}, {"authorization": f"Bearer {stack.api_key}"}):
            refused = http.get(path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "sign_in_required")
    session = sign_in(http, wallet)
    assert http.delete("/v1/wallet/keys/key_0", headers=session).status_code == 404
    for query in ("limit=0", "limit=201", "limit=x", "before=x"):
        assert http.get(f"/v1/wallet/history?{query}", headers=session).status_code == 400
