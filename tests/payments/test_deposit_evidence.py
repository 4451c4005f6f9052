"""Deposits that somebody else executes: each is proven by its own authorization, also beside another one of its channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from contracts.devnet import Devnet, approve_permit2, rpc
from payments.chain.channel_contract import encode_deposit, encode_multicall
from payments.chain.networks import BATCH_SETTLEMENT_ADDRESS, Network
from payments.channels import book
from payments.facilitator import kinds
from payments.settlement import judge
from payments.settlement.engine import Settlements
from payments.settlement.orders import SettlementOrder
from payments.store import Store
from payments.verification import vouchers
from payments.x402.channels import Deposit, Permit2Deposit, hex32
from tests.databases import open_store
from tests.payments.channelling import Channel, channel_of
from tests.payments.settling import SETTLED_S, Books, engine, rows, send, until


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
async def settlements(
    chain: Devnet, network: Network, store: Store, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Settlements]:
    """On a chain that mines only when it is told to."""
    monkeypatch.setattr(judge, "RETRY_S", 0.02)
    monkeypatch.setattr(judge, "UNEXPLAINED_S", 0.2)
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[2].private_key)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], Books(network)) as running:
        yield running


def order_for(channel: Channel, deposit: Deposit, kind: str) -> SettlementOrder:
    nonce = (
        deposit.nonce
        if isinstance(deposit, Permit2Deposit)
        else vouchers.erc3009_deposit_nonce(channel.number, deposit.salt)
    )
    return SettlementOrder(
        id=f"deposit:{nonce}",
        kind=kind,
        reference=hex32(channel.number),
        chain_id=channel.token.chain_id,
        token=channel.token.address,
        payer=channel.config.payer,
        pay_to=BATCH_SETTLEMENT_ADDRESS,
        value=deposit.amount,
        authorization_nonce=nonce,
        call_to=BATCH_SETTLEMENT_ADDRESS,
        call_data=encode_deposit(channel.config, deposit),
        valid_before=deposit.expires_at,
    )


@pytest.mark.parametrize("second", [500, 300])
@pytest.mark.parametrize("kind", [kinds.DEPOSIT, "channel_deposit"])
@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_two_deposits_that_a_stranger_executes_in_one_transaction_are_both_made(
    chain: Devnet, network: Network, store: Store, settlements: Settlements, which: int, kind: str, second: int
) -> None:
    channel = channel_of(chain, network, token=network.tokens[which])
    await store.write(lambda tx: book.ensure(tx, hex32(channel.number), channel.config, channel.token))
    orders = [order_for(channel, channel.deposit(value), kind) for value in (second, 500)]
    for order in reversed(orders):
        await settlements.submit(order)
    await until(lambda: settlements.courier.broadcasts > 1)
    data = encode_multicall([order.call_data for order in orders])
    send(chain, chain.wallets[9], BATCH_SETTLEMENT_ADDRESS, "0x" + data.hex(), bid_gwei=700)
    rpc(chain.rpc_url, "evm_mine")
    outcomes = await asyncio.gather(*(settlements.outcome(order.id, SETTLED_S) for order in orders))
    assert [outcome.state for outcome in outcomes] == ["superseded", "superseded"]
    assert sorted(await rows(store, "received_value")) == sorted([(str(second),), ("500",)])
    assert len(set(await rows(store, "transfer_log_index"))) == 2
