"""Credit above the threshold goes back to its payer on chain, once, and comes back to the books if it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from contracts.devnet import Devnet, as_owner, balance_of, rpc
from payments import wallet_accounts
from payments.chain.networks import Network
from payments.ledger import books as ledger_books
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.settlement import payouts
from payments.settlement.refunds import Refunds
from payments.store import Store, Transaction
from tests.payments.settling import Books, credit, decided, engine, order_for, owe, pay, rows, transactions, until

USD = 1_000_000_000


@pytest.fixture
def books(network: Network) -> Books:
    return Books(network)


async def refund(refunds: Refunds, store: Store) -> int:
    """Begin what is due, and wait until nothing is open."""
    begun = await refunds.round()
    await decided(store)
    return begun


async def test_credit_at_the_threshold_is_sent_back_to_the_unit(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, payer, treasury = network.tokens[0], chain.wallets[1], chain.wallets[3]
    before = balance_of(chain.rpc_url, chain.usdc, payer.address)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=treasury, start=False
    ) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        await owe(store, payer, usdc, 1_234_567_890)
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refund(refunds, store) == 1
        assert refunds.sent == 1
    assert balance_of(chain.rpc_url, chain.usdc, payer.address) == before + 1_234_567
    assert await credit(store, payer, usdc) == 890
    assert await rows(store, "kind, state, value") == [("refund", "mined", "1234567")]
    assert await store.read(ledger_books.check) == []


async def test_credit_below_the_threshold_or_held_stays(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, payer = network.tokens[0], chain.wallets[1]
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=chain.wallets[3], start=False
    ) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        await owe(store, payer, usdc, USD)
        account = payer_account(payer.address.lower(), usdc.asset)
        revenue = account_id("revenue", usdc.asset)
        await store.write(
            lambda tx: transfers.hold(tx, id="hold:x", debit=account, credit=revenue, amount=1, reference="x")
        )
        await refunds.scan()
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refund(refunds, store) == 0
    assert await rows(store) == []


async def test_a_wallet_that_keeps_a_balance_is_left_alone(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, payer = network.tokens[0], chain.wallets[1]
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=chain.wallets[3], start=False
    ) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        await owe(store, payer, usdc, 5 * USD)
        await store.write(lambda tx: wallet_accounts.open_account(tx, payer.address.lower()))
        await refunds.scan()
        assert await refund(refunds, store) == 0
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refund(refunds, store) == 0
    assert await rows(store) == []


async def test_a_refund_that_was_written_before_a_crash_is_sent_once_after_it(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, payer, treasury = network.tokens[0], chain.wallets[1], chain.wallets[3]
    before = balance_of(chain.rpc_url, chain.usdc, payer.address)
    async with engine(store, network, chain.rpc_url, [treasury], books, treasury=treasury, start=False) as stopped:
        refunds = Refunds(store, stopped, network.tokens, USD)
        await owe(store, payer, usdc, 3 * USD)
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refunds.round() == 1
        assert await rows(store, "state") == [("queued",)]
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refunds.round() == 0
    async with engine(store, network, chain.rpc_url, [treasury], books, treasury=treasury, start=False) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        # The treasury's account also pays the gas of payments: one sequence of nonces.
        assert settlements.treasury is settlements.signers[0]
        payment = order_for(pay(chain.wallets[2], usdc, 10), usdc)
        await settlements.submit(payment)
        assert (await settlements.outcome(payment.id, 20)).paid
        await decided(store)
    assert balance_of(chain.rpc_url, chain.usdc, payer.address) == before + 3_000_000
    assert await credit(store, payer, usdc) == 0
    assert await store.read(ledger_books.check) == []


async def test_a_refund_that_the_token_refuses_leaves_the_credit_and_is_not_tried_at_once_again(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc, payer, treasury = network.tokens[0], chain.wallets[1], chain.wallets[3]
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", payer.address)
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=treasury, start=False
    ) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        await owe(store, payer, usdc, 2 * USD)
        for _ in range(3):
            await refunds.scan()
            assert await refund(refunds, store) == 0
        assert refunds.refused == 1
    assert await credit(store, payer, usdc) == 2 * USD
    assert await rows(store) == []


async def test_a_refund_that_reverts_is_voided(chain: Devnet, network: Network, store: Store, books: Books) -> None:
    usdc, payer, treasury = network.tokens[0], chain.wallets[1], chain.wallets[3]
    async with engine(
        store, network, chain.rpc_url, [chain.wallets[0]], books, treasury=treasury, start=False
    ) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await settlements.start()
        await owe(store, payer, usdc, 2 * USD)
        refunds.consider(payer.address.lower(), usdc.asset)
        rpc(chain.rpc_url, "evm_setAutomine", False)
        assert await refunds.round() == 1
        await until(lambda: settlements.courier.broadcasts == 1)
        [(raw,)] = await transactions(store, "raw_transaction")
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", payer.address)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        rpc(chain.rpc_url, "eth_sendRawTransaction", "0x" + bytes(raw).hex())
        await decided(store)
        refunds.consider(payer.address.lower(), usdc.asset)
        assert await refunds.round() == 0
    assert await rows(store, "state") == [("failed",)]
    assert await credit(store, payer, usdc) == 2 * USD
    assert await store.read(ledger_books.check) == []


async def test_a_refund_that_cannot_be_written_holds_up_no_other(
    chain: Devnet, network: Network, store: Store, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    usdc, treasury, true_hold = network.tokens[0], chain.wallets[3], payouts.hold
    odd, other = chain.wallets[1], chain.wallets[2]

    def hold(tx: Transaction, name: str, settlement_id: str, wallet: str, *amount: Any) -> None:
        if wallet == odd.address.lower():
            raise transfers.TransferConflict("exists with other content")
        true_hold(tx, name, settlement_id, wallet, *amount)

    monkeypatch.setattr(payouts, "hold", hold)
    monkeypatch.setattr("payments.settlement.refunds.INTERVAL_S", 0.02)
    async with engine(store, network, chain.rpc_url, [treasury], books, treasury=treasury) as settlements:
        refunds = Refunds(store, settlements, network.tokens, USD)
        await owe(store, odd, usdc, 3 * USD)
        await refunds.start()
        await until(lambda: refunds.refused == 1)
        await owe(store, other, usdc, 3 * USD)
        refunds.consider(other.address.lower(), usdc.asset)
        await until(lambda: refunds.sent == 1)
        await refunds.stop()
    assert await credit(store, odd, usdc) == 3 * USD
