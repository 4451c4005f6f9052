"""Chains that are slow, go back, or forget: nobody is asked to pay again, nobody is credited twice, and it ends by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from eth_account import Account

from contracts.devnet import USDC, call_data
from tests.e2e import chain_acts
from tests.e2e.clients import available, sign_in
from tests.e2e.conftest import QUESTION
from tests.e2e.grounds import Ground, amount_of, error_of, turn, wait_until
from tests.e2e.grounds import ground as new_ground
from tests.e2e.payers import DEV_TOKENS, RICH, WAYS, Payer, Way

TOPUPS, TOPUP = "/v1/wallet/topups", {"amount_usd": "2.00"}
ELSEWHERE = "0x" + "e1" * 20
SMALL = 50_000
"""Atomic units: five cents, which is too little to be swept."""
PROMPT: tuple[Way, ...] = ("exact USDC", "exact USDT", "channel USDC", "channel USDT")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with new_ground(tmp_path_factory.mktemp("chains"), PAYMENTS__SETTLEMENT_WAIT_S="1") as made:
        yield made


@pytest.fixture
def ground(shared: Ground) -> Iterator[Ground]:
    with turn(shared) as mine:
        yield mine


def taken(ground: Ground, payer: Payer, way: Way) -> int:
    return RICH - ground.balance(DEV_TOKENS[way.split()[1]], payer.address)


def price(way: Way, headers: dict[str, str]) -> int:
    return 10 * amount_of(headers) if way.startswith("channel") else amount_of(headers)


@pytest.mark.parametrize("way", PROMPT)
def test_a_chain_without_blocks_is_202_and_the_same_payment_goes_on_from_there(ground: Ground, way: Way) -> None:
    """Whoever waits for a block of twelve seconds is answered before, told where to look, and never asked to pay again."""
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, way, QUESTION)
    with ground.stopped():
        for _ in range(3):
            waiting = ground.ask(headers, QUESTION)
            assert waiting.status_code == 202, waiting.text
            assert waiting.json()["status"] == "pending"
            assert int(waiting.headers["retry-after"]) >= 1
            assert waiting.headers["x-should-retry"] == "false"
            polled = ground.http.get(waiting.json()["poll"])
            assert polled.status_code == 200, polled.text
            assert "choices" not in waiting.text
        assert len(ground.query("SELECT 1 FROM settlement WHERE payer = ?", payer.address)) == 1
        assert len(ground.simulator.attempts()) <= 1, "only the first may begin before its money is there"
    wait_until(lambda: ground.ask(headers, QUESTION).status_code == 200, "it is served")
    assert taken(ground, payer, way) == price(way, headers)
    assert ground.ask(headers, QUESTION).status_code == 200
    assert taken(ground, payer, way) == price(way, headers)


def test_a_top_up_on_a_chain_without_blocks_is_credited_once_when_it_has_some(ground: Ground) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, "exact USDC", TOPUP, path=TOPUPS)
    with ground.stopped():
        for _ in range(2):
            assert ground.ask(headers, TOPUP, TOPUPS).status_code == 202
    wait_until(lambda: credit(ground, payer) == 2_000_000_000, "it is credited")
    assert ground.ask(headers, TOPUP, TOPUPS).status_code == 200
    assert (credit(ground, payer), taken(ground, payer, "exact USDC")) == (2_000_000_000, 2_000_000)


def credit(ground: Ground, payer: Payer) -> int:
    rows = ground.query("SELECT balance FROM ledger_account WHERE id = ?", f"payer:{payer.address}@eip155:84532/USDC")
    return int(rows[0][0]) if rows else 0


@pytest.mark.parametrize("way", WAYS)
def test_what_a_reorganisation_takes_away_is_paid_again_by_itself(ground: Ground, way: Way) -> None:
    """The block that has the transfer is gone; the payer does nothing, and pays once."""
    payer = Payer(ground.stack)
    ground.mine()
    headers = payer.pay(ground.http, way, QUESTION)
    assert ground.ask(headers, QUESTION).status_code == 200
    wait_until(lambda: taken(ground, payer, way) > 0, "it is paid")
    once = taken(ground, payer, way)
    before = ground.rpc("eth_blockNumber")
    ground.rpc("anvil_reorg", 1, [])
    assert ground.rpc("eth_blockNumber") == before
    wait_until(lambda: taken(ground, payer, way) == once, "it is paid again")
    ground.mine(3)
    ground.check_quiet()
    assert taken(ground, payer, way) == once
    assert ground.ask(headers, QUESTION).status_code == 200
    assert ground.served() == 1


@pytest.mark.parametrize("way", PROMPT)
def test_a_payer_that_leaves_in_a_reorganisation_takes_no_more_than_the_answer(ground: Ground, way: Way) -> None:
    """In the new chain the money went elsewhere first. What was credited is taken back, and what it bought is our loss."""
    payer, dev = Payer(ground.stack), DEV_TOKENS[way.split()[1]]
    headers = payer.pay(ground.http, way, QUESTION)
    answer = ground.ask(headers, QUESTION)
    assert answer.status_code == 200, answer.text
    if way.startswith("channel"):
        payer.channels[dev.symbol].heard(answer)
    away = call_data("transfer(address,uint256)", ELSEWHERE, RICH)
    with ground.stopped():
        ground.rpc("anvil_reorg", 1, [])
        chain_acts.send_dearly(ground.stack.rpc_url, payer.address, away, dev.address)
        ground.mine()
    wait_until(lambda: ground.balance(dev, payer.address) == 0, "the payer has left")
    ground.mine(3)
    wait_until(lambda: gone(ground, payer, way), "the books know", lambda: ground.open_things())
    assert credit(ground, payer) == 0
    again = ground.ask(payer.pay(ground.http, way, QUESTION | {"seed": 1}), QUESTION | {"seed": 1})
    assert again.status_code == 402, again.text
    assert error_of(again) in ("insufficient_funds", "invalid_batch_settlement_evm_cumulative_exceeds_balance")
    assert ground.served() == 1
    ground.check_books()


def gone(ground: Ground, payer: Payer, way: Way) -> bool:
    kind = "channel_deposit" if way.startswith("channel") else "payment"
    rows = ground.query("SELECT state FROM settlement WHERE kind = ? AND payer = ?", kind, payer.address)
    return rows == [("failed",)]


@pytest.mark.parametrize("way", PROMPT)
def test_a_transaction_that_the_pool_forgets_is_sent_again(ground: Ground, way: Way) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, way, QUESTION)
    with ground.stopped():
        asked = ground.begin(headers, QUESTION)
        ground.until_broadcast(payer.address)
        ground.rpc("anvil_dropAllTransactions")
        assert asked.answer().status_code == 202
    wait_until(lambda: ground.ask(headers, QUESTION).status_code == 200, "it is served", seconds=40)
    assert taken(ground, payer, way) == price(way, headers)


def test_a_claim_that_a_reorganisation_takes_away_is_claimed_again(ground: Ground) -> None:
    payer = Payer(ground.stack)
    assert ground.ask(payer.pay(ground.http, "channel USDC", QUESTION), QUESTION).status_code == 200
    wait_until(lambda: outstanding(ground, payer) < 1_000, "it is claimed")
    ground.check_quiet()
    treasury = ground.balance(USDC, ground.stack.pay_to)
    (block,) = ground.query(
        "SELECT MAX(block_number) FROM settlement JOIN channel_claim ON channel_claim.settlement_id = settlement.id"
        " JOIN channel ON channel.id = channel_claim.channel_id WHERE channel.payer = ?",
        payer.address,
    )[0]
    with ground.stopped():
        ground.rpc("anvil_reorg", int(ground.rpc("eth_blockNumber"), 16) - block + 1, [])
        assert ground.balance(USDC, ground.stack.pay_to) < treasury
    wait_until(lambda: ground.balance(USDC, ground.stack.pay_to) == treasury, "it is claimed again")
    ground.mine(3)
    ground.check_quiet()
    assert outstanding(ground, payer) < 1_000


def outstanding(ground: Ground, payer: Payer) -> int:
    sql = "SELECT charged_nano_usd - claimed_nano_usd FROM channel WHERE payer = ?"
    return int(ground.query(sql, payer.address)[0][0])


def test_a_top_up_that_a_reorganisation_takes_away_is_credited_once_in_the_end(ground: Ground) -> None:
    payer = Payer(ground.stack)
    headers = payer.pay(ground.http, "exact USDC", TOPUP, path=TOPUPS)
    assert ground.ask(headers, TOPUP, TOPUPS).status_code == 200
    ground.rpc("anvil_reorg", 1, [])
    wait_until(lambda: taken(ground, payer, "exact USDC") == 2_000_000, "it is paid again")
    ground.mine(3)
    ground.check_quiet()
    assert credit(ground, payer) == 2_000_000_000
    ground.check_books()


def session_of(ground: Ground, payer: Payer) -> dict[str, str]:
    return sign_in(ground.http, Account.from_key(payer.key.secret))


def test_a_deposit_that_a_deep_reorganisation_takes_away_is_taken_back_and_counts_when_it_comes_again(
    ground: Ground,
) -> None:
    """It was credited, and a part of it spent: the part is our loss, and the balance is not below zero."""
    payer = Payer(ground.stack)
    session = session_of(ground, payer)
    asked = ground.http.post("/v1/wallet/deposit-addresses", headers=session).json()
    address = asked["deposit_addresses"][0]["address"]
    before = int(ground.rpc("eth_blockNumber"), 16)
    payer.acts(USDC.address, "transfer(address,uint256)", address, SMALL)
    ground.mine(4)
    wait_until(lambda: available(ground.http, session)["USDC"] == "0.05", "it is credited")
    assert ground.ask(session, QUESTION).status_code == 200
    assert "0.04" < available(ground.http, session)["USDC"] < "0.05"
    with ground.stopped():
        ground.rpc("anvil_reorg", int(ground.rpc("eth_blockNumber"), 16) - before, [])
    assert ground.balance(USDC, address) == 0
    ground.mine(4)
    wait_until(lambda: available(ground.http, session)["USDC"] == "0.00", "it is taken back")
    assert ground.ask(session, QUESTION).status_code == 402
    ground.check_books()
    payer.acts(USDC.address, "transfer(address,uint256)", address, SMALL)
    ground.mine(4)
    wait_until(lambda: available(ground.http, session)["USDC"] == "0.05", "what came again is credited")
    assert ground.ask(session, QUESTION).status_code == 200
    ground.check_books()


@pytest.mark.parametrize("forgotten", [False, True], ids=["sent again at once", "the pool forgets it too"])
def test_a_withdrawal_that_a_reorganisation_takes_away_is_sent_again_and_paid_once(
    ground: Ground, forgotten: bool
) -> None:
    payer = Payer(ground.stack)
    session = session_of(ground, payer)
    headers = payer.pay(ground.http, "exact USDC", TOPUP, path=TOPUPS)
    assert ground.ask(headers, TOPUP, TOPUPS).status_code == 200
    ground.mine(3)
    ground.check_quiet()
    order, named = {"asset": "USDC", "amount_usd": "all"}, session | {"idempotency-key": payer.address}
    made = ground.ask(named, order, "/v1/wallet/withdrawals")
    assert made.status_code == 200, made.text
    poll = made.json()["poll"]
    wait_until(lambda: ground.http.get(poll, headers=session).json()["state"] == "paid", "it is paid")
    assert ground.balance(USDC, payer.address) == RICH
    with ground.stopped():
        ground.rpc("anvil_reorg", 1, [])
        assert ground.balance(USDC, payer.address) == RICH - 2_000_000
        # Nobody can spend meanwhile what is on its way back to the wallet.
        assert available(ground.http, session)["USDC"] == "0.00"
        if forgotten:
            ground.rpc("anvil_dropAllTransactions")
    wait_until(lambda: ground.balance(USDC, payer.address) == RICH, "it is sent again")
    ground.mine(3)
    ground.check_quiet()
    assert ground.ask(named, order, "/v1/wallet/withdrawals").json()["id"] == made.json()["id"]
    assert ground.http.get(poll, headers=session).json()["state"] == "paid"
    ground.mine(3)
    assert (ground.balance(USDC, payer.address), available(ground.http, session)["USDC"]) == (RICH, "0.00")
    ground.check_books()
