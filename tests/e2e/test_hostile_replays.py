"""One payment, used again: at once, for something else, elsewhere, and by another name. It pays once, in every scheme."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from contracts.devnet import USDC, USDT
from tests.e2e.clients import JSON, decoded, encoded
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import CHAIN_ID, DEV_TOKENS, RICH, WAYS, Payer, Way, changed, headers, offer_of

COPIES = 50
OTHER = QUESTION | {"messages": [{"role": "user", "content": "Why is the sea blue?"}]}
TOPUPS = "/v1/wallet/topups"
TOPUP = {"amount_usd": "0.50"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("replays")) as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


async def all_at_once(
    ground: Ground, sent: list[dict[str, str]], body: dict[str, Any], path: str = "/v1/chat/completions"
) -> list[httpx.Response]:
    content = orjson.dumps(body)
    limits = httpx.Limits(max_connections=len(sent))
    async with httpx.AsyncClient(base_url=ground.stack.gateway_url, timeout=60, limits=limits) as http:
        return await asyncio.gather(*(http.post(path, content=content, headers=JSON | each) for each in sent))


def spent(ground: Ground, payer: Payer) -> int:
    """Atomic units of both tokens that have left a payer."""
    return sum(RICH - ground.balance(token, payer.address) for token in (USDC, USDT))


def may_be_spent(payer: Payer, way: Way, price: int) -> int:
    """The most that one payment takes from its payer: a channel's is its whole deposit, which stays its own."""
    return payer.channels[way.split()[1]].deposited if way.startswith("channel") else price


@pytest.mark.parametrize("way", WAYS)
async def test_fifty_copies_at_once_are_one_answer_and_one_payment(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION)
    answers = await all_at_once(ground, [signed] * COPIES, QUESTION)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 409}, statuses
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert ground.served() == 1
    ground.check_quiet()
    assert 0 < spent(ground, payer) <= may_be_spent(payer, way, amount_of(signed))


async def test_fifty_copies_of_one_voucher_are_one_answer(ground: Ground) -> None:
    payer = Payer(ground.stack)
    opened = ground.ask(payer.pay(ground.http, "channel USDC", QUESTION), QUESTION)
    payer.channels["USDC"].heard(opened)
    signed = payer.pay(ground.http, "channel USDC", OTHER)
    answers = await all_at_once(ground, [signed] * COPIES, OTHER)
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert ground.served() == 2


async def test_fifty_copies_of_a_top_up_are_one_credit(ground: Ground) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, "exact USDC", TOPUP, path=TOPUPS)
    answers = await all_at_once(ground, [signed] * COPIES, TOPUP, TOPUPS)
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.json()["receipt"] for answer in answers if answer.status_code == 200}) == 1
    assert spent(ground, payer) == amount_of(signed) == 500_000
    assert credit(ground, payer) == 500_000_000
    assert ground.served() == 0


def credit(ground: Ground, payer: Payer, symbol: str = "USDC") -> int:
    """Nano-USD that a payer has with the gateway."""
    account = f"payer:{payer.address}@eip155:{CHAIN_ID}/{symbol}"
    rows = ground.query("SELECT balance FROM ledger_account WHERE id = ?", account)
    return int(rows[0][0]) if rows else 0


@pytest.mark.parametrize("way", WAYS)
def test_a_payment_pays_for_no_other_request(ground: Ground, way: Way) -> None:
    """Before it was used and after, with the quote of its own request, with the other one's, and with none."""
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION)
    fresh = payer.ask(ground.http, way, OTHER)
    foreign = [signed, changed(signed, lambda p: p.update(extensions={})), with_offer(signed, fresh, way)]

    before = ground.ask(foreign[0], OTHER)
    assert (before.status_code, error_of(before)) == (402, "quote_mismatch")
    used = ground.ask(signed, QUESTION)
    assert used.status_code == 200, used.text
    for each in foreign:
        again = ground.ask(each, OTHER)
        assert again.status_code in (402, 409), again.text
        assert "choices" not in again.text
    assert ground.served() == 1
    ground.check_quiet()
    assert spent(ground, payer) <= may_be_spent(payer, way, amount_of(signed))


def with_offer(signed: dict[str, str], required: dict[str, Any], way: Way) -> dict[str, str]:
    """A signed payment beside another request's offer and quote."""
    payment = decoded(signed["PAYMENT-SIGNATURE"])
    return signed | {
        "PAYMENT-SIGNATURE": encoded(
            payment | {"accepted": offer_of(required, way), "extensions": required["extensions"]}
        )
    }


@pytest.mark.parametrize("way", WAYS)
async def test_of_one_payment_for_many_requests_at_once_one_is_answered(ground: Ground, way: Way) -> None:
    """Without quotes, so that nothing but the payment itself is bound to a request."""
    payer = Payer(ground.stack)
    signed = changed(payer.pay(ground.http, way, QUESTION), lambda p: p.update(extensions={}))
    bodies = [QUESTION | {"seed": number} for number in range(20)]
    async with httpx.AsyncClient(base_url=ground.stack.gateway_url, timeout=60) as http:
        answers = await asyncio.gather(
            *(http.post("/v1/chat/completions", content=orjson.dumps(body), headers=JSON | signed) for body in bodies)
        )
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] == 1, statuses
    assert set(statuses) <= {200, 402, 409}, statuses
    assert ground.served() == 1


def test_a_payment_for_an_answer_is_no_top_up_and_the_other_way_round(ground: Ground) -> None:
    payer = Payer(ground.stack)
    topup = payer.pay(ground.http, "exact USDC", TOPUP, path=TOPUPS)
    as_answer = ground.ask(topup, QUESTION)
    assert (as_answer.status_code, error_of(as_answer)) == (402, "quote_mismatch")
    signed = payer.pay(ground.http, "exact USDC", QUESTION)
    as_topup = ground.ask(signed, TOPUP, TOPUPS)
    assert (as_topup.status_code, error_of(as_topup)) == (402, "quote_mismatch")

    # Used for what it is for, it is nothing else any more, whatever stands beside it.
    assert ground.ask(topup, TOPUP, TOPUPS).status_code == 200
    assert ground.ask(changed(topup, lambda p: p.update(extensions={})), QUESTION).status_code in (402, 409)
    assert ground.ask(signed, QUESTION).status_code == 200
    assert ground.ask(changed(signed, lambda p: p.update(extensions={})), TOPUP, TOPUPS).status_code in (402, 409)
    assert ground.served() == 1
    assert spent(ground, payer) == 500_000 + amount_of(signed)


@pytest.mark.parametrize("way", WAYS)
def test_a_signature_for_another_chain_pays_nothing(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION, chain_id=8453)
    answer = ground.ask(signed, QUESTION)
    assert answer.status_code == 402
    assert error_of(answer) in ("bad_signature", "invalid_batch_settlement_evm_voucher_signature")
    elsewhere = ground.ask(changed(signed, lambda p: p["accepted"].update(network="eip155:8453")), QUESTION)
    assert (elsewhere.status_code, error_of(elsewhere)) == (402, "wrong_network")
    assert (ground.served(), spent(ground, payer)) == (0, 0)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("channel")])
def test_a_fake_token_of_the_same_name_pays_nothing(ground: Ground, way: Way) -> None:
    """Truly signed in a token that anybody could have put on the chain, under the name and the domain of the real one."""
    fake = "0x" + "fa" * 20
    symbol = way.split()[1]
    ground.rpc("anvil_setCode", fake, ground.rpc("eth_getCode", DEV_TOKENS[symbol].address, "latest"))
    payer = Payer(ground.stack)
    signed = payer.pay(ground.http, way, QUESTION, token_address=fake)
    answer = ground.ask(signed, QUESTION)
    assert answer.status_code == 402
    assert error_of(answer) in ("bad_signature", "wrong_token")
    accepted = ground.ask(changed(signed, lambda p: p["accepted"].update(asset=fake)), QUESTION)
    assert (accepted.status_code, error_of(accepted)) == (402, "wrong_token")
    assert (ground.served(), spent(ground, payer)) == (0, 0)


def relabelled(payment: dict[str, Any], way: Way, required: dict[str, Any]) -> dict[str, str]:
    """A payment under another scheme's offer, its authorization given the members that this one has, and no others."""
    payment = copy.deepcopy(payment)
    payment["accepted"] = offer_of(required, way)
    witness = payment["payload"]["permit2Authorization"]["witness"]
    if way.startswith("upto"):
        witness["facilitator"] = payment["accepted"]["extra"]["facilitatorAddress"].lower()
    else:
        witness.pop("facilitator")
    return headers(way, payment)


@pytest.mark.parametrize(("signed_for", "shown_as"), [("exact USDT", "upto USDT"), ("upto USDT", "exact USDT")])
def test_a_permit_for_one_scheme_is_none_for_the_other(ground: Ground, signed_for: Way, shown_as: Way) -> None:
    payer = Payer(ground.stack)
    required = payer.ask(ground.http, shown_as, QUESTION)
    payment = payer.sign(signed_for, payer.ask(ground.http, signed_for, QUESTION))
    answer = ground.ask(relabelled(payment, shown_as, required), QUESTION)
    assert (answer.status_code, error_of(answer)) == (402, "wrong_spender")

    # With the spender that the scheme wants, it is not what was signed.
    payment["payload"]["permit2Authorization"]["spender"] = payer.sign(shown_as, required)["payload"][
        "permit2Authorization"
    ]["spender"]
    answer = ground.ask(relabelled(payment, shown_as, required), QUESTION)
    assert (answer.status_code, error_of(answer)) == (402, "bad_signature")
    assert (ground.served(), spent(ground, payer)) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [("exact USDT", "upto USDT"), ("upto USDT", "exact USDT")])
def test_one_permit2_nonce_pays_once_whatever_the_scheme(ground: Ground, first: Way, second: Way) -> None:
    """Permit2 counts nonces by owner, so that two true signatures with one nonce are one payment."""
    payer, nonce = Payer(ground.stack), 77
    signed = payer.pay(ground.http, first, QUESTION, nonce=nonce)
    assert ground.ask(signed, QUESTION).status_code == 200
    again = ground.ask(payer.pay(ground.http, second, OTHER, nonce=nonce), OTHER)
    assert (again.status_code, error_of(again)) == (409, "authorization_reused")
    assert ground.served() == 1
    ground.check_quiet()
    assert spent(ground, payer) <= amount_of(signed)


async def test_one_permit2_nonce_in_three_schemes_at_once_pays_for_what_is_answered(ground: Ground) -> None:
    """An `upto` answer is settled after it is given, so a deposit with its nonce overtakes it: what that costs is a debt."""
    payer, nonce = Payer(ground.stack), 78
    ways: list[Way] = ["exact USDT", "upto USDT", "channel USDT"]
    sent = [payer.pay(ground.http, way, QUESTION, nonce=nonce) for way in ways]
    answers = await asyncio.gather(*(all_at_once(ground, [each], QUESTION) for each in sent))
    statuses = [answer.status_code for (answer,) in answers]
    assert set(statuses) <= {200, 402, 409}, statuses
    ground.check_quiet()
    unpaid = ground.query(
        "SELECT COUNT(*) FROM payment_authorization JOIN receipt ON receipt.id = receipt_id"
        " WHERE receipt.payer = ? AND payment_authorization.state = 'defaulted'",
        payer.address,
    )[0][0]
    assert unpaid <= 1
    assert ground.served() - statuses.count(200) <= 1, "at most one answer that nobody was shown"
    if unpaid:
        refused = ground.ask(payer.pay(ground.http, "upto USDC", OTHER), OTHER)
        assert (refused.status_code, error_of(refused)) == (402, "unpaid_answers")


def test_a_deposit_s_authorization_is_no_payment(ground: Ground) -> None:
    """`receiveWithAuthorization` to the collector, shown as a transfer to the treasury."""
    payer = Payer(ground.stack)
    deposit = payer.sign("channel USDC", payer.ask(ground.http, "channel USDC", QUESTION))["payload"]["deposit"]
    erc3009 = deposit["authorization"]["erc3009Authorization"]
    payment = payer.sign("exact USDC", payer.ask(ground.http, "exact USDC", QUESTION))
    payment["payload"]["signature"] = erc3009["signature"]
    payment["payload"]["authorization"] |= {name: erc3009[name] for name in ("validAfter", "validBefore")}
    answer = ground.ask(headers("exact USDC", payment), QUESTION)
    assert (answer.status_code, error_of(answer)) == (402, "bad_signature")
    assert (ground.served(), spent(ground, payer)) == (0, 0)
