"""What the processes of one database tell each other about its settlements, from inside the units that change them.

A notification may be lost: it only makes what everybody finds by looking now and then come sooner. See `payments.store`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from payments.databases.base import PAYLOAD_BYTES_MAX
from payments.store import Transaction

if TYPE_CHECKING:
    from payments.settlement.outbox import Entry

QUEUED = "queued"
"""Says that an order waits for whoever holds a signer."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a settlement. An open `state` takes an earlier decision back."""

    settlement_id: str
    state: str
    payer: str
    burnt: bool
    """Whether our own call for it moved nothing and cost gas."""

    @classmethod
    def of(cls, entry: Entry, state: str) -> Decision:
        """That an entry comes to `state`."""
        return cls(entry.id, state, entry.order.payer, entry.burnt)


def channel(chain_id: int) -> str:
    """Where the news of a chain's settlements are."""
    return f"settlements:{chain_id}"


def tell_queued(tx: Transaction, chain_id: int) -> None:
    """An order was written that no transaction carries."""
    tx.notify(channel(chain_id), QUEUED)


def tell_decided(tx: Transaction, chain_id: int, decisions: Iterable[Decision]) -> None:
    """Something was decided by this unit."""
    head = orjson.dumps(tx.instance).decode()
    payload = ""
    for decision in decisions:
        text = orjson.dumps((decision.settlement_id, decision.state, decision.payer, decision.burnt)).decode()
        if payload and len(head) + len(payload) + len(text) + 4 > PAYLOAD_BYTES_MAX:
            tx.notify(channel(chain_id), f"[{head}{payload}]")
            payload = ""
        payload += f",{text}"
    if payload:
        tx.notify(channel(chain_id), f"[{head}{payload}]")


def read(payload: str) -> tuple[str, list[Decision]]:
    """Which process decided, and what, of a payload that is not `QUEUED`."""
    instance, *decisions = orjson.loads(payload)
    return instance, [Decision(*decision) for decision in decisions]
