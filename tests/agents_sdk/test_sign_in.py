"""Only a sign-in message is signed as one."""

from __future__ import annotations

import time

import httpx
import pytest

from agents_sdk import SignInRefused
from agents_sdk.sign_in import check_message
from tests.agents_sdk.conftest import ADDRESS, MakeAgent
from tests.agents_sdk.fake_gateway import FakeGateway, sign_in_message

HOST = "gateway.example:8402"
NOW = 1_800_000_000


def check(message: str, now: float = NOW) -> None:
    check_message(message, address=ADDRESS, base_url=httpx.URL(f"http://{HOST}"), now=now)


def test_the_gateways_own_message_is_good() -> None:
    check(sign_in_message(HOST, ADDRESS, NOW))


@pytest.mark.parametrize(
    ("replaced", "by"),
    [
        (HOST, "gateway.example"),
        (f"URI: http://{HOST}", "URI: http://elsewhere.example"),
        (ADDRESS, "0x" + "00" * 20),
        ("Sign in to Farebox", "Transfer everything"),
        ("Version: 1", "Version: 2"),
        ("This does not move funds.", "This does not move funds.\nResources:\n- https://elsewhere.example"),
        ("2027-01-15T08:05:00Z", "2029-01-15T08:05:00Z"),
        ("Chain ID: 84532", "Chain ID: all"),
    ],
)
def test_a_message_that_differs_is_not_signed(replaced: str, by: str) -> None:
    message = sign_in_message(HOST, ADDRESS, NOW)
    assert replaced in message
    with pytest.raises(SignInRefused):
        check(message.replace(replaced, by))


@pytest.mark.parametrize("late", [-3600, 301])
def test_a_message_for_another_time_is_not_signed(late: int) -> None:
    with pytest.raises(SignInRefused, match="not good now"):
        check(sign_in_message(HOST, ADDRESS, NOW), NOW + late)


def test_an_appended_line_is_not_signed() -> None:
    with pytest.raises(SignInRefused):
        check(sign_in_message(HOST, ADDRESS, NOW) + "\nResources:\n- x")


def test_asking_for_the_credit_says_why_it_was_not_signed(gateway: FakeGateway, make_agent: MakeAgent) -> None:
    gateway.message = sign_in_message("elsewhere.example", ADDRESS, int(time.time()))
    with pytest.raises(SignInRefused, match=r"is for elsewhere\.example"):
        make_agent().credit()
