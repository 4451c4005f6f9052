"""What does not pay for a request is answered 402 with the reason; what is no payment is 400; and nothing is taken or run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount

from contracts.devnet import USDC, USDT, balance_of
from gateway.dev.simulator.process import Simulator
from gateway.dev.stack import Stack
from tests.e2e.clients import JSON, ask, ask_and_sign, decoded, encoded
from tests.e2e.conftest import QUESTION

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def nothing_happens(stack: Stack, wallet: LocalAccount, simulator: Simulator) -> Any:
    """Checks afterwards that no token moved and no provider was asked."""
    tokens = [USDC, USDT]
    before = [balance_of(stack.rpc_url, token, wallet.address) for token in tokens]
    yield
    assert [balance_of(stack.rpc_url, token, wallet.address) for token in tokens] == before
    assert simulator.attempts() == []


@pytest.mark.parametrize(
    "other",
    [
        QUESTION | {"messages": [{"role": "user", "content": "Why is the sea blue?"}]},
        QUESTION | {"model": "qwen3.7-flash"},
        QUESTION | {"max_tokens": 65},
        QUESTION | {"stream": True},
    ],
    ids=["body", "model", "max_tokens", "stream"],
)
@pytest.mark.usefixtures("nothing_happens")
def test_a_payment_for_one_request_does_not_pay_for_another(
    http: httpx.Client, wallet: LocalAccount, other: dict[str, Any]
) -> None:
    answer = ask(http, other, ask_and_sign(http, wallet, QUESTION))
    assert answer.status_code == 402
    assert decoded(answer.headers["payment-required"])["error"].startswith("quote_mismatch")


@pytest.mark.usefixtures("nothing_happens")
def test_a_payment_obtained_on_another_path_does_not_pay_here(http: httpx.Client, wallet: LocalAccount) -> None:
    headers = ask_and_sign(http, wallet, QUESTION)
    answer = http.post("/v1/quote", json=QUESTION, headers=headers)
    assert answer.status_code == 200
    assert "payment-response" not in answer.headers


def _set(*path: str, to: Any) -> Change:
    def change(payment: dict[str, Any]) -> None:
        *parents, last = path
        target = payment
        for name in parents:
            target = target[name]
        target[last] = to(target[last]) if callable(to) else to

    return change


def _both(*changes: Change) -> Change:
    def change(payment: dict[str, Any]) -> None:
        for single in changes:
            single(payment)

    return change


def _one_more(value: str) -> str:
    return str(int(value) + 1)


def _one_less(value: str) -> str:
    return str(int(value) - 1)


def _other_last_byte(value: str) -> str:
    return value[:-2] + ("00" if value[-2:] != "00" else "01")


STRANGER = "0x000000000000000000000000000000000000dEaD"


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (_set("accepted", "amount", to=_one_less), {"quote_mismatch"}),
        (_set("accepted", "amount", to=_one_more), {"quote_mismatch"}),
        (_set("payload", "authorization", "value", to=_one_less), {"wrong_amount"}),
        (_set("payload", "authorization", "value", to=_one_more), {"wrong_amount"}),
        (
            _both(_set("accepted", "amount", to=_one_less), _set("payload", "authorization", "value", to=_one_less)),
            {"quote_mismatch"},
        ),
        (_set("payload", "authorization", "to", to=STRANGER), {"wrong_recipient"}),
        (_set("accepted", "payTo", to=STRANGER), {"wrong_recipient"}),
        (_set("accepted", "network", to="eip155:8453"), {"wrong_network"}),
        (_set("accepted", "network", to="solana:mainnet"), {"wrong_network"}),
        (_set("accepted", "asset", to=STRANGER), {"wrong_token"}),
        (_set("payload", "authorization", "validBefore", to="1000"), {"expired"}),
        (_set("payload", "authorization", "validAfter", to=str(int(time.time()) + 9999)), {"not_yet_valid"}),
        (_set("payload", "authorization", "nonce", to=_other_last_byte), {"bad_signature"}),
        (_set("payload", "authorization", "from", to=STRANGER), {"bad_signature"}),
        (_set("extensions", "farebox", "quote", to=_other_last_byte), {"quote_mismatch", "quote_malformed"}),
        (_set("extensions", "farebox", "quote", to="AAAA"), {"quote_malformed"}),
    ],
)
@pytest.mark.usefixtures("nothing_happens")
def test_a_payment_that_is_not_the_one_quoted_is_refused_with_the_reason(
    http: httpx.Client, wallet: LocalAccount, change: Change, codes: set[str]
) -> None:
    payment = copy.deepcopy(decoded(ask_and_sign(http, wallet, QUESTION)["PAYMENT-SIGNATURE"]))
    change(payment)
    answer = ask(http, QUESTION, {"PAYMENT-SIGNATURE": encoded(payment)})
    assert answer.status_code == 402, answer.text
    error = decoded(answer.headers["payment-required"])["error"]
    assert error.partition(":")[0] in codes, error
    assert isinstance(answer.json()["error"], str)
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "header",
    ["%%%", "", "e30=", "bnVsbA==", "W10=", encoded({"x402Version": 2}), encoded({"x402Version": 9}), "A" * 20_000],
)
@pytest.mark.parametrize("name", ["PAYMENT-SIGNATURE", "X-PAYMENT"])
@pytest.mark.usefixtures("nothing_happens")
def test_what_is_no_payment_is_400_and_says_what_is_wrong(http: httpx.Client, name: str, header: str) -> None:
    answer = ask(http, QUESTION, {name: header})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) >= {"message", "type", "code", "param"}


@pytest.mark.parametrize("spelling", ["1e3", "-1", "+5", " 5", "05", "0x5", "5.0", "٥", 5, None, "9" * 100])
@pytest.mark.usefixtures("nothing_happens")
def test_numbers_have_one_spelling(http: httpx.Client, wallet: LocalAccount, spelling: Any) -> None:
    payment = decoded(ask_and_sign(http, wallet, QUESTION)["PAYMENT-SIGNATURE"])
    payment["payload"]["authorization"]["value"] = spelling
    answer = ask(http, QUESTION, {"PAYMENT-SIGNATURE": encoded(payment)})
    assert answer.status_code == 400, answer.text
    assert "value" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "auto", "messages": ' + b"[" * 200 + b"]" * 200 + b"}", None),
        (b'{"model": "auto"}', None),
        (b'{"model": "auto", "messages": "hello"}', None),
        (b'{"model": "auto", "messages": [], "max_tokens": -1}', None),
        (b'{"model": 7, "messages": []}', None),
        (b'{"model": "auto", "messages": [{"role": "user", "content": "\xff"}]}', "invalid_json"),
    ],
)
def test_a_wrong_body_is_400_in_the_openai_form(http: httpx.Client, body: bytes, code: str | None) -> None:
    answer = http.post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert code is None or error["code"] == code


def test_an_unknown_model_is_404_with_its_name(http: httpx.Client) -> None:
    answer = ask(http, QUESTION | {"model": "gpt-99"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "gpt-99" in answer.json()["error"]["message"]


def test_headers_beyond_the_limit_are_431(http: httpx.Client) -> None:
    for headers in ({"x-long": "a" * 100_000}, {f"x-{number}": "a" * 1000 for number in range(100)}):
        answer = http.post("/v1/chat/completions", json=QUESTION, headers=headers)
        assert answer.status_code == 431
        assert answer.json()["error"]["code"] == "headers_too_large"


def test_a_body_beyond_the_limit_is_413(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", content=b" " * 5_000_000, headers=JSON)
    assert answer.status_code == 413


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("GET", "/v1/quote", 405)])
def test_other_urls_answer_in_the_same_form(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) >= {"message", "type", "code", "param"}


def test_a_402_fits_in_three_kilobytes_of_header(http: httpx.Client) -> None:
    answer = ask(http, QUESTION)
    assert answer.status_code == 402
    assert len(answer.headers["payment-required"]) <= 3_000
    offers = decoded(answer.headers["payment-required"])["accepts"]
    assert [offer["extra"]["paymentFlow"] for offer in offers] == ["upfront", "upfront"]


def test_a_key_that_is_not_known_is_401(http: httpx.Client) -> None:
    answer = ask(http, QUESTION, {"Authorization": "Bearer fbk_unknown"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_payer_without_money_is_402_with_a_fresh_quote(
    stack: Stack, http: httpx.Client, simulator: Simulator
) -> None:
    answer = ask(http, QUESTION, ask_and_sign(http, Account.create(), QUESTION))
    assert answer.status_code == 402, answer.text
    required = decoded(answer.headers["payment-required"])
    assert required["error"].startswith("insufficient_funds")
    assert required["accepts"]
    assert answer.json()["accepts"]
    assert simulator.attempts() == []
