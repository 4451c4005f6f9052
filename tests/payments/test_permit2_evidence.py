"""Payments by Permit2, whose Transfers name no nonce: each counts for one payment, and for the one that made it where that can
be told. All payments here are of one payer, so that nothing but its nonce tells them apart."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import (
    Devnet,
    Wallet,
    approve_permit2,
    balance_of,
    call_data,
    place_operator_contracts,
    rpc,
)
from payments.chain.networks import MULTICALL3_ADDRESS, Network, Token
from payments.chain.rpc import Rpc, RpcError
from payments.chain.transactions import encode_aggregate3, settle_call
from payments.errors import PaymentRefused
from payments.settlement import judge, reverts
from payments.settlement.engine import Settlements
from payments.store import Store, Transaction
from tests.databases import open_store
from tests.payments import settling
from tests.payments.settling import (
    PAY_TO,
    SETTLED_S,
    credit,
    engine,
    let_ours_be_mined,
    mine,
    order_for,
    pay,
    rows,
    send,
    submit,
    transactions,
    until,
)

HIDING = "0x" + "5a" * 20
"""Where a contract stands that makes the calls that are written into its code."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


class Books(settling.Books):
    """Books that for a while cannot take some payments."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.held: set[str] = set()

    def on_mined(self, tx: Transaction, row: dict[str, Any]) -> None:
        if row["id"] in self.held:
            raise RuntimeError("not yet")
        super().on_mined(tx, row)


@pytest.fixture
def books(network: Network) -> Books:
    return Books(network)


@pytest.fixture
def usdt(network: Network) -> Token:
    return network.tokens[1]


@pytest.fixture
def payer(chain: Devnet, monkeypatch: pytest.MonkeyPatch) -> Wallet:
    """Has approved Permit2. From here on the chain mines only when it is told to, and nobody waits long."""
    monkeypatch.setattr(judge, "RETRY_S", 0.02)
    monkeypatch.setattr(judge, "UNEXPLAINED_S", 0.2)
    approve_permit2(chain.rpc_url, chain.usdt, chain.wallets[1].private_key)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    return chain.wallets[1]


@pytest.fixture
async def settlements(
    chain: Devnet, network: Network, store: Store, books: Books, payer: Wallet
) -> AsyncIterator[Settlements]:
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as running:
        yield running


def use_up(chain: Devnet, payer: Wallet, token: Token, nonce: int, how: str) -> None:
    """The payer bids more than anybody, so that in its block this comes first."""
    to, data = chain.permit2, call_data("invalidateUnorderedNonces(uint256,uint256)", nonce >> 8, 1)
    if how == "used for itself":
        to, itself = settle_call(pay(payer, token, 700, to=payer.address.lower(), nonce=nonce), token)
        data = "0x" + itself.hex()
    send(chain, payer, to, data, bid_gwei=800)


def execute(chain: Devnet, calls: list[tuple[str, bytes]]) -> None:
    """A stranger makes calls in one transaction, as many of them as can be made, and bids more than we do."""
    to, data = calls[0] if len(calls) == 1 else (MULTICALL3_ADDRESS, encode_aggregate3(calls))
    send(chain, chain.wallets[9], to, "0x" + data.hex(), bid_gwei=700)


def hide(chain: Devnet, calls: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The same calls, made by a contract whose own calldata says nothing of them."""
    size, code, at = 39, b"", b""
    end = size * len(calls) + 1
    for to, data in calls:
        length, offset = len(data).to_bytes(2, "big"), (end + len(at)).to_bytes(2, "big")
        # CODECOPY to memory; CALL with it, without coin and with all gas; POP.
        code += b"\x61" + length + b"\x61" + offset + b"\x5f\x39" + b"\x5f\x5f\x61" + length + b"\x5f\x5f\x73"
        code += bytes.fromhex(to[2:]) + b"\x5a\xf1\x50"
        at += data
    assert len(code) + 1 == end
    rpc(chain.rpc_url, "anvil_setCode", HIDING, "0x" + (code + b"\x00" + at).hex())
    return [(HIDING, b"")]


def openly(chain: Devnet, calls: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return calls


@pytest.mark.parametrize("how", [openly, hide])
async def test_two_payments_in_one_foreign_transaction_are_both_paid(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token, how: Callable[..., Any]
) -> None:
    both = [pay(payer, usdt, 700), pay(payer, usdt, 700)]
    ids = [await submit(settlements, payment, usdt) for payment in both]
    execute(chain, how(chain, [settle_call(payment, usdt) for payment in both]))
    mine(chain.rpc_url)
    outcomes = await asyncio.gather(*(settlements.outcome(each, SETTLED_S) for each in ids))
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == 1400
    assert [outcome.state for outcome in outcomes] == ["superseded", "superseded"]
    assert len(set(await rows(store, "transfer_log_index"))) == 2
    assert await credit(store, payer, usdt) == 1_400_000


async def test_payments_that_were_executed_together_before_they_came_are_all_booked_at_once(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token
) -> None:
    together = [pay(payer, usdt, 700) for _ in range(5)]
    execute(chain, [settle_call(payment, usdt) for payment in together])
    mine(chain.rpc_url)
    orders = [order_for(payment, usdt) for payment in (*together, pay(payer, usdt, 700))]
    assert await asyncio.gather(*map(settlements.book_executed, orders)) == [True] * 5 + [False]
    assert await credit(store, payer, usdt) == 5 * 700_000


async def test_an_old_payment_is_found_although_nodes_keep_no_state_of_old_blocks(
    chain: Devnet, settlements: Settlements, payer: Wallet, usdt: Token, monkeypatch: pytest.MonkeyPatch
) -> None:
    payments = [pay(payer, usdt, 700), pay(payer, usdt, 5)]
    execute(chain, [settle_call(payment, usdt) for payment in payments])
    mine(chain.rpc_url, 3)
    true_call, head = Rpc.call, rpc(chain.rpc_url, "eth_blockNumber")

    async def call(self: Rpc, method: str, params: Sequence[Any] = ()) -> Any:
        if method == "eth_call" and params[1] != head:
            raise RpcError(-32000, "missing trie node")
        return await true_call(self, method, params)

    monkeypatch.setattr(Rpc, "call", call)
    assert await settlements.book_executed(order_for(payments[0], usdt))


@pytest.mark.parametrize("held", [False, True], ids=["booked", "not booked yet"])
@pytest.mark.parametrize("how", ["cancelled", "used for itself"])
async def test_what_was_used_up_in_the_block_of_our_batch_fails_and_counts_as_a_revert(
    chain: Devnet,
    network: Network,
    store: Store,
    books: Books,
    payer: Wallet,
    usdt: Token,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    held: bool,
) -> None:
    """The payer's other payment is in the same batch; its Transfer is not this one's, whichever is looked at first."""
    monkeypatch.setattr(reverts, "REVERTS_MAX", 1)
    signer, nonce = chain.wallets[0], secrets.randbits(240) << 8
    batch, _ = place_operator_contracts(chain.rpc_url, PAY_TO, signer.address, [signer.address])
    orders = [order_for(pay(payer, usdt, 700, nonce=each), usdt) for each in (nonce, None)]
    async with engine(store, network, chain.rpc_url, [signer], books, batch_contract=batch) as settlements:
        await asyncio.gather(*map(settlements.submit, orders))
        await until(lambda: settlements.courier.broadcasts > 0)
        assert await transactions(store, "kind") == [("batch",)]
        if held:
            books.held.add(orders[1].id)
        use_up(chain, payer, usdt, nonce, how)
        mine(chain.rpc_url)
        assert (await settlements.outcome(orders[0].id, SETTLED_S)).state == "failed"
        with pytest.raises(PaymentRefused):
            settlements.admit(orders[0].payer)
        books.held.clear()
        assert (await settlements.outcome(orders[1].id, SETTLED_S)).state == "mined"
    assert await credit(store, payer, usdt) == 700_000


async def test_what_our_own_call_moved_is_not_counted_twice_if_it_proved_another_settlement(
    chain: Devnet, store: Store, books: Books, settlements: Settlements, payer: Wallet, usdt: Token
) -> None:
    """The same authorization twice, as it comes to a gateway and to a facilitator of one database."""
    payment = pay(payer, usdt, 700)
    orders = [order_for(payment, usdt), order_for(payment, usdt)]
    for order in orders:
        await settlements.submit(order)
    books.held.add(orders[0].id)
    await until(lambda: settlements.courier.broadcasts > 1)
    mine(chain.rpc_url)
    assert (await settlements.outcome(orders[1].id, SETTLED_S)).state == "superseded"
    books.held.clear()
    assert (await settlements.outcome(orders[0].id, SETTLED_S)).state == "failed"
    assert await credit(store, payer, usdt) == 700_000


@pytest.mark.parametrize("hidden", [False, True], ids=["openly", "hidden"])
async def test_a_cancelled_payment_is_not_paid_by_another_one_of_its_block(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token, hidden: bool
) -> None:
    nonce = secrets.randbits(240) << 8
    cancelled, other = pay(payer, usdt, 700, nonce=nonce), pay(payer, usdt, 700)
    cancelled_id = await submit(settlements, cancelled, usdt)
    calls = [settle_call(payment, usdt) for payment in (cancelled, other)]
    execute(chain, hide(chain, calls) if hidden else calls)
    use_up(chain, payer, usdt, nonce, "cancelled")
    mine(chain.rpc_url)
    assert (await settlements.outcome(cancelled_id, SETTLED_S)).state == "failed"
    assert await settlements.book_executed(order_for(other, usdt))
    assert await credit(store, payer, usdt) == 700_000


async def test_a_payment_that_was_used_up_is_not_paid_by_one_of_a_later_block_that_nobody_can_read(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token
) -> None:
    nonce = secrets.randbits(240) << 8
    used_up, other = pay(payer, usdt, 700, nonce=nonce), pay(payer, usdt, 700)
    used_up_id = await submit(settlements, used_up, usdt)
    rpc(chain.rpc_url, "anvil_dropAllTransactions")
    use_up(chain, payer, usdt, nonce, "used for itself")
    mine(chain.rpc_url)
    execute(chain, hide(chain, [settle_call(other, usdt)]))
    mine(chain.rpc_url)
    let_ours_be_mined(chain, settlements)
    assert (await settlements.outcome(used_up_id, SETTLED_S)).state == "failed"
    assert await settlements.book_executed(order_for(other, usdt))


async def test_a_small_payment_does_not_prove_a_large_one_of_its_block(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token
) -> None:
    nonce = secrets.randbits(240) << 8
    large, small = pay(payer, usdt, 700_000, nonce=nonce), pay(payer, usdt, 1)
    large_id = await submit(settlements, large, usdt)
    execute(chain, hide(chain, [settle_call(small, usdt)]))
    use_up(chain, payer, usdt, nonce, "used for itself")
    mine(chain.rpc_url)
    assert (await settlements.outcome(large_id, SETTLED_S)).state == "failed"
    assert await credit(store, payer, usdt) == 0


async def test_a_transfer_that_did_not_come_of_the_proxy_proves_nothing(
    chain: Devnet, store: Store, settlements: Settlements, payer: Wallet, usdt: Token
) -> None:
    payment = pay(payer, usdt, 700)
    to_itself = pay(payer, usdt, 700, to=payer.address.lower(), nonce=payment.authorization.nonce)
    order_id = await submit(settlements, payment, usdt)
    transfer = bytes.fromhex(call_data("transferFrom(address,address,uint256)", payer.address, PAY_TO, 700)[2:])
    approve = call_data("approve(address,uint256)", HIDING, 700)
    send(chain, payer, usdt.address, approve, bid_gwei=800)
    execute(chain, hide(chain, [settle_call(to_itself, usdt), (usdt.address, transfer)]))
    mine(chain.rpc_url)
    assert (await settlements.outcome(order_id, SETTLED_S)).state == "failed"
    assert balance_of(chain.rpc_url, chain.usdt, PAY_TO) == 700
    assert await credit(store, payer, usdt) == 0
