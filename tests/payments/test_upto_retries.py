"""Answers by upto whose settlement failed for a moment only: their payers' authorizations are good until their deadlines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import payments.settlement.judge
import payments.settlement.late
import payments.settlement.retries
from contracts.devnet import (
    OWNER_ADDRESS,
    Devnet,
    Wallet,
    approve_permit2,
    as_owner,
    balance_of,
    call_data,
    rpc,
    send_signed,
)
from payments import promises, receipts
from payments.chain.networks import Network
from payments.errors import SchemeRefused
from payments.ledger.accounts import account_id, payer_account
from payments.settlement import stories
from payments.settlement.retries import TRIES_MAX
from payments.tenders.upto import UptoHold
from payments.tenders.upto_settlement import settlement_id
from tests.payments.exact_samples import assert_books_balance
from tests.payments.pledging import ANSWERED, COST, Desk, gateway
from tests.payments.settling import PAY_TO, rows, transactions, until

TAKEN = 7_655
"""Atomic units of `COST`."""
SAVINGS = 9
"""The wallet where a payer puts its money aside."""
WINDOW_S = 0.6
"""How long nothing happens, where nothing is to happen: a dozen looks."""

Act = Callable[[Devnet, Wallet], Any]


def pause(chain: Devnet, payer: Wallet) -> None:
    as_owner(chain.rpc_url, chain.usdt, "pause()")


def unpause(chain: Devnet, payer: Wallet) -> None:
    as_owner(chain.rpc_url, chain.usdt, "unpause()")


def blacklist(chain: Devnet, payer: Wallet) -> None:
    as_owner(chain.rpc_url, chain.usdt, "addBlackList(address)", payer.address)


def forgive(chain: Devnet, payer: Wallet) -> None:
    as_owner(chain.rpc_url, chain.usdt, "removeBlackList(address)", payer.address)


def put_aside(chain: Devnet, payer: Wallet) -> None:
    move(chain, payer, chain.wallets[SAVINGS], balance_of(chain.rpc_url, chain.usdt, payer.address))


def take_back(chain: Devnet, payer: Wallet) -> None:
    move(chain, chain.wallets[SAVINGS], payer, COST)


def move(chain: Devnet, sender: Wallet, recipient: Wallet, value: int) -> None:
    data = call_data("transfer(address,uint256)", recipient.address, value)
    send_signed(chain.rpc_url, sender.private_key, chain.usdt.address, data)


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payments.settlement.judge, "FIRST_LOOK_MS", 10)
    monkeypatch.setattr(payments.settlement.late, "FIRST_LOOK_MS", 50)
    monkeypatch.setattr(payments.settlement.late, "INTERVAL_MAX_MS", 50)


@pytest.fixture
def payer(chain: Devnet) -> Wallet:
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[1].private_key)
    return chain.wallets[1]


async def fails(
    desk: Desk,
    payer: Wallet,
    misfortune: Act,
    *,
    valid_s: int = 300,
    seen: Callable[[UptoHold], object] = lambda _: None,
) -> UptoHold:
    """An answer whose settlement is due while something keeps its payer's money from moving, and has failed for good."""
    hold = await desk.authorize(desk.sign(payer, desk.network.tokens[1], valid_s=valid_s))
    seen(hold)
    misfortune(desk.chain, payer)
    await hold.capture(COST, ANSWERED)
    assert not await desk.settled(hold.receipt_id)
    rpc(desk.chain.rpc_url, "anvil_mine", "0x3")
    return hold


async def pledge_of(desk: Desk, hold: UptoHold) -> str:
    query = "SELECT state FROM payment_authorization WHERE receipt_id=?"
    row = await desk.store.read(lambda tx: tx.execute(query, (hold.receipt_id,)).fetchone())
    return str(row[0])


async def until_paid(desk: Desk, hold: UptoHold) -> None:
    async with asyncio.timeout(20):
        while await pledge_of(desk, hold) != "paid":  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.02)


async def balances(desk: Desk, payer: Wallet) -> dict[str, int]:
    asset = desk.network.tokens[1].asset
    names = {
        "variance": account_id("variance", asset),
        "receivable": account_id("receivable", asset, payer.address.lower()),
        "credit": payer_account(payer.address.lower(), asset),
    }
    return {name: await desk.balance(account) for name, account in names.items()}


@pytest.mark.parametrize(
    ("misfortune", "relief"),
    [(pause, unpause), (blacklist, forgive), (put_aside, take_back)],
    ids=lambda act: act.__name__,
)
async def test_what_could_not_be_settled_for_a_moment_is_settled_after_it_once(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet, misfortune: Act, relief: Act
) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await fails(desk, payer, misfortune)
        assert await balances(desk, payer) == {"variance": -COST, "receivable": 0, "credit": 0}
        with pytest.raises(SchemeRefused) as refused:
            await desk.authorize(desk.sign(payer, network.tokens[1]))
        assert refused.value.code == "unpaid_answers"
        await asyncio.sleep(WINDOW_S)
        assert len(await transactions(desk.store)) == 1, "gas was spent on what could not succeed"
        relief(chain, payer)
        await until_paid(desk, hold)
        assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == TAKEN
        assert await balances(desk, payer) == {"variance": 0, "receivable": 0, "credit": 679}
        assert await transactions(desk.store) == [("batch", "included")] * 2
        view = await desk.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
        assert view is not None
        assert (view.settlement_state, view.paid_nano_usd) == ("mined", TAKEN * 1_000)
        assert await desk.paid(hold.receipt_id)
        await desk.check_books()
        await asyncio.sleep(WINDOW_S)
        assert len(await transactions(desk.store)) == 2


async def test_what_is_never_possible_again_stays_a_debt_and_costs_nothing_more(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet
) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await fails(desk, payer, pause)
        told = await desk.store.read(lambda tx: stories.tell(tx, settlement_id(hold.receipt_id)))
        assert told is not None
        # Permit2's own words, not the proxy's for whoever may not call it.
        assert told["settlement"]["reason"] == "TRANSFER_FROM_FAILED"
        assert "sends it again if it would be paid then" in told["next"]
        await asyncio.sleep(WINDOW_S)
        rpc(chain.rpc_url, "evm_increaseTime", 400)
        rpc(chain.rpc_url, "anvil_mine", "0x4")
        await until_watched(desk, False)
        unpause(chain, payer)
        await asyncio.sleep(WINDOW_S)
        assert await pledge_of(desk, hold) == "defaulted"
        assert await balances(desk, payer) == {"variance": -COST, "receivable": 0, "credit": 0}
        assert await transactions(desk.store) == [("batch", "included")]
        await desk.check_books()


async def until_watched(desk: Desk, watched: bool) -> None:
    async with asyncio.timeout(20):
        while [row[0] is not None for row in await rows(desk.store, "watch_again_ms")] != [watched]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_an_authorization_that_is_about_to_expire_is_not_worth_another_transaction(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        monkeypatch.setattr(payments.settlement.retries, "DEADLINE_MARGIN_S", 200)
        hold = await fails(desk, payer, pause, valid_s=150)
        unpause(chain, payer)
        await asyncio.sleep(WINDOW_S)
        assert (await pledge_of(desk, hold), len(await transactions(desk.store))) == ("defaulted", 1)
        monkeypatch.setattr(payments.settlement.retries, "DEADLINE_MARGIN_S", 60)
        await until_paid(desk, hold)


async def test_what_fails_again_and_again_in_its_block_is_tried_three_times(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet
) -> None:
    """Whenever it would succeed, something that comes before it in its block makes it fail."""
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await fails(desk, payer, pause)
        for tries in range(2, TRIES_MAX + 1):
            rpc(chain.rpc_url, "evm_setAutomine", False)
            unpause(chain, payer)
            await until(lambda: pending(chain) == 1)
            assert await pledge_of(desk, hold) == "pledged"
            assert await desk.under_way(hold.receipt_id)
            assert await balances(desk, payer) == {"variance": 0, "receivable": -COST, "credit": 0}
            promised = await desk.store.read(lambda tx: promises.under_way(tx, payer.address.lower()))
            assert promises.exposure(promised) == COST
            first = {"from": OWNER_ADDRESS, "to": chain.usdt.address, "data": call_data("pause()"), "gas": hex(100_000)}
            fees = {"maxFeePerGas": hex(900 * 10**9), "maxPriorityFeePerGas": hex(800 * 10**9)}
            rpc(chain.rpc_url, "eth_sendTransaction", first | fees)
            rpc(chain.rpc_url, "evm_mine")
            rpc(chain.rpc_url, "evm_setAutomine", True)
            assert not await desk.settled(hold.receipt_id)
            assert await transactions(desk.store) == [("batch", "included")] * tries
            assert await balances(desk, payer) == {"variance": -COST, "receivable": 0, "credit": 0}
            rpc(chain.rpc_url, "anvil_mine", "0x3")
        unpause(chain, payer)
        await asyncio.sleep(WINDOW_S)
        assert (await pledge_of(desk, hold), len(await transactions(desk.store))) == ("defaulted", TRIES_MAX)
        await desk.check_books()


def pending(chain: Devnet) -> int:
    """Transactions of our signer that no block has."""
    signer = chain.wallets[0].address
    counts = [int(rpc(chain.rpc_url, "eth_getTransactionCount", signer, tag), 16) for tag in ("pending", "latest")]
    return counts[0] - counts[1]


async def test_a_debt_that_was_paid_from_the_balance_is_not_collected_again(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet
) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await fails(desk, payer, put_aside)
        await desk.pay_in(payer, network.tokens[1], COST)
        approve_permit2(chain.rpc_url, chain.usdc, payer.private_key)
        other = await desk.authorize(desk.sign(payer, network.tokens[0]))
        assert await pledge_of(desk, hold) == "repaid"
        await other.release(ANSWERED)
        take_back(chain, payer)
        await asyncio.sleep(WINDOW_S)
        assert (await pledge_of(desk, hold), len(await transactions(desk.store))) == ("repaid", 1)
        await assert_books_balance(desk.store)


async def test_a_reverted_call_is_not_sent_again_before_its_block_is_final(
    chain: Devnet, network: Network, sqlite_database: Path, payer: Wallet
) -> None:
    async with gateway(sqlite_database, chain, network) as desk:
        hold = await desk.authorize(desk.sign(payer, network.tokens[1]))
        pause(chain, payer)
        await hold.capture(COST, ANSWERED)
        assert not await desk.settled(hold.receipt_id)
        unpause(chain, payer)
        await asyncio.sleep(WINDOW_S)
        assert (await pledge_of(desk, hold), len(await transactions(desk.store))) == ("defaulted", 1)
        rpc(chain.rpc_url, "anvil_mine", "0x2")
        await until_paid(desk, hold)


async def test_of_two_replicas_one_sends_it_again_and_the_other_goes_on_when_that_one_is_gone(
    chain: Devnet, network: Network, postgres_database: str, payer: Wallet
) -> None:
    async with contextlib.AsyncExitStack() as second_running:
        async with gateway(postgres_database, chain, network) as first:
            second = await second_running.enter_async_context(gateway(postgres_database, chain, network))
            told: list[object] = []
            hold = await fails(
                first,
                payer,
                pause,
                seen=lambda hold: second.outcomes.follow(settlement_id(hold.receipt_id), told.append),
            )
            await until(lambda: bool(told))
            rpc(chain.rpc_url, "evm_setAutomine", False)
            unpause(chain, payer)
            await until(lambda: pending(chain) == 1)
            # It was told of the failure, and that this is not the last word.
            async with asyncio.timeout(20):
                while not await second.under_way(hold.receipt_id):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            rpc(chain.rpc_url, "evm_setAutomine", True)
            rpc(chain.rpc_url, "evm_mine")
            await until_paid(first, hold)
            assert await transactions(first.store) == [("batch", "included")] * 2
            async with asyncio.timeout(20):
                while not await second.paid(hold.receipt_id):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            other = await fails(first, payer, blacklist)
        forgive(chain, payer)
        await until_paid(second, other)
        assert await transactions(second.store) == [("batch", "included")] * 4
        assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == 2 * TAKEN
        await second.check_books()


@pytest.mark.parametrize("after", ["the failure", "it was queued again"])
async def test_after_a_kill_another_process_sends_it_again(
    chain: Devnet,
    network: Network,
    database: Path | str,
    payer: Wallet,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(database, chain, network) as desk:
        hold = await fails(desk, payer, pause)
        if after == "it was queued again":
            # Nothing of this process takes it up any more.
            monkeypatch.setattr(desk.services.settlements._care.dispatcher, "take", lambda entry: None)  # type: ignore[attr-defined]
            unpause(chain, payer)
            async with asyncio.timeout(20):
                while await pledge_of(desk, hold) != "pledged":  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
    if after == "the failure":
        unpause(chain, payer)
    async with gateway(database, chain, network) as desk:
        await until_paid(desk, hold)
        assert await transactions(desk.store) == [("batch", "included")] * 2
        assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == TAKEN
        await desk.check_books()
