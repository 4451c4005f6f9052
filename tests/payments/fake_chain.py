"""A chain in memory, for tests that need thousands of blocks and every fault: blocks, gas, a mempool, and reorganisations.

What its contracts do is in `fake_contracts`. What it does not know it refuses.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import coincurve

from payments.chain.nodes import Node
from payments.chain.replies import Reply, Request, RpcError
from payments.chain.rlp import rlp_decode, rlp_encode
from payments.chain.rpc import Rpc
from payments.chain.transactions import Call
from payments.verification.signatures import keccak256
from tests.payments.fake_contracts import Contracts, Frame, OutOfGas, Reverted, State

GWEI = 10**9
GAS_OF_TRANSACTION = 21_000
GAS_OF_CALL = 50_000
EARLIER_BLOCKS = 5
"""A chain is older than whoever looks at it."""


@dataclass(slots=True)
class Sent:
    """A transaction as the mempool has it. Fees in wei."""

    hash: str
    sender: str
    nonce: int
    max_fee: int
    priority_fee: int
    call: Call


@dataclass(slots=True)
class Block:
    """A block, what it holds, and the state before it."""

    number: int
    hash: str
    timestamp: int
    sent: list[Sent]
    receipts: dict[str, dict[str, Any]]
    before: State


class FakeChain:
    """The chain. Its token moves without a look at signatures: those are other tests' matter.

    Args:
        token: The one token's address.
        batch_contract: The operator's.
        balances: Of the token, from the beginning.
        clock: Unix seconds.
    """

    def __init__(
        self, token: str, batch_contract: str, balances: dict[str, int], clock: Callable[[], float] = time.time
    ) -> None:
        self.token, self.batch_contract = token, batch_contract
        self.contracts = Contracts(token, batch_contract)
        self.state = State(balances)
        self.blocks: list[Block] = []
        self.mempool: dict[tuple[str, int], Sent] = {}
        self.base_fee = GWEI
        """Wei; what offers less at most is not mined."""
        self.executed: list[tuple[Sent, bool]] = []
        """Every transaction that was ever executed, in a block that stayed or not, and whether it reverted as a whole."""
        self._clock = clock
        self._salt = itertools.count()
        for _ in range(EARLIER_BLOCKS):
            self.mine()

    @property
    def head(self) -> Block:
        return self.blocks[-1]

    # --- what tests do ------------------------------------------------------------------------------------------------

    def mine(self) -> None:
        """Make a block of everything that can be mined."""
        number = len(self.blocks)
        block_hash = "0x" + keccak256(f"{number} {next(self._salt)}".encode()).hex()
        block = Block(number, block_hash, int(self._clock()), [], {}, self.state.copy())
        self.blocks.append(block)
        for key in sorted(self.mempool):
            sent, nonce = self.mempool[key], self.state.nonces.get(key[0], 0)
            if sent.nonce < nonce:
                del self.mempool[key]
            elif sent.nonce == nonce and sent.max_fee >= self.base_fee:
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
        """Somebody's transaction, mined at once in a block of its own, whatever fees are."""
        waiting, self.mempool = self.mempool, {}
        nonce = self.state.nonces.get(sender, 0)
        name = "0x" + keccak256(f"{sender} {next(self._salt)}".encode()).hex()
        self.mempool = {(sender, nonce): Sent(name, sender, nonce, 2**63, 0, call)}
        self.mine()
        self.mempool = waiting

    def receipts(self) -> list[dict[str, Any]]:
        """All of the chain, in order."""
        return [receipt for block in self.blocks for receipt in block.receipts.values()]

    def sent_by(self, sender: str) -> list[Sent]:
        """All transactions of an account in the chain, in order."""
        return [sent for block in self.blocks for sent in block.sent if sent.sender == sender]

    # --- execution ----------------------------------------------------------------------------------------------------

    def _include(self, block: Block, sent: Sent) -> None:
        self.state.nonces[sent.sender] = sent.nonce + 1
        before, status = self.state.copy(), "0x1"
        logs: list[dict[str, Any]] = []
        frame = Frame(self.state, sent.sender, block.timestamp, block.number)
        try:
            logs, _ = self.contracts.execute(frame, sent.call.to, sent.call.data)
            gas = GAS_OF_TRANSACTION + GAS_OF_CALL * max(frame.calls, 1)
        except Reverted as reverted:
            self.state, status = before, "0x0"
            gas = sent.call.gas if isinstance(reverted, OutOfGas) else GAS_OF_CALL
        first = sum(len(receipt["logs"]) for receipt in block.receipts.values())
        place = {"blockNumber": hex(block.number), "blockHash": block.hash, "transactionHash": sent.hash}
        self.executed.append((sent, status == "0x0"))
        if status == "0x0" and sent.call.to != self.batch_contract:
            self.contracts.failed_calls.add((sent.call.to, sent.call.data))
        block.sent.append(sent)
        block.receipts[sent.hash] = place | {
            "status": status,
            "from": sent.sender,
            "to": sent.call.to,
            "gasUsed": hex(gas),
            "effectiveGasPrice": hex(min(sent.max_fee, self.base_fee + sent.priority_fee)),
            "logs": [log | place | {"logIndex": hex(first + index)} for index, log in enumerate(logs)],
        }

    def _state_at(self, tag: str) -> State:
        number = self.head.number if tag in ("latest", "pending") else int(tag, 16)
        return self.blocks[number + 1].before if number < self.head.number else self.state

    # --- JSON-RPC -----------------------------------------------------------------------------------------------------

    def answer(self, method: str, params: Sequence[Any]) -> Reply:
        """What a node says."""
        match method:
            case "eth_blockNumber":
                return hex(self.head.number)
            case "eth_feeHistory":
                return {"baseFeePerGas": [hex(self.base_fee)], "reward": [["0x1"]]}
            case "eth_getTransactionCount":
                return hex(self._count(*params))
            case "eth_sendRawTransaction":
                return self._take(bytes.fromhex(params[0][2:]))
            case "eth_getTransactionReceipt":
                return next((b.receipts[params[0]] for b in self.blocks if params[0] in b.receipts), None)
            case "eth_getTransactionByHash":
                found = next((sent for block in self.blocks for sent in block.sent if sent.hash == params[0]), None)
                return found and {"to": found.call.to, "input": "0x" + found.call.data.hex()}
            case "eth_getBlockByNumber":
                number = self.head.number if params[0] == "latest" else int(params[0], 16)
                if number > self.head.number:
                    return None
                block = self.blocks[number]
                held = [{"from": each.sender, "nonce": hex(each.nonce), "hash": each.hash} for each in block.sent]
                return {
                    "number": hex(number),
                    "hash": block.hash,
                    "timestamp": hex(block.timestamp),
                    "transactions": held if params[1] else [each["hash"] for each in held],
                }
            case "eth_getCode":
                return "0x"
            case "eth_getLogs":
                return self._logs(params[0])
            case "eth_call":
                return self._call(*params)
            case _:
                return RpcError(-32601, f"{method} is not known here")

    def _count(self, address: str, tag: str) -> int:
        count = self._state_at(tag).nonces.get(address, 0)
        while tag == "pending" and (address, count) in self.mempool:
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
            if sent.max_fee * 10 < pending.max_fee * 11 or sent.priority_fee * 10 < pending.priority_fee * 11:
                return RpcError(-32000, "replacement transaction underpriced")
        self.mempool[sent.sender, sent.nonce] = sent
        return sent.hash

    def _logs(self, query: dict[str, Any]) -> list[dict[str, Any]]:
        first, last = int(query["fromBlock"], 16), int(query["toBlock"], 16)
        found = []
        for block in self.blocks[first : last + 1]:
            for log in (log for receipt in block.receipts.values() for log in receipt["logs"]):
                wanted = zip(query["topics"], log["topics"], strict=False)
                if log["address"] == query["address"] and all(_matches(*pair) for pair in wanted):
                    found.append(log)
        return found

    def _call(self, call: dict[str, Any], tag: str) -> Reply:
        frame = Frame(
            self._state_at(tag).copy(), call.get("from", "0x" + "00" * 20), int(self._clock()), self.head.number
        )
        try:
            _, output = self.contracts.execute(frame, call["to"], bytes.fromhex(call["data"][2:]))
        except Reverted:
            return RpcError(3, "execution reverted")
        return "0x" + output.hex()


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


def _matches(wanted: str | list[str] | None, topic: str) -> bool:
    return wanted is None or topic == wanted or (isinstance(wanted, list) and topic in wanted)


def _sent(raw: bytes) -> Sent:
    fields = rlp_decode(raw[1:])
    assert isinstance(fields, list)
    unsigned, (parity, r, s) = fields[:9], fields[9:]
    digest = keccak256(b"\x02" + rlp_encode(unsigned))
    signature = r.rjust(32, b"\0") + s.rjust(32, b"\0") + bytes((int.from_bytes(parity, "big"),))
    key = coincurve.PublicKey.from_signature_and_message(signature, digest, hasher=None)
    sender = "0x" + keccak256(key.format(compressed=False)[1:])[-20:].hex()
    nonce, priority_fee, max_fee, gas = (int.from_bytes(fields[at], "big") for at in (1, 2, 3, 4))
    call = Call("0x" + fields[5].hex(), fields[7], gas)
    return Sent("0x" + keccak256(raw).hex(), sender, nonce, max_fee, priority_fee, call)
