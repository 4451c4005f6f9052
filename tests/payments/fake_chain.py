"""A chain in memory, for tests that need thousands of blocks and every fault: one EIP-3009 token, plain transfers, the batch
contract, a mempool, and reorganisations. What it does not know it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import coincurve

from payments.chain.batches import EXECUTED_TOPIC, encode_execute
from payments.chain.nodes import Node
from payments.chain.replies import Reply, Request, RpcError
from payments.chain.rlp import rlp_decode, rlp_encode
from payments.chain.rpc import Rpc
from payments.chain.transactions import (
    AUTHORIZATION_USED_TOPIC,
    TRANSFER_TOPIC,
    WORD,
    Call,
    address_topic,
    encode_authorization_state,
    encode_transfer,
    selector,
)
from payments.verification.signatures import keccak256

GAS_PRICE_WEI = 10**9
GAS_OF_CALL = 50_000
_EIP3009 = selector("transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,uint8,bytes32,bytes32)")
_TRANSFER = encode_transfer("0x" + "00" * 20, 0)[:4]
_STATE = encode_authorization_state("0x" + "00" * 20, 0)[:4]
_EXECUTE = encode_execute([])[:4]
_EXECUTE_TRANSFERS = selector("executeTransfers(address,address,uint256,bytes)")
_TRANSFER_LENGTHS = (20, 12, 6, 6, 32, 1, 32, 32)


class Reverted(Exception):
    """A call undid what it did."""


@dataclass(slots=True)
class Sent:
    """A transaction as the mempool has it."""

    hash: str
    sender: str
    nonce: int
    max_fee: int
    call: Call


@dataclass(slots=True)
class State:
    """What a block changes."""

    balances: dict[str, int] = field(default_factory=dict)
    used: set[tuple[str, int]] = field(default_factory=set)
    nonces: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Block:
    """A block, what it holds, and the state before it."""

    number: int
    hash: str
    sent: list[Sent]
    receipts: dict[str, dict[str, Any]]
    before: State


class FakeChain:
    """The chain. Its token moves by EIP-3009 without a look at signatures: those are other tests' matter."""

    def __init__(self, token: str, batch_contract: str) -> None:
        self.token, self.batch_contract = token, batch_contract
        self.state = State()
        self.blocks: list[Block] = []
        self.mempool: dict[tuple[str, int], Sent] = {}
        self.batches_revert = 0
        """So many of the next batches revert as a whole."""
        self._salt = itertools.count()
        self.mine()

    @property
    def head(self) -> Block:
        return self.blocks[-1]

    # --- what tests do ------------------------------------------------------------------------------------------------

    def mine(self) -> None:
        """Make a block of everything that can be mined."""
        number = len(self.blocks)
        block = Block(
            number, "0x" + keccak256(f"{number} {next(self._salt)}".encode()).hex(), [], {}, copy.deepcopy(self.state)
        )
        self.blocks.append(block)
        for key in sorted(self.mempool):
            sent = self.mempool[key]
            if sent.nonce == self.state.nonces.get(sent.sender, 0):
                del self.mempool[key]
                self._include(block, sent)

    def reorganise(self, depth: int, *, keep: bool) -> None:
        """Take the last blocks away and mine empty ones instead; their transactions are pending again, or forgotten."""
        gone = self.blocks[-depth:]
        self.blocks = self.blocks[:-depth]
        self.state = gone[0].before
        for sent in [sent for block in gone for sent in block.sent]:
            if keep:
                self.mempool.setdefault((sent.sender, sent.nonce), sent)
        waiting, self.mempool = self.mempool, {}
        for _ in range(depth + 1):
            self.mine()
        self.mempool = waiting

    def act(self, sender: str, call: Call) -> None:
        """Somebody's transaction, mined at once in a block of its own."""
        waiting, self.mempool = self.mempool, {}
        nonce = self.state.nonces.get(sender, 0)
        sent = Sent("0x" + keccak256(f"{sender} {next(self._salt)}".encode()).hex(), sender, nonce, GAS_PRICE_WEI, call)
        self.mempool = {(sender, nonce): sent}
        self.mine()
        self.mempool = waiting

    def receipts(self) -> list[dict[str, Any]]:
        """All of the chain, in order."""
        return [receipt for block in self.blocks for receipt in block.receipts.values()]

    # --- execution ----------------------------------------------------------------------------------------------------

    def _include(self, block: Block, sent: Sent) -> None:
        self.state.nonces[sent.sender] = sent.nonce + 1
        before, logs = copy.deepcopy(self.state), []
        try:
            logs = self._transact(sent.call)
            status = "0x1"
        except Reverted:
            self.state, status = before, "0x0"
        first = sum(len(receipt["logs"]) for receipt in block.receipts.values())
        place = {"blockNumber": hex(block.number), "blockHash": block.hash, "transactionHash": sent.hash}
        block.sent.append(sent)
        block.receipts[sent.hash] = place | {
            "status": status,
            "from": sent.sender,
            "to": sent.call.to,
            "gasUsed": hex(GAS_OF_CALL),
            "effectiveGasPrice": hex(GAS_PRICE_WEI),
            "logs": [log | place | {"logIndex": hex(first + index)} for index, log in enumerate(logs)],
        }

    def _transact(self, call: Call) -> list[dict[str, Any]]:
        if call.to != self.batch_contract:
            return self._execute(call.to, call.data)
        if self.batches_revert:
            self.batches_revert -= 1
            raise Reverted
        logs: list[dict[str, Any]] = []
        for index, (to, data) in enumerate(_calls_of(call.data)):
            before = copy.deepcopy(self.state)
            try:
                logs += self._execute(to, data)
                success = 1
            except Reverted:
                self.state, success = before, 0
            topics = [EXECUTED_TOPIC, f"0x{index:064x}"]
            logs.append({"address": self.batch_contract, "topics": topics, "data": f"0x{success:064x}"})
        return logs

    def _execute(self, to: str, data: bytes) -> list[dict[str, Any]]:
        if to != self.token:
            return []  # a transfer of nothing to somebody
        words = [int.from_bytes(data[at : at + WORD], "big") for at in range(4, len(data), WORD)]
        if data[:4] == _EIP3009:
            payer, recipient, value, nonce = _address(words[0]), _address(words[1]), words[2], words[5]
            if (payer, nonce) in self.state.used:
                raise Reverted
            self.state.used.add((payer, nonce))
            used = {
                "address": self.token,
                "topics": [AUTHORIZATION_USED_TOPIC, address_topic(payer), f"0x{nonce:064x}"],
                "data": "0x",
            }
            return [used, self._move(payer, recipient, value)]
        raise Reverted

    def _move(self, payer: str, recipient: str, value: int) -> dict[str, Any]:
        if self.state.balances.get(payer, 0) < value:
            raise Reverted
        self.state.balances[payer] -= value
        self.state.balances[recipient] = self.state.balances.get(recipient, 0) + value
        topics = [TRANSFER_TOPIC, address_topic(payer), address_topic(recipient)]
        return {"address": self.token, "topics": topics, "data": f"0x{value:064x}"}

    # --- JSON-RPC -----------------------------------------------------------------------------------------------------

    def answer(self, method: str, params: Sequence[Any]) -> Reply:
        """What a node says."""
        match method:
            case "eth_blockNumber":
                return hex(self.head.number)
            case "eth_feeHistory":
                return {"baseFeePerGas": [hex(GAS_PRICE_WEI)], "reward": [["0x1"]]}
            case "eth_getTransactionCount":
                return hex(self._count(params[0], pending=params[1] == "pending"))
            case "eth_sendRawTransaction":
                return self._take(bytes.fromhex(params[0][2:]))
            case "eth_getTransactionReceipt":
                return next((b.receipts[params[0]] for b in self.blocks if params[0] in b.receipts), None)
            case "eth_getBlockByNumber":
                number = self.head.number if params[0] == "latest" else int(params[0], 16)
                if number > self.head.number:
                    return None
                return {"number": hex(number), "hash": self.blocks[number].hash, "timestamp": hex(int(time.time()))}
            case "eth_getLogs":
                return self._logs(params[0])
            case "eth_call":
                return self._call(bytes.fromhex(params[0]["data"][2:]))
            case _:
                return RpcError(-32601, f"{method} is not known here")

    def _count(self, address: str, *, pending: bool) -> int:
        count = self.state.nonces.get(address, 0)
        while pending and (address, count) in self.mempool:
            count += 1
        return count

    def _take(self, raw: bytes) -> Reply:
        sent = _sent(raw)
        if any(sent.hash in block.receipts for block in self.blocks):
            return RpcError(-32000, "nonce too low")
        if sent.nonce < self.state.nonces.get(sent.sender, 0):
            return RpcError(-32000, "nonce too low")
        pending = self.mempool.get((sent.sender, sent.nonce))
        if pending is not None:
            if pending.hash == sent.hash:
                return RpcError(-32000, "already known")
            if sent.max_fee * 10 < pending.max_fee * 11:
                return RpcError(-32000, "replacement transaction underpriced")
        self.mempool[sent.sender, sent.nonce] = sent
        return sent.hash

    def _logs(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        first, last = int(query["fromBlock"], 16), int(query["toBlock"], 16)
        found = []
        for block in self.blocks[first : last + 1]:
            for log in (log for receipt in block.receipts.values() for log in receipt["logs"]):
                wanted = zip(query["topics"], log["topics"], strict=False)
                if log["address"] == query["address"] and all(topic in (None, own) for topic, own in wanted):
                    found.append(log)
        return found

    def _call(self, data: bytes) -> Reply:
        if data[:4] == _STATE:
            payer, nonce = _address(int.from_bytes(data[4:36], "big")), int.from_bytes(data[36:68], "big")
            return f"0x{int((payer, nonce) in self.state.used):064x}"
        return RpcError(3, "execution reverted")


class FakeRpc(Rpc):
    """One node of a chain in memory."""

    def __init__(self, chain: FakeChain) -> None:
        super().__init__(["http://127.0.0.1:1/"])
        self._chain = chain
        self.refuse = 0
        """So many POSTs do not reach the node."""
        self.lose = 0
        """So many reach it, and their answers are lost."""

    async def _ask(self, node: Node, requests: Sequence[Request], timeout_s: float) -> list[Reply]:
        if self.refuse:
            self.refuse -= 1
            raise OSError("refused")
        replies = [self._chain.answer(method, params) for method, params in requests]
        if self.lose:
            self.lose -= 1
            raise OSError("lost")
        return replies


def _address(word: int) -> str:
    return f"0x{word:040x}"


def _calls_of(data: bytes) -> list[tuple[str, bytes]]:
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
        calls.append((token, b"".join((_EIP3009, payer, recipient, *others))))
    return calls


def _sent(raw: bytes) -> Sent:
    fields = rlp_decode(raw[1:])
    assert isinstance(fields, list)
    unsigned, (parity, r, s) = fields[:9], fields[9:]
    digest = keccak256(b"\x02" + rlp_encode(unsigned))
    signature = r.rjust(32, b"\0") + s.rjust(32, b"\0") + bytes((int.from_bytes(parity, "big"),))
    key = coincurve.PublicKey.from_signature_and_message(signature, digest, hasher=None)
    sender = "0x" + keccak256(key.format(compressed=False)[1:])[-20:].hex()
    nonce, max_fee, gas = (int.from_bytes(fields[at], "big") for at in (1, 3, 4))
    call = Call("0x" + fields[5].hex(), fields[7], gas)
    return Sent("0x" + keccak256(raw).hex(), sender, nonce, max_fee, call)
