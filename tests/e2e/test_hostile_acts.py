"""What a payer does on the chain while we work for it: takes its money away, takes back what it signed, pays in another way.

Each act comes before our look at the chain, or between it and the block. Nothing is shown that is not paid for; of `upto`,
which is paid after the answer, no more than its limit is at stake; and what a payer makes us burn has an end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from contracts.devnet import MULTICALL3_ADDRESS, PERMIT2_ADDRESS, USDC, call_data, send_as
from payments.chain.channel_contract import encode_deposit
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS
from payments.chain.transactions import encode_aggregate3, settle_call
from payments.x402.channels import ChannelPayment
from payments.x402.wire import Payment, decode_payment
from tests.e2e import chain_acts
from tests.e2e.clients import decoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn, wait_until
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import DEV_TOKENS, RICH, WAYS, Payer, Way, token

EXPOSURE_USD = "0.00007"
EXPOSURE_NANO_USD = 70_000
"""Three of our question, whose quote is about 21 millionths of a dollar."""
ELSEWHERE = "0x" + "e1" * 20
STRANGER = 9
NONCE = 77
DEPOSIT_FAILED = "invalid_batch_settlement_evm_deposit_transaction_failed"
DEPOSIT_SIMULATION = "invalid_batch_settlement_evm_deposit_simulation_failed"

Act = tuple[str, str]
"""A call of the payer's own: to whom, and its data."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("acts")
    with new_ground(
        directory, PAYMENTS__PAYER_EXPOSURE_USD=EXPOSURE_USD, PAYMENTS__UPTO_EXPOSURE_USD=EXPOSURE_USD
    ) as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def drained(payer: Payer, way: Way, headers: dict[str, str]) -> Act:
    return DEV_TOKENS[way.split()[1]].address, chain_acts.drain_call(ELSEWHERE, RICH)


def revoked(payer: Payer, way: Way, headers: dict[str, str]) -> Act:
    return DEV_TOKENS[way.split()[1]].address, call_data("approve(address,uint256)", PERMIT2_ADDRESS, 0)


def invalidated(payer: Payer, way: Way, headers: dict[str, str]) -> Act:
    """EIP-3009 cancels by signature, Permit2 by a bit of the owner's own."""
    if way == "exact USDC":
        return USDC.address, cancel_call(payer, headers)
    return PERMIT2_ADDRESS, call_data("invalidateUnorderedNonces(uint256,uint256)", NONCE >> 8, 1 << (NONCE & 255))


def cancel_call(payer: Payer, headers: dict[str, str]) -> str:
    from eth_account import Account

    return chain_acts.cancel_call(Account.from_key(payer.key.secret), headers)


ACTS: list[tuple[Way, Callable[[Payer, Way, dict[str, str]], Act], str, str]] = [
    ("exact USDC", drained, "insufficient_funds", "settlement_failed"),
    ("exact USDC", invalidated, "authorization_used", "settlement_failed"),
    ("exact USDT", drained, "insufficient_funds", "settlement_failed"),
    ("exact USDT", revoked, "permit2_allowance_required", "settlement_failed"),
    ("exact USDT", invalidated, "authorization_used", "settlement_failed"),
    ("channel USDC", drained, "insufficient_funds", DEPOSIT_FAILED),
    ("channel USDT", drained, "insufficient_funds", DEPOSIT_FAILED),
    ("channel USDT", revoked, "permit2_allowance_required", DEPOSIT_FAILED),
    ("channel USDT", invalidated, DEPOSIT_SIMULATION, DEPOSIT_FAILED),
    ("upto USDT", drained, "insufficient_funds", ""),
    ("upto USDT", revoked, "permit2_allowance_required", ""),
    ("upto USDT", invalidated, "authorization_used", ""),
]
IDS = [f"{way} {act.__name__}" for way, act, _, _ in ACTS]


def gas_of_ours(ground: Ground) -> int:
    """Wei that settling has cost so far."""
    return sum(int(fee) for (fee,) in ground.query("SELECT fee_wei FROM chain_transaction WHERE fee_wei IS NOT NULL"))


def our_transactions(ground: Ground) -> int:
    return int(ground.query("SELECT COUNT(*) FROM chain_transaction")[0][0])


@pytest.mark.parametrize(("way", "act", "code", "_"), ACTS, ids=IDS)
def test_what_came_before_our_look_is_seen_and_costs_us_nothing(
    ground: Ground, way: Way, act: Callable[..., Act], code: str, _: str
) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, way, QUESTION, nonce=NONCE)
    to, data = act(payer, way, headers)
    send_as(ground.stack.rpc_url, payer.address, to, data)
    before = our_transactions(ground)
    for _again in range(2):
        answer = ground.ask(headers, QUESTION)
        assert (answer.status_code, error_of(answer)) == (412 if "allowance" in code else 402, code)
    assert ground.served() == 0
    assert our_transactions(ground) == before


@pytest.mark.parametrize(
    ("way", "act", "_", "code"), [each for each in ACTS if each[3]], ids=[i for i in IDS if "upto" not in i]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_overtakes_our_transfer_shows_the_payer_nothing(
    ground: Ground, way: Way, act: Callable[..., Act], _: str, code: str, stream: bool
) -> None:
    payer, body = Payer(ground.stack), QUESTION | {"stream": stream}
    headers = payer.pay(ground.http, way, body, nonce=NONCE)
    with ground.stopped():
        answer = overtaken(ground, payer, headers, body, act(payer, way, headers))
    assert (answer.status_code, error_of(answer)) == (402, code), answer.text
    assert "choices" not in answer.text
    assert len(ground.simulator.attempts()) <= 1
    again = ground.ask(headers, body)
    assert again.status_code in (402, 412)
    assert len(ground.simulator.attempts()) <= 1


def overtaken(ground: Ground, payer: Payer, headers: dict[str, str], body: dict[str, Any], act: Act) -> httpx.Response:
    """Send a paid request, wait until our transaction is under way, and put another one before it in the block."""
    asked = ground.begin(headers, body)
    ground.until_broadcast(payer.address)
    chain_acts.send_dearly(ground.stack.rpc_url, payer.address, act[1], act[0])
    return ground.mine_until_answered(asked)


@pytest.mark.parametrize("act", [drained, revoked, invalidated])
def test_an_upto_answer_that_cannot_be_taken_is_a_debt_and_no_more_than_one(
    ground: Ground, act: Callable[..., Act]
) -> None:
    payer = Payer(ground.stack)
    ground.simulator.configure(QUESTION["model"], first_token_ms=600)
    headers = payer.pay(ground.http, "upto USDT", QUESTION, nonce=NONCE)
    asked = ground.begin(headers, QUESTION)
    wait_until(ground.simulator.under_way, "the answer is being made")
    to, data = act(payer, "upto USDT", headers)
    send_as(ground.stack.rpc_url, payer.address, to, data)
    answer = asked.answer()
    assert answer.status_code == 200, answer.text
    ground.check_quiet()
    assert pledges(ground, payer) == {"defaulted": 1}

    # The same again finds its answer; anything more has to be paid in another way, and first.
    assert ground.ask(headers, QUESTION).content == answer.content
    refused = ground.ask(payer.pay(ground.http, "upto USDC", QUESTION), QUESTION)
    assert (refused.status_code, error_of(refused)) == (402, "unpaid_answers")
    assert {offer["scheme"] for offer in decoded(refused.headers["payment-required"])["accepts"]} == {"exact"}
    assert ground.served() == 1


def pledges(ground: Ground, payer: Payer) -> Counter[str]:
    rows = ground.query(
        "SELECT payment_authorization.state FROM payment_authorization JOIN receipt ON receipt.id = receipt_id"
        " WHERE receipt.payer = ? AND receipt.tender = 'upto'",
        payer.address,
    )
    return Counter(state for (state,) in rows)


def test_of_many_upto_answers_at_once_a_payer_that_leaves_owes_no_more_than_the_limit(ground: Ground) -> None:
    payer = Payer(ground.stack)
    ground.simulator.configure(QUESTION["model"], first_token_ms=1_000)
    bodies = [QUESTION | {"seed": number} for number in range(12)]
    sent = [payer.pay(ground.http, "upto USDC", body) for body in bodies]
    asked = [ground.begin(headers, body) for headers, body in zip(sent, bodies, strict=True)]
    wait_until(ground.simulator.under_way, "the first answers are being made")
    payer.acts(USDC.address, "transfer(address,uint256)", ELSEWHERE, RICH)
    answers = [each.answer() for each in asked]
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 402}, statuses
    assert 1 <= statuses[200] <= 3
    assert ground.served() == statuses[200]
    ground.check_quiet()
    owed = ground.query(
        "SELECT SUM(charged_nano_usd) FROM receipt WHERE payer = ? AND tender = 'upto' AND state = 'captured'",
        payer.address,
    )[0][0]
    assert 0 < owed <= EXPOSURE_NANO_USD
    refused = {error_of(answer) for answer in answers if answer.status_code == 402}
    assert refused <= {"exposure_exceeded", "insufficient_funds"}


def test_of_many_payments_under_way_no_more_begin_early_than_the_limit(ground: Ground) -> None:
    """And when the payer takes its money away, no more answers than that were made for nothing."""
    payer = Payer(ground.stack)
    bodies = [QUESTION | {"seed": number} for number in range(10)]
    sent = [payer.pay(ground.http, "exact USDC", body) for body in bodies]
    with ground.stopped():
        asked = [ground.begin(headers, body) for headers, body in zip(sent, bodies, strict=True)]
        wait_until(
            lambda: ground.query("SELECT COUNT(*) FROM settlement WHERE payer = ?", payer.address)[0][0] == 10,
            "all are on their way",
        )
        wait_until(lambda: ground.served() >= 1, "the first have begun")
        assert len(ground.simulator.attempts()) <= 3
        chain_acts.send_dearly(ground.stack.rpc_url, payer.address, chain_acts.drain_call(ELSEWHERE, RICH))
        for each in asked:
            ground.mine_until_answered(each)
    answers = [each.answer() for each in asked]
    assert {(answer.status_code, error_of(answer)) for answer in answers} == {(402, "settlement_failed")}
    assert len(ground.simulator.attempts()) <= 3


def test_a_payer_whose_payments_fail_again_and_again_is_told_to_wait_and_burns_no_more_gas(ground: Ground) -> None:
    payer = Payer(ground.stack)
    cost = []
    for turn_ in range(3):
        body = QUESTION | {"seed": turn_}
        headers = payer.pay(ground.http, "exact USDC", body)
        before = gas_of_ours(ground)
        with ground.stopped():
            answer = overtaken(ground, payer, headers, body, (USDC.address, cancel_call(payer, headers)))
        assert error_of(answer) == "settlement_failed"
        cost.append(gas_of_ours(ground) - before)
    assert all(each > 0 for each in cost)
    sent = our_transactions(ground)
    for way in WAYS:
        refused = ground.ask(payer.pay(ground.http, way, QUESTION), QUESTION)
        assert (refused.status_code, error_of(refused)) == (402, "payments_reverted"), way
        assert " s" in decoded(refused.headers["payment-required"])["error"], "it says how long"
    assert our_transactions(ground) == sent
    assert ground.ask(Payer(ground.stack).pay(ground.http, "exact USDC", QUESTION), QUESTION).status_code == 200


# ------------------------------------------------------------------------------------------------------------ strangers


def call_of(headers: dict[str, str], way: Way) -> tuple[str, bytes]:
    """The call that executes a payment, as anybody can make it who has seen the header."""
    payment = decode_payment(headers["PAYMENT-SIGNATURE"], "payment-signature")
    if isinstance(payment, ChannelPayment):
        assert payment.deposit is not None
        return BATCH_SETTLEMENT_ADDRESS, encode_deposit(payment.config, payment.deposit)
    assert isinstance(payment, Payment)
    return settle_call(payment, token(way.split()[1]))


def through_a_batch(headers: dict[str, str], way: Way) -> tuple[str, bytes]:
    """The same among others' calls, in somebody else's batch."""
    others = (USDC.address.lower(), bytes.fromhex(call_data("balanceOf(address)", ELSEWHERE)[2:]))
    return MULTICALL3_ADDRESS, encode_aggregate3([others, call_of(headers, way), others])


@pytest.mark.parametrize("how", [call_of, through_a_batch])
@pytest.mark.parametrize("when", ["before our look", "before our block"])
@pytest.mark.parametrize("way", ["exact USDC", "exact USDT", "channel USDC", "channel USDT"])
def test_whoever_executes_it_it_is_paid_once_and_served_once(
    ground: Ground, way: Way, when: str, how: Callable[..., tuple[str, bytes]]
) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, way, QUESTION)
    to, data = how(headers, way)
    stranger = ground.stack.wallets[STRANGER]["address"]
    if when == "before our look":
        send_as(ground.stack.rpc_url, stranger, to, "0x" + data.hex())
        answer = ground.ask(headers, QUESTION)
    else:
        with ground.stopped():
            asked = ground.begin(headers, QUESTION)
            ground.until_broadcast(payer.address)
            chain_acts.send_dearly(ground.stack.rpc_url, stranger, "0x" + data.hex(), to, gas=600_000)
            answer = ground.mine_until_answered(asked)
    assert answer.status_code == 200, answer.text
    assert ground.ask(headers, QUESTION).content == answer.content
    assert ground.served() == 1
    taken = 10 * amount_of(headers) if way.startswith("channel") else amount_of(headers)
    assert RICH - ground.balance(DEV_TOKENS[way.split()[1]], payer.address) == taken


@pytest.mark.parametrize("way", ["exact USDC", "exact USDT"])
def test_a_consumed_nonce_beside_a_transfer_of_the_right_amount_is_no_payment(ground: Ground, way: Way) -> None:
    """Cancelled in one transaction, and the price sent in another: money came, but not for this, and is nobody's."""
    payer = Payer(ground.stack)
    dev = DEV_TOKENS[way.split()[1]]
    headers = payer.pay(ground.http, way, QUESTION, nonce=NONCE)
    price = amount_of(headers)
    to, data = invalidated(payer, way, headers)
    send_as(ground.stack.rpc_url, payer.address, to, data)
    payer.acts(dev.address, "transfer(address,uint256)", ground.stack.pay_to, price)
    refused = ground.ask(headers, QUESTION)
    assert (refused.status_code, error_of(refused)) == (402, "authorization_used")

    other = payer.pay(ground.http, way, QUESTION, nonce=NONCE + 1)
    with ground.stopped():
        asked = ground.begin(other, QUESTION)
        ground.until_broadcast(payer.address)
        to, data = (
            (dev.address, cancel_call(payer, other))
            if way == "exact USDC"
            else (PERMIT2_ADDRESS, call_data("invalidateUnorderedNonces(uint256,uint256)", 0, 1 << (NONCE + 1)))
        )
        chain_acts.send_dearly(ground.stack.rpc_url, payer.address, data, to)
        transfer = call_data("transfer(address,uint256)", ground.stack.pay_to, price)
        chain_acts.send_dearly(ground.stack.rpc_url, payer.address, transfer, dev.address)
        answer = ground.mine_until_answered(asked)
    assert (answer.status_code, error_of(answer)) == (402, "settlement_failed"), answer.text
    assert len(ground.simulator.attempts()) <= 1
    assert RICH - ground.balance(dev, payer.address) == 2 * price


def test_nobody_else_can_settle_an_upto_payment(ground: Ground) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, "upto USDT", QUESTION)
    to, data = call_of(headers, "upto USDT")
    stranger = ground.stack.wallets[STRANGER]["address"]
    sent = chain_acts.send_dearly(ground.stack.rpc_url, stranger, "0x" + data.hex(), to)
    wait_until(lambda: ground.rpc("eth_getTransactionReceipt", sent), "it is mined")
    assert ground.rpc("eth_getTransactionReceipt", sent)["status"] == "0x0"
    assert ground.ask(headers, QUESTION).status_code == 200
