"""An authorization whose settlement failed, executed by a stranger later: the money is its payer's, once, by itself."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from pathlib import Path

import pytest

import payments.settlement.judge
import payments.settlement.late
from contracts.devnet import Devnet, Wallet, approve_permit2, as_owner, balance_of, call_data, rpc, send_as, send_signed
from payments import receipts
from payments.chain.networks import Network, Token
from payments.chain.rpc import Rpc
from payments.chain.transactions import settle_call
from payments.errors import PaymentRefused
from payments.ledger.transfers import Balance
from payments.reconciliation import Report, reconcile
from payments.store import Store
from payments.tenders.evidence import PAID_LATE
from payments.tenders.exact import ExactServices, ExactTender
from payments.x402.wire import Eip3009Authorization, Payment, requirement_for
from tests.payments.desks import VALUE, opened
from tests.payments.exact_samples import DETAILS, QUOTED, credit_of, quote_of
from tests.payments.settling import PAY_TO, lagging_logs, pay, rows, until

STRANGER = 7


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payments.settlement.judge, "FIRST_LOOK_MS", 10)
    monkeypatch.setattr(payments.settlement.late, "FIRST_LOOK_MS", 50)


async def fails(services: ExactServices, chain: Devnet, network: Network, payment: Payment, token: Token) -> str:
    """Take a payment whose payer empties its wallet before the block; returns the receipt of what failed."""
    wallet, coin = chain.wallets[1], chain.usdc if token.symbol == "USDC" else chain.usdt
    requirement = requirement_for(token, network, QUOTED, PAY_TO, 300)
    tender = ExactTender(services, payment, token, network, requirement, hashlib.sha256(b"request").digest())
    rpc(chain.rpc_url, "evm_setAutomine", False)
    hold = await tender.authorize(quote_of(), DETAILS)
    signer = chain.wallets[0].address
    await until(
        lambda: (
            int(rpc(chain.rpc_url, "eth_getTransactionCount", signer, "pending"), 16)
            > int(rpc(chain.rpc_url, "eth_getTransactionCount", signer, "latest"), 16)
        )
    )
    rpc(chain.rpc_url, "anvil_setBalance", wallet.address, hex(10**20))
    balance = balance_of(chain.rpc_url, coin, wallet.address)
    drain = {
        "from": wallet.address,
        "to": coin.address,
        "data": call_data("transfer(address,uint256)", chain.wallets[9].address, balance),
        "gas": hex(200_000),
        "maxFeePerGas": hex(900 * 10**9),
        "maxPriorityFeePerGas": hex(800 * 10**9),
    }
    rpc(chain.rpc_url, "anvil_impersonateAccount", wallet.address)
    rpc(chain.rpc_url, "eth_sendTransaction", drain)
    rpc(chain.rpc_url, "evm_mine")
    rpc(chain.rpc_url, "evm_setAutomine", True)
    with pytest.raises(PaymentRefused) as refused:
        await hold.ready()
    assert refused.value.code == "settlement_failed"
    fund = call_data("transfer(address,uint256)", wallet.address, balance)
    send_signed(chain.rpc_url, chain.wallets[9].private_key, coin.address, fund)
    return hold.receipt_id


def execute(chain: Devnet, payment: Payment, token: Token) -> None:
    to, data = settle_call(payment, token)
    send_as(chain.rpc_url, chain.wallets[STRANGER].address, to, "0x" + data.hex())


async def checked(services: ExactServices, chain: Devnet, network: Network) -> Report:
    rpc(chain.rpc_url, "anvil_mine", "0x3")
    async with Rpc([chain.rpc_url]) as node:
        report = await reconcile(services.store, node, network, PAY_TO)
    assert report.findings == []
    return report


async def until_watched(store: Store, watched: bool) -> None:
    async with asyncio.timeout(20):
        while [row[0] is not None for row in await rows(store, "watch_again_ms")] != [watched]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_what_a_stranger_executes_after_the_failure_is_credited_once_by_itself(
    chain: Devnet, network: Network, database: Path | str, which: int, restart: bool
) -> None:
    token, wallet = network.tokens[which], chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, wallet.private_key)
    payment = pay(wallet, token, VALUE)
    async with contextlib.AsyncExitStack() as running:
        services, _ = await running.enter_async_context(opened(database, chain, network))
        receipt_id = await fails(services, chain, network, payment, token)
        await until_watched(services.store, True)
        if restart:
            await running.aclose()
        execute(chain, payment, token)
        if restart:
            services, _ = await running.enter_async_context(opened(database, chain, network))
        # A check of the books may come first: it cannot know yet whose the money is.
        await checked(services, chain, network)
        await until_watched(services.store, False)
        assert await credit_of(services.store, payment.payer, token.asset) == Balance(QUOTED, 0)
        view = await services.store.read(lambda tx: receipts.get(tx, receipt_id))
        assert view is not None
        told = view.as_json()
        assert (told["state"], told["reason"], told["credited_usd"]) == ("released", PAID_LATE, "0.02")
        assert told["transaction"]["state"] == "superseded"
        await checked(services, chain, network)
    async with opened(database, chain, network) as (services, _):
        await checked(services, chain, network)
        assert await credit_of(services.store, payment.payer, token.asset) == Balance(QUOTED, 0)


@pytest.mark.parametrize("how", ["expired", "cancelled"])
async def test_what_nobody_can_execute_any_more_is_watched_no_more(
    chain: Devnet, network: Network, database: Path | str, how: str
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    payment = pay(wallet, usdc, VALUE, valid_s=120)
    async with opened(database, chain, network) as (services, _):
        await fails(services, chain, network, payment, usdc)
        await until_watched(services.store, True)
        if how == "expired":
            rpc(chain.rpc_url, "evm_setNextBlockTimestamp", int(time.time()) + 121)
            rpc(chain.rpc_url, "evm_mine")
        else:
            cancel(chain, wallet, payment)
        # Only when that is final.
        await asyncio.sleep(0.3)
        await until_watched(services.store, True)
        rpc(chain.rpc_url, "anvil_mine", "0x3")
        await until_watched(services.store, False)
        assert [row[0] for row in await rows(services.store, "state")] == ["failed"]


async def test_what_is_failed_because_logs_came_too_late_is_credited_when_they_come(
    chain: Devnet, network: Network, database: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nonce is used in a block that is final, and the node has no logs of that for longer than we wait."""
    token, payer = network.tokens[0], chain.wallets[1].address.lower()
    payment = pay(chain.wallets[1], token, VALUE)
    async with opened(database, chain, network) as (services, _):
        await fails(services, chain, network, payment, token)
        async with lagging_logs(monkeypatch) as asked:
            execute(chain, payment, token)
            rpc(chain.rpc_url, "anvil_mine", "0x3")
            await asked(7)
            await until_watched(services.store, True)
        await until_watched(services.store, False)
        assert await credit_of(services.store, payer, token.asset) == Balance(QUOTED, 0)
        await checked(services, chain, network)


def cancel(chain: Devnet, wallet: Wallet, payment: Payment) -> None:
    """The payer uses its nonce up for nothing: it pays itself."""
    assert isinstance(payment.authorization, Eip3009Authorization)
    usdc = Token("USDC", chain.chain_id, chain.usdc.address.lower(), 6, "eip3009", "USDC", "2")
    own = pay(wallet, usdc, 1, to=wallet.address.lower(), nonce=payment.authorization.nonce)
    to, data = settle_call(own, usdc)
    send_as(chain.rpc_url, chain.wallets[STRANGER].address, to, "0x" + data.hex())


async def test_what_was_refused_before_it_was_settled_is_unattributed_when_it_arrives(
    chain: Devnet, network: Network, database: Path | str
) -> None:
    usdc = network.tokens[0]
    payment = pay(chain.wallets[1], usdc, VALUE)
    requirement = requirement_for(usdc, network, QUOTED, PAY_TO, 300)
    async with opened(database, chain, network) as (services, _):
        as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", payment.payer)
        tender = ExactTender(services, payment, usdc, network, requirement, b"d" * 32)
        with pytest.raises(PaymentRefused):
            await tender.authorize(quote_of(), DETAILS)
        as_owner(chain.rpc_url, chain.usdc, "unBlacklist(address)", payment.payer)
        execute(chain, payment, usdc)
        report = await checked(services, chain, network)
        assert [movement.amount_nano_usd for token in report.tokens for movement in token.booked] == [QUOTED]
        assert await credit_of(services.store, payment.payer, usdc.asset) == Balance(0, 0)
