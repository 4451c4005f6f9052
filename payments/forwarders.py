"""Deposit addresses and what happened at them, as the books know it. Everything here runs inside store units.

Money at a wallet's own address is the wallet's balance as soon as it is deep enough in the chain, and stands in the ledger
against `forwarders` until it is swept to the treasury: then against `custody`. So on every chain, `forwarders` is minus what
the addresses hold, as `custody` is minus what the treasury holds. Both directions are booked from the token's own logs,
whoever made the transaction, each log once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from payments.chain.networks import Token
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import atomic_to_nano_down
from payments.store import Transaction

Direction = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Movement:
    """A Transfer to a deposit address (in) or from one (out)."""

    direction: Direction
    token: Token
    address: str
    """The deposit address, lower-case hex."""
    other: str
    """Who sent it, or who got it."""
    value: int
    """Atomic units."""
    transaction_hash: str
    log_index: int
    block_number: int

    @property
    def id(self) -> str:
        """The name of its ledger transfer."""
        return f"log:{self.transaction_hash}:{self.log_index}"

    @property
    def amount_nano_usd(self) -> int:
        """What it is worth."""
        return atomic_to_nano_down(self.value, self.token.decimals)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a chain's deposits were read: a block and its hash."""

    block_number: int
    block_hash: str


@dataclass(frozen=True, slots=True)
class Address:
    """A deposit address: whose it is, and the factory that can sweep it. All lower-case hex."""

    address: str
    wallet: str
    factory: str


def register(tx: Transaction, chain_id: int, each: Address) -> bool:
    """Note that an address is a wallet's. False if it was noted before."""
    row = tx.execute(
        "INSERT INTO deposit_address (chain_id, address, wallet, factory, created_ms) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (chain_id, address) DO NOTHING RETURNING address",
        (chain_id, each.address, each.wallet, each.factory, _now_ms()),
    ).fetchone()
    return row is not None


def addresses(tx: Transaction, chain_id: int) -> dict[str, Address]:
    """Every deposit address on a chain."""
    rows = tx.execute("SELECT address, wallet, factory FROM deposit_address WHERE chain_id = ?", (chain_id,)).fetchall()
    return {row[0]: Address(*row) for row in rows}


def of_wallet(tx: Transaction, wallet: str) -> list[tuple[int, str]]:
    """A wallet's deposit addresses, with the chain of each."""
    rows = tx.execute(
        "SELECT chain_id, address FROM deposit_address WHERE wallet = ? ORDER BY created_ms, chain_id", (wallet,)
    ).fetchall()
    return [(row[0], row[1]) for row in rows]


def cursor(tx: Transaction, chain_id: int) -> Cursor | None:
    """How far deposits were read; None if never."""
    row = tx.execute("SELECT block_number, block_hash FROM deposit_cursor WHERE chain_id = ?", (chain_id,)).fetchone()
    return None if row is None else Cursor(*row)


def advance(tx: Transaction, chain_id: int, seen: Cursor | None, to: Cursor) -> bool:
    """Move the cursor from where it was `seen` to be. False, with nothing changed, if somebody else has moved it."""
    if cursor(tx, chain_id) != seen:
        return False
    tx.execute(
        "INSERT INTO deposit_cursor (chain_id, block_number, block_hash) VALUES (?, ?, ?)"
        " ON CONFLICT (chain_id) DO UPDATE SET block_number = excluded.block_number, block_hash = excluded.block_hash",
        (chain_id, to.block_number, to.block_hash),
    )
    return True


def book(tx: Transaction, each: Movement, wallet: str, treasury: str) -> bool:
    """Book one movement: a deposit is the wallet's balance, a sweep the treasury's, a token's own fee the operator's loss.

    Returns:
        False if it was booked before, or is worth less than a nano-USD.
    """
    amount = each.amount_nano_usd
    if amount == 0 or not _remember(tx, each, wallet):
        return False
    forwarders = account_id("forwarders", each.token.asset)
    # A check of the books may have seen the treasury's side of it before anybody knew whose address this is.
    seen = transfers.find(tx, each.id)
    if seen is not None and forwarders in (seen.debit, seen.credit):
        seen = None
    if each.direction == "in":
        debit, credit = forwarders, payer_account(wallet, each.token.asset)
    else:
        debit = account_id("custody" if each.other == treasury else "variance", each.token.asset)
        debit, credit = debit if seen is None else seen.credit, forwarders
    name = _ledger_id(tx, each, taken=seen is not None)
    transfers.post(tx, id=name, debit=debit, credit=credit, amount=amount, reference=each.transaction_hash)
    return True


def known_since(tx: Transaction, chain_id: int, block_number: int) -> list[tuple[str, str, str, int, str]]:
    """What is booked from a block on: id, direction, transaction hash, amount, address; oldest log first."""
    rows = tx.execute(
        "SELECT id, direction, transaction_hash, amount_nano_usd, address FROM forwarder_movement"
        " WHERE chain_id = ? AND block_number >= ? AND state = 'booked' ORDER BY block_number, log_index",
        (chain_id, block_number),
    ).fetchall()
    return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]


def relocate(tx: Transaction, movement_id: str, each: Movement) -> None:
    """A reorganisation has put a movement into another block."""
    tx.execute(
        "UPDATE forwarder_movement SET block_number = ?, log_index = ? WHERE id = ?",
        (each.block_number, each.log_index, movement_id),
    )


def reverse(tx: Transaction, movement_id: str) -> None:
    """A reorganisation took a movement away for good: take back what was booked; what is spent of it is the operator's loss."""
    row = tx.execute(
        "UPDATE forwarder_movement SET state = 'reversed', bookings = bookings + 1 WHERE id = ? AND state = 'booked'"
        " RETURNING bookings",
        (movement_id,),
    ).fetchone()
    if row is None:
        return
    round_ = row[0] - 1
    made = transfers.find(tx, movement_id if round_ == 0 else f"{movement_id}:{round_}")
    assert made is not None
    suffix = f"{movement_id.partition(':')[2]}:{round_}"
    asset = made.credit.rpartition("@")[2]
    if made.credit.startswith("payer:"):
        missing = made.amount - transfers.balance(tx, made.credit).available
        if missing > 0:
            variance = account_id("variance", asset)
            transfers.post(
                tx, id=f"loss:{suffix}", debit=variance, credit=made.credit, amount=missing, reference=made.reference
            )
    transfers.post(
        tx, id=f"unlog:{suffix}", debit=made.credit, credit=made.debit, amount=made.amount, reference=made.reference
    )


def unswept(tx: Transaction, chain_id: int, asset: str, at_least: int) -> list[tuple[Address, int]]:
    """The addresses that hold so much of a token by the books, the fullest first, and what they hold in nano-USD."""
    rows = tx.execute(
        "SELECT deposit_address.address, deposit_address.wallet, deposit_address.factory,"
        " SUM(CASE WHEN direction = 'in' THEN amount_nano_usd ELSE -amount_nano_usd END) AS held"
        " FROM forwarder_movement JOIN deposit_address ON deposit_address.chain_id = forwarder_movement.chain_id"
        " AND deposit_address.address = forwarder_movement.address"
        " WHERE forwarder_movement.chain_id = ? AND asset = ? AND state = 'booked'"
        " GROUP BY deposit_address.address, deposit_address.wallet, deposit_address.factory"
        " HAVING SUM(CASE WHEN direction = 'in' THEN amount_nano_usd ELSE -amount_nano_usd END) >= ?"
        " ORDER BY 4 DESC",
        (chain_id, asset, at_least),
    ).fetchall()
    return [(Address(*row[:3]), int(row[3])) for row in rows]


def booked_above(tx: Transaction, chain_id: int, asset: str, block_number: int) -> tuple[int, int]:
    """What came in and what was swept above a block, in nano-USD, as far as it is booked."""
    row = tx.execute(
        "SELECT COALESCE(SUM(CASE WHEN direction = 'in' THEN amount_nano_usd ELSE 0 END), 0),"
        " COALESCE(SUM(CASE WHEN direction = 'out' THEN amount_nano_usd ELSE 0 END), 0) FROM forwarder_movement"
        " WHERE chain_id = ? AND asset = ? AND block_number > ? AND state = 'booked'",
        (chain_id, asset, block_number),
    ).fetchone()
    return int(row[0]), int(row[1])


def swept_above(tx: Transaction, chain_id: int, asset: str, treasury: str, block_number: int) -> int:
    """What the treasury got from deposit addresses above a block, in nano-USD, as far as it is booked."""
    row = tx.execute(
        "SELECT COALESCE(SUM(amount_nano_usd), 0) FROM forwarder_movement WHERE chain_id = ? AND asset = ?"
        " AND direction = 'out' AND other = ? AND block_number > ? AND state = 'booked'",
        (chain_id, asset, treasury, block_number),
    ).fetchone()
    return int(row[0])


def match(
    known: Iterable[tuple[str, str, str, int, str]], found: Sequence[Movement]
) -> tuple[list[tuple[str, Movement]], list[Movement], list[str]]:
    """Compare what is booked with what the chain has now; a transaction may have moved, and its logs with it.

    Returns:
        What is there still (perhaps elsewhere), what is new, and the ids of what is gone.
    """
    left: dict[tuple[str, str, int, str], list[Movement]] = {}
    for each in found:
        key = (each.direction, each.transaction_hash, each.amount_nano_usd, each.address)
        left.setdefault(key, []).append(each)
    still, gone = [], []
    for movement_id, direction, transaction_hash, amount, address in known:
        same = left.get((direction, transaction_hash, amount, address))
        if same:
            still.append((movement_id, same.pop(0)))
        else:
            gone.append(movement_id)
    return still, [each for group in left.values() for each in group], gone


def _remember(tx: Transaction, each: Movement, wallet: str) -> bool:
    """Write a movement down, or bring one back that a reorganisation had taken away."""
    row = tx.execute(
        "INSERT INTO forwarder_movement (id, chain_id, asset, direction, address, wallet, other, amount_nano_usd,"
        " transaction_hash, log_index, block_number, state, bookings, created_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'booked', 0, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = 'booked', block_number = excluded.block_number"
        " WHERE forwarder_movement.state = 'reversed' RETURNING id",
        (
            each.id,
            each.token.chain_id,
            each.token.asset,
            each.direction,
            each.address,
            wallet,
            each.other,
            each.amount_nano_usd,
            each.transaction_hash,
            each.log_index,
            each.block_number,
            _now_ms(),
        ),
    ).fetchone()
    return row is not None


def _ledger_id(tx: Transaction, each: Movement, *, taken: bool) -> str:
    """The name of its ledger transfer this time; `taken`: the first one's is another transfer's."""
    if taken:
        tx.execute("UPDATE forwarder_movement SET bookings = 1 WHERE id = ? AND bookings = 0", (each.id,))
    bookings = tx.execute("SELECT bookings FROM forwarder_movement WHERE id = ?", (each.id,)).fetchone()[0]
    return each.id if bookings == 0 else f"{each.id}:{bookings}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
