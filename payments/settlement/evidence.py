"""What proves on the chain that a settlement was paid. A receipt's status alone never does.

The attacks that this stands against: a cancelled authorization consumes its nonce without paying; a transfer of the right
amount may be the payment of something else; several authorizations may be executed in one transaction, some of them to
another recipient. So a use of this very nonce and a Transfer are paired, and the database lets each Transfer log serve once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.chain.logs import Log, get_logs, transferred
from payments.chain.networks import PERMIT2_ADDRESS
from payments.chain.rpc import Rpc, RpcError
from payments.chain.transactions import (
    AUTHORIZATION_USED_TOPIC,
    PROXY_SETTLE_TERMS_LENGTH,
    TRANSFER_TOPIC,
    address_topic,
    decode_revert,
    encode_authorization_state,
    encode_nonce_bitmap,
    nonce_is_set,
)
from payments.settlement.outbox import Entry

CANDIDATES_MAX = 50
"""Transfers of one payer to us that are looked into for one Permit2 payment."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The Transfer that paid a settlement."""

    transaction_hash: str
    block_number: int
    block_hash: str
    transfer_log_index: int
    received_value: int
    """Atomic units; less than what was sent if the token takes a fee."""


@dataclass(frozen=True, slots=True)
class NoEvidence:
    """Nothing paid it, up to the block that was searched."""

    nonce_consumed: bool
    """Whether the authorization can never be executed any more."""


def of_own_transaction(receipt: dict[str, Any], entry: Entry) -> Evidence | None:
    """What a receipt of a transaction that we signed proves, or None if it does not pay this entry.

    The transaction is the entry's one call, so its events are this call's.
    """
    if receipt["status"] != "0x1":
        return None
    logs: list[Log] = receipt["logs"]
    if _is_eip3009(entry) and not any(_uses_nonce(log, entry) for log in logs):
        return None
    return _pick(receipt, logs, entry)


def of_foreign_transaction(receipt: dict[str, Any], entry: Entry) -> Evidence | None:
    """What a receipt of somebody else's transaction proves for an EIP-3009 entry.

    One transaction may execute many authorizations: only the token's events between this nonce's use and the next one count.
    """
    if receipt["status"] != "0x1":
        return None
    logs = [log for log in receipt["logs"] if log["address"].lower() == entry.token]
    start = next((index for index, log in enumerate(logs) if _uses_nonce(log, entry)), None)
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
    return _pick(receipt, following[:end], entry)


async def search(rpc: Rpc, entry: Entry, head: int) -> Evidence | NoEvidence:
    """Look for what paid `entry` in any transaction from its submission to block `head`.

    Raises:
        RpcError: A node refused; try again later.
        RpcUnavailable: No node answered; try again later.
    """
    if entry.kind == "refund":
        return NoEvidence(nonce_consumed=False)
    if _is_eip3009(entry):
        return await _search_eip3009(rpc, entry, head)
    return await _search_permit2(rpc, entry, head)


async def explain_failure(rpc: Rpc, entry: Entry) -> str:
    """Why the entry's call fails now, in the contract's own words."""
    call = {"to": entry.call_to, "data": "0x" + entry.call_data.hex()}
    if entry.signer is not None:  # its key may have been taken out of the configuration
        call["from"] = entry.signer.address
    try:
        await rpc.call("eth_call", [call, "latest"])
    except RpcError as error:
        if isinstance(error.data, str) and error.data.startswith("0x") and len(error.data) > 2:
            return decode_revert(bytes.fromhex(error.data[2:]))
        return error.message
    return "the transfer reverted"


def _is_eip3009(entry: Entry) -> bool:
    return entry.kind == "payment" and entry.call_to == entry.token


def _uses_nonce(log: Log, entry: Entry) -> bool:
    topics = log["topics"]
    assert entry.authorization_nonce is not None
    return (
        len(topics) == 3
        and topics[0] == AUTHORIZATION_USED_TOPIC
        and log["address"].lower() == entry.token
        and topics[1][-40:].lower() == entry.payer[2:]
        and int(topics[2], 16) == entry.authorization_nonce
    )


def _pick(receipt: dict[str, Any], logs: list[Log], entry: Entry) -> Evidence | None:
    for log in logs:
        value = transferred(log, entry.token, entry.payer, entry.pay_to)
        if value is not None and 0 < value <= entry.value:
            return Evidence(
                transaction_hash=receipt["transactionHash"],
                block_number=int(receipt["blockNumber"], 16),
                block_hash=receipt["blockHash"],
                transfer_log_index=int(log["logIndex"], 16),
                received_value=value,
            )
    return None


async def _search_eip3009(rpc: Rpc, entry: Entry, head: int) -> Evidence | NoEvidence:
    assert entry.authorization_nonce is not None
    nonce = f"0x{entry.authorization_nonce:064x}"
    topics = [AUTHORIZATION_USED_TOPIC, address_topic(entry.payer), nonce]
    for log in await get_logs(rpc, entry.token, topics, entry.from_block, head):
        receipt = await rpc.call("eth_getTransactionReceipt", [log["transactionHash"]])
        evidence = None if receipt is None else of_foreign_transaction(receipt, entry)
        if evidence is not None:
            return evidence
    state = await _read(rpc, entry.token, encode_authorization_state(entry.payer, entry.authorization_nonce), head)
    return NoEvidence(nonce_consumed=state == 1)


async def _search_permit2(rpc: Rpc, entry: Entry, head: int) -> Evidence | NoEvidence:
    if not await _permit2_nonce_is_used(rpc, entry, head):
        return NoEvidence(nonce_consumed=False)
    topics = [TRANSFER_TOPIC, address_topic(entry.payer), address_topic(entry.pay_to)]
    logs = await get_logs(rpc, entry.token, topics, entry.from_block, head)
    for transaction_hash in list(dict.fromkeys(log["transactionHash"] for log in logs))[-CANDIDATES_MAX:]:
        transaction = await rpc.call("eth_getTransactionByHash", [transaction_hash])
        receipt = await rpc.call("eth_getTransactionReceipt", [transaction_hash])
        if transaction is None or receipt is None or receipt["status"] != "0x1":
            continue
        data = bytes.fromhex(transaction["input"][2:])
        if (transaction.get("to") or "").lower() == entry.call_to and data[:4] == entry.call_data[:4]:
            # A direct call says what it settles; the signature behind the terms may be spelled otherwise than ours.
            proven = data[:PROXY_SETTLE_TERMS_LENGTH] == entry.call_data[:PROXY_SETTLE_TERMS_LENGTH]
        else:
            proven = await _consumed_by(rpc, receipt, entry)
        if not proven:
            continue
        evidence = _pick(receipt, receipt["logs"], entry)
        if evidence is not None:
            return evidence
    return NoEvidence(nonce_consumed=True)


async def _consumed_by(rpc: Rpc, receipt: dict[str, Any], entry: Entry) -> bool:
    """Whether a transaction that reached the proxy some other way stands in the block that consumed the nonce."""
    if not any(log["address"].lower() == entry.call_to for log in receipt["logs"]):
        return False
    block = int(receipt["blockNumber"], 16)
    return await _permit2_nonce_is_used(rpc, entry, block) and not await _permit2_nonce_is_used(rpc, entry, block - 1)


async def _permit2_nonce_is_used(rpc: Rpc, entry: Entry, block: int) -> bool:
    assert entry.authorization_nonce is not None
    data = encode_nonce_bitmap(entry.payer, entry.authorization_nonce)
    return nonce_is_set(await _read(rpc, PERMIT2_ADDRESS, data, block), entry.authorization_nonce)


async def _read(rpc: Rpc, to: str, data: bytes, block: int) -> int:
    answer = await rpc.call("eth_call", [{"to": to, "data": "0x" + data.hex()}, hex(block)])
    return int(answer, 16) if len(answer) > 2 else 0
