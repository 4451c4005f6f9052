"""Reading what a node sent: JSON-RPC's envelope, and whether each result looks like an answer to its call.

Nonsense is told from an answer here, once, so that a node that sends it is passed over like one that sends nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import orjson

Request = tuple[str, Sequence[Any]]

BLOCK_MAX = 2**53
"""Beyond it is nonsense, which would not even fit the database."""
UINT256_DIGITS = 66
BUSY_CODES = frozenset({-32005, -32016, 429})
"""What nodes answer to one call of many when they limit their callers."""
INTERNAL_ERROR = -32603


class RpcError(Exception):
    """A node's own error answer to one call."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        """Keep JSON-RPC's code, message and data."""
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.data = data

    @property
    def is_the_nodes_own(self) -> bool:
        """Whether another node may well answer: this one limits its callers, or is broken inside. Some report a revert as an
        internal error too, with what the contract returned."""
        return self.code in BUSY_CODES or (self.code == INTERNAL_ERROR and self.data is None)


Reply = Any | RpcError


def read_replies(content: bytes, requests: Sequence[Request]) -> list[Reply]:
    """The result of each request, or the node's error, in order.

    Raises:
        ValueError: The node answered with something else.
    """
    answers = orjson.loads(content)
    if isinstance(answers, dict):  # a node that refuses the whole batch answers with one object
        raise ValueError(f"refused the batch: {answers.get('error')}")
    if not isinstance(answers, list) or len(answers) != len(requests):
        raise ValueError("the batch was answered in part")
    replies: dict[int, Reply] = {}
    for answer in answers:
        if not isinstance(answer, dict) or type(answer.get("id")) is not int:
            raise ValueError("an answer is not an object with the id of its call")
        error = answer.get("error")
        replies[answer["id"]] = answer.get("result") if error is None else _error(error)
    if len(replies) != len(requests) or not all(index in replies for index in range(len(requests))):
        raise ValueError("the answers do not belong to the calls")
    for index, (method, params) in enumerate(requests):
        check, reply = _CHECKS.get(method), replies[index]
        if check is not None and not isinstance(reply, RpcError) and not check(reply, params):
            raise ValueError(f"what it answered to {method} is none: {str(reply)[:60]!r}")
    return [replies[index] for index in range(len(requests))]


def _error(error: Any) -> RpcError:
    if not isinstance(error, dict):
        return RpcError(0, str(error))
    code = 0
    with contextlib.suppress(TypeError, ValueError):
        code = int(error.get("code", 0))
    return RpcError(code, str(error.get("message", "")), error.get("data"))


# --- what results look like -------------------------------------------------------------------------------------------


def _is_quantity(result: Any, _: Sequence[Any] = ()) -> bool:
    if not isinstance(result, str) or not result.startswith("0x") or len(result) > UINT256_DIGITS:
        return False
    try:
        return int(result, 16) >= 0
    except ValueError:
        return False


def _is_block_number(result: Any, _: Sequence[Any] = ()) -> bool:
    return _is_quantity(result) and int(result, 16) <= BLOCK_MAX


def _is_hash(result: Any) -> bool:
    return isinstance(result, str) and len(result) == UINT256_DIGITS


def _is_bytes(result: Any, _: Sequence[Any]) -> bool:
    if not isinstance(result, str) or not result.startswith("0x"):
        return False
    try:
        return len(bytes.fromhex(result[2:])) * 2 == len(result) - 2
    except ValueError:
        return False


def _is_receipt(result: Any, params: Sequence[Any]) -> bool:
    """Of the transaction that was asked for; one that is pending has no block and says nothing else."""
    if result is None:
        return True
    if not isinstance(result, dict) or str(result.get("transactionHash")).lower() != params[0]:
        return False
    if result.get("blockNumber") is None:
        return True
    return (
        _is_block_number(result["blockNumber"])
        and _is_hash(result.get("blockHash"))
        and result.get("status") in ("0x0", "0x1")
        and _are_logs(result.get("logs"))
    )


def _are_logs(result: Any, _: Sequence[Any] = ()) -> bool:
    return isinstance(result, list) and all(
        isinstance(log, dict)
        and isinstance(log.get("address"), str)
        and isinstance(log.get("data"), str)
        and isinstance(log.get("topics"), list)
        and all(isinstance(topic, str) for topic in log["topics"])
        and _is_quantity(log.get("logIndex"))
        for log in result
    )


def _is_block(result: Any, _: Sequence[Any]) -> bool:
    return result is None or (
        isinstance(result, dict)
        and _is_hash(result.get("hash"))
        and _is_block_number(result.get("number"))
        and _is_quantity(result.get("timestamp"))
    )


_CHECKS: dict[str, Callable[[Any, Sequence[Any]], bool]] = {
    "eth_blockNumber": _is_block_number,
    "eth_call": _is_bytes,
    "eth_chainId": _is_quantity,
    "eth_estimateGas": _is_quantity,
    "eth_getBalance": _is_quantity,
    "eth_getBlockByNumber": _is_block,
    "eth_getLogs": _are_logs,
    "eth_getTransactionCount": _is_block_number,
    "eth_getTransactionReceipt": _is_receipt,
}
