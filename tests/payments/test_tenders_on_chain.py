"""Exact payments with everything real: the signatures, the chain's judgement, the engine, the chain and the books."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of, rpc
from payments import receipts
from payments.chain.networks import Network, Token
from payments.errors import AllowanceRequired, PaymentRefused
from payments.ledger import transfers
from payments.store import Store
from payments.tenders.base import Outcome
from payments.tenders.exact import AlreadyUsed, ExactHold, ExactServices, ExactTender
from payments.x402.wire import Payment, requirement_for
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import DETAILS, QUOTED, assert_books_balance, credit_of, quote_of
from tests.payments.settling import PAY_TO, pay

ANSWERED = Outcome({"model": "m"})


def tender(services: ExactServices, network: Network, token: Token, payment: Payment) -> ExactTender:
    requirement = requirement_for(token, network, QUOTED, PAY_TO, 300)
    return ExactTender(services, payment, token, network, requirement, hashlib.sha256(b"request").digest())


async def custody_of(store: Store, token: Token) -> int:
    return await store.read(lambda tx: transfers.balance(tx, f"custody@{token.asset}").balance)


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_payment_is_settled_once_and_the_rest_is_credit(
    chain: Devnet, network: Network, sqlite_database: Path, which: int
) -> None:
    token, wallet = network.tokens[which], chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, wallet.private_key)
    payment = pay(wallet, token, VALUE)
    async with opened(sqlite_database, chain, network) as (services, _):

        async def send() -> ExactHold | AlreadyUsed:
            try:
                return await tender(services, network, token, payment).authorize(quote_of(), DETAILS)
            except AlreadyUsed as used:
                return used

        (hold,) = [
            result for result in await asyncio.gather(*(send() for _ in range(50))) if isinstance(result, ExactHold)
        ]
        assert hold.may_start_early
        await hold.ready()
        charge = await hold.capture(7_000_000, ANSWERED)
        assert await credit_of(services.store, payment.payer, token.asset) == transfers.Balance(QUOTED - 7_000_000, 0)
        on_chain = balance_of(chain.rpc_url, (chain.usdc, chain.usdt)[which], PAY_TO)
        assert (on_chain, await custody_of(services.store, token)) == (VALUE, -QUOTED)
        view = await services.store.read(lambda tx: receipts.get(tx, hold.receipt_id))
        assert view is not None
        transaction = rpc(chain.rpc_url, "eth_getTransactionByHash", view.transaction_hash)
        assert (charge.transaction_hash, view.block_number) == (
            transaction["hash"],
            int(transaction["blockNumber"], 16),
        )
        assert isinstance(await send(), AlreadyUsed)
        await assert_books_balance(services.store)


async def test_missing_allowance_and_balance_are_said_before_anything_is_sent(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    usdc, usdt = network.tokens
    async with opened(sqlite_database, chain, network) as (services, _):
        unapproved = pay(chain.wallets[2], usdt, VALUE)
        with pytest.raises(AllowanceRequired):
            await tender(services, network, usdt, unapproved).authorize(quote_of(), DETAILS)
        poor = pay(chain.wallets[2], usdc, 10**15)
        with pytest.raises(PaymentRefused) as refused:
            await tender(services, network, usdc, poor).authorize(quote_of(), DETAILS)
        assert refused.value.code == "insufficient_funds"
        approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
        hold = await tender(services, network, usdt, unapproved).authorize(quote_of(), DETAILS)
        await hold.ready()
        count = await services.store.read(lambda tx: tx.execute("SELECT COUNT(*) FROM settlement").fetchone()[0])
        assert count == 1


async def test_gateway_that_stops_before_the_block_gives_the_answer_after_the_next_start(
    chain: Devnet, network: Network, sqlite_database: Path
) -> None:
    usdc = network.tokens[0]
    payment = pay(chain.wallets[3], usdc, VALUE)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with opened(sqlite_database, chain, network) as (services, _):
        first = await tender(services, network, usdc, payment).authorize(quote_of(), DETAILS)
    rpc(chain.rpc_url, "evm_setAutomine", True)
    async with opened(sqlite_database, chain, network) as (services, _):
        hold = await tender(services, network, usdc, payment).authorize(quote_of(), DETAILS)
        assert hold.receipt_id == first.receipt_id
        rpc(chain.rpc_url, "evm_mine")
        await hold.ready()
        await hold.capture(QUOTED, ANSWERED)
        assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == VALUE
        assert await credit_of(services.store, payment.payer) == transfers.Balance(0, 0)
        await assert_books_balance(services.store)
