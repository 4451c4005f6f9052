"""A 402 is believed only as far as it adds up, and nothing is signed that the policy forbids."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from agents_sdk import (
    Agent,
    FareboxError,
    LimitExceeded,
    NetworkFeeTooHigh,
    NetworkNotAllowed,
    QuoteRejected,
    RecipientNotAllowed,
    SpendingPolicy,
    Token,
    TokenNotAllowed,
)
from agents_sdk.money import nano_to_atomic_up, nano_to_usd, usd_to_nano
from agents_sdk.tokens import KNOWN_TOKENS
from payments import money
from payments.chain.networks import KNOWN_NETWORKS
from tests.agents_sdk import fake_gateway
from tests.agents_sdk.conftest import MakeAgent
from tests.agents_sdk.fake_gateway import FakeGateway

QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}


def ask(agent: Agent) -> httpx.Response:
    with agent.http_client() as http:
        return http.post("/v1/chat/completions", json=QUESTION)


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"amount": "501"}, "which is 500 units of USDC; the payment asked for is 501"),
        ({"amount": "500.0"}, "the payment asked for is 500.0"),
        ({"quote": {"maximum_usd": "0.0006"}}, "add up to 0.0005 USD, its maximum is 0.0006 USD"),
        ({"quote": {"items": []}}, r"add up to 0\.00 USD"),
        ({"quote": {"items": [{"name": "inference", "amount_usd": "-1"}]}}, "no itemised quote that can be read"),
        ({"quote": {"maximum_usd": 0.0005}}, "no itemised quote that can be read"),
        ({"quote": {"expires_at": 1}}, "expired already"),
        ({"resource": "https://elsewhere.example/v1/chat/completions"}, "is for https://elsewhere.example"),
        ({"domain": {"name": "Another Coin"}}, "the signing domain of USDC"),
        ({"domain": {"version": "1"}}, "the signing domain of USDC"),
        ({"domain": {"assetTransferMethod": "permit2"}}, "USDC moves by eip3009, the 402 says permit2"),
        ({"timeout": 10**9}, "good for 1000000000 seconds"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_402_that_lies_gets_no_signature(gateway: FakeGateway, agent: Agent, lie: dict[str, Any], says: str) -> None:
    gateway.extra = lie
    with pytest.raises(QuoteRejected, match=says):
        ask(agent)
    assert gateway.nonces == set()
    assert agent.spent() == "0.00"


@pytest.mark.parametrize(
    ("policy", "refusal", "says"),
    [
        (
            {"max_per_request": "0.0004"},
            LimitExceeded,
            "may cost 0.0005 USD, more than the 0.0004 USD allowed per request",
        ),
        ({"max_per_hour": "0.0001"}, LimitExceeded, "allowed per hour"),
        ({"max_per_day": "0.0001"}, LimitExceeded, "allowed per day"),
        ({"max_network_fee": "0.00005"}, NetworkFeeTooHigh, "the network fee is 0.0001 USD"),
        ({"tokens": ["USDT"]}, TokenNotAllowed, "would be in USDC"),
        ({"networks": ["eip155:8453"]}, NetworkNotAllowed, "would be on eip155:84532"),
        ({"recipients": ["0x" + "00" * 20]}, RecipientNotAllowed, fake_gateway.PAY_TO),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_policy_refuses_before_anything_is_signed(
    gateway: FakeGateway, make_agent: MakeAgent, policy: dict[str, Any], refusal: type[FareboxError], says: str
) -> None:
    with pytest.raises(refusal, match=says):
        ask(make_agent(policy=SpendingPolicy(**policy)))
    assert gateway.nonces == set()


def test_limits_hold_for_credit_too(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    with pytest.raises(LimitExceeded):
        ask(make_agent(policy=SpendingPolicy(max_per_request="0.0004"), credit="start"))
    assert gateway.on_credit == 0


def test_allow_lists_take_any_spelling_of_an_address(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    policy = SpendingPolicy(
        tokens=[fake_gateway.USDC.address.upper().replace("0X", "0x")],
        recipients=[fake_gateway.PAY_TO.upper().replace("0X", "0x")],
        networks=[fake_gateway.NETWORK],
    )
    assert ask(make_agent(policy=policy)).status_code == 200


def test_an_unknown_token_is_refused_whatever_it_calls_itself(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    address = "0x" + "66" * 20
    gateway.tokens = [Token("USDC", fake_gateway.NETWORK, address, 6, "eip3009", "USD Coin", "2")]
    with pytest.raises(TokenNotAllowed, match=f"{address} on eip155:84532 is not known"):
        ask(make_agent())
    assert ask(make_agent(tokens=gateway.tokens)).status_code == 200


def test_the_preferred_token_is_used(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.tokens = [fake_gateway.USDC, fake_gateway.USDT]
    assert ask(make_agent(policy=SpendingPolicy(prefer=["USDT"]))).status_code == 200
    assert gateway.payments[0].accepted.asset == fake_gateway.USDT.address
    assert ask(make_agent()).status_code == 200
    assert gateway.payments[1].accepted.asset == fake_gateway.USDC.address


@pytest.mark.parametrize("header", ["", "%%%", base64.b64encode(b"{}").decode(), base64.b64encode(b"[[").decode()])
def test_a_402_that_cannot_be_read_is_refused_or_passed_on(make_agent: MakeAgent, header: str) -> None:
    answer = httpx.MockTransport(lambda _: httpx.Response(402, headers={"payment-required": header}, json={"a": 1}))
    with make_agent().http_client(transport=answer) as http:
        if header:
            with pytest.raises(QuoteRejected):
                http.post("/v1/chat/completions", json=QUESTION)
        else:
            assert http.post("/v1/chat/completions", json=QUESTION).json() == {"a": 1}


def test_amounts_are_read_and_rounded_as_the_gateway_does() -> None:
    for text in ("0", "0.05", "12.000000001", "999999999999.999999999"):
        assert usd_to_nano(text) == money.usd_to_nano(text)
        assert nano_to_usd(usd_to_nano(text)) == money.nano_to_usd(usd_to_nano(text))
    for amount in (0, 1, 999, 1000, 1001, 10**12 + 1):
        for decimals in (6, 9, 18):
            assert nano_to_atomic_up(amount, decimals) == money.nano_to_atomic_up(amount, decimals)
    for text in ("", "1e3", "-1", "0.0000000001", "1,0", "٣"):
        with pytest.raises(ValueError):
            usd_to_nano(text)


def test_the_known_tokens_are_those_that_the_gateway_knows() -> None:
    ours = {(token.chain_id, token.address): token for token in KNOWN_TOKENS}
    for network in KNOWN_NETWORKS.values():
        for theirs in network.tokens:
            known = ours[network.chain_id, theirs.address]
            assert (known.symbol, known.decimals, known.transfer_method, known.name, known.version) == (
                theirs.symbol, theirs.decimals, theirs.transfer_method, theirs.domain_name, theirs.domain_version,
            )  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"max_per_request": "5 cents"},
        {"max_per_day": 2},
        {"channel_deposit": 1.5},
        {"tokens": "USDC"},
        {"tokens": ["0xUSDC"]},
        {"networks": ["foo"]},
        {"networks": [8453]},
        {"recipients": ["foo"]},
        {"permit2_allowance": "much"},
    ],
    ids=str,
)
def test_a_policy_that_cannot_be_read_is_an_error_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        SpendingPolicy(**bad)
