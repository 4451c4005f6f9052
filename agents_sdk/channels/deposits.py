"""Deposits into payment channels: one authorization is one deposit, however often and with whatever requests it is sent.

A deposit goes with a request that needs it. While nobody knows whether it was made, the very same one goes with every other
request that needs it, so that a crash, a lost answer or many requests at once never make a second one.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass
from typing import Any

from agents_sdk.channels.rows import Book, Wanted, add_balance, channel_of, nano_up, padded, unspent
from agents_sdk.journal import Journal, StoredPayment, milliseconds
from agents_sdk.money import nano_to_atomic_up

HEAD_START_MS = 1_000
"""A deposit goes with one request alone for this long; then with every request that needs it, since it happens once anyway."""
DEPOSIT_MARGIN_S = 30
"""An authorization that ends sooner is not sent any more; whether it was used shows when the channel pays."""

_DEPOSITS = (
    "SELECT id, state, amount, authorization, payment_id, created_ms, expires_at FROM deposit WHERE channel_id = ?"
)
DEPOSIT_TRANSITIONS: dict[str, tuple[str, ...]] = {
    "signed": ("reserved",),
    # A request that came with it was served.
    "made": ("signed", "assumed", "failed"),
    # Its authorization has ended and nothing was heard: the channel is tried as if it had been made.
    "assumed": ("signed",),
    # Never signed, or the gateway says that it did not use it: its word, so it counts until the authorization ends.
    "failed": ("reserved", "signed", "assumed"),
}


@dataclass(frozen=True, slots=True)
class Deposit:
    """A deposit that goes with a voucher; `authorization` is None if it is to be signed."""

    id: str
    amount: int
    authorization: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Another request is in the way, and may soon be out of it: it makes a deposit, or needs what is in the channel."""


@dataclass(frozen=True, slots=True)
class Full:
    """The channel was to be filled up, and has enough."""


@dataclass(frozen=True, slots=True)
class TooDear:
    """The request may cost more than the policy lets lie in a channel."""

    deposit: int
    needed: int


def accepted(journal: Journal, payment: StoredPayment) -> None:
    """The gateway serves a payment: the deposit that came with it is in the channel."""
    with journal.transaction() as database:
        row = database.execute(
            "SELECT deposit.id, deposit.channel_id, deposit.amount, deposit.state FROM voucher "
            "JOIN deposit ON deposit.id = voucher.deposit_id WHERE voucher.payment_id = ? AND deposit.state <> 'made'",
            (payment.id,),
        ).fetchone()
        if row is not None:
            move(database, row[0], "made")
            if row[3] != "assumed":
                add_balance(database, row[1], int(row[2]))


def exceeded(journal: Journal, payment: StoredPayment) -> bool:
    """The gateway says that a channel has not enough: then what was assumed of old deposits is wrong. False if nothing was."""
    with journal.transaction() as database:
        channel_id = channel_of(database, payment.id)
        assumed = database.execute(f"{_DEPOSITS} AND state = 'assumed'", (channel_id,)).fetchall()
        for row in assumed:
            move(database, row[0], "failed")
            add_balance(database, channel_id, -int(row[2]))
    return bool(assumed)


def failed(journal: Journal, payment: StoredPayment) -> None:
    """The gateway says that it cannot make the deposit that came with a payment."""
    with journal.transaction() as database:
        row = database.execute(
            "SELECT deposit.id FROM voucher JOIN deposit ON deposit.id = deposit_id "
            "WHERE payment_id = ? AND state = 'signed'",
            (payment.id,),
        ).fetchone()
        if row is not None:
            move(database, row[0], "failed")


def deposit_of(journal: Journal, payment: StoredPayment) -> int:
    """What a payment deposits, in atomic units."""
    with journal.transaction() as database:
        row = database.execute(
            "SELECT amount FROM deposit WHERE id = (SELECT deposit_id FROM voucher WHERE payment_id = ?)", (payment.id,)
        ).fetchone()
    return 0 if row is None else int(row[0])


# ---------------------------------------------------------------------- inside a transaction


def needed(
    journal: Journal, database: sqlite3.Connection, channel: Book, wanted: Wanted, amount: int
) -> Deposit | Wait | TooDear | Full:
    """The deposit that the channel needs to cover `amount`, or to be filled up: one that is on its way, or a new one."""
    query = f"{_DEPOSITS} AND state IN ('reserved', 'signed')"
    for deposit_id, state, value, authorization, payment_id, created_ms, _ in database.execute(
        query, (wanted.terms.channel_id,)
    ).fetchall():
        alone = milliseconds() - created_ms < HEAD_START_MS and not journal.is_abandoned(database, payment_id)
        if state == "reserved" or alone or amount > channel.balance + int(value):
            return Wait()
        return Deposit(deposit_id, int(value), json.loads(authorization))
    limit = nano_to_atomic_up(wanted.deposit_nano_usd, wanted.terms.decimals)
    room = limit - unspent(database, wanted)
    if wanted.fill_from is not None and amount <= channel.balance and room < wanted.fill_from:
        return Full()
    if room > 0 and channel.balance + room >= amount:
        return Deposit(f"dep_{secrets.token_hex(10)}", room, None)
    return Wait() if channel.under_way_nano_usd else TooDear(limit, amount - channel.owed)


def insert(database: sqlite3.Connection, wanted: Wanted, deposit: Deposit, payment_id: str) -> None:
    database.execute(
        "INSERT INTO deposit VALUES (?, ?, ?, 'reserved', ?, ?, NULL, ?, ?, ?)",
        (
            deposit.id, wanted.terms.channel_id, wanted.payer, padded(deposit.amount),
            nano_up(deposit.amount, wanted.terms.decimals), payment_id, milliseconds(), wanted.deposit_expires_at,
        ),
    )  # fmt: skip


def give_up_old(journal: Journal, database: sqlite3.Connection, channel_id: str) -> None:
    """A deposit that nobody can make any more may have been made; one that nobody is going to sign was not."""
    for deposit_id, state, amount, _, payment_id, _, expires_at in database.execute(
        f"{_DEPOSITS} AND state IN ('reserved', 'signed')", (channel_id,)
    ).fetchall():
        if state == "reserved" and journal.is_abandoned(database, payment_id):
            never_signed(database, deposit_id)
        elif state == "signed" and expires_at < milliseconds() // 1000 + DEPOSIT_MARGIN_S:
            move(database, deposit_id, "assumed")
            add_balance(database, channel_id, int(amount))


def never_signed(database: sqlite3.Connection, deposit_id: str) -> None:
    move(database, deposit_id, "failed")
    database.execute("UPDATE deposit SET expires_at = 0 WHERE id = ?", (deposit_id,))


def move(database: sqlite3.Connection, deposit_id: str, state: str) -> None:
    before = DEPOSIT_TRANSITIONS[state]
    changed = database.execute(
        f"UPDATE deposit SET state = ? WHERE id = ? AND state IN ({','.join('?' * len(before))})",  # noqa: S608 - only marks
        (state, deposit_id, *before),
    ).rowcount
    assert changed == 1, f"deposit {deposit_id} cannot become {state}"
