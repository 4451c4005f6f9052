"""Payers of channels who mean harm: worthless vouchers, money withdrawn while we sleep, refunds that are asked for twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contracts.devnet import USDC, RpcRefused
from tests.e2e import chain_acts
from tests.e2e.clients import decoded, encoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, error_of, turn, wait_until
from tests.e2e.grounds import ground as new_ground
from tests.e2e.nodes import FaultyNode
from tests.e2e.payers import RICH, Channel, Payer, Way, headers

CODE = "invalid_batch_settlement_evm_"
DELAY_S = 900
WAY: Way = "channel USDC"
LATER = int(time.time()) + 10**6
"""For what is signed on a chain whose clock was put forward."""


@pytest.fixture(scope="module")
def node() -> Iterator[FaultyNode]:
    """Between the gateway and the chain."""
    with FaultyNode() as made:
        yield made


@pytest.fixture(scope="module")
def shared(node: FaultyNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    def between(chain: str) -> list[str]:
        node.target = chain
        return [node.url]

    with new_ground(
        tmp_path_factory.mktemp("hostile-channels"),
        nodes=between,
        PAYMENTS__CHANNEL_WITHDRAW_DELAY_S=str(DELAY_S),
        PAYMENTS__CHANNEL_CLAIM_AGE_S="3600",
        PAYMENTS__SETTLEMENT_WAIT_S="20",
    ) as made:
        yield made


@pytest.fixture
def ground(shared: Ground, node: FaultyNode) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine
        node.heal()


def opened(ground: Ground) -> tuple[Payer, Channel]:
    """A payer with a channel that has paid for one answer."""
    payer = Payer(ground.stack)
    answer = ground.ask(payer.pay(ground.http, WAY, QUESTION, valid_before=LATER), QUESTION)
    assert answer.status_code == 200, answer.text
    channel = payer.channels["USDC"]
    channel.heard(answer)
    return payer, channel


def row(ground: Ground, payer: Payer) -> dict[str, Any]:
    names = ("state", "balance", "charged_nano_usd", "claimed_nano_usd", "lost_nano_usd", "refunding", "total_claimed")
    found = ground.query(f"SELECT {', '.join(names)} FROM channel WHERE payer = ?", payer.address)
    return {name: value if name == "state" else int(value) for name, value in zip(names, found[0], strict=True)}


def stale(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(channel.charged)


def low(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(channel.charged + price - 1)


def high(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(channel.deposited + 1)


def huge(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(2**128 - 1)


def of_another_channel(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(channel.charged + price, channel.number ^ 1)


def of_another_chain(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    return channel.voucher(channel.charged + price, chain_id=8453)


def of_another_payer(payer: Payer, channel: Channel, price: int) -> dict[str, Any]:
    signed = channel.voucher(channel.charged + price)
    other = Payer(payer.stack, usdc=0, usdt=0, approved=False)
    own, channel.payer = channel.payer, other
    forged = channel.voucher(channel.charged + price)
    channel.payer = own
    return signed | {"signature": forged["signature"]}


@pytest.mark.parametrize(
    ("voucher", "code"),
    [
        (stale, "cumulative_amount_mismatch"),
        (low, "cumulative_amount_mismatch"),
        (high, "cumulative_exceeds_balance"),
        (huge, "cumulative_exceeds_balance"),
        (of_another_channel, "channel_id_mismatch"),
        (of_another_chain, "voucher_signature"),
        (of_another_payer, "voucher_signature"),
    ],
)
def test_a_voucher_that_covers_nothing_buys_nothing_and_the_right_one_still_does(
    ground: Ground, voucher: Callable[[Payer, Channel, int], dict[str, Any]], code: str
) -> None:
    payer, channel = opened(ground)
    other = QUESTION | {"seed": 1}
    payment = payer.sign(WAY, payer.ask(ground.http, WAY, other))
    wrong = payment | {
        "payload": payment["payload"] | {"voucher": voucher(payer, channel, int(payment["accepted"]["amount"]))}
    }
    refused = ground.ask(headers(WAY, wrong), other)
    assert (refused.status_code, error_of(refused)) == (402, CODE + code), refused.text
    assert ground.served() == 1
    if voucher is high or voucher is huge:
        # Its payer has signed more than there is: whatever it signs now, it cannot take that back.
        return
    assert ground.ask(headers(WAY, payment), other).status_code == 200
    assert ground.served() == 2


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("receiver", "0x" + "ee" * 20, "receiver_mismatch"),
        ("receiverAuthorizer", "0x" + "ee" * 20, "receiver_authorizer_mismatch"),
        ("token", "0x" + "ee" * 20, "token_mismatch"),
        ("withdrawDelay", 1, "withdraw_delay_mismatch"),
        ("withdrawDelay", DELAY_S - 1, "withdraw_delay_mismatch"),
        ("payer", "0x" + "00" * 20, "deposit_payload"),
        ("payerAuthorizer", "0x" + "00" * 20, "channel_id_mismatch"),
        ("salt", "0x" + "11" * 32, "channel_id_mismatch"),
    ],
)
def test_a_channel_that_is_not_as_offered_pays_nothing(ground: Ground, name: str, value: Any, code: str) -> None:
    payer = Payer(ground.stack)
    payment = payer.sign(WAY, payer.ask(ground.http, WAY, QUESTION), valid_before=LATER)
    payment["payload"]["channelConfig"][name] = value
    refused = ground.ask(headers(WAY, payment), QUESTION)
    assert (refused.status_code, error_of(refused)) == (402, CODE + code)
    assert (ground.served(), ground.balance(USDC, payer.address)) == (0, RICH)


def refund(channel: Channel, payment: dict[str, Any], **more: str) -> dict[str, str]:
    """The headers that ask for what was not charged."""
    voucher = channel.voucher(channel.charged)
    payload = {"type": "refund", "channelConfig": channel.config_json(), "voucher": voucher} | more
    return {"PAYMENT-SIGNATURE": encoded(payment | {"payload": payload})}


def test_a_refund_asked_for_twenty_times_at_once_is_one(ground: Ground) -> None:
    payer, channel = opened(ground)
    payment = payer.sign(WAY, payer.ask(ground.http, WAY, QUESTION))
    asked = [ground.begin(refund(channel, payment), {}, method="GET") for _ in range(20)]
    answers = [each.answer() for each in asked]
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] >= 1, answers[0].text
    assert set(statuses) <= {200, 202, 402}, statuses
    assert {error_of(each) for each in answers if each.status_code == 402} <= {f"{CODE}refund_no_balance"}
    transactions = {
        decoded(each.headers["payment-response"])["transaction"] for each in answers if each.status_code == 200
    }
    assert len(transactions) == 1
    assert RICH - ground.balance(USDC, payer.address) == channel.charged
    again = ground.begin(refund(channel, payment), {}, method="GET").answer()
    assert (again.status_code, error_of(again)) == (402, f"{CODE}refund_no_balance")


def test_a_refund_that_somebody_else_submits_first_is_one_and_is_known(ground: Ground) -> None:
    """Our signature is public once our transaction is: whoever copies the call refunds the same channel once."""
    payer, channel = opened(ground)
    payment = payer.sign(WAY, payer.ask(ground.http, WAY, QUESTION))
    with ground.stopped():
        asked = ground.begin(refund(channel, payment), {}, method="GET")
        ours = ground.until_broadcast(payer.address)
        chain_acts.send_dearly(ground.stack.rpc_url, payer.address, ours["input"], ours["to"], gas=400_000)
        answer = ground.mine_until_answered(asked)
    assert answer.status_code in (200, 402), answer.text
    wait_until(lambda: row(ground, payer)["balance"] == channel.charged, "the book knows", lambda: row(ground, payer))
    assert RICH - ground.balance(USDC, payer.address) == channel.charged


def test_a_withdrawal_is_answered_with_a_claim_before_it_can_be_finished(ground: Ground) -> None:
    payer, channel = opened(ground)
    owed = row(ground, payer)["charged_nano_usd"] // 1_000
    channel.acts("initiateWithdraw", channel.deposited)
    wait_until(lambda: row(ground, payer)["claimed_nano_usd"] // 1_000 == owed, "it is claimed", seconds=30)
    refused = ground.ask(payer.pay(ground.http, WAY, QUESTION | {"seed": 1}), QUESTION | {"seed": 1})
    assert (refused.status_code, error_of(refused)) == (402, f"{CODE}cumulative_exceeds_balance")
    ground.rpc("evm_increaseTime", DELAY_S + 1)
    channel.acts("finalizeWithdraw")
    assert RICH - ground.balance(USDC, payer.address) == owed
    assert row(ground, payer)["lost_nano_usd"] == 0
    assert ground.served() == 1


def test_what_is_withdrawn_while_we_have_no_node_is_a_loss_that_is_known_and_ends(
    ground: Ground, node: FaultyNode
) -> None:
    """Vouchers need no chain, so answers go on without one: until what is owed could not be claimed for too long."""
    payer, channel = opened(ground)
    node.fault = "status"
    other = QUESTION | {"seed": 1}
    paid = payer.sign(WAY, payer.ask(ground.http, WAY, other))
    answer = ground.ask(headers(WAY, paid), other)
    assert answer.status_code == 200, answer.text
    channel.heard(answer)
    patience_ms = (3_600 + DELAY_S // 2 + 1) * 1_000
    ground.write(
        "UPDATE channel SET unclaimed_since_ms = unclaimed_since_ms - ? WHERE payer = ?", patience_ms, payer.address
    )
    third = QUESTION | {"seed": 2}
    late = headers(WAY, payer.sign(WAY, payer.ask(ground.http, WAY, third)))
    refused = ground.ask(late, third)
    assert (refused.status_code, error_of(refused)) == (503, "channel_unclaimed")
    assert ground.served() == 2

    channel.acts("initiateWithdraw", channel.deposited)
    ground.rpc("evm_increaseTime", DELAY_S + 1)
    channel.acts("finalizeWithdraw")
    node.heal()
    wait_until(lambda: row(ground, payer)["state"] == "drained", "it is known", lambda: row(ground, payer), seconds=40)
    lost = row(ground, payer)
    assert lost["lost_nano_usd"] == lost["charged_nano_usd"] > 0
    refused = ground.ask(late, third)
    assert refused.status_code in (402, 503), refused.text
    assert ground.served() == 2
    ground.mine(3)
    ground.check_books()


def test_nobody_but_the_payer_can_begin_a_withdrawal(ground: Ground) -> None:
    payer, channel = opened(ground)
    before = ground.balance(USDC, payer.address)
    own, channel.payer = channel.payer, Payer(ground.stack, usdc=0, usdt=0, approved=False)
    with pytest.raises(RpcRefused):
        channel.acts("initiateWithdraw", 1)
    channel.payer = own
    assert ground.balance(USDC, payer.address) == before
