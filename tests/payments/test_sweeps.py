"""What lies at deposit addresses is swept when it is worth it, by us or by anybody, and the books follow."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, as_owner, balance_of, send_as
from payments.deposits import Deposits
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.settlement.sweeps import Sweeps
from payments.store import Store
from tests.payments.depositing import CENT, CONFIRMATIONS, USD, balance, deposits, factory, give, proof, treasury
from tests.payments.nodes import LyingNode
from tests.payments.settling import Books, decided, engine, mine, rows, until

__all__ = ["deposits", "factory", "treasury"]


@contextlib.asynccontextmanager
async def sweeping(
    chain: Devnet, store: Store, deposits: Deposits, threshold_nano_usd: int = USD
) -> AsyncIterator[Sweeps]:
    async with engine(
        store, deposits.network, chain.rpc_url, [chain.wallets[0]], Books(deposits.network), start=False
    ) as settlements:
        await settlements.start()
        yield Sweeps(store, settlements, deposits, threshold_nano_usd=threshold_nano_usd, interval_s=60)


async def test_a_sweep_moves_what_is_worth_it_and_leaves_the_rest(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet
) -> None:
    usdc, _ = deposits.network.tokens
    before = balance_of(chain.rpc_url, chain.usdc, treasury.address)
    addresses = [await deposits.register(each.address.lower()) for each in chain.wallets[:3]]
    for address, value in zip(addresses, (150 * CENT, 200 * CENT, 99 * CENT), strict=True):
        give(chain, chain.usdc, address, value)
    give(chain, chain.usdt, addresses[0], 100 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    assert (await proof(deposits, store)).findings == []
    async with sweeping(chain, store, deposits) as sweeper:
        assert await sweeper.round() == 2
        assert await sweeper.round() == 0
        await decided(store)
        # The books follow at depth; until then nothing is swept again, nor after it.
        assert await sweeper.round() == 0
        assert (await proof(deposits, store)).findings == []
        mine(chain.rpc_url, CONFIRMATIONS)
        assert (await proof(deposits, store)).findings == []
        assert await sweeper.round() == 0
    assert balance_of(chain.rpc_url, chain.usdc, treasury.address) == before + 350 * CENT
    held = await store.read(lambda tx: transfers.balance(tx, account_id("forwarders", usdc.asset)).balance)
    assert held == -99 * USD // 100
    assert {kind for kind, state in await rows(store, "kind, state") if state in ("mined", "final")} == {"sweep"}
    # The first sweep made the clones; a second deposit to the same address is swept as well.
    give(chain, chain.usdc, addresses[0], 500 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    async with sweeping(chain, store, deposits) as sweeper:
        assert await sweeper.round() == 1
        await decided(store)
    mine(chain.rpc_url, CONFIRMATIONS)
    assert (await proof(deposits, store)).findings == []
    assert balance_of(chain.rpc_url, chain.usdc, treasury.address) == before + 850 * CENT


async def test_an_address_that_the_token_blocks_holds_nobody_up_and_is_not_tried_at_once_again(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet
) -> None:
    before = balance_of(chain.rpc_url, chain.usdc, treasury.address)
    addresses = [await deposits.register(each.address.lower()) for each in chain.wallets[:2]]
    for address in addresses:
        give(chain, chain.usdc, address, 200 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    as_owner(chain.rpc_url, chain.usdc, "blacklist(address)", addresses[0])
    async with sweeping(chain, store, deposits) as sweeper:
        assert await sweeper.round() == 1
        await decided(store)
        mine(chain.rpc_url, CONFIRMATIONS)
        await deposits.catch_up()
        assert await sweeper.round() == 0
    assert balance_of(chain.rpc_url, chain.usdc, treasury.address) == before + 200 * CENT
    assert [await balance(store, wallet, deposits.network.tokens[0]) for wallet in chain.wallets[:2]] == [2 * USD] * 2
    assert (await proof(deposits, store)).findings == []


async def test_sweeps_go_on_after_an_answer_that_is_none(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet
) -> None:
    """A node that is out of step knows no contract, and answers a call of one with nothing."""
    give(chain, chain.usdc, await deposits.register(chain.wallets[1].address.lower()), 200 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    node, books = LyingNode(chain.rpc_url), Books(deposits.network)
    node.results = {"eth_call": "0x"}
    async with node.serve() as url, engine(store, deposits.network, url, [chain.wallets[0]], books) as settlements:
        sweeper = Sweeps(store, settlements, deposits, threshold_nano_usd=USD, interval_s=0.02)
        await sweeper.start()
        await until(lambda: node.told > 1)
        node.results = {}
        await until(lambda: sweeper.sent == 1)
        await sweeper.stop()
        await decided(store)


async def test_what_another_sweep_has_emptied_since_it_was_looked_at_is_not_swept_again(
    chain: Devnet, store: Store, deposits: Deposits, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(chain, chain.usdc, await deposits.register(chain.wallets[1].address.lower()), 200 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    async with sweeping(chain, store, deposits) as first:
        second = Sweeps(store, first._settlements, deposits, threshold_nano_usd=USD, interval_s=60)
        look = second._still_full

        async def slowly(*arguments: Any) -> Any:
            seen = await look(*arguments)
            if seen:
                assert await first.round() == 1
                await decided(store)
            return seen

        monkeypatch.setattr(second, "_still_full", slowly)
        assert await second.round() == 0
    assert len(await rows(store, "id")) == 1


async def test_of_a_token_that_takes_a_fee_what_arrived_is_credited_and_the_sweeps_fee_is_the_operators(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet
) -> None:
    usdt, wallet = deposits.network.tokens[1], chain.wallets[1]
    as_owner(chain.rpc_url, chain.usdt, "setParams(uint256,uint256)", 10, 40)
    address = await deposits.register(wallet.address.lower())
    give(chain, chain.usdt, address, 10_000_000)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    assert await balance(store, wallet, usdt) == balance_of(chain.rpc_url, chain.usdt, address) * 1_000 < 10 * USD
    async with sweeping(chain, store, deposits) as sweeper:
        assert await sweeper.round() == 1
        await decided(store)
    mine(chain.rpc_url, CONFIRMATIONS)
    assert (await proof(deposits, store)).findings == []
    lost = await store.read(lambda tx: transfers.balance(tx, account_id("variance", usdt.asset)).balance)
    assert lost < 0
    assert await balance(store, wallet, usdt) > 9 * USD


async def test_anybodys_sweep_is_booked_as_well(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet
) -> None:
    from payments.chain.batches import account_of, encode_sweep

    wallet = chain.wallets[1]
    address = await deposits.register(wallet.address.lower())
    give(chain, chain.usdc, address, 7 * CENT)
    data = encode_sweep(chain.usdc.address.lower(), [account_of(wallet.address.lower())])
    send_as(chain.rpc_url, chain.wallets[5].address, deposits.factory, "0x" + data.hex())
    mine(chain.rpc_url, CONFIRMATIONS)
    # The treasury's books may find it before those of the addresses do, and the other way round.
    assert (await proof(deposits, store)).findings == []
    await deposits.catch_up()
    assert (await proof(deposits, store)).findings == []
    unattributed = account_id("unattributed", deposits.network.tokens[0].asset)
    assert await store.read(lambda tx: transfers.balance(tx, unattributed).balance) == 0
    assert await balance(store, wallet, deposits.network.tokens[0]) == 7 * USD // 100
