"""Tokens that refuse, stop, or take a part: Circle's own USDC and a dollar like Tether's, in every scheme.

A transfer that the token will not make is seen before it costs anything; one that it refuses in the block shows the payer
nothing; and what a token keeps for itself is nobody's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from contracts.devnet import OWNER_ADDRESS, USDC, USDT, DevToken, as_owner, call_data, load
from tests.contracts import circle
from tests.e2e import chain_acts
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn, wait_until
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import DEV_TOKENS, RICH, WAYS, Payer, Way

DEAR = QUESTION | {"model": "gpt-5.4", "max_tokens": 2_000}
"""About three cents: a fee of a thousandth shows."""
FAILED = frozenset({"settlement_failed", "invalid_batch_settlement_evm_deposit_transaction_failed"})
REFUSED = frozenset({"transfer_would_fail", "invalid_batch_settlement_evm_deposit_simulation_failed"})
BLACKLIST = {
    "USDC": ("blacklist(address)", "unBlacklist(address)"),
    "USDT": ("addBlackList(address)", "removeBlackList(address)"),
}
PROMPT_WAYS = tuple(way for way in WAYS if not way.startswith("upto"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("tokens")) as made:
        circle.place(load(made.stack.rpc_url))
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def dev_of(way: Way) -> DevToken:
    return DEV_TOKENS[way.split()[1]]


def owner_acts(ground: Ground, dev: DevToken, signature: str, *arguments: str | int) -> None:
    as_owner(ground.stack.rpc_url, dev, signature, *arguments)


def settlements(ground: Ground, payer: Payer) -> int:
    """How many transfers of a payer were ever begun."""
    return int(ground.query("SELECT COUNT(*) FROM settlement WHERE payer = ?", payer.address)[0][0])


@pytest.mark.parametrize("way", WAYS)
def test_a_blacklisted_payer_is_refused_and_served_once_it_is_not(ground: Ground, way: Way) -> None:
    payer, dev = Payer(ground.stack), dev_of(way)
    on, off = BLACKLIST[dev.symbol]
    headers = payer.pay(ground.http, way, QUESTION)
    owner_acts(ground, dev, on, payer.address)
    refused = ground.ask(headers, QUESTION)
    assert refused.status_code == 402
    assert error_of(refused) in REFUSED, refused.text
    assert (ground.served(), settlements(ground, payer)) == (0, 0)
    owner_acts(ground, dev, off, payer.address)
    assert ground.ask(headers, QUESTION).status_code == 200
    assert ground.served() == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_paused_token_pays_nothing_and_goes_on_when_it_does(ground: Ground, way: Way) -> None:
    payer, dev = Payer(ground.stack), dev_of(way)
    headers = payer.pay(ground.http, way, QUESTION)
    owner_acts(ground, dev, "pause()")
    try:
        refused = ground.ask(headers, QUESTION)
        assert refused.status_code == 402
        assert error_of(refused) in REFUSED, refused.text
        assert (ground.served(), settlements(ground, payer)) == (0, 0)
    finally:
        owner_acts(ground, dev, "unpause()")
    assert ground.ask(headers, QUESTION).status_code == 200


@pytest.mark.parametrize("way", ["exact USDC", "upto USDC"])
def test_a_blacklisted_treasury_is_paid_nothing_and_serves_nobody_until_it_is_not(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, way, QUESTION)
    owner_acts(ground, USDC, "blacklist(address)", ground.stack.pay_to)
    try:
        refused = ground.ask(headers, QUESTION)
        assert (refused.status_code, error_of(refused)) == (402, "transfer_would_fail")
        assert (ground.served(), settlements(ground, payer)) == (0, 0)
    finally:
        owner_acts(ground, USDC, "unBlacklist(address)", ground.stack.pay_to)
    assert ground.ask(headers, QUESTION).status_code == 200


def test_what_a_channel_owes_a_blacklisted_treasury_is_claimed_when_it_is_not(ground: Ground) -> None:
    payer = Payer(ground.stack)
    owner_acts(ground, USDC, "blacklist(address)", ground.stack.pay_to)
    try:
        assert ground.ask(payer.pay(ground.http, "channel USDC", QUESTION), QUESTION).status_code == 200
        wait_until(lambda: _claim_from(ground, payer) > 0, "the claim was tried, and put off")
        # What would fail costs nothing.
        assert not ground.query("SELECT 1 FROM settlement WHERE kind = 'channel_claim' AND state = 'failed'")
    finally:
        owner_acts(ground, USDC, "unBlacklist(address)", ground.stack.pay_to)
    # It is tried again in a minute; the test does not wait for that.
    ground.write("UPDATE channel SET claim_from_ms = 0 WHERE payer = ?", payer.address)
    wait_until(lambda: _outstanding(ground, payer) < 1_000, "it is claimed")


def _claim_from(ground: Ground, payer: Payer) -> int:
    return int(ground.query("SELECT claim_from_ms FROM channel WHERE payer = ?", payer.address)[0][0])


def _outstanding(ground: Ground, payer: Payer) -> int:
    sql = "SELECT charged_nano_usd - claimed_nano_usd FROM channel WHERE payer = ?"
    return int(ground.query(sql, payer.address)[0][0])


def blacklists_payer(ground: Ground, payer: Payer, dev: DevToken) -> str:
    return call_data(BLACKLIST[dev.symbol][0], payer.address)


def pauses(ground: Ground, payer: Payer, dev: DevToken) -> str:
    return call_data("pause()")


@pytest.mark.parametrize("act", [blacklists_payer, pauses])
@pytest.mark.parametrize("way", PROMPT_WAYS)
def test_what_the_token_refuses_in_the_very_block_shows_the_payer_nothing(
    ground: Ground, way: Way, act: Callable[[Ground, Payer, DevToken], str]
) -> None:
    payer, dev = Payer(ground.stack), dev_of(way)
    headers = payer.pay(ground.http, way, QUESTION)
    try:
        with ground.stopped():
            asked = ground.begin(headers, QUESTION)
            ground.until_broadcast(payer.address)
            chain_acts.send_dearly(ground.stack.rpc_url, OWNER_ADDRESS, act(ground, payer, dev), dev.address)
            answer = ground.mine_until_answered(asked)
    finally:
        if act is pauses:
            owner_acts(ground, dev, "unpause()")
    assert answer.status_code == 402, answer.text
    assert error_of(answer) in FAILED
    assert len(ground.simulator.attempts()) <= 1
    assert ground.balance(dev, payer.address) == RICH


# ---------------------------------------------------------------------------------------------------------------- fees


@pytest.fixture
def fee(ground: Ground) -> Iterator[None]:
    """Tether's switch is on: a thousandth of every transfer."""
    owner_acts(ground, USDT, "setParams(uint256,uint256)", 10, 49)
    yield
    owner_acts(ground, USDT, "setParams(uint256,uint256)", 0, 0)


@pytest.mark.parametrize("way", ["exact USDT", "upto USDT", "channel USDT"])
@pytest.mark.usefixtures("fee")
def test_a_token_that_takes_a_fee_buys_no_answer_and_costs_us_nothing(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    rich = ground.balance(USDT, payer.address)
    refused = ground.ask(payer.pay(ground.http, way, DEAR), DEAR)
    assert refused.status_code == 402, refused.text
    assert error_of(refused) in {"token_takes_fee", *REFUSED}
    assert (ground.served(), settlements(ground, payer)) == (0, 0)
    assert ground.balance(USDT, payer.address) == rich
    assert ground.ask(payer.pay(ground.http, "exact USDC", DEAR), DEAR).status_code == 200


def test_a_fee_that_comes_in_the_very_block_leaves_what_arrived(ground: Ground) -> None:
    """Credited is what arrived, and no answer costs more than the payer then has."""
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, "exact USDT", DEAR)
    try:
        with ground.stopped():
            asked = ground.begin(headers, DEAR)
            ground.until_broadcast(payer.address)
            switch = call_data("setParams(uint256,uint256)", 10, 49)
            chain_acts.send_dearly(ground.stack.rpc_url, OWNER_ADDRESS, switch, USDT.address)
            answer = ground.mine_until_answered(asked)
    finally:
        owner_acts(ground, USDT, "setParams(uint256,uint256)", 0, 0)
    assert answer.status_code == 200, answer.text
    (paid, charged) = ground.query(
        "SELECT paid_nano_usd, charged_nano_usd FROM receipt WHERE payer = ?", payer.address
    )[0]
    price = amount_of(headers)
    assert paid == (price - price // 1000) * 1000
    assert 0 < charged <= paid


def test_a_fee_that_is_taken_of_a_claim_is_in_the_books(ground: Ground) -> None:
    """The channel was opened before. What does not arrive is the operator's loss; the payer owes no more for it."""
    payer = Payer(ground.stack)
    assert ground.ask(payer.pay(ground.http, "channel USDT", DEAR), DEAR).status_code == 200
    payer.channels["USDT"].charged = int(
        ground.query("SELECT announced FROM channel WHERE payer = ?", payer.address)[0][0]
    )
    wait_until(lambda: _outstanding(ground, payer) < 1_000, "the first answer is claimed")
    owner_acts(ground, USDT, "setParams(uint256,uint256)", 19, 49)
    try:
        again = DEAR | {"seed": 1}
        ground.simulator.configure("gpt-5.4", output_tokens=2_000)
        assert ground.ask(payer.pay(ground.http, "channel USDT", again), again).status_code == 200
        wait_until(lambda: _outstanding(ground, payer) < 1_000, "the second answer is claimed")
        ground.check_quiet()
    finally:
        owner_acts(ground, USDT, "setParams(uint256,uint256)", 0, 0)
    (lost,) = ground.query("SELECT SUM(amount) FROM ledger_transfer WHERE id LIKE 'withheld:%'")[0]
    assert lost > 0
    ground.mine(3)
    ground.check_books()
