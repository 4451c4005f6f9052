"""What a process finds in the database when accounts become its own: everything that is not decided for good, whoever left it
behind."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True)
class Ours:
    """Of which accounts' transactions this process looks after what they carry, as one unit finds it."""

    accounts: frozenset[str]
    all_but: bool
    """Whether it is those of all accounts but these, and what no transaction ever carried."""

    def has(self, address: str | None) -> bool:
        """Whether an account's transactions are among them; None: what no transaction carries."""
        return (address in self.accounts) != self.all_but

    def condition(self, column: str) -> tuple[str, Sequence[str]]:
        """The same in SQL, for a column with the account, and its parameters."""
        if not self.accounts:
            return ("1=1" if self.all_but else "1=0"), ()
        marks = ",".join("?" * len(self.accounts))
        named = f"{column} NOT IN ({marks}) OR {column} IS NULL" if self.all_but else f"{column} IN ({marks})"
        return f"({named})", tuple(self.accounts)


def ours(tx: Transaction, chain_id: int, accounts: frozenset[str], *, caretaker: bool) -> Ours:
    """What this process looks after, which sends with `accounts` now; the caretaker also after what nobody else does."""
    return Ours(frozenset(living_signers(tx, chain_id) - accounts), True) if caretaker else Ours(accounts, False)


def due(
    tx: Transaction,
    chain_id: int,
    when: Literal["watch_again_ms", "look_again_ms"],
    kinds: Collection[str],
    ours: Ours,
    limit: int,
) -> list[tuple[str, int]]:
    """Settlements whose time has come, the longest overdue first, with when each was changed last.

    Only those that this process can look at are asked for: others, which nobody may ever look at, would fill every look.

    Args:
        tx: The unit's transaction.
        chain_id: Of the network.
        when: The column with the time.
        kinds: Those that are known here.
        ours: Of which accounts' transactions.
        limit: At most so many.
    """
    carried_by_us, accounts = ours.condition("chain_transaction.signer")
    rows = tx.execute(
        "SELECT settlement.id, settlement.updated_ms FROM settlement"  # noqa: S608 - names from this module
        " LEFT JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id"
        f" WHERE settlement.chain_id=? AND {when}<=? AND settlement.kind IN ({','.join('?' * len(kinds))})"
        f" AND {carried_by_us} ORDER BY {when} LIMIT ?",
        (chain_id, states.now_ms(), *kinds, *accounts, limit),
    ).fetchall()
    return [(settlement_id, updated_ms) for settlement_id, updated_ms in rows]


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


def paid(tx: Transaction, chain_id: int, ours: Ours, kinds: Collection[str], head: int) -> list[Entry]:
    """What is paid and not final, and was carried by an account that is `ours`."""
    return [
        entry
        for entry, signer in outbox.load_paid(tx, chain_id, head - SHALLOW_BLOCKS)
        if ours.has(signer) and entry.kind in kinds and entry.block_number is not None
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
