"""What the settlement engine is asked to do: one movement on a chain, as a call that a signer of ours can make.

An order is data. The engine adds a transaction and keeps the rows; evidence on the chain decides the outcome. What differs
between kinds of orders (who signs, what proves one, what it does to the ledger) is the `Kind` that is registered for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from payments.chain.logs import Log
from payments.chain.rpc import Request, Rpc
from payments.chain.transactions import nonce_is_set
from payments.store import Transaction

LedgerCallback = Callable[[Transaction, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class SettlementOrder:
    """A transfer of `value` atomic units of `token` from `payer` to `pay_to`; of the token `NOBODY`, of wei.

    Addresses are lower-case hex. The same `id` submitted again is the same settlement, not a second one.
    """

    id: str
    kind: str
    """Registered with the engine, see `Kind`: ``payment``, ``refund``, …"""
    reference: str
    """What it is for: a payment's receipt id, a refund's ledger transfer id."""
    chain_id: int
    token: str
    payer: str
    pay_to: str
    value: int
    authorization_nonce: int | None
    """The nonce whose use, together with the Transfer, is the evidence; None for what needs no payer's authorization."""
    call_to: str
    call_data: bytes
    valid_before: int
    """Unix seconds after which the call cannot succeed any more; 0 if never."""

    def __post_init__(self) -> None:
        assert self.value > 0
        assert all(address == address.lower() for address in (self.token, self.payer, self.pay_to, self.call_to))


NO_LOG = -1
"""The place of evidence that is no log: coin moves without any, and then the transaction itself is what proves it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The log, mostly a Transfer, that proves a settlement."""

    transaction_hash: str
    block_number: int
    block_hash: str
    transfer_log_index: int
    """In its block; or `NO_LOG`."""
    received_value: int
    """Atomic units; less than what was sent if the token takes a fee."""
    withheld_value: int = 0
    """Atomic units that the token's fee took of a transfer by a contract that says how much it sent."""


@dataclass(frozen=True, slots=True)
class NoEvidence:
    """Nothing paid it, up to the block that was searched."""

    nonce_consumed: bool
    """Whether the authorization can never be executed any more."""
    explained: bool = False
    """Whether logs say what consumed it. A node whose logs lag behind its state has none, and then it may have been paid."""


@dataclass(frozen=True, slots=True)
class NonceRead:
    """How the chain is asked whether an authorization was used or cancelled."""

    to: str
    data: bytes
    nonce: int
    in_bitmap: bool
    """As Permit2 keeps them, 256 in a word; else the word itself says it, as with EIP-3009."""

    def request(self, block: int) -> Request:
        """The question, as of a block."""
        return "eth_call", ({"to": self.to, "data": "0x" + self.data.hex()}, hex(block))

    def is_used(self, answer: str) -> bool:
        """What the answer says.

        Raises:
            ValueError: It is no answer to this.
        """
        word = int(answer, 16) if len(answer) > 2 else 0
        return nonce_is_set(word, self.nonce) if self.in_bitmap else word == 1


EARLIER_BLOCKS = 2_000
"""How far back a use of a nonce is looked for that came before our own transaction: what one query can ask of a public node."""


@dataclass(frozen=True, slots=True)
class Search:
    """Where evidence of an order is looked for, in anybody's transactions."""

    rpc: Rpc
    from_block: int
    head: int
    """The last one that counts."""
    free: Callable[[list[Log]], Awaitable[list[Log]]]
    """Those of some logs that are no other settlement's evidence."""
    batch_contract: str | None = None
    """The operator's own, lower-case hex: its events say truly which log came of which call."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The blocks to look through, both included. Somebody may have executed an authorization before the order was given a
        transaction of ours: a nonce is used once, so that what used it before `from_block` proves as much."""
        here = (self.from_block, self.head)
        return (here, (self.earliest, self.from_block - 1)) if self.from_block > 0 else (here,)

    @property
    def earliest(self) -> int:
        """The first of those blocks."""
        return max(self.from_block - EARLIER_BLOCKS, 0)


def _no_nonce(order: SettlementOrder) -> NonceRead | None:
    return None


class Proof(Protocol):
    """What proves on the chain that orders of a kind were carried out. A receipt's status alone never does."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """What the logs of the order's very own call prove, or None if they do not prove it.

        Args:
            order: What was to happen.
            receipt: Of the transaction of ours that made the call.
            logs: Those of the receipt that the call left; the call did not revert.
        """

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """Look for evidence in anybody's transaction.

        Raises:
            RpcError: A node refused; try again later.
            RpcUnavailable: No node answered; try again later.
        """


def _always(tx: Transaction, order: SettlementOrder) -> bool:
    return True


def _through_anybody(order: SettlementOrder) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Kind:
    """How orders of one kind are carried, proven and booked."""

    proof: Proof
    on_paid: LedgerCallback
    """Called in the unit that records evidence, with the settlement's row. Idempotent."""
    on_failed: LedgerCallback
    """Called in the unit that records the failure, with the settlement's row. Idempotent."""
    gas: Callable[[SettlementOrder], int]
    """The most gas that the call may use."""
    signed_by: Literal["settler", "treasury"] = "settler"
    batchable: bool = False
    """Whether the batch contract may make the call: whoever calls makes no difference to it."""
    still_wanted: Callable[[Transaction, SettlementOrder], bool] = _always
    """Whether an order may be written now: what it is for may have been forgotten since its process looked, if that process was
    stopped meanwhile."""
    through: Callable[[SettlementOrder], str | None] = _through_anybody
    """The one batch contract that can make an order's call, lower-case hex: the operator's at the time that the payer signed,
    which need not be the configured one any more. None where it makes no difference who calls."""
    on_tried_again: Callable[[Transaction, dict[str, Any]], bool] | None = None
    """Called in the unit that queues a failed order again, with the settlement's row: tells whether it is wanted still, and
    takes back what `on_failed` booked. None for what is not tried again, see `payments.settlement.retries`."""
    on_reopened: LedgerCallback | None = None
    """Called in the unit that opens a paid order again because a reorganisation took its evidence away, with the settlement's
    row. What `on_paid` booked may stand until it is paid again or fails; what is known of the chain does not."""
    nonce: Callable[[SettlementOrder], NonceRead | None] = _no_nonce
    """Where the chain keeps the nonce of an authorization that anybody may execute, also after ours has failed."""
