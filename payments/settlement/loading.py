"""What an engine finds in the database when it starts: everything that is not decided for good, whoever left it behind."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from payments.chain.signers import Signer
from payments.settlement import outbox, outgoing, states
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.settlement.reverts import WINDOW_S
from payments.store import Transaction

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The rows of one network that are still worked on."""

    entries: list[Entry]
    """Open, or paid and not final."""
    transactions: list[Outgoing]
    """Not known to be in a block, with what they carry."""
    reverts: list[tuple[str, float]]
    """Payers whose payments reverted lately, and how many seconds ago, oldest first."""


def load(tx: Transaction, chain_id: int, accounts: Mapping[str, Signer], kinds: Collection[str]) -> Loaded:
    """Read all of it. A transaction that is in a block while its entries are not decided is carried again: whoever was deciding
    them was killed, and its receipt says it once more."""
    stranded = outbox.stranded(tx, chain_id)
    for transaction in outgoing.load(tx, stranded, accounts) if stranded else ():
        outgoing.exclude(tx, transaction)
    now_ms = states.now_ms()
    reverts = outbox.reverted_since(tx, chain_id, now_ms - int(1000 * WINDOW_S))
    entries = outbox.load(tx, chain_id, ("queued", "submitted", "mined", "superseded"))
    transactions = with_entries(tx, outgoing.load_signed(tx, chain_id, accounts))
    unknown = {entry.kind for entry in entries} - set(kinds)
    if unknown:
        # A facilitator on a gateway's database: what only that one can book waits for it.
        log.warning("settlements of the kinds %s are left to the process that handles them", sorted(unknown))
    return Loaded(
        [entry for entry in entries if entry.kind in kinds],
        [each for each in transactions if all(entry.kind in kinds for entry in each.entries)],
        [(payer, (now_ms - reverted_ms) / 1000) for payer, reverted_ms in reverts],
    )


def with_entries(tx: Transaction, transactions: list[Outgoing]) -> list[Outgoing]:
    """The same transactions, each with what it carries."""
    carried = outbox.load_carried(tx, [transaction.id for transaction in transactions])
    for transaction in transactions:
        transaction.entries = carried[transaction.id]
    return transactions
