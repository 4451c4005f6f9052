"""The contracts of a chain in memory: one token, the batch contract, Permit2 as the `upto` proxy uses it, payment channels,
and Multicall3. They do what the real ones do to balances and nonces and leave the same events; signatures they take on trust,
except those under vouchers and claims, which say how much may be claimed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from eth_abi.abi import decode, encode

from payments.chain import channel_contract as channels
from payments.chain.batches import EXECUTED_TOPIC, encode_execute
from payments.chain.channel_contract import ChannelState
from payments.chain.networks import (
    BATCH_SETTLEMENT_ADDRESS,
    ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
    MULTICALL3_ADDRESS,
    PERMIT2_ADDRESS,
    UPTO_PERMIT2_PROXY_ADDRESS,
)
from payments.chain.transactions import (
    AUTHORIZATION_USED_TOPIC,
    TRANSFER_TOPIC,
    TRANSFER_WITH_AUTHORIZATION,
    WORD,
    address_topic,
    selector,
    topic,
)
from payments.verification.signatures import recover
from payments.verification.vouchers import (
    channel_id,
    claim_batch_digest,
    erc3009_deposit_nonce,
    refund_digest,
    voucher_digest,
)
from payments.x402.channels import ChannelConfig

CHAIN_ID = 84532
CANCEL = selector("cancelAuthorization(address,bytes32,uint8,bytes32,bytes32)")
INITIATE = "initiateWithdraw((address,address,address,address,address,uint40,bytes32),uint128)"
FINALIZE = "finalizeWithdraw((address,address,address,address,address,uint40,bytes32))"
SETTLED_UPTO_TOPIC = topic("Settled()")
_CONFIG = "(address,address,address,address,address,uint40,bytes32)"
_EXECUTE = encode_execute([])[:4]
_EXECUTE_TRANSFERS = selector("executeTransfers(address,address,uint256,bytes)")
_TRANSFER_LENGTHS = (20, 12, 6, 6, 32, 1, 32, 32)

Log = dict[str, Any]
Result = tuple[list[Log], bytes]


class Reverted(Exception):
    """A call undid what it did."""


class OutOfGas(Reverted):
    """It also used all that it had."""


@dataclass(slots=True)
class State:
    """What a block changes."""

    balances: dict[str, int] = field(default_factory=dict)
    used: set[tuple[str, int]] = field(default_factory=set)
    """Nonces of EIP-3009."""
    permit2: set[tuple[str, int]] = field(default_factory=set)
    nonces: dict[str, int] = field(default_factory=dict)
    channels: dict[int, ChannelState] = field(default_factory=dict)
    unsettled: dict[str, int] = field(default_factory=dict)
    """Claimed from channels, by receiver."""

    def copy(self) -> State:
        """The same, to go on from here."""
        return State(
            dict(self.balances),
            set(self.used),
            set(self.permit2),
            dict(self.nonces),
            dict(self.channels),
            dict(self.unsettled),
        )

    def restore(self, earlier: State) -> None:
        """Become what it was."""
        for name in ("balances", "used", "permit2", "nonces", "channels", "unsettled"):
            setattr(self, name, getattr(earlier, name))


@dataclass(slots=True)
class Frame:
    """A call's surroundings."""

    state: State
    sender: str
    timestamp: int
    number: int
    calls: int = 0
    """How many a batch made."""


class Contracts:
    """All contracts of one chain.

    Args:
        token: The token's address.
        batch_contract: The operator's.
    """

    def __init__(self, token: str, batch_contract: str) -> None:
        self.token, self.batch_contract = token, batch_contract
        self.batches_out_of_gas = 0
        """So many of the next batches revert as a whole."""
        self.gas_eaters: set[str] = set()
        """Payers whose transfers use all gas that there is: a batch with one among others reverts as a whole."""
        self.failed_calls: set[tuple[str, bytes]] = set()
        """Calls that reverted by themselves, in a block that stayed or not: each can be called a failure."""
        self.blocked: set[str] = set()
        """Payers and recipients whose transfers the token refuses."""
        self._functions: dict[str, Callable[[Frame, bytes], Result]] = {
            token: self._token,
            batch_contract: self._batch,
            PERMIT2_ADDRESS: self._permit2,
            UPTO_PERMIT2_PROXY_ADDRESS: self._upto,
            BATCH_SETTLEMENT_ADDRESS: self._channels,
            MULTICALL3_ADDRESS: self._multicall,
        }

    def execute(self, frame: Frame, to: str, data: bytes) -> Result:
        """Make a call: its logs and what it returns. A call to nobody moves nothing.

        Raises:
            Reverted: It failed; what it changed in `frame.state` is the caller's to undo.
        """
        function = self._functions.get(to)
        return ([], b"") if function is None else function(frame, data)

    # --- the token ----------------------------------------------------------------------------------------------------

    def _token(self, frame: Frame, data: bytes) -> Result:
        name, arguments = data[:4], _words(data[4:])
        if name == TRANSFER_WITH_AUTHORIZATION:
            payer, recipient = _address(arguments[0]), _address(arguments[1])
            value, _, valid_before, nonce = arguments[2:6]
            if frame.timestamp >= valid_before:
                raise Reverted
            used = self._use(frame, payer, nonce)
            return [used, self._move(frame, payer, recipient, value)], b""
        if name == CANCEL:
            return [self._use(frame, _address(arguments[0]), arguments[1])], b""
        if name == selector("transfer(address,uint256)"):
            return [self._move(frame, frame.sender, _address(arguments[0]), arguments[1])], _word(1)
        if name == selector("authorizationState(address,bytes32)"):
            return [], _word((_address(arguments[0]), arguments[1]) in frame.state.used)
        if name == selector("balanceOf(address)"):
            return [], _word(frame.state.balances.get(_address(arguments[0]), 0))
        if name == selector("allowance(address,address)"):
            return [], _word(2**255)
        raise Reverted

    def _use(self, frame: Frame, payer: str, nonce: int) -> Log:
        if (payer, nonce) in frame.state.used:
            raise Reverted
        frame.state.used.add((payer, nonce))
        return _log(self.token, AUTHORIZATION_USED_TOPIC, address_topic(payer), f"0x{nonce:064x}")

    def _move(self, frame: Frame, payer: str, recipient: str, value: int) -> Log:
        if payer in self.gas_eaters:
            raise OutOfGas
        balances = frame.state.balances
        if balances.get(payer, 0) < value or {payer, recipient} & self.blocked:
            raise Reverted
        balances[payer] -= value
        balances[recipient] = balances.get(recipient, 0) + value
        return _log(self.token, TRANSFER_TOPIC, address_topic(payer), address_topic(recipient), data=_word(value))

    # --- the batch contract -------------------------------------------------------------------------------------------

    def _batch(self, frame: Frame, data: bytes) -> Result:
        calls = calls_of(data)
        if len(calls) > 1 and self.batches_out_of_gas:
            self.batches_out_of_gas -= 1
            raise OutOfGas
        logs: list[Log] = []
        inner = Frame(frame.state, self.batch_contract, frame.timestamp, frame.number)
        for index, (to, call_data) in enumerate(calls):
            before = frame.state.copy()
            try:
                logs += self.execute(inner, to, call_data)[0]
                success = 1
            except Reverted as reverted:
                if isinstance(reverted, OutOfGas) and len(calls) > 1:
                    raise
                frame.state.restore(before)
                self.failed_calls.add((to, call_data))
                success = 0
            logs.append(_log(self.batch_contract, EXECUTED_TOPIC, f"0x{index:064x}", data=_word(success)))
        frame.calls = len(calls)
        return logs, b""

    # --- Permit2 ------------------------------------------------------------------------------------------------------

    def _permit2(self, frame: Frame, data: bytes) -> Result:
        owner, place = _address(_words(data[4:])[0]), _words(data[4:])[1]
        nonces = [nonce for payer, nonce in frame.state.permit2 if payer == owner and nonce >> 8 == place]
        return [], _word(sum(1 << (nonce & 0xFF) for nonce in nonces))

    def _upto(self, frame: Frame, data: bytes) -> Result:
        _, permitted, nonce, deadline, amount, owner, to, facilitator, _ = _words(data[4 : 4 + 9 * WORD])
        payer = _address(owner)
        if frame.sender != _address(facilitator) or frame.timestamp > deadline or amount > permitted:
            raise Reverted
        if (payer, nonce) in frame.state.permit2:
            raise Reverted
        frame.state.permit2.add((payer, nonce))
        moved = self._move(frame, payer, _address(to), amount)
        return [moved, _log(UPTO_PERMIT2_PROXY_ADDRESS, SETTLED_UPTO_TOPIC)], b""

    # --- channels -----------------------------------------------------------------------------------------------------

    def _channels(self, frame: Frame, data: bytes) -> Result:
        name, arguments = data[:4], data[4:]
        if name == selector("multicall(bytes[])"):
            (calls,) = decode(["bytes[]"], arguments)
            return [log for call in calls for log in self._channels(frame, call)[0]], b""
        if name == selector(f"deposit({_CONFIG},uint128,address,bytes)"):
            return self._deposit(frame, *decode([_CONFIG, "uint128", "address", "bytes"], arguments)), b""
        if name == selector(f"claimWithSignature((({_CONFIG},uint128),bytes,uint128)[],bytes)"):
            return self._claim(frame, *decode([f"(({_CONFIG},uint128),bytes,uint128)[]", "bytes"], arguments)), b""
        if name == selector("settle(address,address)"):
            return self._settle(frame, decode(["address"], arguments)[0]), b""
        if name == selector(f"refundWithSignature({_CONFIG},uint128,uint256,bytes)"):
            return self._refund(frame, *decode([_CONFIG, "uint128", "uint256", "bytes"], arguments)), b""
        if name == selector(INITIATE):
            return self._initiate(frame, *decode([_CONFIG, "uint128"], arguments)), b""
        if name == selector(FINALIZE):
            return self._finalize(frame, *decode([_CONFIG], arguments)), b""
        channel = frame.state.channels.get(_words(arguments)[0], ChannelState(0, 0, 0, 0, 0))
        if name == selector("channels(bytes32)"):
            return [], _word(channel.balance) + _word(channel.total_claimed)
        if name == selector("pendingWithdrawals(bytes32)"):
            return [], _word(channel.withdraw_amount) + _word(channel.withdraw_at)
        if name == selector("refundNonce(bytes32)"):
            return [], _word(channel.refund_nonce)
        raise Reverted

    def _deposit(self, frame: Frame, raw: Any, amount: int, collector: str, data: bytes) -> list[Log]:
        config = _config(raw)
        number = channel_id(config, CHAIN_ID)
        channel = frame.state.channels.get(number, ChannelState(0, 0, 0, 0, 0))
        if amount == 0 or collector.lower() != ERC3009_DEPOSIT_COLLECTOR_ADDRESS:
            raise Reverted
        _, valid_before, salt = decode(["uint256", "uint256", "uint256"], data)
        if frame.timestamp >= valid_before:
            raise Reverted
        used = self._use(frame, config.payer, erc3009_deposit_nonce(number, salt))
        moved = self._move(frame, config.payer, BATCH_SETTLEMENT_ADDRESS, amount)
        frame.state.channels[number] = replace(channel, balance=channel.balance + amount)
        new = _word(amount) + _word(channel.balance + amount)
        return [used, moved, _channel_log(channels.DEPOSITED_TOPIC, number, frame.sender, new)]

    def _claim(self, frame: Frame, rows: Any, signature: bytes) -> list[Log]:
        parsed = [(_config(config), most, signed, total) for (config, most), signed, total in rows]
        entries = [(channel_id(config, CHAIN_ID), most, total) for config, most, _, total in parsed]
        if recover(claim_batch_digest(entries, CHAIN_ID), signature) != parsed[0][0].receiver_authorizer:
            raise Reverted
        logs = []
        for (config, most, signed, total), (number, _, _) in zip(parsed, entries, strict=True):
            channel = frame.state.channels.get(number, ChannelState(0, 0, 0, 0, 0))
            if total <= channel.total_claimed:
                continue
            if total > most or total > channel.balance:
                raise Reverted
            if recover(voucher_digest(number, most, CHAIN_ID), signed) != config.payer_authorizer:
                raise Reverted
            added = total - channel.total_claimed
            frame.state.channels[number] = replace(channel, total_claimed=total)
            frame.state.unsettled[config.receiver] = frame.state.unsettled.get(config.receiver, 0) + added
            logs.append(_channel_log(channels.CLAIMED_TOPIC, number, frame.sender, _word(added) + _word(total)))
        return logs

    def _settle(self, frame: Frame, receiver: str) -> list[Log]:
        amount = frame.state.unsettled.pop(receiver.lower(), 0)
        if not amount:
            return []
        topics = (channels.SETTLED_TOPIC, address_topic(receiver.lower()), address_topic(self.token))
        settled = _log(BATCH_SETTLEMENT_ADDRESS, *topics, address_topic(frame.sender), data=_word(amount))
        return [self._move(frame, BATCH_SETTLEMENT_ADDRESS, receiver.lower(), amount), settled]

    def _refund(self, frame: Frame, raw: Any, amount: int, nonce: int, signature: bytes) -> list[Log]:
        config = _config(raw)
        number = channel_id(config, CHAIN_ID)
        channel = frame.state.channels.get(number, ChannelState(0, 0, 0, 0, 0))
        signer = recover(refund_digest(number, nonce, amount, CHAIN_ID), signature)
        if nonce != channel.refund_nonce or amount == 0 or signer != config.receiver_authorizer:
            raise Reverted
        amount = min(amount, channel.balance - channel.total_claimed)
        withdraw = max(channel.withdraw_amount - amount, 0)
        frame.state.channels[number] = replace(
            channel,
            balance=channel.balance - amount,
            refund_nonce=nonce + 1,
            withdraw_amount=withdraw,
            withdraw_at=channel.withdraw_at if withdraw else 0,
        )
        if not amount:
            return []
        moved = self._move(frame, BATCH_SETTLEMENT_ADDRESS, config.payer, amount)
        return [moved, _channel_log(channels.REFUNDED_TOPIC, number, frame.sender, _word(amount))]

    def _initiate(self, frame: Frame, raw: Any, amount: int) -> list[Log]:
        config = _config(raw)
        number = channel_id(config, CHAIN_ID)
        channel = frame.state.channels.get(number, ChannelState(0, 0, 0, 0, 0))
        if frame.sender != config.payer or channel.withdraw_at or amount == 0:
            raise Reverted
        if amount > channel.balance - channel.total_claimed:
            raise Reverted
        frame.state.channels[number] = replace(channel, withdraw_amount=amount, withdraw_at=frame.timestamp)
        data = _word(amount) + _word(frame.timestamp + config.withdraw_delay)
        return [_log(BATCH_SETTLEMENT_ADDRESS, channels.WITHDRAW_INITIATED_TOPIC, f"0x{number:064x}", data=data)]

    def _finalize(self, frame: Frame, raw: Any) -> list[Log]:
        config = _config(raw)
        number = channel_id(config, CHAIN_ID)
        channel = frame.state.channels.get(number, ChannelState(0, 0, 0, 0, 0))
        if not channel.withdraw_at or frame.timestamp < channel.withdraw_at + config.withdraw_delay:
            raise Reverted
        amount = min(channel.withdraw_amount, channel.balance - channel.total_claimed)
        frame.state.channels[number] = replace(
            channel, balance=channel.balance - amount, withdraw_amount=0, withdraw_at=0
        )
        logs = [_channel_log(channels.WITHDRAW_FINALIZED_TOPIC, number, frame.sender, _word(amount))]
        return [self._move(frame, BATCH_SETTLEMENT_ADDRESS, config.payer, amount), *logs] if amount else logs

    # --- Multicall3 ---------------------------------------------------------------------------------------------------

    def _multicall(self, frame: Frame, data: bytes) -> Result:
        if data[:4] == selector("getBlockNumber()"):
            return [], _word(frame.number)
        (calls,) = decode(["(address,bool,bytes)[]"], data[4:])
        results = []
        for to, _, call_data in calls:
            before = frame.state.copy()
            try:
                results.append((True, self.execute(frame, to.lower(), call_data)[1]))
            except Reverted:
                frame.state.restore(before)
                results.append((False, b""))
        return [], encode(["(bool,bytes)[]"], [results])


def calls_of(data: bytes) -> list[tuple[str, bytes]]:
    """The calls in the calldata of a batch: contract and calldata of each."""
    if data[:4] == _EXECUTE_TRANSFERS:
        return _transfers_of(data[4:])
    assert data[:4] == _EXECUTE

    def number(at: int) -> int:
        return int.from_bytes(data[at : at + WORD], "big")

    start = 4 + 2 * WORD
    calls = []
    for index in range(number(4 + WORD)):
        at = start + number(start + index * WORD)
        content = at + number(at + 2 * WORD)
        calls.append((_address(number(at)), data[content + WORD : content + WORD + number(content)]))
    return calls


def _transfers_of(data: bytes) -> list[tuple[str, bytes]]:
    """The calls that the batch contract makes of packed transfers."""
    token, recipient = "0x" + data[12:WORD].hex(), data[WORD : 2 * WORD]
    entries = io.BytesIO(data[5 * WORD :][: int.from_bytes(data[4 * WORD : 5 * WORD], "big")])
    calls = []
    while len(first := entries.read(_TRANSFER_LENGTHS[0])):
        payer, *others = (each.rjust(WORD, b"\0") for each in (first, *map(entries.read, _TRANSFER_LENGTHS[1:])))
        calls.append((token, b"".join((TRANSFER_WITH_AUTHORIZATION, payer, recipient, *others))))
    return calls


def _config(raw: Any) -> ChannelConfig:
    payer, payer_authorizer, receiver, receiver_authorizer, token, delay, salt = raw
    return ChannelConfig(
        payer.lower(),
        payer_authorizer.lower(),
        receiver.lower(),
        receiver_authorizer.lower(),
        token.lower(),
        delay,
        int.from_bytes(salt, "big"),
    )


def _channel_log(event: str, number: int, sender: str, data: bytes) -> Log:
    return _log(BATCH_SETTLEMENT_ADDRESS, event, f"0x{number:064x}", address_topic(sender), data=data)


def _log(address: str, *topics: str, data: bytes = b"") -> Log:
    return {"address": address, "topics": list(topics), "data": "0x" + data.hex()}


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + WORD], "big") for at in range(0, len(data), WORD)]


def _word(value: int) -> bytes:
    return int(value).to_bytes(WORD, "big")


def _address(word: int) -> str:
    return f"0x{word & (2**160 - 1):040x}"
