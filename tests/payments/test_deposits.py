"""Deposits by plain transfer: credited once, at depth, whatever the chain does and its nodes say; books equal the chain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from eth_utils.address import to_checksum_address

import payments.deposits
from contracts.devnet import Devnet, Wallet, call_data, rpc, send_signed
from payments import forwarders, wallet_accounts
from payments.chain.batches import account_of, encode_sweep
from payments.chain.networks import Network, Token
from payments.chain.rpc import Request, Rpc, RpcError
from payments.deposits import Deposits, FactoryMismatch
from payments.leases import LeaseLost, Leases
from payments.ledger import books as ledger_books
from payments.ledger import history, transfers
from payments.ledger.accounts import account_id, payer_account
from payments.reconciliation import reconcile
from payments.store import Store
from tests.payments.depositing import CENT, CONFIRMATIONS, USD, balance, deposits, factory, give, proof, treasury
from tests.payments.settling import mine

__all__ = ["deposits", "factory", "treasury"]


async def test_a_deposit_is_credited_at_depth_and_not_before_and_once(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    await deposits.verify()
    address = await deposits.register(wallet.address.lower())
    assert await deposits.register(wallet.address.lower()) == address
    sent = give(chain, chain.usdc, address, 5 * CENT)
    for _ in range(CONFIRMATIONS):
        await deposits.catch_up()
        assert await balance(store, wallet, usdc) == 0
        mine(chain.rpc_url)
    assert [await deposits.catch_up() for _ in range(3)] == [1, 0, 0]
    assert await balance(store, wallet, usdc) == USD // 20
    (line,) = (await store.read(lambda tx: history.page(tx, wallet.address.lower(), 9))).entries
    assert (line.kind, line.amount_nano_usd, line.transaction_hash) == ("deposit", USD // 20, sent)
    assert await store.read(lambda tx: wallet_accounts.keeps_balance(tx, wallet.address.lower()))
    assert (await proof(deposits, store)).findings == []


async def test_a_restart_goes_on_and_replicas_credit_once(
    chain: Devnet, network: Network, store: Store, deposits: Deposits
) -> None:
    usdc, usdt = network.tokens
    wallet, other = chain.wallets[1], chain.wallets[2]
    addresses = [await deposits.register(each.address.lower()) for each in (wallet, other)]
    for number, token in itertools.product(range(3), (chain.usdc, chain.usdt)):
        give(chain, token, addresses[0], (number + 1) * CENT)
    give(chain, chain.usdc, addresses[1], CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    async with Rpc([chain.rpc_url]) as node:
        replicas = [
            Deposits(store, node, network, deposits.treasury, deposits.factory, confirmations=CONFIRMATIONS)
            for _ in range(4)
        ]
        assert sum(await asyncio.gather(*(each.catch_up() for each in replicas))) == 7
        mine(chain.rpc_url, 3)
        assert sum(await asyncio.gather(*(each.catch_up() for each in replicas))) == 0
    assert [await balance(store, wallet, token) for token in (usdc, usdt)] == [6 * USD // 100] * 2
    assert await balance(store, other, usdc) == USD // 100
    assert (await proof(deposits, store)).findings == []


async def test_only_the_holder_of_the_lease_books(
    chain: Devnet, network: Network, store: Store, deposits: Deposits
) -> None:
    address = await deposits.register(chain.wallets[1].address.lower())
    give(chain, chain.usdc, address, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    first, second = Leases(store, "first"), Leases(store, "second")
    assert await first.acquire(f"watcher:{network.chain_id}")
    deposits._leased = second
    with pytest.raises(LeaseLost):
        await deposits.round()
    assert await balance(store, chain.wallets[1], network.tokens[0]) == 0
    deposits._leased = first
    assert await deposits.catch_up() == 1


async def test_a_reorganisation_above_the_depth_is_not_noticed_in_the_books(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    address = await deposits.register(wallet.address.lower())
    await deposits.catch_up()
    give(chain, chain.usdc, address, CENT)
    await deposits.catch_up()
    rpc(chain.rpc_url, "anvil_reorg", 1, [])
    mine(chain.rpc_url, CONFIRMATIONS + 2)
    assert await deposits.catch_up() == 0
    assert await balance(store, wallet, usdc) == 0
    assert (await proof(deposits, store)).findings == []


async def test_a_reorganisation_below_the_depth_takes_the_credit_back_and_what_comes_again_counts(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    address = await deposits.register(wallet.address.lower())
    mine(chain.rpc_url, 2)
    await deposits.catch_up()
    give(chain, chain.usdc, address, 3 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    assert await deposits.catch_up() == 1
    # A cent of it is spent before it vanishes: the operator's loss.
    spent = account_id("revenue", usdc.asset)
    account = payer_account(wallet.address.lower(), usdc.asset)
    await store.write(
        lambda tx: transfers.post(tx, id="spent", debit=account, credit=spent, amount=USD // 100, reference="x")
    )
    rpc(chain.rpc_url, "anvil_reorg", CONFIRMATIONS + 1, [])
    mine(chain.rpc_url, 2)
    await deposits.catch_up()
    assert await balance(store, wallet, usdc) == 0
    variance = await store.read(lambda tx: transfers.balance(tx, account_id("variance", usdc.asset)).balance)
    assert variance == -USD // 100
    assert (await proof(deposits, store)).findings == []
    give(chain, chain.usdc, address, 2 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    assert await balance(store, wallet, usdc) == 2 * USD // 100
    assert (await proof(deposits, store)).findings == []


async def test_what_lay_at_an_address_before_it_was_asked_for_is_the_wallets_too(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    give(chain, chain.usdc, deposits.address_of(wallet.address.lower()), 4 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    await deposits.register(wallet.address.lower())
    await deposits.register(wallet.address.lower())
    await deposits.catch_up()
    assert await balance(store, wallet, usdc) == 4 * USD // 100
    assert (await proof(deposits, store)).findings == []


async def something_else(chain: Devnet, deposits: Deposits) -> None:
    """Happens on the chain, and is read."""
    give(chain, chain.usdc, chain.wallets[7].address, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()


async def something_is_gone(chain: Devnet, deposits: Deposits) -> None:
    """A reorganisation takes away what happened in the last block that was read, and that is noticed."""
    rpc(chain.rpc_url, "anvil_reorg", CONFIRMATIONS + 1, [])
    mine(chain.rpc_url, 2)
    await deposits.catch_up()


@pytest.mark.parametrize("lately_is_gone", [False, True])
async def test_what_lay_there_before_survives_a_reorganisation_but_for_what_that_takes_away(
    chain: Devnet, store: Store, deposits: Deposits, lately_is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payments.deposits, "REORG_BLOCKS", 8)
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    address = deposits.address_of(wallet.address.lower())
    give(chain, chain.usdc, address, 3 * CENT)
    mine(chain.rpc_url, 8)
    give(chain, chain.usdc, address, 2 * CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    await deposits.register(wallet.address.lower())
    assert await balance(store, wallet, usdc) == 5 * USD // 100
    if not lately_is_gone:
        await something_else(chain, deposits)
    await something_is_gone(chain, deposits)
    assert await balance(store, wallet, usdc) == (3 if lately_is_gone else 5) * USD // 100
    assert (await proof(deposits, store)).findings == []


async def test_what_somebody_swept_before_the_address_was_asked_for_is_the_wallets_and_no_stumbling_block(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    usdc, wallet, stranger = deposits.network.tokens[0], chain.wallets[1], chain.wallets[6]
    give(chain, chain.usdc, deposits.address_of(wallet.address.lower()), 4 * CENT)
    sweep = encode_sweep(chain.usdc.address, [account_of(wallet.address.lower())])
    send_signed(chain.rpc_url, stranger.private_key, to_checksum_address(deposits.factory), "0x" + sweep.hex())
    mine(chain.rpc_url, CONFIRMATIONS)
    unattributed = account_id("unattributed", usdc.asset)

    async def nobodys() -> int:
        assert (await proof(deposits, store)).findings == []
        return (await store.read(lambda tx: transfers.balance(tx, unattributed))).balance

    assert await nobodys() == 4 * USD // 100
    await deposits.register(wallet.address.lower())
    assert (await balance(store, wallet, usdc), await nobodys()) == (4 * USD // 100, 0)
    # What is read again is found as it was booked.
    await something_else(chain, deposits)
    await something_is_gone(chain, deposits)
    assert (await balance(store, wallet, usdc), await nobodys()) == (4 * USD // 100, 0)


@pytest.mark.parametrize("treasury_first", [False, True])
async def test_what_the_owner_sends_to_a_deposit_address_is_booked_on_both_sides(
    chain: Devnet, store: Store, deposits: Deposits, treasury: Wallet, treasury_first: bool
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    address = await deposits.register(wallet.address.lower())
    owner = account_id("owner", usdc.asset)
    owned = await store.read(lambda tx: transfers.balance(tx, owner).balance)
    give(chain, chain.usdc, address, 4 * CENT, treasury)
    mine(chain.rpc_url, CONFIRMATIONS)
    if treasury_first:
        alone = await reconcile(store, deposits._rpc, deposits.network, deposits.treasury, confirmations=CONFIRMATIONS)
        assert alone.findings == []
    assert (await proof(deposits, store)).findings == []
    assert await balance(store, wallet, usdc) == 4 * USD // 100
    assert await store.read(lambda tx: transfers.balance(tx, owner).balance) == owned - 4 * USD // 100


async def test_an_address_is_given_while_the_chain_is_read_as_fast_as_can_be(
    chain: Devnet, store: Store, deposits: Deposits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was overtaken five times was told that the chain cannot be asked."""
    wallets, usdc = chain.wallets[1:4], deposits.network.tokens[0]
    for wallet in wallets:
        give(chain, chain.usdc, deposits.address_of(wallet.address.lower()), CENT)
    await deposits.catch_up()
    mine(chain.rpc_url, 60)
    monkeypatch.setattr(payments.deposits, "RANGE_MAX", 1)
    true_ask, overtaken = deposits._rpc.ask, 0

    async def ask(requests: Sequence[Request]) -> list[Any]:
        """The cursor moves whenever a balance is asked for."""
        nonlocal overtaken
        if requests[0][0] == "eth_call" and overtaken < 20:
            moved = await deposits.round() is not None
            overtaken += moved
        return await true_ask(requests)

    monkeypatch.setattr(deposits._rpc, "ask", ask)
    await asyncio.gather(*(deposits.register(wallet.address.lower()) for wallet in wallets))
    assert overtaken >= 20
    await deposits.catch_up()
    assert [await balance(store, wallet, usdc) for wallet in wallets] == [USD // 100] * len(wallets)
    assert (await proof(deposits, store)).findings == []


async def test_an_address_waits_for_newer_blocks_where_the_node_has_forgotten_the_state_of_old_ones(
    chain: Devnet, deposits: Deposits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a long rest, while what was missed is read."""
    await deposits.catch_up()
    mine(chain.rpc_url, 40)
    monkeypatch.setattr(payments.deposits, "RANGE_MAX", 10)
    monkeypatch.setattr(payments.deposits, "REGISTER_WAIT_S", 1.0)
    head, true_ask = int(rpc(chain.rpc_url, "eth_blockNumber"), 16), deposits._rpc.ask

    async def ask(requests: Sequence[Request]) -> list[Any]:
        if requests[0][0] == "eth_call" and int(str(requests[0][1][1]), 16) < head - 15:
            raise RpcError(-32000, "missing trie node")
        return await true_ask(requests)

    monkeypatch.setattr(deposits._rpc, "ask", ask)
    with pytest.raises(RpcError):
        await deposits.register(chain.wallets[1].address.lower())
    asked = asyncio.create_task(deposits.register(chain.wallets[1].address.lower()))
    for _ in range(3):
        await asyncio.sleep(0.05)
        assert not asked.done()
        await deposits.round()
    await asked


async def test_a_token_that_is_not_taken_is_nothing(chain: Devnet, store: Store, deposits: Deposits) -> None:
    wallet, fake = chain.wallets[1], "0x" + "fa" * 20
    address = await deposits.register(wallet.address.lower())
    code = rpc(chain.rpc_url, "eth_getCode", chain.usdc.address, "latest")
    rpc(chain.rpc_url, "anvil_setCode", fake, code)
    with contextlib.suppress(Exception):
        send_signed(
            chain.rpc_url, chain.wallets[5].private_key, fake, call_data("transfer(address,uint256)", address, 0)
        )
    mine(chain.rpc_url, CONFIRMATIONS)
    assert await deposits.catch_up() == 0
    assert await balance(store, wallet, deposits.network.tokens[0]) == 0


async def test_a_factory_that_pays_somebody_else_is_refused(
    chain: Devnet, network: Network, store: Store, deposits: Deposits
) -> None:
    for payee, place in ((chain.wallets[4].address, deposits.factory), (deposits.treasury, chain.usdc.address)):
        wrong = Deposits(store, deposits._rpc, network, payee, place)
        with pytest.raises(FactoryMismatch):
            await wrong.verify()


class Nodes:
    """Several nodes that answer from one chain, some of them wrongly."""

    def __init__(self, node: Rpc, lies: list[Any]) -> None:
        self._node, self._lies = node, lies

    async def call(self, method: str, params: Any = ()) -> Any:
        return await self._node.call(method, params)

    async def ask(self, requests: Any) -> Any:
        return await self._node.ask(requests)

    async def ask_each(self, requests: Any) -> list[list[Any]]:
        truth = await self._node.ask(requests)
        return [lie(requests, list(truth)) for lie in self._lies]


def honest(requests: Any, replies: list[Any]) -> list[Any]:
    return replies


def silent_about_logs(requests: Any, replies: list[Any]) -> list[Any]:
    return [[] if request[0] == "eth_getLogs" else reply for request, reply in zip(requests, replies, strict=True)]


def behind(requests: Any, replies: list[Any]) -> list[Any]:
    return [None, *replies[1:]]


def generous(requests: Any, replies: list[Any]) -> list[Any]:
    def more(logs: list[Any]) -> list[Any]:
        return [each | {"data": hex(int(each["data"], 16) * 1000)} for each in logs]

    return [more(r) if q[0] == "eth_getLogs" else r for q, r in zip(requests, replies, strict=True)]


def nonsense(requests: Any, replies: list[Any]) -> list[Any]:
    return [7 for _ in replies]


@pytest.mark.parametrize(
    ("nodes", "credited"),
    [
        ([honest], True),
        ([honest, honest, silent_about_logs], True),
        ([silent_about_logs, honest, honest, generous], True),
        ([nonsense, behind, honest], True),
        ([honest, silent_about_logs], False),
        ([generous, honest], False),
        ([behind], False),
        ([nonsense], False),
    ],
)
async def test_what_most_nodes_say_counts_and_nothing_while_they_disagree(
    chain: Devnet, store: Store, deposits: Deposits, nodes: list[Any], credited: bool
) -> None:
    usdc, wallet = deposits.network.tokens[0], chain.wallets[1]
    address = await deposits.register(wallet.address.lower())
    give(chain, chain.usdc, address, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    node: Any = deposits._rpc
    several: Any = Nodes(node, nodes)
    deposits._rpc = several
    await deposits.catch_up()
    assert await balance(store, wallet, usdc) == (USD // 100 if credited else 0)
    deposits._rpc = node
    await deposits.catch_up()
    assert await balance(store, wallet, usdc) == USD // 100


async def test_a_plain_transfer_to_the_treasury_stays_unattributed(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    await deposits.register(chain.wallets[5].address.lower())
    give(chain, chain.usdc, deposits.treasury, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    report = await proof(deposits, store)
    assert report.findings == []
    assert [movement.amount_nano_usd for token in report.tokens for movement in token.booked] == [USD // 100]
    assert await balance(store, chain.wallets[5], deposits.network.tokens[0]) == 0


async def test_money_that_the_books_do_not_know_at_an_address_is_found(
    chain: Devnet, store: Store, deposits: Deposits
) -> None:
    address = await deposits.register(chain.wallets[1].address.lower())
    give(chain, chain.usdc, address, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    await store.write(lambda tx: tx.execute("DELETE FROM forwarder_movement"))
    await store.write(
        lambda tx: transfers.post(
            tx,
            id="wrong",
            debit=account_id("variance", deposits.network.tokens[0].asset),
            credit=account_id("forwarders", deposits.network.tokens[0].asset),
            amount=1_000,
            reference="x",
        )
    )
    assert "forwarders_differ" in {finding.code for finding in (await proof(deposits, store)).findings}


async def test_what_is_booked_is_compared_by_transaction_not_by_place() -> None:
    token = Token("USDC", 1, "0x" + "aa" * 20, 6, "eip3009", "USDC", "2")

    def movement(transaction: str, index: int, value: int) -> forwarders.Movement:
        return forwarders.Movement("in", token, "0xf", "0xs", value, transaction, index, 9)

    known = [
        ("log:a:3", "in", "a", 5_000, "0xf"),
        ("log:a:4", "in", "a", 5_000, "0xf"),
        ("log:b:1", "in", "b", 1_000, "0xf"),
    ]
    found = [movement("a", 7, 5), movement("a", 8, 5), movement("a", 9, 5), movement("c", 1, 1)]
    still, new, gone = forwarders.match(known, found)
    assert [(id, each.log_index) for id, each in still] == [("log:a:3", 7), ("log:a:4", 8)]
    assert sorted(each.id for each in new) == ["log:a:9", "log:c:1"]
    assert gone == ["log:b:1"]


async def test_the_books_alone_stay_whole(chain: Devnet, store: Store, deposits: Deposits) -> None:
    address = await deposits.register(chain.wallets[1].address.lower())
    give(chain, chain.usdc, address, CENT)
    mine(chain.rpc_url, CONFIRMATIONS)
    await deposits.catch_up()
    assert await store.read(ledger_books.check) == []
