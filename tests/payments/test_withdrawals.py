"""Withdrawals: held at once, limited, looked at when large, paid once, and given back if they fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, as_owner, balance_of, rpc
from payments import withdrawals
from payments.chain.networks import Network, Token
from payments.ledger import books as ledger_books
from payments.ledger import history, transfers
from payments.ledger.accounts import account_id, payer_account
from payments.settlement.engine import Settlements
from payments.settlement.withdrawer import Withdrawer
from payments.store import Store
from payments.withdrawals import NotUnderReview, UnknownWithdrawal, Withdrawal, WithdrawalRefused
from tests.payments.settling import Books, decided, engine, owe, rows, transactions, until
from tests.payments.withdrawing import LIMITS, USD, ask


@contextlib.asynccontextmanager
async def withdrawing(
    chain: Devnet, network: Network, store: Store, *, start: bool = True
) -> AsyncIterator[tuple[Withdrawer, Settlements]]:
    treasury = chain.wallets[3]
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], Books(network), treasury=treasury, start=False
    ) as settlements:
        withdrawer = Withdrawer(store, settlements, network.tokens, treasury.address.lower())
        if start:
            await settlements.start()
        yield withdrawer, settlements


async def balance(store: Store, wallet: Wallet, token: Token) -> transfers.Balance:
    return await store.read(lambda tx: transfers.balance(tx, payer_account(wallet.address.lower(), token.asset)))


async def state_of(store: Store, made: Withdrawal) -> str:
    found = await store.read(lambda tx: withdrawals.get(tx, made.id))
    assert found is not None
    return found.state


async def test_what_is_withdrawn_arrives_and_leaves_the_books(chain: Devnet, network: Network, store: Store) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    before = balance_of(chain.rpc_url, chain.usdc, wallet.address)
    async with withdrawing(chain, network, store, start=False) as (withdrawer, settlements):
        await owe(store, wallet, usdc, 10 * USD + 999)
        made, new = await ask(
            store, wallet, usdc, 4 * USD + 999, "k", replace(LIMITS, fee=USD // 2), withdrawer.treasury
        )
        assert new
        assert (made.state, made.amount_nano_usd, made.fee_nano_usd) == ("queued", 4 * USD, USD // 2)
        held = await balance(store, wallet, usdc)
        assert (held.available, held.pending_out) == (5 * USD + USD // 2 + 999, 4 * USD + USD // 2)
        await settlements.start()
        withdrawer.take(made.id)
        await decided(store)
    assert balance_of(chain.rpc_url, chain.usdc, wallet.address) == before + 4_000_000
    assert await balance(store, wallet, usdc) == transfers.Balance(5 * USD + USD // 2 + 999, 0)
    revenue = await store.read(lambda tx: transfers.balance(tx, account_id("revenue", usdc.asset)).balance)
    assert revenue == USD // 2
    paid = await store.read(lambda tx: withdrawals.get(tx, made.id))
    assert paid is not None
    assert (paid.state, paid.reason) == ("paid", None)
    assert paid.transaction_hash is not None
    lines = (await store.read(lambda tx: history.page(tx, wallet.address.lower(), 10))).entries
    assert {(line.kind, line.amount_nano_usd) for line in lines} >= {
        ("withdrawal", -4 * USD),
        ("network_fee", -USD // 2),
    }
    assert next(line for line in lines if line.kind == "withdrawal").transaction_hash == paid.transaction_hash
    assert await store.read(ledger_books.check) == []


async def test_everything_can_be_withdrawn_but_for_what_is_less_than_a_unit(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    await owe(store, wallet, usdc, 7 * USD + 1_234)
    made, _ = await ask(store, wallet, usdc, None, limits=replace(LIMITS, fee=USD))
    assert made.amount_nano_usd == 6 * USD + 1_000
    assert (await balance(store, wallet, usdc)).available == 234


@pytest.mark.parametrize(
    ("amount", "code"),
    [
        (USD - 1, "below_minimum"),
        (0, "below_minimum"),
        (101 * USD, "above_maximum"),
        (31 * USD, "insufficient_balance"),
    ],
)
async def test_what_the_limits_forbid_holds_nothing(
    chain: Devnet, network: Network, store: Store, amount: int, code: str
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    await owe(store, wallet, usdc, 30 * USD)
    with pytest.raises(WithdrawalRefused) as refused:
        await ask(store, wallet, usdc, amount)
    assert (refused.value.code, refused.value.status) == (code, 409)
    assert await balance(store, wallet, usdc) == transfers.Balance(30 * USD, 0)
    assert await rows(store) == []


async def test_all_that_there_is_may_be_too_little(network: Network, chain: Devnet, store: Store) -> None:
    with pytest.raises(WithdrawalRefused, match="minimum"):
        await ask(store, chain.wallets[1], network.tokens[0], None, limits=replace(LIMITS, fee=USD))


async def test_the_days_limit_counts_a_token_and_a_wallet_and_forgets(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usdc, usdt = network.tokens
    wallet, other = chain.wallets[1], chain.wallets[2]
    for who, token in ((wallet, usdc), (wallet, usdt), (other, usdc)):
        await owe(store, who, token, 400 * USD)
    await ask(store, wallet, usdc, 100 * USD, "a")
    with pytest.raises(WithdrawalRefused) as refused:
        await ask(store, wallet, usdc, 51 * USD, "b")
    assert refused.value.code == "daily_limit"
    await ask(store, wallet, usdc, 50 * USD, "c")
    await ask(store, wallet, usdt, 100 * USD, "d")
    await ask(store, other, usdc, 100 * USD, "e")
    monkeypatch.setattr(withdrawals, "DAY_MS", 0)
    await ask(store, wallet, usdc, 51 * USD, "f")


async def test_failed_ones_count_too_for_they_cost_gas(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    monkeypatch.setattr(withdrawals, "PER_DAY_MAX", 2)
    await owe(store, wallet, usdc, 10 * USD)
    for name in ("a", "b"):
        made, _ = await ask(store, wallet, usdc, USD, name)
        row = {"id": made.id, "reference": f"withdrawal:{made.id}", "reason": "reverted"}
        await store.write(lambda tx, row=row: withdrawals.on_failed(tx, row))  # type: ignore[misc]
    assert await balance(store, wallet, usdc) == transfers.Balance(10 * USD, 0)
    with pytest.raises(WithdrawalRefused):
        await ask(store, wallet, usdc, USD, "c")


async def test_the_same_key_is_the_same_withdrawal_and_another_amount_is_a_conflict(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, usdt = network.tokens
    wallet, other = chain.wallets[1], chain.wallets[2]
    await owe(store, wallet, usdc, 10 * USD)
    await owe(store, other, usdc, 10 * USD)
    both = await asyncio.gather(*(ask(store, wallet, usdc, 4 * USD) for _ in range(20)))
    assert len({made.id for made, _ in both}) == 1
    assert sum(new for _, new in both) == 1
    assert (await balance(store, wallet, usdc)).pending_out == 4 * USD
    for token, amount in ((usdc, 5 * USD), (usdt, 4 * USD)):
        with pytest.raises(WithdrawalRefused) as refused:
            await ask(store, wallet, token, amount)
        assert refused.value.code == "idempotency_conflict"
    # All that there is may happen to be as much, and is another wish all the same.
    with pytest.raises(WithdrawalRefused) as refused:
        await ask(store, wallet, usdc, None)
    assert refused.value.code == "idempotency_conflict"
    everything, _ = await ask(store, wallet, usdc, None, "all")
    assert await ask(store, wallet, usdc, None, "all") == (everything, False)
    # Keys are each wallet's own: nobody finds, or blocks, what another one made.
    assert (await ask(store, other, usdc, 5 * USD))[1]
    for key in ("", "a b", "x" * 129, "ключ"):
        with pytest.raises(WithdrawalRefused) as refused:
            await ask(store, wallet, usdc, USD, key)
        assert refused.value.status == 400


async def test_a_large_one_waits_for_a_person_and_splitting_it_does_not_help(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    await owe(store, wallet, usdc, 90 * USD)
    small, _ = await ask(store, wallet, usdc, 20 * USD, "a")
    large, _ = await ask(store, wallet, usdc, 30 * USD, "b")
    assert (small.state, large.state) == ("queued", "review")
    assert [id for id, _ in await rows(store)] == [small.id]
    with pytest.raises(NotUnderReview):
        await store.write(lambda tx: withdrawals.reject(tx, small.id, "no"))
    with pytest.raises(UnknownWithdrawal):
        await store.write(lambda tx: withdrawals.approve(tx, "wd_0"))
    for _ in range(2):
        rejected = await store.write(lambda tx: withdrawals.reject(tx, large.id, "who are you?"))
        assert (rejected.state, rejected.reason) == ("rejected", "who are you?")
    with pytest.raises(NotUnderReview):
        await store.write(lambda tx: withdrawals.approve(tx, large.id))
    assert await balance(store, wallet, usdc) == transfers.Balance(90 * USD, 20 * USD)
    assert await store.read(ledger_books.check) == []


async def test_what_a_person_approved_is_sent_once_by_a_gateway_that_runs_or_starts(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    before = balance_of(chain.rpc_url, chain.usdc, wallet.address)
    await owe(store, wallet, usdc, 90 * USD)
    made, _ = await ask(store, wallet, usdc, 60 * USD)
    async with withdrawing(chain, network, store) as (withdrawer, _):
        assert await withdrawer.round() == 0
        for _ in range(2):
            assert (await store.write(lambda tx: withdrawals.approve(tx, made.id))).state == "approved"
        assert await asyncio.gather(*(withdrawer.round() for _ in range(3))) in ([1, 0, 0], [0, 1, 0], [0, 0, 1])
        await decided(store)
        assert await withdrawer.round() == 0
    assert await state_of(store, made) == "paid"
    assert balance_of(chain.rpc_url, chain.usdc, wallet.address) == before + 60_000_000
    assert await store.read(ledger_books.check) == []


async def test_what_was_approved_in_a_token_that_is_gone_holds_up_nothing(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawals, "ENQUEUED_AT_ONCE", 2)
    usdc, limits = network.tokens[0], replace(LIMITS, review=1)
    gone = replace(usdc, symbol="GONE")
    approved = []
    for number, token in enumerate((usdc, gone, gone, usdc)):
        await owe(store, chain.wallets[number], token, 2 * USD)
        made, _ = await ask(store, chain.wallets[number], token, USD, limits=limits)
        approved.append((await store.write(lambda tx, made=made: withdrawals.approve(tx, made.id))).id)  # type: ignore[misc]
    async with withdrawing(chain, network, store) as (withdrawer, _):
        del withdrawer.tokens[network.tokens[1].asset]
        assert await withdrawer.round() == 2
        await decided(store)
    assert sorted(id for id, _ in await rows(store)) == sorted((approved[0], approved[3]))


async def test_one_that_was_written_before_a_crash_is_sent_once_after_it(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    before = balance_of(chain.rpc_url, chain.usdc, wallet.address)
    await owe(store, wallet, usdc, 9 * USD)
    async with withdrawing(chain, network, store, start=False) as (withdrawer, _):
        made, _ = await ask(store, wallet, usdc, 3 * USD, "k", LIMITS, withdrawer.treasury)
    for _ in range(2):
        async with withdrawing(chain, network, store):
            await decided(store)
    assert await state_of(store, made) == "paid"
    assert balance_of(chain.rpc_url, chain.usdc, wallet.address) == before + 3_000_000
    assert (await balance(store, wallet, usdc)).balance == 6 * USD


async def test_a_transfer_that_the_token_would_refuse_is_not_begun(
    chain: Devnet, network: Network, store: Store
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", wallet.address)
    async with withdrawing(chain, network, store) as (withdrawer, _):
        with pytest.raises(WithdrawalRefused) as refused:
            await withdrawer.require_possible(wallet.address.lower(), usdc, USD)
    assert refused.value.code == "withdrawal_impossible"


@pytest.mark.parametrize("deposited", [False, True])
async def test_what_the_treasury_has_not_yet_is_refused_with_where_it_lies(
    chain: Devnet, network: Network, store: Store, deposited: bool
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    if deposited:
        owed = {"debit": account_id("forwarders", usdc.asset), "credit": payer_account(wallet.address, usdc.asset)}
        await store.write(lambda tx: transfers.post(tx, id="log:1:0", amount=3 * USD, reference="log", **owed))
    async with withdrawing(chain, network, store) as (withdrawer, _):
        more = balance_of(chain.rpc_url, chain.usdc, withdrawer.treasury) * 1000 + USD
        with pytest.raises(WithdrawalRefused) as refused:
            await withdrawer.require_possible(wallet.address.lower(), usdc, more)
    assert refused.value.code == "treasury_short"
    assert ("3.00 USD lie at deposit addresses until they are swept" in str(refused.value)) is deposited
    assert "try again" in str(refused.value)


async def test_one_that_reverts_gives_the_money_and_the_fee_back(chain: Devnet, network: Network, store: Store) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    await owe(store, wallet, usdc, 9 * USD)
    async with withdrawing(chain, network, store) as (withdrawer, settlements):
        made, _ = await ask(store, wallet, usdc, 3 * USD, "k", replace(LIMITS, fee=USD), withdrawer.treasury)
        rpc(chain.rpc_url, "evm_setAutomine", False)
        withdrawer.take(made.id)
        await until(lambda: settlements.courier.broadcasts == 1)
        [(raw,)] = await transactions(store, "raw_transaction")
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", wallet.address)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        rpc(chain.rpc_url, "eth_sendRawTransaction", "0x" + bytes(raw).hex())
        await decided(store)
    assert await state_of(store, made) == "failed"
    assert await balance(store, wallet, usdc) == transfers.Balance(9 * USD, 0)
    assert await store.read(ledger_books.check) == []


async def test_what_a_reorganisation_makes_impossible_is_given_back_with_its_fee(
    network: Network, store: Store
) -> None:
    """A payout was mined and charged for; then its block is gone, and the treasury cannot make it any more."""
    wallet, usdc = Wallet("0x" + "a1" * 20, "0x" + "11" * 32), network.tokens[0]
    await owe(store, wallet, usdc, 10 * USD)
    made, _ = await ask(store, wallet, usdc, 4 * USD, limits=replace(LIMITS, fee=USD // 2))
    row = {"id": made.id, "reference": f"withdrawal:{made.id}", "value": "4000000", "reason": "no money"}
    await store.write(lambda tx: withdrawals.on_paid(tx, row, usdc))
    assert await balance(store, wallet, usdc) == transfers.Balance(5 * USD + USD // 2, 0)
    for _ in range(2):
        await store.write(lambda tx: withdrawals.on_failed(tx, row))
        assert await balance(store, wallet, usdc) == transfers.Balance(10 * USD, 0)
    assert await state_of(store, made) == "failed"
    page = await store.read(lambda tx: history.page(tx, wallet.address, 10))
    assert sum(entry.amount_nano_usd for entry in page.entries) == 10 * USD
    assert await store.read(ledger_books.check) == []


@pytest.mark.parametrize("first", ["paid", "failed"])
async def test_however_often_the_chain_changes_its_mind_it_is_paid_or_given_back_and_never_both(
    network: Network, store: Store, first: str
) -> None:
    wallet, usdc = Wallet("0x" + "a1" * 20, "0x" + "11" * 32), network.tokens[0]
    await owe(store, wallet, usdc, 5 * USD)
    made, _ = await ask(store, wallet, usdc, 4 * USD, limits=replace(LIMITS, fee=USD // 2))
    row = {"id": made.id, "reference": f"withdrawal:{made.id}", "value": "4000000", "reason": "it reverted"}
    custody = account_id("custody", usdc.asset)
    verdicts = {
        "paid": lambda tx: withdrawals.on_paid(tx, row, usdc),
        "failed": lambda tx: withdrawals.on_failed(tx, row),
    }
    second = "failed" if first == "paid" else "paid"
    for verdict in (first, first, second, second, first, second):
        await store.write(verdicts[verdict])
        left = USD // 2 if verdict == "paid" else 5 * USD
        assert await balance(store, wallet, usdc) == transfers.Balance(left, 0)
        assert await state_of(store, made) == verdict
        assert await store.read(ledger_books.check) == []

    # It was given back and spent: then the chain pays it all the same, and that is the operator's loss until it is undone.
    await store.write(verdicts["failed"])
    spent, revenue = 3 * USD, account_id("revenue", usdc.asset)
    await store.write(
        lambda tx: transfers.post(
            tx, id="spent", debit=payer_account(wallet.address, usdc.asset), credit=revenue, amount=spent, reference="r"
        )
    )
    for verdict, left, lost in (
        ("paid", 0, 2 * USD + USD // 2),
        ("failed", 2 * USD, 0),
        ("paid", 0, 2 * USD + USD // 2),
    ):
        await store.write(verdicts[verdict])
        assert await balance(store, wallet, usdc) == transfers.Balance(left, 0)
        variance = await store.read(lambda tx: transfers.balance(tx, account_id("variance", usdc.asset)))
        assert variance.balance == -lost
        assert (await store.read(lambda tx: transfers.balance(tx, custody))).balance == -(
            5 if verdict == "failed" else 1
        ) * USD
        assert await store.read(ledger_books.check) == []


async def test_what_is_approved_after_a_round_that_failed_is_sent(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.settlement.withdrawer.INTERVAL_S", 0.02)
    usdc, wallet, true_enqueue = network.tokens[0], chain.wallets[1], withdrawals.enqueue_approved
    failed: list[Any] = []

    def enqueue_approved(*arguments: Any) -> list[str]:
        if not failed:
            failed.append(arguments)
            raise transfers.TransferConflict("exists with other content")
        return true_enqueue(*arguments)

    monkeypatch.setattr(withdrawals, "enqueue_approved", enqueue_approved)
    async with withdrawing(chain, network, store) as (withdrawer, _):
        await owe(store, wallet, usdc, 90 * USD)
        made, _ = await ask(store, wallet, usdc, 80 * USD)
        await store.write(lambda tx: withdrawals.approve(tx, made.id))
        await withdrawer.start()
        async with asyncio.timeout(10):
            while await state_of(store, made) == "approved":  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        await withdrawer.stop()
    assert failed
