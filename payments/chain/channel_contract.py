"""The batch-settlement contract as bytes: calldata of what we call, its events, and its state in one call.

Source: the x402 scheme `batch-settlement` on EVM, the ABI of the official packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from payments.chain.networks import (
    BATCH_SETTLEMENT_ADDRESS,
    ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
    MULTICALL3_ADDRESS,
    PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
)
from payments.chain.rpc import Request
from payments.chain.transactions import (
    WORD,
    address_word,
    decode_aggregate3,
    encode_aggregate3,
    selector,
    topic,
    word,
)
from payments.x402.channel_actions import Claim
from payments.x402.channels import ChannelConfig, Deposit, Permit2Deposit
from payments.x402.extensions.eip2612 import Eip2612Permit

_CONFIG = "(address,address,address,address,address,uint40,bytes32)"
_DEPOSIT = selector(f"deposit({_CONFIG},uint128,address,bytes)")
_CLAIM_WITH_SIGNATURE = selector(f"claimWithSignature((({_CONFIG},uint128),bytes,uint128)[],bytes)")
_SETTLE = selector("settle(address,address)")
_REFUND_WITH_SIGNATURE = selector(f"refundWithSignature({_CONFIG},uint128,uint256,bytes)")
_MULTICALL = selector("multicall(bytes[])")
_CHANNELS = selector("channels(bytes32)")
_PENDING_WITHDRAWALS = selector("pendingWithdrawals(bytes32)")
_REFUND_NONCE = selector("refundNonce(bytes32)")
_RECEIVERS = selector("receivers(address,address)")
_GET_BLOCK_NUMBER = selector("getBlockNumber()")

DEPOSITED_TOPIC = topic("Deposited(bytes32,address,uint128,uint128)")
CLAIMED_TOPIC = topic("Claimed(bytes32,address,uint128,uint128)")
SETTLED_TOPIC = topic("Settled(address,address,address,uint128)")
REFUNDED_TOPIC = topic("Refunded(bytes32,address,uint128)")
WITHDRAW_INITIATED_TOPIC = topic("WithdrawInitiated(bytes32,uint128,uint40)")
WITHDRAW_FINALIZED_TOPIC = topic("WithdrawFinalized(bytes32,address,uint128)")
CHANNEL_TOPICS = (
    DEPOSITED_TOPIC,
    CLAIMED_TOPIC,
    REFUNDED_TOPIC,
    WITHDRAW_INITIATED_TOPIC,
    WITHDRAW_FINALIZED_TOPIC,
)
"""The events that change a channel; each has its id as the first indexed argument."""

GAS_DEPOSIT = 300_000
GAS_REFUND = 180_000
GAS_CLAIM_BASE = 160_000
"""`claimWithSignature` and `settle` in one call, besides the channels."""
GAS_CLAIM_EACH = 60_000
GAS_SETTLE = 150_000

CONFIG_WORDS = 7
STATE_CALLS = 3


@dataclass(frozen=True, slots=True)
class ChannelState:
    """A channel as the contract has it. Amounts are atomic units; `balance` includes what was claimed."""

    balance: int
    total_claimed: int
    withdraw_amount: int
    withdraw_at: int
    """Unix seconds at which the payer announced its withdrawal; 0 if it has not."""
    refund_nonce: int


def encode_deposit(config: ChannelConfig, deposit: Deposit, permit: Eip2612Permit | None = None) -> bytes:
    """Calldata of `deposit`, with the collector that the authorization was signed for; over Permit2 an EIP-2612 permit may give
    the allowance."""
    if isinstance(deposit, Permit2Deposit):
        collector = PERMIT2_DEPOSIT_COLLECTOR_ADDRESS
        signature = _tail(deposit.signature)
        heads = (word(deposit.nonce), word(deposit.deadline), word(4 * WORD), word(4 * WORD + len(signature)))
        data = b"".join((*heads, signature, _tail(b"" if permit is None else _collector_permit(permit))))
    else:
        collector = ERC3009_DEPOSIT_COLLECTOR_ADDRESS
        heads = (word(deposit.valid_after), word(deposit.valid_before), word(deposit.salt), word(4 * WORD))
        data = b"".join((*heads, _tail(deposit.signature)))
    offset = word((CONFIG_WORDS + 3) * WORD)
    return b"".join(
        (_DEPOSIT, encode_config(config), word(deposit.amount), address_word(collector), offset, _tail(data))
    )


def _collector_permit(permit: Eip2612Permit) -> bytes:
    """A permit as the collector takes it: value, deadline, v, r, s."""
    return word(permit.value) + word(permit.deadline) + word(permit.signature[64]) + permit.signature[:64]


def encode_claim(claims: Sequence[Claim], authorizer_signature: bytes) -> bytes:
    """Calldata of `claimWithSignature`."""
    heads, tails, offset = [], [], len(claims) * WORD
    for claim in claims:
        signature = _tail(claim.signature)
        tail = b"".join(
            (
                encode_config(claim.config),
                word(claim.voucher_amount),
                word((CONFIG_WORDS + 3) * WORD),
                word(claim.total),
                signature,
            )
        )
        heads.append(word(offset))
        tails.append(tail)
        offset += len(tail)
    array = b"".join((word(len(claims)), *heads, *tails))
    return b"".join(
        (_CLAIM_WITH_SIGNATURE, word(2 * WORD), word(2 * WORD + len(array)), array, _tail(authorizer_signature))
    )


def permit2_deposit_terms(call_data: bytes) -> bytes | None:
    """The nonce and the deadline of the authorization that a `deposit` over Permit2 uses; None for other calldata."""
    collector, nonce = 4 + (CONFIG_WORDS + 1) * WORD, 4 + (CONFIG_WORDS + 4) * WORD
    if call_data[:4] != _DEPOSIT or f"0x{_word_at(call_data, collector):040x}" != PERMIT2_DEPOSIT_COLLECTOR_ADDRESS:
        return None
    return call_data[nonce : nonce + 2 * WORD]


def decode_claims(call_data: bytes) -> list[tuple[ChannelConfig, int]]:
    """The channels of a `claimWithSignature` that `encode_claim` made, and what is claimed of each in all after it."""
    array = 4 + _word_at(call_data, 4)
    heads = array + WORD
    found = []
    for number in range(_word_at(call_data, array)):
        entry = heads + _word_at(call_data, heads + number * WORD)
        words = [_word_at(call_data, entry + place * WORD) for place in range(CONFIG_WORDS + 3)]
        payer, payer_authorizer, receiver, authorizer, token = (f"0x{value:040x}" for value in words[:5])
        config = ChannelConfig(payer, payer_authorizer, receiver, authorizer, token, words[5], words[6])
        found.append((config, words[-1]))
    return found


def receiver_call(receiver: str, token: str) -> tuple[str, bytes]:
    """The call that tells what was claimed for a receiver, and what of it was sent: two words."""
    return BATCH_SETTLEMENT_ADDRESS, _RECEIVERS + address_word(receiver) + address_word(token)


def encode_settle(receiver: str, token: str) -> bytes:
    """Calldata of `settle`: what was claimed goes to the receiver."""
    return _SETTLE + address_word(receiver) + address_word(token)


def encode_claim_and_settle(claims: Sequence[Claim], authorizer_signature: bytes, receiver: str, token: str) -> bytes:
    """Calldata of both in one call: what is claimed is in the treasury in the same transaction."""
    return encode_multicall((encode_claim(claims, authorizer_signature), encode_settle(receiver, token)))


def encode_multicall(calls: Sequence[bytes]) -> bytes:
    """Calldata of the contract's own `multicall`: all or nothing."""
    heads, tails, offset = [], [], len(calls) * WORD
    for call in calls:
        tail = _tail(call)
        heads.append(word(offset))
        tails.append(tail)
        offset += len(tail)
    return b"".join((_MULTICALL, word(WORD), word(len(calls)), *heads, *tails))


def encode_refund(config: ChannelConfig, amount: int, nonce: int, signature: bytes) -> bytes:
    """Calldata of `refundWithSignature`."""
    offset = word((CONFIG_WORDS + 3) * WORD)
    return b"".join(
        (_REFUND_WITH_SIGNATURE, encode_config(config), word(amount), word(nonce), offset, _tail(signature))
    )


def state_calls(channel: int) -> list[tuple[str, bytes]]:
    """The calls whose answers `decode_state` reads."""
    return [
        (BATCH_SETTLEMENT_ADDRESS, function + word(channel))
        for function in (_CHANNELS, _PENDING_WITHDRAWALS, _REFUND_NONCE)
    ]


def states_call(channels: Sequence[int], more: Sequence[tuple[str, bytes]] = ()) -> Request:
    """One call for the states of several channels, the block that they are of, and the answers to `more` calls."""
    calls = [(MULTICALL3_ADDRESS, _GET_BLOCK_NUMBER)]
    calls += [call for channel in channels for call in state_calls(channel)]
    calls += more
    return ("eth_call", ({"to": MULTICALL3_ADDRESS, "data": "0x" + encode_aggregate3(calls).hex()}, "latest"))


def decode_states(answer: str, count: int, more: int = 0) -> tuple[int, list[ChannelState], list[tuple[bool, bytes]]]:
    """The block, the states of `count` channels and the answers to `more` calls, from what `states_call` was answered.

    Raises:
        ValueError: It is no such answer, as from a chain without the contracts.
    """
    (_, block), *results = decode_aggregate3(bytes.fromhex(answer[2:]), 1 + STATE_CALLS * count + more)
    ends = range(STATE_CALLS, STATE_CALLS * count + 1, STATE_CALLS)
    found = [decode_state(results[end - STATE_CALLS : end]) for end in ends]
    return int.from_bytes(block, "big"), found, results[STATE_CALLS * count :]


def decode_state(results: Sequence[tuple[bool, bytes]]) -> ChannelState:
    """A channel's state from the answers to `state_calls`.

    Raises:
        ValueError: The contract is not there.
    """
    lengths = (2 * WORD, 2 * WORD, WORD)
    if not all(ok and len(data) == length for (ok, data), length in zip(results, lengths, strict=True)):
        raise ValueError("there is no batch-settlement contract")
    numbers = [int.from_bytes(data[at : at + WORD], "big") for _, data in results for at in range(0, len(data), WORD)]
    return ChannelState(*numbers)


def encode_config(config: ChannelConfig) -> bytes:
    return b"".join(
        (
            address_word(config.payer),
            address_word(config.payer_authorizer),
            address_word(config.receiver),
            address_word(config.receiver_authorizer),
            address_word(config.token),
            word(config.withdraw_delay),
            word(config.salt),
        )
    )


def _word_at(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + WORD], "big")


def _tail(data: bytes) -> bytes:
    return word(len(data)) + data + b"\0" * (-len(data) % WORD)
