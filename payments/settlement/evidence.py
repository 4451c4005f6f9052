"""What proves on the chain that a settlement was paid. A receipt's status alone never does.

The attacks that this stands against: a cancelled authorization consumes its nonce without paying; a transfer of the right
amount may be the payment of something else; several authorizations may be executed in one transaction, some of them to
another recipient. So a use of this very nonce and a Transfer are paired, and the database lets each Transfer log serve once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from payments.chain.logs import Log, get_logs, receipt_with, transferred
from payments.chain.rpc import Rpc, RpcError
from payments.chain.transactions import (
    AUTHORIZATION_USED_TOPIC,
    TRANSFER_TOPIC,
    address_topic,
    decode_revert,
    last_call,
    proxy_terms,
)
from payments.settlement import permit2_evidence
from payments.settlement.authorization_nonces import end_of, is_used, nonce_read
from payments.settlement.orders import Evidence, NoEvidence, NonceRead, Search, SettlementOrder
from payments.settlement.permit2_evidence import Permit2Use, Pick


class PaymentProof:
    """A payer's authorization: the token's Transfer together with the use of this very nonce."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `Proof`."""
        if _is_eip3009(order) and not any(_uses_nonce(log, order) for log in logs):
            return None
        return pick_transfer(receipt, logs, order)

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `Proof`. If somebody else submitted the authorization, it is paid all the same."""
        nonce = payment_nonce(order)
        if not await is_used(where.rpc, nonce, where.head):
            return NoEvidence(nonce_consumed=False)
        ended = await end_of(nonce, order.payer, where)
        if _is_eip3009(order):
            evidence = await find_eip3009(order, where, pick_transfer)
        else:
            topics = [TRANSFER_TOPIC, address_topic(order.payer), address_topic(order.pay_to)]
            evidence = await permit2_evidence.find(order, _permit2_use(order), where, ended, order.token, topics)
        return evidence or NoEvidence(nonce_consumed=True, explained=ended is not None)


class TransferProof:
    """A transfer of our own, which nobody else can make: a Transfer in our own transaction."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `Proof`. Whoever signed it has paid: since the order was written the treasury may have been exchanged."""
        return pick_transfer(receipt, logs, replace(order, payer=receipt["from"].lower()))

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `Proof`."""
        return NoEvidence(nonce_consumed=False)


def payment_nonce(order: SettlementOrder) -> NonceRead:
    """Where the chain keeps the nonce of a payment."""
    return nonce_read(order, permit2=not _is_eip3009(order))


async def find_eip3009(order: SettlementOrder, where: Search, pick: Pick) -> Evidence | None:
    """Evidence that an EIP-3009 authorization was used for an order, in anybody's transaction: its nonce is in a log.

    Args:
        order: What is to be proven.
        where: The chain.
        pick: What proves it among the logs of one authorization.

    Raises:
        RpcError: A node refused.
        RpcUnavailable: No node answered, or one contradicts itself.
    """
    assert order.authorization_nonce is not None
    topics = [AUTHORIZATION_USED_TOPIC, address_topic(order.payer), f"0x{order.authorization_nonce:064x}"]
    for start, end in where.ranges:
        for log in await get_logs(where.rpc, order.token, topics, start, end):
            evidence = of_foreign_transaction(await receipt_with(where.rpc, log), order, pick)
            if evidence is not None:
                return evidence
    return None


def of_foreign_transaction(receipt: dict[str, Any], order: SettlementOrder, pick: Pick) -> Evidence | None:
    """What a receipt of somebody else's transaction proves for an EIP-3009 order.

    One transaction may execute many authorizations: only the events between this nonce's use and the next one count.
    """
    if receipt["status"] != "0x1":
        return None
    logs: list[Log] = receipt["logs"]
    start = next((index for index, log in enumerate(logs) if _uses_nonce(log, order)), None)
    if start is None:
        return None
    following = logs[start + 1 :]
    end = next((index for index, log in enumerate(following) if _uses_any_nonce(log, order)), len(following))
    return pick(receipt, following[:end], order)


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


def _permit2_use(order: SettlementOrder) -> Permit2Use:
    proxy, data = last_call(order.call_to, order.call_data)
    terms = proxy_terms(data)
    assert terms is not None
    return Permit2Use(proxy, proxy_terms, terms, payment_nonce(order), pick_transfer)


def _uses_any_nonce(log: Log, order: SettlementOrder) -> bool:
    return bool(log["address"].lower() == order.token and log["topics"][:1] == [AUTHORIZATION_USED_TOPIC])


def _uses_nonce(log: Log, order: SettlementOrder) -> bool:
    topics = log["topics"]
    assert order.authorization_nonce is not None
    return (
        _uses_any_nonce(log, order)
        and len(topics) == 3
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
