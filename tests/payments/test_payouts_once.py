"""No nonce but the signer's own protects what leaves the treasury: it must leave it once, whatever nodes and operators do."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from contracts.devnet import Devnet, Wallet, balance_of
from payments.chain.networks import Network, Token
from payments.chain.nodes import Node
from payments.chain.replies import Reply, Request, RpcError
from payments.chain.rpc import Rpc
from payments.chain.transactions import Call
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.settlement import payouts
from payments.settlement.account_nonces import user_of
from payments.settlement.repairs import NONCE_LOST_ROUNDS
from payments.store import Store
from tests.payments.fake_chain import FakeChain, FakeRpc
from tests.payments.machines import BATCH, THIEF, TOKEN
from tests.payments.settling import Books, decided, engine, owe, rows
from tests.payments.withdrawing import USD, ask

OWED = 4 * USD
OLD, NEW = 3, 4
"""Wallets that are the treasury."""


async def withdraw(store: Store, wallet: Wallet, token: Token, treasury: Wallet) -> str:
    """Write the order of a withdrawal of all that is owed."""
    await owe(store, wallet, token, OWED)
    made, _ = await ask(store, wallet, token, None, treasury=treasury.address.lower())
    return made.id


async def refund(store: Store, wallet: Wallet, token: Token, treasury: Wallet) -> str:
    """Write the order of a refund of all that is owed."""
    await owe(store, wallet, token, OWED)
    payer, value = wallet.address.lower(), OWED // 1000
    await store.write(lambda tx: payouts.hold(tx, "refund", "refund_1", payer, token, value))
    await store.write(
        lambda tx: payouts.enqueue(tx, "refund", "refund_1", payer, token, value, treasury.address.lower())
    )
    return "refund_1"


async def left(store: Store, wallet: Wallet, token: Token) -> transfers.Balance:
    return await store.read(lambda tx: transfers.balance(tx, payer_account(wallet.address.lower(), token.asset)))


async def test_a_payout_whose_receipt_comes_late_is_made_once(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nonces are of a node's state; its index of receipts may lag behind that, or be built anew."""
    usdc, wallet, treasury = network.tokens[0], chain.wallets[1], chain.wallets[OLD]
    before = balance_of(chain.rpc_url, chain.usdc, wallet.address)
    true_ask, lags, looks = Rpc._ask, True, 0

    async def ask(self: Rpc, node: Node, requests: Sequence[Request], timeout_s: float) -> list[Reply]:
        nonlocal looks
        replies = await true_ask(self, node, requests, timeout_s)
        methods = [method for method, _ in requests]
        looks += lags and {"eth_getTransactionCount", "eth_getTransactionReceipt"} <= set(methods)
        hidden = "eth_getTransactionReceipt" if lags else None
        return [None if method == hidden else reply for method, reply in zip(methods, replies, strict=True)]

    monkeypatch.setattr(Rpc, "_ask", ask)
    fast = dataclasses.replace(network, block_time_ms=50)
    async with engine(store, fast, chain.rpc_url, [chain.wallets[0]], Books(fast), treasury=treasury) as settlements:
        settlements.take_queued(await withdraw(store, wallet, usdc, treasury))
        async with asyncio.timeout(30):
            while looks < 3 * NONCE_LOST_ROUNDS:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        lags = False
        await decided(store)
    assert await left(store, wallet, usdc) == transfers.Balance(0, 0)
    assert balance_of(chain.rpc_url, chain.usdc, wallet.address) - before == OWED // 1000


@pytest.mark.parametrize("order", [withdraw, refund])
async def test_a_payout_that_waited_while_the_treasury_was_exchanged_is_paid_by_the_new_one(
    chain: Devnet, network: Network, store: Store, order: Any
) -> None:
    usdc, wallet = network.tokens[0], chain.wallets[1]
    before = balance_of(chain.rpc_url, chain.usdc, wallet.address)
    written = await order(store, wallet, usdc, chain.wallets[OLD])
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], Books(network), treasury=chain.wallets[NEW]):
        await decided(store)
    assert await rows(store) == [(written, "mined")]
    assert await left(store, wallet, usdc) == transfers.Balance(0, 0)
    assert balance_of(chain.rpc_url, chain.usdc, wallet.address) - before == OWED // 1000


@pytest.mark.parametrize("ago", [0, 1, 2, 5, 40])
async def test_a_block_says_which_transaction_used_a_nonce(ago: int) -> None:
    chain = FakeChain(TOKEN.address, BATCH, {})
    sender = "0x" + "51" * 20
    for _ in range(3):
        chain.act(sender, Call(THIEF, b"", 21_000))
    used = chain.head.sent[0].hash
    for _ in range(ago):
        chain.mine()
    chain.act(sender, Call(THIEF, b"", 21_000))
    rpc, head = FakeRpc(chain), chain.head.number
    assert await user_of(rpc, sender, 2, head) == used
    assert await user_of(rpc, sender, 3, head) == chain.head.sent[0].hash
    assert await user_of(rpc, sender, 4, head) is None


async def test_a_node_that_forgets_old_states_says_so() -> None:
    chain = FakeChain(TOKEN.address, BATCH, {})
    sender = "0x" + "51" * 20
    chain.act(sender, Call(THIEF, b"", 21_000))
    for _ in range(9):
        chain.mine()
    true_answer, oldest = chain.answer, chain.head.number - 3

    def answer(method: str, params: Sequence[Any]) -> Reply:
        if method == "eth_getTransactionCount" and int(params[1], 16) < oldest:
            return RpcError(-32000, "missing trie node")
        return true_answer(method, params)

    chain.answer = answer  # type: ignore[method-assign]
    with pytest.raises(RpcError, match="missing trie node"):
        await user_of(FakeRpc(chain), sender, 0, chain.head.number)
