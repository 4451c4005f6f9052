"""Many calls in one transaction, through the operator's own batch contract; and many deposit addresses swept in one call.

The contract isolates its calls from each other and marks the end of each with an event, so that what a call did can be told
apart from what its neighbours did: see `logs_of_calls`. Source: `contracts/src/FareboxBatch.sol`, `DepositForwarders.sol`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contracts.operators import deposit_address
from payments.chain.logs import Log
from payments.chain.networks import UPTO_PERMIT2_PROXY_ADDRESS
from payments.chain.rpc import Request, Rpc
from payments.chain.transactions import (
    TRANSFER_WITH_AUTHORIZATION,
    WORD,
    Call,
    address_word,
    selector,
    topic,
    uint_at,
    word,
)

EXECUTED_TOPIC = topic("Executed(uint256,bool)")
SWEPT_TOPIC = topic("Swept(bytes32,address,uint256)")
SWEEP_FAILED_TOPIC = topic("SweepFailed(bytes32,address)")

BATCH_GAS = 40_000
"""What a batch costs besides its calls: the transaction itself, the signer's look-up."""
OWN_GAS_PER_CALL = 16_000
"""What the contract wants to have left besides a call's own limit, and what the event and the calldata cost."""

_EXECUTE = selector("execute((address,uint256,bytes)[])")
_IS_SIGNER = selector("isSigner(address)")
_EXECUTE_TRANSFERS = selector("executeTransfers(address,address,uint256,bytes)")
_PACKED = ((0, 20), (2, 12), (3, 6), (4, 6), (5, 32), (6, 1), (7, 32), (8, 32))
"""Position and bytes of the arguments in a packed transfer, as `FareboxBatch.sol` has them."""
_SWEEP = selector("sweep(address,bytes32[])")


@dataclass(frozen=True, slots=True)
class Executed:
    """What one call of a batch came to: the contract's verdict, and the logs that the call left."""

    success: bool
    logs: list[Log]


def encode_execute(calls: Sequence[Call]) -> bytes:
    """Calldata of `FareboxBatch.execute`; each call may use its own `gas` and carries no coin."""
    heads, tails, offset = [], [], len(calls) * WORD
    for call in calls:
        assert call.value == 0
        padded = call.data + b"\0" * (-len(call.data) % WORD)
        tail = b"".join((address_word(call.to), word(call.gas), word(3 * WORD), word(len(call.data)), padded))
        heads.append(word(offset))
        tails.append(tail)
        offset += len(tail)
    return b"".join((_EXECUTE, word(WORD), word(len(calls)), *heads, *tails))


def decode_execute(data: bytes) -> list[tuple[str, bytes]]:
    """The target (lower-case hex) and the calldata of each call that `encode_execute` encoded.

    Raises:
        ValueError: It is no such calldata.
    """
    if data[:4] != _EXECUTE:
        raise ValueError("this is not the calldata of a batch")
    heads = 4 + 2 * WORD
    found = []
    for number in range(uint_at(data, heads - WORD)):
        entry = heads + uint_at(data, heads + number * WORD)
        content = entry + 4 * WORD
        call_data = data[content : content + uint_at(data, content - WORD)]
        found.append((f"0x{uint_at(data, entry):040x}", call_data))
    return found


def encode_batch(calls: Sequence[Call]) -> bytes:
    """Calldata of the batch contract for these calls: packed if all of them are EIP-3009 transfers of one token to one
    recipient, as most are; else `encode_execute`. What the calls do, and the events, are the same."""
    packed = [_packed_transfer(call.data) for call in calls]
    first = calls[0]
    recipient = _argument(first.data, 1)
    alike = all(
        (call.to, call.gas, call.value, _argument(call.data, 1)) == (first.to, first.gas, 0, recipient)
        for call in calls
    )
    entries = b"".join(each for each in packed if each is not None)
    if not alike or None in packed:
        return encode_execute(calls)
    heads = (_EXECUTE_TRANSFERS, address_word(first.to), recipient, word(first.gas), word(4 * WORD), word(len(entries)))
    return b"".join((*heads, entries, b"\0" * (-len(entries) % WORD)))


def _packed_transfer(data: bytes) -> bytes | None:
    """The arguments of `transferWithAuthorization` but the recipient, in their fewest bytes; None for another call, or one
    whose arguments need more of them."""
    if data[:4] != TRANSFER_WITH_AUTHORIZATION or len(data) != 4 + 9 * WORD:
        return None
    fields = []
    for position, length in _PACKED:
        argument = _argument(data, position)
        if any(argument[: WORD - length]):
            return None
        fields.append(argument[WORD - length :])
    return b"".join(fields)


def _argument(data: bytes, position: int) -> bytes:
    return data[4 + position * WORD : 4 + (position + 1) * WORD]


def batch_gas_limit(calls: Sequence[Call]) -> int:
    """The gas with which a batch cannot fail for want of gas: the 64th that every call leaves behind is counted (EIP-150)."""
    data_gas = sum(16 * len(call.data) for call in calls)
    return BATCH_GAS + data_gas + sum(call.gas + call.gas // 63 + OWN_GAS_PER_CALL for call in calls)


def logs_of_calls(receipt: dict[str, Any]) -> list[Executed]:
    """What each call of a batch did, in order, by the events of its receipt.

    Args:
        receipt: Of a transaction to a batch contract, as a node gives it; it did not revert.

    Raises:
        ValueError: The receipt is not that of a batch.
    """
    batch_contract = (receipt.get("to") or "").lower()
    results: list[Executed] = []
    logs: list[Log] = []
    for log in receipt["logs"]:
        if not _is_executed(log, batch_contract):
            logs.append(log)
            continue
        if int(log["topics"][1], 16) != len(results):
            raise ValueError("the calls of a batch are out of order")
        results.append(Executed(int(log["data"], 16) == 1, logs))
        logs = []
    if not results:
        raise ValueError("this is not the receipt of a batch")
    return results


def logs_of_call(receipt: dict[str, Any], position: int) -> list[Log] | None:
    """The logs of one call of a transaction of ours.

    Args:
        receipt: As a node gives it.
        position: The call's place in the batch; 0 if the transaction is the call itself.

    Returns:
        None if the call reverted.

    Raises:
        ValueError: There is no such call.
    """
    if receipt["status"] != "0x1":
        return None
    logs: list[Log] = receipt["logs"]
    batch_contract = (receipt.get("to") or "").lower()
    if not any(_is_executed(log, batch_contract) for log in logs):
        return logs
    results = logs_of_calls(receipt)
    if position >= len(results):
        raise ValueError(f"a batch of {len(results)} calls has none at {position}")
    return results[position].logs if results[position].success else None


def _is_executed(log: Log, batch_contract: str) -> bool:
    return bool(log["address"].lower() == batch_contract and log["topics"][:1] == [EXECUTED_TOPIC])


def account_of(address: str) -> bytes:
    """The name of a wallet's account at the factory: its address (lower-case hex) as a word."""
    return address_word(address)


def forwarder_address(factory: str, implementation: str, address: str) -> str:
    """Where a wallet deposits, lower-case hex.

    Args:
        factory: The operator's `DepositForwarders`.
        implementation: The factory's `FORWARDER`.
        address: The wallet's.
    """
    return deposit_address(factory, implementation, account_of(address))


def encode_sweep(token: str, accounts: Sequence[bytes]) -> bytes:
    """Calldata of `DepositForwarders.sweep`: all that these accounts' addresses have of `token` goes to the treasury."""
    return b"".join((_SWEEP, address_word(token), word(2 * WORD), word(len(accounts)), *accounts))


async def missing_for_upto(rpc: Rpc, batch_contract: str, signers: Sequence[str]) -> str | None:
    """What keeps the batch contract from settling payments of the scheme `upto`, for people; None if nothing does.

    Raises:
        RpcError: A node refused a question.
        RpcUnavailable: No node answered.
    """
    codes: list[Request] = [("eth_getCode", (each, "latest")) for each in (batch_contract, UPTO_PERMIT2_PROXY_ADDRESS)]
    calls: list[Request] = [
        ("eth_call", ({"to": batch_contract, "data": "0x" + (_IS_SIGNER + address_word(signer)).hex()}, "latest"))
        for signer in signers
    ]
    contract, proxy, *allowed = await rpc.ask([*codes, *calls])
    if len(contract) <= 2 or len(proxy) <= 2:
        return "there is no batch contract" if len(contract) <= 2 else "there is no upto proxy on this chain"
    refused = [signer for signer, reply in zip(signers, allowed, strict=True) if int(reply or "0x", 16) != 1]
    return f"the batch contract does not know the signers {refused}" if refused or not signers else None
