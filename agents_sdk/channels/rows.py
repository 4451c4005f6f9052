"""The rows of payment channels in the agent's journal, for `agents_sdk.channels.book` and `agents_sdk.channels.deposits`.
Everything here runs inside a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from agents_sdk.channels.terms import Terms
from agents_sdk.journal import milliseconds
from agents_sdk.money import atomic_to_nano_down, nano_to_atomic_up, nano_to_usd
from agents_sdk.policy import Window

_DIGITS = 39
"""Of the largest uint128: amounts are texts of this length, so that they compare as numbers do."""


@dataclass(frozen=True, slots=True)
class Book:
    """A channel as the journal has it. Amounts are atomic units unless their name says otherwise."""

    terms: Terms
    origin: str
    """The gateway's URL when it was used last. The channel is with whom its terms name, by whatever URL."""
    balance: int
    """What was deposited and not given back, claimed or not."""
    signed: int
    """The highest voucher: what can be claimed at most."""
    charged_nano_usd: int
    under_way_nano_usd: int

    @property
    def owed(self) -> int:
        """What requests cost in all, those under way at their maxima."""
        return nano_to_atomic_up(self.charged_nano_usd + self.under_way_nano_usd, self.terms.decimals)

    @property
    def unspent(self) -> int:
        """What is left of the deposits."""
        return max(0, self.balance - self.owed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request that is to be paid through a channel."""

    terms: Terms
    origin: str
    payer: str
    request: str
    recipient: str
    price_nano_usd: int
    expires_at: int
    deposit_nano_usd: int
    """What may lie unspent in the channels of one gateway and token."""
    fill_from: int | None = None
    """Fill the channel up also where it covers the request, if that takes at least this many atomic units."""
    deposit_expires_at: int
    windows: Sequence[Window]


def ensure(database: sqlite3.Connection, wanted: Wanted) -> None:
    """The channel is there, and used last with this gateway."""
    terms = wanted.terms
    database.execute(
        "INSERT INTO channel VALUES (?, ?, ?, ?, ?, '0', ?, 0, ?) "
        "ON CONFLICT (id) DO UPDATE SET origin = excluded.origin",
        (terms.channel_id, wanted.origin, wanted.payer, terms.asset, terms.to_json(), padded(0), milliseconds()),
    )


def find(database: sqlite3.Connection, channel_id: str) -> Book:
    terms, origin, balance, signed, charged = database.execute(
        "SELECT terms, origin, balance, signed, charged_nano_usd FROM channel WHERE id = ?", (channel_id,)
    ).fetchone()
    (under_way,) = database.execute(
        "SELECT COALESCE(SUM(price_nano_usd), 0) FROM voucher WHERE channel_id = ? AND closed_ms IS NULL", (channel_id,)
    ).fetchone()
    return Book(Terms.from_json(terms), origin, int(balance), int(signed), charged, under_way)


def unspent(database: sqlite3.Connection, wanted: Wanted) -> int:
    """What lies in this gateway's channels in the same token: neither new terms nor a new URL is a reason to lock up more."""
    rows = database.execute(
        "SELECT id FROM channel WHERE payer = ? AND asset = ?", (wanted.payer, wanted.terms.asset)
    ).fetchall()
    channels = [find(database, channel_id) for (channel_id,) in rows]
    return sum(
        each.unspent
        for each in channels
        if each.origin == wanted.origin or each.terms.receiver == wanted.terms.receiver
    )


def channel_of(database: sqlite3.Connection, payment_id: str) -> str:
    (channel_id,) = database.execute("SELECT channel_id FROM voucher WHERE payment_id = ?", (payment_id,)).fetchone()
    return str(channel_id)


def add_balance(database: sqlite3.Connection, channel_id: str, change: int) -> None:
    (balance,) = database.execute("SELECT balance FROM channel WHERE id = ?", (channel_id,)).fetchone()
    database.execute("UPDATE channel SET balance = ? WHERE id = ?", (str(int(balance) + change), channel_id))


def nano_up(amount: int, decimals: int) -> int:
    down = atomic_to_nano_down(amount, decimals)
    return down if nano_to_atomic_up(down, decimals) >= amount else down + 1


def usd(amount: int, terms: Terms) -> str:
    return nano_to_usd(atomic_to_nano_down(amount, terms.decimals))


def padded(amount: int) -> str:
    return f"{amount:0{_DIGITS}d}"
