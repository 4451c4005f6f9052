"""What counts as paid, and what does not: the chain's events of one mined transaction, each used once."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.devnet import Devnet, approve_permit2, balance_of, call_data, rpc, send_signed
from payments.chain.networks import Network
from payments.chain.rpc import Rpc
from payments.chain.transactions import (
    AUTHORIZATION_USED_TOPIC,
    TRANSFER_TOPIC,
    address_topic,
    selector,
    settle_call,
    word,
)
from payments.settlement import judge, outbox, states
from payments.settlement.engine import Settlements
from payments.settlement.evidence import PaymentProof
from payments.settlement.orders import NoEvidence
from payments.settlement.outbox import Entry
from payments.store import Store, Transaction
from payments.verification.eip712 import token_domain_separator
from payments.verification.signatures import keccak256
from tests.databases import open_store
from tests.payments.settling import (
    PAY_TO,
    SETTLED_S,
    Books,
    credit,
    engine,
    lagging_logs,
    let_ours_be_mined,
    mine,
    order_for,
    pay,
    rows,
    sign,
    submit,
    submit_elsewhere,
    until,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def books(network: Network) -> Books:
    return Books(network)


@pytest.fixture
async def settlements(chain: Devnet, network: Network, store: Store, books: Books) -> AsyncIterator[Settlements]:
    """An engine on a chain that mines only when it is told to."""
    rpc(chain.rpc_url, "evm_setAutomine", False)
    async with engine(store, network, chain.rpc_url, [chain.wallets[0]], books) as running:
        yield running


async def test_an_authorization_that_somebody_else_submitted_is_paid_once(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdc = network.tokens[0]
    payment = pay(chain.wallets[1], usdc, 700)
    order_id = await submit(settlements, payment, usdc)
    theirs = submit_elsewhere(chain, [settle_call(payment, usdc)])
    let_ours_be_mined(chain, settlements)
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert (outcome.state, outcome.transaction_hash, outcome.paid) == ("superseded", theirs, True)
    assert [row["state"] for row in books.mined] == ["superseded"]
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 700
    assert await credit(store, chain.wallets[1], usdc) == 700_000


async def test_a_cancelled_authorization_is_not_paid_although_its_nonce_is_consumed(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdc = network.tokens[0]
    payer = chain.wallets[1]
    payment = pay(payer, usdc, 700)
    order_id = await submit(settlements, payment, usdc)
    nonce = payment.authorization.nonce
    type_hash = keccak256(b"CancelAuthorization(address authorizer,bytes32 nonce)")
    struct = keccak256(type_hash + bytes(12) + bytes.fromhex(payer.address[2:]) + word(nonce))
    signature = sign(payer, keccak256(b"\x19\x01" + token_domain_separator(usdc) + struct))
    cancel = (
        selector("cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)")
        + bytes(12)
        + bytes.fromhex(payer.address[2:])
        + word(nonce)
        + word(signature[64])
        + signature[:64]
    )
    submit_elsewhere(chain, [(usdc.address, cancel)])
    let_ours_be_mined(chain, settlements)
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert outcome.state == "failed"
    assert "cancelled" in (outcome.reason or "")
    assert books.mined == []
    assert await credit(store, payer, usdc) == 0


async def test_one_transfer_does_not_pay_for_two_nonces_used_in_one_transaction(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdc = network.tokens[0]
    payer = chain.wallets[1]
    paid, cheated = pay(payer, usdc, 700), pay(payer, usdc, 700)
    # The second nonce is used too, in the same transaction, but for a transfer of the payer to itself.
    to_itself = pay(payer, usdc, 700, to=payer.address.lower(), nonce=cheated.authorization.nonce)
    cheated_id, paid_id = await submit(settlements, cheated, usdc), await submit(settlements, paid, usdc)
    submit_elsewhere(chain, [settle_call(to_itself, usdc), settle_call(paid, usdc)])
    let_ours_be_mined(chain, settlements)
    assert (await settlements.outcome(paid_id, SETTLED_S)).state == "superseded"
    assert (await settlements.outcome(cheated_id, SETTLED_S)).state == "failed"
    assert balance_of(chain.rpc_url, chain.usdc, PAY_TO) == 700
    assert await credit(store, payer, usdc) == 700_000


async def test_two_payments_in_one_foreign_transaction_are_both_paid(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdc = network.tokens[0]
    payer = chain.wallets[1]
    both = [pay(payer, usdc, 700), pay(payer, usdc, 700)]
    ids = [await submit(settlements, payment, usdc) for payment in both]
    submit_elsewhere(chain, [settle_call(payment, usdc) for payment in both])
    let_ours_be_mined(chain, settlements)
    outcomes = await asyncio.gather(*(settlements.outcome(each, SETTLED_S) for each in ids))
    assert [outcome.state for outcome in outcomes] == ["superseded", "superseded"]
    assert len(set(await rows(store, "transfer_log_index"))) == 2
    assert await credit(store, payer, usdc) == 1_400_000


async def test_a_permit_that_somebody_else_submitted_to_the_proxy_is_paid_once(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdt = network.tokens[1]
    payer = chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    payment, other = pay(payer, usdt, 700), pay(payer, usdt, 700)
    order_id = await submit(settlements, payment, usdt)
    submit_elsewhere(chain, [settle_call(other, usdt)])
    theirs = submit_elsewhere(chain, [settle_call(payment, usdt)])
    let_ours_be_mined(chain, settlements)
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert (outcome.state, outcome.transaction_hash) == ("superseded", theirs)
    assert await credit(store, payer, usdt) == 700_000


async def test_a_permit_that_reached_the_proxy_through_another_contract_is_paid(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdt = network.tokens[1]
    payer = chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    payment = pay(payer, usdt, 700)
    order_id = await submit(settlements, payment, usdt)
    theirs = submit_elsewhere(chain, [settle_call(payment, usdt), settle_call(payment, usdt)])
    let_ours_be_mined(chain, settlements)
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert (outcome.state, outcome.transaction_hash) == ("superseded", theirs)
    assert await credit(store, payer, usdt) == 700_000


async def test_an_invalidated_permit_is_not_paid_by_the_payers_other_payment(
    chain: Devnet, network: Network, store: Store, books: Books, settlements: Settlements
) -> None:
    usdt = network.tokens[1]
    payer = chain.wallets[1]
    approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
    nonce = secrets.randbits(240) << 8
    payment, other = pay(payer, usdt, 700, nonce=nonce), pay(payer, usdt, 700)
    order_id = await submit(settlements, payment, usdt)
    submit_elsewhere(chain, [settle_call(other, usdt)])
    invalidate = call_data("invalidateUnorderedNonces(uint256,uint256)", nonce >> 8, 1)
    send_signed(chain.rpc_url, payer.private_key, chain.permit2, invalidate)
    let_ours_be_mined(chain, settlements)
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert outcome.state == "failed"
    assert books.mined == []


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_a_nonce_that_a_node_calls_used_before_it_has_the_logs_is_no_cancellation(
    chain: Devnet,
    network: Network,
    store: Store,
    books: Books,
    settlements: Settlements,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
) -> None:
    """Its logs lag behind its state: the same payment may have been executed by somebody else."""
    token, payer = network.tokens[which], chain.wallets[1]
    if which == 1:
        approve_permit2(chain.rpc_url, chain.usdt, payer.private_key)
        mine(chain.rpc_url)
    monkeypatch.setattr(judge, "RETRY_S", 0.02)
    payment = pay(payer, token, 700)
    order_id = await submit(settlements, payment, token)
    async with lagging_logs(monkeypatch) as asked:
        theirs = submit_elsewhere(chain, [settle_call(payment, token)])
        let_ours_be_mined(chain, settlements)
        await asked(7)
        assert (await settlements.outcome(order_id, 0.1)).state == "submitted"
        assert books.failed == []
    outcome = await settlements.outcome(order_id, SETTLED_S)
    assert (outcome.state, outcome.transaction_hash, outcome.paid) == ("superseded", theirs, True)
    assert await credit(store, payer, token) == 700_000


async def test_a_superseded_payment_does_not_hold_up_the_signer(
    chain: Devnet, network: Network, store: Store, books: Books
) -> None:
    usdc = network.tokens[0]
    payment = pay(chain.wallets[1], usdc, 700, valid_s=-14)
    fast = dataclasses.replace(network, block_time_ms=50)
    rpc(chain.rpc_url, "evm_setAutomine", False)
    rpc(chain.rpc_url, "evm_setTime", payment.authorization.expires_at - 30)
    async with engine(store, fast, chain.rpc_url, [chain.wallets[0]], books) as settlements:
        order_id = await submit(settlements, payment, usdc)
        submit_elsewhere(chain, [settle_call(payment, usdc)])
        rpc(chain.rpc_url, "evm_setTime", payment.authorization.expires_at + 60)
        rpc(chain.rpc_url, "anvil_dropAllTransactions")
        mine(chain.rpc_url)
        assert (await settlements.outcome(order_id, SETTLED_S)).state == "superseded"
        following = order_for(pay(chain.wallets[2], usdc, 5), usdc)
        await settlements.submit(following)
        rpc(chain.rpc_url, "evm_setAutomine", True)
        assert (await settlements.outcome(following.id, SETTLED_S)).paid
        await until(lambda: settlements.signers[0].in_flight == 0)


def test_a_transfer_in_our_own_transaction_proves_nothing_without_the_use_of_the_nonce(
    chain: Devnet, network: Network
) -> None:
    """As a token that skips what it has seen would leave it: a Transfer of the right amount, for another authorization."""
    token = network.tokens[0]
    order, other = (order_for(pay(chain.wallets[1], token, 5), token) for _ in range(2))
    transfer = {
        "address": token.address,
        "topics": [TRANSFER_TOPIC, address_topic(order.payer), address_topic(order.pay_to)],
        "data": "0x" + word(5).hex(),
        "logIndex": "0x1",
    }
    used = {
        "address": token.address,
        "topics": [AUTHORIZATION_USED_TOPIC, address_topic(order.payer), f"0x{order.authorization_nonce:064x}"],
        "data": "0x",
        "logIndex": "0x0",
    }
    receipt = {"transactionHash": "0x01", "blockNumber": "0x5", "blockHash": "0x05", "status": "0x1"}
    assert PaymentProof().of_call(order, receipt, [used, transfer]) is not None
    assert PaymentProof().of_call(other, receipt, [used, transfer]) is None


async def test_a_transfer_that_proves_one_settlement_proves_no_other(
    chain: Devnet, network: Network, store: Store
) -> None:
    first, second = (order_for(pay(chain.wallets[1], network.tokens[0], 5), network.tokens[0]) for _ in range(2))

    def unit(tx: Transaction) -> list[dict[tuple[str, int], str]]:
        assert outbox.enqueue(tx, first)
        assert outbox.enqueue(tx, second)
        assert states.move(tx, first.id, "superseded", transaction_hash="0x01", transfer_log_index=7)
        return [outbox.proven_by(tx, first.chain_id, hashes) for hashes in (["0x01", "0x02"], ["0x02"])]

    assert await store.write(unit) == [{("0x01", 7): first.id}, {}]


@pytest.mark.parametrize("which", [0, 1], ids=["USDC", "USDT"])
async def test_of_what_nobody_says_from_where_it_is_to_be_looked_for_no_node_is_asked_for_years_of_logs(
    chain: Devnet, network: Network, settlements: Settlements, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """What no transaction of ours carried, on a chain of thirty million blocks."""
    token = network.tokens[which]
    ranges: list[tuple[int, int]] = []

    async def call(self: Rpc, method: str, params: Sequence[Any] = ()) -> Any:
        if method == "eth_call":
            return "0x" + (word(1) if which == 0 else b"\xff" * 32).hex()
        assert method == "eth_getLogs"
        ranges.append((int(params[0]["fromBlock"], 16), int(params[0]["toBlock"], 16)))
        return []

    monkeypatch.setattr(Rpc, "call", call)
    entry = Entry(order_for(pay(chain.wallets[1], token, 5), token), "queued", 0)
    found = await settlements._care.judge.search(entry, 30_000_000)
    assert found == NoEvidence(nonce_consumed=True)
    assert len(ranges) <= 60
    assert max(end for _, end in ranges) == 30_000_000
    assert min(start for start, _ in ranges) <= 30_000_000 - 40_000
