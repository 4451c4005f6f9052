"""What proves on the chain that a settlement was paid. A receipt's status alone never does.

The attacks that this stands against: a cancelled authorization consumes its nonce without paying; a transfer of the right
amount may be the payment of something else; several authorizations may be executed in one transaction, some of them to
another recipient. So a use of this very nonce and a Transfer are paired, and the database lets each Transfer log serve once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from payments.chain.logs import Log, get_logs, receipt_with, transferred
from payments.chain.networks import PERMIT2_ADDRESS
from payments.chain.rpc import Rpc, RpcError, RpcUnavailable
from payments.chain.transactions import (
    AUTHORIZATION_CANCELED_TOPIC,
    AUTHORIZATION_USED_TOPIC,
    NONCES_INVALIDATED_TOPIC,
    TRANSFER_TOPIC,
    WORD,
    address_topic,
    decode_revert,
    encode_authorization_state,
    encode_nonce_bitmap,
    last_call,
    nonce_is_set,
    proxy_terms,
)
from payments.settlement.orders import Evidence, NoEvidence, NonceRead, SettlementOrder

EARLIER_BLOCKS = 2_000
"""How far back a use of a nonce is looked for that came before our own transaction: what one query can ask of a public node."""
CANDIDATES_MAX = 50
"""Transfers of one payer to us that are looked into for one Permit2 payment."""


class PaymentProof:
    """A payer's authorization: the token's Transfer together with the use of this very nonce."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `Proof`."""
        if _is_eip3009(order) and not any(_uses_nonce(log, order) for log in logs):
            return None
        return pick_transfer(receipt, logs, order)

    async def search(self, rpc: Rpc, order: SettlementOrder, from_block: int, head: int) -> Evidence | NoEvidence:
        """See `Proof`. If somebody else submitted the authorization, it is paid all the same, also if that was before the order
        was given a transaction of ours: a nonce is used once, so that what used it before `from_block` proves as much."""
        find = _find_eip3009 if _is_eip3009(order) else _find_permit2
        nonce = payment_nonce(order)
        if not await is_used(rpc, nonce, head):
            return NoEvidence(nonce_consumed=False)
        explained = await is_explained(rpc, nonce, order.payer, from_block, head)
        evidence = await find(rpc, order, from_block, head)
        if evidence is None and from_block > 0:
            evidence = await find(rpc, order, max(from_block - EARLIER_BLOCKS, 0), from_block - 1)
        return evidence or NoEvidence(nonce_consumed=True, explained=explained)


class TransferProof:
    """A transfer of our own, which nobody else can make: a Transfer in our own transaction."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `Proof`. Whoever signed it has paid: since the order was written the treasury may have been exchanged."""
        return pick_transfer(receipt, logs, replace(order, payer=receipt["from"].lower()))

    async def search(self, rpc: Rpc, order: SettlementOrder, from_block: int, head: int) -> Evidence | NoEvidence:
        """See `Proof`."""
        return NoEvidence(nonce_consumed=False)


def payment_nonce(order: SettlementOrder) -> NonceRead:
    """Where the chain keeps the nonce of a payment."""
    return nonce_read(order, permit2=not _is_eip3009(order))


def nonce_read(order: SettlementOrder, *, permit2: bool) -> NonceRead:
    """Where the chain keeps the nonce of an order: at Permit2, or at the token itself."""
    payer, nonce = order.payer, order.authorization_nonce
    assert nonce is not None
    if permit2:
        return NonceRead(PERMIT2_ADDRESS, encode_nonce_bitmap(payer, nonce), nonce, in_bitmap=True)
    return NonceRead(order.token, encode_authorization_state(payer, nonce), nonce, in_bitmap=False)


async def is_used(rpc: Rpc, nonce: NonceRead, block: int) -> bool:
    """Whether an authorization was used or cancelled up to a block; errors as for `Rpc.call`."""
    return nonce.is_used(await rpc.call(*nonce.request(block)))


async def is_explained(rpc: Rpc, nonce: NonceRead, payer: str, from_block: int, head: int) -> bool:
    """Whether a log says what consumed a nonce: that it was cancelled or, at the token, used.

    Asked before evidence is looked for: a node that has this log has the earlier ones. A nonce of Permit2 that was used for
    something else leaves none.

    Raises:
        RpcError: A node refused.
        RpcUnavailable: No node answered.
    """
    start = max(from_block - EARLIER_BLOCKS, 0)
    if not nonce.in_bitmap:
        ends = [AUTHORIZATION_USED_TOPIC, AUTHORIZATION_CANCELED_TOPIC]
        return bool(await get_logs(rpc, nonce.to, [ends, address_topic(payer), f"0x{nonce.nonce:064x}"], start, head))
    logs = await get_logs(rpc, nonce.to, [NONCES_INVALIDATED_TOPIC, address_topic(payer)], start, head)
    words = ((int(log["data"][2 : 2 + 2 * WORD], 16), int(log["data"][2 + 2 * WORD :], 16)) for log in logs)
    return any(place == nonce.nonce >> 8 and nonce_is_set(mask, nonce.nonce) for place, mask in words)


def of_foreign_transaction(receipt: dict[str, Any], order: SettlementOrder) -> Evidence | None:
    """What a receipt of somebody else's transaction proves for an EIP-3009 order.

    One transaction may execute many authorizations: only the token's events between this nonce's use and the next one count.
    """
    if receipt["status"] != "0x1":
        return None
    logs = [log for log in receipt["logs"] if log["address"].lower() == order.token]
    start = next((index for index, log in enumerate(logs) if _uses_nonce(log, order)), None)
    if start is None:
        return None
    following = logs[start + 1 :]
    end = next(
        (
            index
            for index, log in enumerate(following)
            if log["topics"] and log["topics"][0] == AUTHORIZATION_USED_TOPIC
        ),
        len(following),
    )
    return pick_transfer(receipt, following[:end], order)


async def explain_failure(rpc: Rpc, order: SettlementOrder, sender: str | None) -> str:
    """Why the order's call fails now, in the contract's own words.

    Args:
        rpc: The chain.
        order: What failed.
        sender: Who makes the call, lower-case hex; None if nobody knows any more.
    """
    call = {"to": order.call_to, "data": "0x" + order.call_data.hex()}
    if sender is not None:
        call["from"] = sender
    try:
        await rpc.call("eth_call", [call, "latest"])
    except RpcError as error:
        if isinstance(error.data, str) and error.data.startswith("0x") and len(error.data) > 2:
            return decode_revert(bytes.fromhex(error.data[2:]))
        return error.message
    return "the transfer reverted"


def _is_eip3009(order: SettlementOrder) -> bool:
    return last_call(order.call_to, order.call_data)[0] == order.token


def _uses_nonce(log: Log, order: SettlementOrder) -> bool:
    topics = log["topics"]
    assert order.authorization_nonce is not None
    return (
        len(topics) == 3
        and topics[0] == AUTHORIZATION_USED_TOPIC
        and log["address"].lower() == order.token
        and topics[1][-40:].lower() == order.payer[2:]
        and int(topics[2], 16) == order.authorization_nonce
    )


def pick_transfer(receipt: dict[str, Any], logs: list[Log], order: SettlementOrder) -> Evidence | None:
    """The first Transfer among `logs` from the order's payer to its recipient, of at most its value."""
    for log in logs:
        value = transferred(log, order.token, order.payer, order.pay_to)
        if value is not None and 0 < value <= order.value:
            return Evidence(
                transaction_hash=receipt["transactionHash"],
                block_number=int(receipt["blockNumber"], 16),
                block_hash=receipt["blockHash"],
                transfer_log_index=int(log["logIndex"], 16),
                received_value=value,
            )
    return None


async def _find_eip3009(rpc: Rpc, order: SettlementOrder, from_block: int, to_block: int) -> Evidence | None:
    assert order.authorization_nonce is not None
    nonce = f"0x{order.authorization_nonce:064x}"
    topics = [AUTHORIZATION_USED_TOPIC, address_topic(order.payer), nonce]
    for log in await get_logs(rpc, order.token, topics, from_block, to_block):
        evidence = of_foreign_transaction(await receipt_with(rpc, log), order)
        if evidence is not None:
            return evidence
    return None


async def _find_permit2(rpc: Rpc, order: SettlementOrder, from_block: int, to_block: int) -> Evidence | None:
    proxy, ours = last_call(order.call_to, order.call_data)
    terms = proxy_terms(ours)
    topics = [TRANSFER_TOPIC, address_topic(order.payer), address_topic(order.pay_to)]
    logs = await get_logs(rpc, order.token, topics, from_block, to_block)
    for transaction_hash, log in list({log["transactionHash"]: log for log in logs}.items())[-CANDIDATES_MAX:]:
        transaction = await rpc.call("eth_getTransactionByHash", [transaction_hash])
        receipt = await receipt_with(rpc, log)
        if transaction is None:
            raise RpcUnavailable(f"a node has a log of {transaction_hash}, and does not have it")
        theirs = proxy_terms(bytes.fromhex(transaction["input"][2:]))
        if (transaction.get("to") or "").lower() == proxy and theirs is not None:
            # A direct call says what it settles; the signature behind the terms may be spelled otherwise than ours.
            proven = theirs == terms
        else:
            proven = await _consumed_by(rpc, receipt, order, proxy)
        if not proven:
            continue
        evidence = pick_transfer(receipt, receipt["logs"], order)
        if evidence is not None:
            return evidence
    return None


async def _consumed_by(rpc: Rpc, receipt: dict[str, Any], order: SettlementOrder, proxy: str) -> bool:
    """Whether a transaction that reached the proxy some other way stands in the block that consumed the nonce."""
    if not any(log["address"].lower() == proxy for log in receipt["logs"]):
        return False
    block = int(receipt["blockNumber"], 16)
    nonce = payment_nonce(order)
    return await is_used(rpc, nonce, block) and not await is_used(rpc, nonce, block - 1)
