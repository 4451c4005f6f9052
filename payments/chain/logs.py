"""Reading events: long ranges in pieces that public nodes accept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from payments.chain.rpc import Rpc, RpcUnavailable
from payments.chain.transactions import TRANSFER_TOPIC

RANGE_MAX = 2_000
"""Blocks in one query; public nodes refuse more."""

Log = dict[str, Any]


async def get_logs(
    rpc: Rpc,
    address: str,
    topics: Sequence[str | list[str] | None],
    from_block: int,
    to_block: int,
    *,
    range_max: int = RANGE_MAX,
) -> list[Log]:
    """The logs of one contract that match `topics`, both blocks included, in the chain's order.

    Raises:
        RpcError: The node refused a query.
        RpcUnavailable: No node answered.
    """
    logs: list[Log] = []
    for start in range(from_block, to_block + 1, range_max):
        end = min(start + range_max - 1, to_block)
        query = {"address": address, "topics": list(topics), "fromBlock": hex(start), "toBlock": hex(end)}
        logs += await rpc.call("eth_getLogs", [query])
    return logs


async def receipt_with(rpc: Rpc, log: Log) -> dict[str, Any]:
    """The receipt of the transaction that left a log.

    Raises:
        RpcError: The node refused.
        RpcUnavailable: No node answered, or the receipt does not have the log: one of the two answers is wrong, and which one
            is not known.
    """
    receipt = await rpc.call("eth_getTransactionReceipt", [log["transactionHash"]])
    index, topics = int(log["logIndex"], 16), log["topics"]
    if receipt is None or not any(
        int(own["logIndex"], 16) == index and own["topics"] == topics for own in receipt["logs"]
    ):
        raise RpcUnavailable(f"a node has a log of {log['transactionHash']}, and not in its receipt")
    found: dict[str, Any] = receipt
    return found


def transferred(log: Log, token: str, sender: str, recipient: str) -> int | None:
    """The value of a log that is `token`'s Transfer between these two; None for any other log."""
    topics = log["topics"]
    if len(topics) != 3 or topics[0] != TRANSFER_TOPIC or log["address"].lower() != token:
        return None
    if topics[1][-40:].lower() != sender[2:] or topics[2][-40:].lower() != recipient[2:]:
        return None
    return int(log["data"], 16)
