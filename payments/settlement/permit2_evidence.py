"""Which logs one authorization by Permit2 left. Its nonce is in no log: only a call says which one it uses.

So a Transfer is taken for that of this authorization alone, and not of another of the same payer, if the calldata says so: of
a call to the contract itself, or of a call in a batch of our own, whose events tell its calls apart. Of any other contract
that made the call nobody knows which of its calls came to something. There a log counts if it moved exactly the amount, came
from the contract that had to be called, was not preceded by the nonce's cancellation, and is no other settlement's evidence;
and if the authorization is spelled out in the calldata or its nonce was used in that very block. Whatever such a contract
does, as many payments are proven as were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.batches import decode_execute, logs_of_calls
from payments.chain.logs import Log, get_logs, receipt_with
from payments.chain.rpc import RpcUnavailable
from payments.chain.transactions import WORD
from payments.settlement.authorization_nonces import End, is_used, place_of
from payments.settlement.orders import Evidence, NonceRead, Search, SettlementOrder

CANDIDATES_MAX = 50
"""Transactions of one payer to us that are looked into for one authorization."""

Pick = Callable[[dict[str, Any], list[Log], SettlementOrder], Evidence | None]
"""What logs of a receipt prove for an order, if they came of its own call."""


@dataclass(frozen=True, slots=True)
class Permit2Use:
    """A call that uses an authorization, and how its evidence is recognised."""

    target: str
    """The contract that is called, lower-case hex."""
    terms_of: Callable[[bytes], bytes | None]
    """What calldata of the target says of the authorization that it uses: words in a row; None for other calls."""
    terms: bytes
    """Those of this authorization."""
    nonce: NonceRead
    pick: Pick

    def __post_init__(self) -> None:
        assert len(self.terms) >= 2 * WORD

    def is_made_by(self, to: str, data: bytes) -> bool:
        """Whether a call uses this authorization, or makes a call that does."""
        return self.terms_of(data) == self.terms if to == self.target else self.terms in data


async def find(
    order: SettlementOrder,
    use: Permit2Use,
    where: Search,
    ended: End | None,
    address: str,
    topics: Sequence[str],
) -> Evidence | None:
    """Evidence that an authorization was used by `use`, in anybody's transaction.

    Args:
        order: What is to be proven.
        use: How it is used.
        where: The chain.
        ended: Where the nonce was cancelled first; what comes later is not its.
        address: The contract whose logs may be evidence, lower-case hex.
        topics: Theirs.

    Raises:
        RpcError: A node refused.
        RpcUnavailable: No node answered, or one contradicts itself.
    """
    for start, end in where.ranges:
        logs = await get_logs(where.rpc, address, topics, start, end)
        free = await where.free([log for log in logs if ended is None or place_of(log) < ended])
        by_transaction: dict[str, list[Log]] = {}
        for log in free:
            by_transaction.setdefault(log["transactionHash"], []).append(log)
        for candidates in list(by_transaction.values())[-CANDIDATES_MAX:]:
            evidence = await _look_into(order, use, where, candidates)
            if evidence is not None:
                return evidence
    return None


async def _look_into(order: SettlementOrder, use: Permit2Use, where: Search, candidates: list[Log]) -> Evidence | None:
    """What logs of one transaction prove."""
    transaction_hash, places = candidates[0]["transactionHash"], {place_of(log) for log in candidates}
    transaction = await where.rpc.call("eth_getTransactionByHash", [transaction_hash])
    receipt = await receipt_with(where.rpc, candidates[0])
    if transaction is None:
        raise RpcUnavailable(f"a node has a log of {transaction_hash}, and does not have it")
    own = _logs_of_own_call(transaction, receipt, use, where.batch_contract)
    if own is not None:
        return use.pick(receipt, [log for log in own if place_of(log) in places], order)
    proven = (use.pick(receipt, [log], order) for log in _left_by(use.target, receipt) if place_of(log) in places)
    whole = next((evidence for evidence in proven if evidence and evidence.received_value == order.value), None)
    if whole is None or use.terms in _input(transaction) or await _used_in(whole.block_number, use.nonce, where):
        return whole
    return None


def _logs_of_own_call(
    transaction: dict[str, Any], receipt: dict[str, Any], use: Permit2Use, batch_contract: str | None
) -> list[Log] | None:
    """The logs that a transaction left by using this authorization, none if it did not; None if its calldata does not tell."""
    to, data = (transaction.get("to") or "").lower(), _input(transaction)
    if to == use.target and use.terms_of(data) is not None:
        # The signature behind the terms may be spelled otherwise than ours.
        return list(receipt["logs"]) if use.is_made_by(to, data) else []
    if to != batch_contract:
        return None
    try:
        calls = zip(decode_execute(data), logs_of_calls(receipt), strict=True)
        return [log for call, done in calls if done.success and use.is_made_by(*call) for log in done.logs]
    except ValueError:
        return []  # a batch of transfers by EIP-3009, or none at all


def _left_by(target: str, receipt: dict[str, Any]) -> list[Log]:
    """The logs of a contract, and those of tokens that came directly before one of it."""
    logs: list[Log] = receipt["logs"]
    return [
        log
        for index, log in enumerate(logs)
        if log["address"].lower() == target
        or next((each["address"].lower() for each in logs[index:] if each["address"] != log["address"]), "") == target
    ]


async def _used_in(block: int, nonce: NonceRead, where: Search) -> bool:
    return await is_used(where.rpc, nonce, block) and not await is_used(where.rpc, nonce, block - 1)


def _input(transaction: dict[str, Any]) -> bytes:
    return bytes.fromhex(transaction["input"][2:])
