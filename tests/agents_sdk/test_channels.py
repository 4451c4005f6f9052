"""A gateway that is paid through a channel and lies: nothing that it says raises what is signed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from agents_sdk import (
    Agent,
    ChannelDisputed,
    FareboxError,
    LimitExceeded,
    QuoteRejected,
    RequestRefused,
    SpendingPolicy,
)
from agents_sdk.money import usd_to_nano
from tests.agents_sdk import fake_gateway
from tests.agents_sdk.conftest import KEY, MakeAgent
from tests.agents_sdk.fake_channels import COST_USD, PRICE, FakeChannels, sign_voucher

POLICY = SpendingPolicy(schemes=("batch-settlement",), channel_deposit="0.01")
QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}
COST = 113
OTHER_KEY = "0x" + "77" * 32


@pytest.fixture
def gateway(gateway_server: fake_gateway.Server) -> FakeChannels:
    gateway_server.fresh()
    gateway_server.gateway = FakeChannels(gateway_server.url)
    return gateway_server.gateway


@pytest.fixture
def agent(make_agent: MakeAgent) -> Agent:
    return make_agent(policy=POLICY)


def ask(agent: Agent, number: int = 0) -> httpx.Response:
    with agent.http_client() as http:
        return http.post("/v1/chat/completions", json=QUESTION | {"seed": number})


def test_each_voucher_is_over_what_was_charged_and_the_next_price(gateway: FakeChannels, agent: Agent) -> None:
    for number in range(5):
        assert ask(agent, number).status_code == 200
    assert gateway.vouchers == [PRICE + COST * number for number in range(5)]
    assert list(gateway.deposits.values()) == [10_000]
    [channel] = agent.wallet.channels()
    assert (channel.charged_usd, channel.claimable_usd) == ("0.000565", "0.000952")
    assert agent.spent() == "0.000952", "the highest voucher, in dollars"


def lies(amount: int) -> dict[str, Callable[[str], dict[str, str] | None]]:
    """Vouchers that do not prove `amount`, by what is wrong with them."""
    return {
        "none": lambda channel: None,
        "somebody-elses": lambda channel: sign_voucher(OTHER_KEY, channel, amount),
        "another-channels": lambda channel: sign_voucher(KEY, "0x" + "ab" * 32, amount),
        "lower": lambda channel: sign_voucher(KEY, channel, PRICE),
        "altered": lambda channel: sign_voucher(KEY, channel, PRICE) | {"signedMaxClaimable": str(amount)},
        "no-signature": lambda channel: {"signedMaxClaimable": str(amount), "signature": "0x" + "00" * 65},
    }


@pytest.mark.parametrize("lie", lies(0))
def test_more_than_was_signed_has_to_be_proven(gateway: FakeChannels, agent: Agent, lie: str) -> None:
    assert ask(agent).status_code == 200
    [channel] = gateway.channels
    gateway.script = ["correct"]
    gateway.state = {"chargedCumulativeAmount": "9000", "balance": "1000000"}
    gateway.voucher = lies(9000)[lie](channel)
    with pytest.raises(
        ChannelDisputed, match=r"0\.009 USD of the channel .* by this wallet's log it can be 0\.000113 USD"
    ):
        ask(agent, 1)
    assert gateway.claimable == PRICE + COST
    # It goes on as if nothing had been said.
    assert ask(agent, 2).status_code == 200
    assert gateway.claimable <= PRICE + COST + 1


def test_a_voucher_that_another_log_signed_is_believed(gateway: FakeChannels, agent: Agent) -> None:
    assert ask(agent).status_code == 200
    [channel] = gateway.channels
    gateway.script = ["correct"]
    gateway.state = {"chargedCumulativeAmount": "8000"}
    gateway.voucher = sign_voucher(KEY, channel, 8_500)
    assert ask(agent, 1).status_code == 200
    assert gateway.claimable == 8_500, "8000 + 500"
    assert agent.spent() == "0.000613", "what this log signed first; the rest is the other one's"


def test_what_is_claimed_up_to_the_highest_voucher_changes_nothing(gateway: FakeChannels, agent: Agent) -> None:
    """The gateway knows a voucher over the maximum of an answer that cost less, and says that it cost the maximum."""
    for number in range(4):
        assert ask(agent, number).status_code == 200
    for number in range(4, 8):
        gateway.script = ["correct"]
        gateway.state = {"chargedCumulativeAmount": str(gateway.claimable)}
        gateway.voucher = sign_voucher(KEY, next(iter(gateway.channels)), gateway.claimable)
        assert ask(agent, number).status_code == 200
    # Four times it had to be another one, by one unit each; the lie was worth nothing else.
    assert gateway.claimable <= PRICE + COST * 7 + 4


def test_a_gateway_that_is_never_content_gets_a_few_vouchers_and_no_money(gateway: FakeChannels, agent: Agent) -> None:
    gateway.script = ["ok"] + ["correct"] * 50
    assert ask(agent).status_code == 200
    for number in range(1, 6):
        answer = ask(agent, number)
        assert answer.status_code == 402
    assert len(gateway.vouchers) <= 1 + 5 * 5
    assert gateway.claimable <= PRICE + COST + 25


@pytest.mark.parametrize(
    "state",
    [
        {"channelId": "0x" + "12" * 32},
        {"channelId": None},
        {"chargedCumulativeAmount": "-5"},
        {"chargedCumulativeAmount": "1e9"},
        {"chargedCumulativeAmount": 113},
        {"chargedCumulativeAmount": "9" * 60},
        {"balance": None},
    ],
    ids=str,
)
def test_a_correction_that_cannot_be_read_signs_nothing(
    gateway: FakeChannels, agent: Agent, state: dict[str, Any]
) -> None:
    assert ask(agent).status_code == 200
    gateway.script, gateway.state = ["correct"], state
    with pytest.raises(QuoteRejected):
        ask(agent, 1)
    assert len(gateway.vouchers) == 2


@pytest.mark.parametrize("cost", ["5.00", "0.0005", "not a price", ""])
def test_an_answer_never_counts_for_more_than_its_price(gateway: FakeChannels, agent: Agent, cost: str) -> None:
    gateway.cost_usd, gateway.told = cost, {"chargedCumulativeAmount": "5000000"}
    assert ask(agent).status_code == 200
    assert ask(agent, 1).status_code == 200
    assert gateway.claimable == 2 * PRICE


@pytest.mark.parametrize("told", ["9999999", "-1", "0x10", 7])
def test_what_an_answer_tells_of_the_sum_never_raises_it(gateway: FakeChannels, agent: Agent, told: object) -> None:
    gateway.told = {"chargedCumulativeAmount": told}
    for number in range(3):
        assert ask(agent, number).status_code == 200
    assert gateway.claimable == PRICE + 2 * COST


def test_a_deposit_that_is_denied_is_not_made_again(gateway: FakeChannels, agent: Agent) -> None:
    assert ask(agent).status_code == 200
    gateway.script = ["exceeds"] * 50
    for number in range(1, 5):
        assert ask(agent, number).status_code == 402
    assert len(gateway.deposits) == 1
    assert gateway.claimable <= PRICE + COST + 4


def test_new_terms_are_no_reason_to_lock_up_more(gateway: FakeChannels, agent: Agent) -> None:
    gateway.rotate = True
    assert ask(agent).status_code == 200
    for number in range(1, 6):
        with pytest.raises(LimitExceeded, match="per channel_deposit"):
            ask(agent, number)
    assert sum(gateway.deposits.values()) == 10_000


def test_new_terms_at_another_url_are_no_reason_either(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    gateway.rotate = True
    assert ask(make_agent(policy=POLICY)).status_code == 200
    with pytest.raises(LimitExceeded, match="per channel_deposit"):
        ask(make_agent(policy=POLICY, base_url=gateway.url.replace("127.0.0.1", "localhost")), 1)
    assert sum(gateway.deposits.values()) == 10_000


@pytest.mark.parametrize(
    "terms",
    [
        {"receiverAuthorizer": "0x" + "00" * 20},
        {"receiverAuthorizer": None},
        {"withdrawDelay": 30 * 86_400},
        {"withdrawDelay": 1},
        {"withdrawDelay": "86400"},
    ],
    ids=str,
)
def test_terms_that_lock_money_up_are_refused(gateway: FakeChannels, agent: Agent, terms: dict[str, Any]) -> None:
    gateway.terms = terms
    with pytest.raises(QuoteRejected):
        ask(agent)
    assert gateway.vouchers == []


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"amount": "5000000"}, QuoteRejected),
        ({"quote": {"maximum_usd": "2", "items": [{"name": "inference", "amount_usd": "2"}]}}, LimitExceeded),
        ({"resource": "https://elsewhere.example/v1/chat/completions"}, QuoteRejected),
    ],
    ids=["amount", "price", "resource"],
)
def test_prices_and_quotes_are_checked_as_ever(
    gateway: FakeChannels, agent: Agent, extra: dict[str, Any], error: type[FareboxError]
) -> None:
    gateway.extra = extra
    with pytest.raises(error):
        ask(agent)
    assert gateway.vouchers == []


def test_a_recipient_that_is_not_allowed_gets_no_channel(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    policy = SpendingPolicy(schemes=("batch-settlement",), recipients=["0x" + "99" * 20])
    with pytest.raises(FareboxError, match="not an allowed recipient"):
        ask(make_agent(policy=policy))
    assert gateway.vouchers == []


def test_the_limits_hold_whatever_the_gateway_says(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    """It takes every voucher, claims maxima, corrects, and says that answers cost nothing."""
    policy = SpendingPolicy(
        schemes=("batch-settlement",), channel_deposit="0.005", max_per_hour="0.005", max_per_day="0.005"
    )
    agent = make_agent(policy=policy)
    answers = 0
    for number in range(50):
        gateway.script = ["correct", "ok"] if number % 3 else ["ok"]
        gateway.state = {"chargedCumulativeAmount": str(gateway.claimable)}
        gateway.cost_usd = "0.0005" if number % 2 else "0.00"
        try:
            answers += ask(agent, number).status_code == 200
        except (LimitExceeded, ChannelDisputed):
            continue
    assert answers
    assert gateway.claimable <= 5_000
    assert sum(gateway.deposits.values()) <= 5_000
    assert usd_to_nano(agent.spent()) == gateway.claimable * 1000


def test_what_is_spent_of_an_old_deposit_counts_when_it_is_spent(
    gateway: FakeChannels, make_agent: MakeAgent, tmp_path: Path
) -> None:
    policy = SpendingPolicy(schemes=("batch-settlement",), channel_deposit="0.001", max_per_day="0.001")
    agent = make_agent(policy=policy)
    for number in range(5):
        assert ask(agent, number).status_code == 200
        with sqlite3.connect(tmp_path / "agent" / "log.sqlite3") as database:
            database.execute("UPDATE deposit SET created_ms = 0")  # the day before yesterday
    assert agent.remaining() == "0.000048"
    with pytest.raises(LimitExceeded, match="per day"):
        ask(agent, 5)
    assert gateway.claimable == PRICE + 4 * COST


def test_a_channel_is_paid_from_after_a_restart(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    assert ask(make_agent(policy=POLICY)).status_code == 200
    assert ask(make_agent(policy=POLICY), 1).status_code == 200
    assert gateway.vouchers == [PRICE, PRICE + COST]
    assert len(gateway.deposits) == 1


def test_a_deposit_of_which_nothing_was_heard_is_tried_before_another_is_made(
    gateway: FakeChannels, make_agent: MakeAgent, tmp_path: Path
) -> None:
    assert ask(make_agent(policy=POLICY)).status_code == 200
    path = tmp_path / "agent" / "log.sqlite3"
    with sqlite3.connect(path) as database:
        # As after a crash: the deposit is signed, its authorization is over, and the channel is not known to have it.
        database.execute("UPDATE deposit SET state = 'signed', expires_at = 1")
        database.execute("UPDATE channel SET balance = '0'")
    assert ask(make_agent(policy=POLICY), 1).status_code == 200
    assert len(gateway.deposits) == 1
    with sqlite3.connect(path) as database:
        database.execute("UPDATE deposit SET state = 'signed', expires_at = 1")
        database.execute("UPDATE channel SET balance = '0'")
    gateway.script = ["exceeds"]
    assert ask(make_agent(policy=POLICY), 2).status_code == 200
    assert len(gateway.deposits) == 2


def test_a_refund_is_asked_for_with_what_was_charged(gateway: FakeChannels, agent: Agent) -> None:
    for number in range(3):
        assert ask(agent, number).status_code == 200
    refund = agent.wallet.refund_channel(usd="0.001")
    assert refund.transaction == fake_gateway.TRANSACTION
    assert gateway.vouchers[-1] == 3 * COST
    assert gateway.claimable == PRICE + 2 * COST


@pytest.mark.parametrize("given_back", ["999999999", "0", "-5", "much"])
def test_a_refund_never_gives_back_more_than_there_was(gateway: FakeChannels, agent: Agent, given_back: str) -> None:
    assert ask(agent).status_code == 200
    gateway.given_back = given_back
    refund = agent.wallet.refund_channel()
    [channel] = agent.wallet.channels()
    assert usd_to_nano(refund.refunded_usd) + usd_to_nano(channel.deposited_usd) == 10_000_000


def test_a_refund_needs_no_voucher_that_was_not_signed_before(gateway: FakeChannels, agent: Agent) -> None:
    assert ask(agent).status_code == 200
    gateway.script = ["correct"]
    gateway.state = {"chargedCumulativeAmount": "9000"}
    gateway.voucher = sign_voucher(KEY, next(iter(gateway.channels)), 9000)
    with pytest.raises(ChannelDisputed, match=r"more of the channel .* was charged than this wallet signed for"):
        agent.wallet.refund_channel()
    assert gateway.claimable == PRICE
    gateway.script, gateway.state = ["correct"], {"chargedCumulativeAmount": "300"}
    agent.wallet.refund_channel()
    assert (gateway.vouchers[-1], gateway.claimable) == (300, PRICE)


def test_a_channel_is_its_gateways_by_whatever_url(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    """A gateway that moves keeps its receiver and its authorizer: what can be paid with can be listed and refunded."""
    assert ask(make_agent(policy=POLICY)).status_code == 200
    moved = gateway.url.replace("127.0.0.1", "localhost")
    agent = make_agent(policy=POLICY, base_url=moved)
    [channel] = agent.wallet.channels()
    assert (channel.gateway, channel.unspent_usd) == (gateway.url, "0.009887")
    assert ask(agent, 1).status_code == 200
    [channel] = agent.wallet.channels()
    assert (channel.gateway, len(gateway.deposits)) == (moved, 1)
    assert agent.wallet.refund_channel().transaction == fake_gateway.TRANSACTION


def test_a_refund_takes_the_one_channel_that_the_gateway_serves(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    for authorizer in ("0x" + "a8" * 20, "0x" + "a7" * 20):
        gateway.terms = {"receiverAuthorizer": authorizer}
        agent = make_agent(policy=POLICY if authorizer.endswith("a8") else replace(POLICY, channel_deposit="0.02"))
        assert ask(agent).status_code == 200
    served, other = agent.wallet.channels()
    assert agent.wallet.refund_channel().channel == served.id
    with pytest.raises(RequestRefused, match="does not serve the channel"):
        agent.wallet.refund_channel(other.id)


@pytest.mark.parametrize(
    ("usd", "says"),
    [
        ("5", r"5\.00 USD are asked for, and 0\.009887 USD are left in the channel"),
        ("0", r"the least that can come back of eip155:84532/USDC is 0\.000001 USD"),
        ("0.0000001", r"the least that can come back"),
        (None, "nothing in this channel that is not charged"),
    ],
)
def test_a_refund_that_cannot_be_made_says_why(gateway: FakeChannels, agent: Agent, usd: str | None, says: str) -> None:
    assert ask(agent).status_code == 200
    gateway.script = ["empty"]
    with pytest.raises(RequestRefused, match=says):
        agent.wallet.refund_channel(usd=usd)


def test_without_a_name_emptied_channels_are_told_to_be_empty(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    for authorizer in ("0x" + "a7" * 20, "0x" + "a8" * 20):
        gateway.terms = {"receiverAuthorizer": authorizer}
        agent = make_agent(policy=POLICY)
        assert ask(agent).status_code == 200
        agent.wallet.refund_channel()
    with pytest.raises(RequestRefused, match="none of the wallet's channels holds anything"):
        agent.wallet.refund_channel()


def test_a_channel_is_filled_up_to_what_is_asked_for_and_not_for_less_than_the_least_deposit(
    gateway: FakeChannels, agent: Agent
) -> None:
    assert agent.wallet.open_channel("0.006").deposited_usd == "0.006"
    opened = agent.wallet.open_channel("0.02")
    assert (opened.deposited_usd, opened.unspent_usd) == ("0.020113", "0.019887")
    assert list(gateway.deposits.values()) == [6_000, 14_113]
    # The gateway takes no deposit below 5000 units.
    asked = len(gateway.vouchers)
    assert agent.wallet.open_channel("0.02") == opened
    assert agent.wallet.open_channel("0.01") == opened
    assert len(gateway.vouchers) == asked, "nothing was asked or charged"


def test_a_channel_that_the_gateway_does_not_take_any_more_is_the_wallets_to_empty(
    gateway: FakeChannels, agent: Agent
) -> None:
    assert ask(agent).status_code == 200
    gateway.rotate = True
    with pytest.raises(RequestRefused, match=r"finalizeWithdraw"):
        agent.wallet.refund_channel()


def test_channels_of_another_name_are_others(gateway: FakeChannels, make_agent: MakeAgent) -> None:
    assert ask(make_agent(policy=POLICY, channel_name="one")).status_code == 200
    assert len(gateway.channels) == 1
    with pytest.raises(LimitExceeded):
        ask(make_agent(policy=POLICY, channel_name="two"))
    assert f"0.{COST:06d}" == COST_USD
