"""A wallet's account over HTTP: its keys, its history, and who may do what."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, balance_of, call_data, send_signed
from contracts.jsonrpc import rpc
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from payments.money import usd_to_nano
from tests.e2e.clients import ask, ask_and_sign, available, decoded, sign, sign_in
from tests.e2e.conftest import QUESTION


def usdc_of(stack: Stack, wallet: LocalAccount) -> int:
    return balance_of(stack.rpc_url, USDC, wallet.address)


@pytest.fixture
def fresh(stack: Stack) -> LocalAccount:
    """A wallet that nobody knows, with three dollars."""
    made: LocalAccount = Account.create()
    rpc(stack.rpc_url, "anvil_setBalance", made.address, hex(10**18))
    giver = stack.wallets[-1]["private_key"]
    send_signed(stack.rpc_url, giver, USDC.address, call_data("transfer(address,uint256)", made.address, 3_000_000))
    return made


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
    for body, says in (({}, "`name` is required: 1 to 100"), ({"name": "x" * 101}, "must be 1 to 100 printable")):
        refused = http.post("/v1/wallet/keys", headers=session, json=body)
        assert (refused.status_code, says in refused.json()["error"]["message"]) == (400, True), refused.text
    for body in ({}, {"address": "0x1"}):
        assert http.post("/v1/wallet/challenges", json=body).status_code == 400
    unread = http.post("/v1/chat/completions", json=QUESTION, headers={"SIGN-IN-WITH-X": "e30="})
    assert (unread.status_code, unread.json()["error"].partition(":")[0]) == (402, "invalid_message")
    assert "SIGN-IN-WITH-X must be" in unread.json()["error"]
    for query in ("limit=0", "limit=201", "limit=x", "before=x"):
        assert http.get(f"/v1/wallet/history?{query}", headers=session).status_code == 400


# --- top-ups and withdrawals -----------------------------------------------------------------------------------------


def top_up(http: httpx.Client, usd: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return http.post("/v1/wallet/topups", json={"amount_usd": usd}, headers=headers or {})


def nano(balances: dict[str, str], symbol: str = "USDC") -> int:
    return usd_to_nano(balances[symbol])


def test_a_top_up_becomes_balance_once_and_is_not_sent_back(
    http: httpx.Client, stack: Stack, fresh: LocalAccount
) -> None:
    asked = top_up(http, "0.75")
    described = {offer["description"] for offer in asked.json()["accepts"]}
    described.add(decoded(asked.headers["PAYMENT-REQUIRED"])["resource"]["description"])
    assert described == {"Balance of the wallet that pays, spent on answers"}
    assert asked.json()["quote"]["items"] == [{"name": "topup", "amount_usd": "0.75"}]
    payment = sign(fresh, asked)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: top_up(http, "0.75", payment), range(8)))
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert len({answer.json()["receipt"] for answer in answers}) == 1
    assert {answer.json()["credited_usd"] for answer in answers} == {"0.75"}
    assert any(
        decoded(answer.headers["PAYMENT-RESPONSE"])["success"]
        for answer in answers
        if "PAYMENT-RESPONSE" in answer.headers
    )
    session = sign_in(http, fresh)
    assert available(http, session) == {"USDC": "0.75", "USDT": "0.00"}
    (line,) = history(http, session)
    assert (line["type"], line["amount_usd"], line["transaction"]) == (
        "topup",
        "0.75",
        answers[0].json()["transaction"],
    )
    # The payment is bound to its amount: it does not pay for another one, and nothing but the first is taken.
    assert top_up(http, "0.50", payment).status_code in (402, 409)
    assert available(http, session)["USDC"] == "0.75"


def test_nobody_tops_up_anothers_wallet_by_mistake(
    http: httpx.Client, fresh: LocalAccount, wallet: LocalAccount
) -> None:
    payment = sign(fresh, top_up(http, "0.50"))
    refused = top_up(http, "0.50", payment | sign_in(http, wallet))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "payer_mismatch")
    assert available(http, sign_in(http, fresh))["USDC"] == "0.00"
    assert top_up(http, "0.50", payment | sign_in(http, fresh)).status_code == 200


def test_odd_amounts_are_refused(http: httpx.Client) -> None:
    for amount in ("0.09", "10001", "1e3", "-1", "0x10", "1.0000001", "", 5, None):
        refused = http.post("/v1/wallet/topups", json={"amount_usd": amount})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "amount_usd"), amount


def test_what_was_topped_up_and_not_spent_is_withdrawn(http: httpx.Client, stack: Stack, fresh: LocalAccount) -> None:
    session = sign_in(http, fresh)
    for amount in ("0.80", "0.70"):
        assert top_up(http, amount, sign(fresh, top_up(http, amount)) | session).status_code == 200
    assert ask(http, QUESTION, session).status_code == 200
    rest = nano(available(http, session))
    assert 0 < rest < 1_500_000_000
    body = {"asset": "USDC", "amount_usd": "all"}
    refused = http.post("/v1/wallet/withdrawals", json=body, headers=session)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_idempotency_key")
    headers = session | {"idempotency-key": secrets.token_hex(8)}
    refused = http.post("/v1/wallet/withdrawals", json=body | {"to": "0x" + "11" * 20}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "to")
    made = [http.post("/v1/wallet/withdrawals", json=body, headers=headers).json() for _ in range(3)]
    assert len({each["id"] for each in made}) == 1
    deadline = time.monotonic() + 20
    while (found := http.get(made[0]["poll"], headers=session).json())["state"] != "paid":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    before = 3 * 1_000_000
    assert usdc_of(stack, fresh) == before - 1_500_000 + rest // 1000
    assert nano(available(http, session)) == rest % 1000
    assert http.get("/v1/wallet/withdrawals", headers=session).json()["withdrawals"] == [found]
    assert http.get(made[0]["poll"], headers=sign_in(http, Account.create())).status_code == 404


def usdc_of_address(stack: Stack, address: str) -> int:
    return balance_of(stack.rpc_url, USDC, address)


def variables_of(stack: Stack) -> dict[str, str]:
    """The gateway's configuration, as `farebox dev` leaves it for a shell."""
    lines = (Path(stack.database_url.removeprefix("sqlite:///")).parent / "dev.env").read_text().splitlines()
    return dict(shlex.split(line)[1].split("=", 1) for line in lines)


def until_available(http: httpx.Client, headers: dict[str, str], usd: str) -> None:
    deadline = time.monotonic() + 20
    while (found := available(http, headers)["USDC"]) != usd:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_a_deposit_is_spent_by_a_key_and_the_rest_withdrawn_and_the_books_equal_the_chain(
    http: httpx.Client, stack: Stack, fresh: LocalAccount
) -> None:
    session = sign_in(http, fresh)
    asked = http.post("/v1/wallet/deposit-addresses", headers=session).json()
    (deposit,) = asked["deposit_addresses"]
    assert {token["symbol"] for token in asked["tokens"]} == {"USDC", "USDT"}
    data = call_data("transfer(address,uint256)", deposit["address"], 2_500_000)
    sent = send_signed(stack.rpc_url, fresh.key.hex(), USDC.address, data)
    rpc(stack.rpc_url, "anvil_mine", hex(4))
    until_available(http, session, "2.50")
    assert http.get("/v1/wallet", headers=session).json()["deposit_addresses"] == [deposit]
    (line,) = history(http, session)
    assert (line["type"], line["amount_usd"], line["transaction"]) == ("deposit", "2.50", sent)

    key = http.post("/v1/wallet/keys", headers=session, json={"name": "agent"}).json()["key"]
    assert ask(http, QUESTION, {"authorization": f"Bearer {key}"}).status_code == 200
    rest = nano(available(http, session))
    assert 0 < rest < 2_500_000_000
    headers = session | {"idempotency-key": secrets.token_hex(8)}
    body = {"asset": "USDC", "amount_usd": "all"}
    deadline = time.monotonic() + 20
    # What is deposited is not in the treasury before it is swept: until then there may be nothing to pay it out of.
    while (made := http.post("/v1/wallet/withdrawals", json=body, headers=headers)).status_code != 200:
        assert made.json()["error"]["code"] in ("treasury_short", "withdrawal_impossible"), made.text
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while (found := http.get(made.json()["poll"], headers=session).json())["state"] != "paid":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert usdc_of(stack, fresh) == 500_000 + rest // 1000
    rpc(stack.rpc_url, "anvil_mine", hex(4))
    while usdc_of_address(stack, deposit["address"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rpc(stack.rpc_url, "anvil_mine", hex(4))
    check = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "ledger", "check", "--json"],
        env=os.environ | variables_of(stack),
        capture_output=True,
        text=True,
    )
    assert json.loads(check.stdout)["findings"] == [], check.stdout + check.stderr
