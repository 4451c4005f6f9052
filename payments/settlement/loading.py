"""What a process finds in the database when accounts become its own: everything that is not decided for good, whoever left it
behind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from payments.chain.signers import Signer
from payments.leases import living_signers
from payments.settlement import outbox, outgoing, states
from payments.settlement.outbox import Entry
from payments.settlement.outgoing import Outgoing
from payments.settlement.reverts import WINDOW_S
from payments.store import Transaction

log = logging.getLogger(__name__)

SHALLOW_BLOCKS = 64
"""How deep somebody else's execution of an authorization is watched after a restart."""


def under_way(
    tx: Transaction, chain_id: int, accounts: Mapping[str, Signer | None], kinds: Collection[str]
) -> list[Outgoing]:
    """The transactions of these accounts that are to be carried, with what they carry.

    One that is in a block while its entries are not decided is carried again: whoever was deciding them was killed, and its
    receipt says it once more.
    """
    stranded = [transaction_id for transaction_id, signer in outbox.stranded(tx, chain_id) if signer in accounts]
    for transaction in outgoing.load(tx, stranded, accounts):
        outgoing.exclude(tx, transaction)
    return with_entries(tx, outgoing.load_signed(tx, chain_id, accounts), kinds)


def paid(
    tx: Transaction, chain_id: int, ours: Callable[[str | None], bool], kinds: Collection[str], head: int
) -> list[Entry]:
    """What is paid and not final, and was carried by an account that is `ours`."""
    return [
        entry
        for entry, signer in outbox.load_paid(tx, chain_id, head - SHALLOW_BLOCKS)
        if ours(signer) and entry.kind in kinds and entry.block_number is not None
    ]


def orphaned(tx: Transaction, chain_id: int, accounts: Collection[str], kinds: Collection[str]) -> list[Outgoing]:
    """The transactions under way of accounts that are none of `accounts`, and whose key nobody alive has."""
    keyless = outgoing.signers_under_way(tx, chain_id) - living_signers(tx, chain_id) - set(accounts)
    return under_way(tx, chain_id, dict.fromkeys(keyless), kinds) if keyless else []


def reverts(tx: Transaction, chain_id: int) -> list[tuple[str, float]]:
    """Payers whose payments reverted lately, and how many seconds ago, oldest first."""
    now_ms = states.now_ms()
    found = outbox.reverted_since(tx, chain_id, now_ms - int(1000 * WINDOW_S))
    return [(payer, (now_ms - reverted_ms) / 1000) for payer, reverted_ms in found]


def with_entries(tx: Transaction, transactions: list[Outgoing], kinds: Collection[str]) -> list[Outgoing]:
    """The same transactions, each with what it carries. Entries of unknown kinds are left to a process that knows them."""
    carried = outbox.load_carried(tx, [transaction.id for transaction in transactions])
    for transaction in transactions:
        entries = carried[transaction.id]
        transaction.entries = [entry for entry in entries if entry.kind in kinds]
        transaction.others = len(entries) - len(transaction.entries)
        if transaction.others:
            log.warning("%s carries settlements of kinds that this process does not know", transaction.id)
    return transactions
