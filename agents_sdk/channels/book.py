"""What the agent knows of its payment channels, in its journal: the next voucher, and what the gateway can be owed.

A channel's next voucher is over what was charged, the maxima of what is under way, and the price of the request at hand: so
several requests pay from one channel at once, also from several processes on one journal. The sums are this journal's own. What
a request cost is the gateway's word, once, bounded by the price that was quoted for it; that it was more after all is never
believed. Only a voucher of this very wallet that is higher than any in this journal shows that there was another journal.

The exposure is what was ever signed: a gateway can claim the highest voucher, never more, whatever it says.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

from agents_sdk.channels import deposits
from agents_sdk.channels.deposits import Deposit, Full, TooDear, Wait
from agents_sdk.channels.rows import Book, Wanted, add_balance, channel_of, ensure, find, nano_up, padded, usd
from agents_sdk.channels.terms import Status, Terms
from agents_sdk.errors import ChannelDisputed
from agents_sdk.journal import REPLAY_GRACE_S, Journal, StoredPayment, milliseconds
from agents_sdk.money import atomic_to_nano_down, nano_to_atomic_up

UNCLEAR_MAX = 5
"""Receipts that are read before one request."""
_NOT_ALONE = """
    SELECT 1 FROM voucher JOIN payment ON payment.id = voucher.payment_id
    WHERE voucher.channel_id = ? AND voucher.payment_id <> ?
      AND (voucher.closed_ms IS NULL OR voucher.closed_ms >= (SELECT created_ms FROM payment WHERE id = ?))
"""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A voucher that may be signed now."""

    payment: StoredPayment
    amount: int
    deposit: Deposit | None


def reserve(journal: Journal, wanted: Wanted) -> Reserved | Wait | TooDear | Full:
    """Choose the next voucher of a channel and count it against the limits, before it is signed.

    Raises:
        LimitExceeded: If a limit would be broken, by the voucher or by the deposit that it needs.
    """
    terms = wanted.terms
    with journal.transaction() as database:
        ensure(database, wanted)
        _give_up_old(journal, database, terms.channel_id)
        channel = find(database, terms.channel_id)
        owed = channel.charged_nano_usd + channel.under_way_nano_usd + wanted.price_nano_usd
        amount = _unused(database, terms.channel_id, nano_to_atomic_up(owed, terms.decimals))
        deposit: Deposit | None = None
        if amount > channel.balance or wanted.fill_from is not None:
            found = deposits.needed(journal, database, channel, wanted, amount)
            if not isinstance(found, Deposit):
                return found
            deposit = found
        growth = nano_up(amount, terms.decimals) - nano_up(channel.signed, terms.decimals)
        _check_limits(journal, database, wanted, max(0, growth), deposit)
        payment_id = journal.insert(
            database,
            origin=wanted.origin,
            payer=wanted.payer,
            request=wanted.request,
            amount_nano_usd=max(0, growth),
            asset=terms.asset,
            recipient=wanted.recipient,
            expires_at=wanted.expires_at,
        )
        if deposit is not None and deposit.authorization is None:
            deposits.insert(database, wanted, deposit, payment_id)
        database.execute(
            "INSERT INTO voucher VALUES (?, ?, ?, ?, ?, NULL, NULL, NULL)",
            (payment_id, terms.channel_id, padded(amount), wanted.price_nano_usd, deposit and deposit.id),
        )
        _raise_signed(database, channel, amount)
    payment = StoredPayment(payment_id, wanted.price_nano_usd, terms.asset, wanted.expires_at)
    return Reserved(payment, amount, deposit)


def keep(
    journal: Journal, reserved: Reserved, header: str, authorization: dict[str, Any] | None, expires_at: int
) -> StoredPayment:
    """Keep what was signed, so that from here on this very payment is sent, and this very deposit.

    Args:
        journal: The log.
        reserved: What it was signed for.
        header: The payment.
        authorization: The deposit's, if it was signed just now.
        expires_at: Until when that can be used, in Unix seconds.
    """
    with journal.transaction() as database:
        if authorization is not None:
            assert reserved.deposit is not None
            deposits.move(database, reserved.deposit.id, "signed")
            database.execute(
                "UPDATE deposit SET authorization = ?, expires_at = ? WHERE id = ?",
                (json.dumps(authorization), expires_at, reserved.deposit.id),
            )
        return journal.sign(database, reserved.payment, header, reserved.payment.expires_at)


def drop(journal: Journal, reserved: Reserved) -> None:
    """Nothing was signed after all."""
    with journal.transaction() as database:
        journal.end(database, reserved.payment.id, "void")
        _end_voucher(database, reserved.payment.id, 0)
        if reserved.deposit is not None and reserved.deposit.authorization is None:
            deposits.never_signed(database, reserved.deposit.id)


def served_as(journal: Journal, payment: StoredPayment, receipt_id: str) -> None:
    """Under which receipt the gateway serves a payment: it tells what that cost, if the answer does not."""
    with journal.transaction() as database:
        database.execute("UPDATE voucher SET receipt_id = ? WHERE payment_id = ?", (receipt_id, payment.id))


def unclear(journal: Journal, channel_id: str) -> list[tuple[str, str]]:
    """Payments that count in full until their receipts are read: their ids, and the receipts'."""
    with journal.transaction() as database:
        rows = database.execute(
            "SELECT payment_id, receipt_id FROM voucher WHERE channel_id = ? AND receipt_id IS NOT NULL "
            "AND closed_ms IS NOT NULL ORDER BY closed_ms DESC LIMIT ?",
            (channel_id, UNCLEAR_MAX),
        ).fetchall()
    return [(payment_id, receipt_id) for payment_id, receipt_id in rows]


def clear(journal: Journal, payment_id: str, charged_nano_usd: int | None) -> None:
    """What an unclear payment cost, at most what it counts for; None if nobody can tell."""
    with journal.transaction() as database:
        _count(database, payment_id, charged_nano_usd)


def close(
    journal: Journal, payment: StoredPayment, state: str, charged_nano_usd: int | None, told: int | None = None
) -> None:
    """Write down what became of a payment.

    Args:
        journal: The log.
        payment: The payment.
        state: A state of the journal's payments.
        charged_nano_usd: What it cost; None if that is not known: then it counts in full.
        told: What the gateway says was charged through the channel in all when it took the payment up, this one included, in
            atomic units: never more than we know, and less if what was lost cost less than its maximum.
    """
    with journal.transaction() as database:
        if not journal.is_open(database, payment.id):  # given up while its answer was still coming
            _count(database, payment.id, charged_nano_usd)
            return
        journal.end(database, payment.id, state)
        price = payment.amount_nano_usd
        channel_id = _end_voucher(
            database, payment.id, price if charged_nano_usd is None else min(charged_nano_usd, price)
        )
        if charged_nano_usd is not None:
            database.execute("UPDATE voucher SET receipt_id = NULL WHERE payment_id = ?", (payment.id,))
        alone = database.execute(_NOT_ALONE, (channel_id, payment.id, payment.id)).fetchone() is None
        if told is not None and alone:
            channel = find(database, channel_id)
            least = min(channel.charged_nano_usd, atomic_to_nano_down(told, channel.terms.decimals))
            database.execute("UPDATE channel SET charged_nano_usd = ? WHERE id = ?", (least, channel_id))


def correct(journal: Journal, terms: Terms, status: Status, *, ours: bool) -> None:
    """The gateway says that a voucher was not the next one, and what was charged. Believe only what it proves.

    Up to the highest voucher that is known, nothing it says changes what is signed next: the voucher came late, or what it
    counts are maxima that it announced. To count from its word would let it charge maxima for answers that cost less.

    Args:
        journal: The log.
        terms: The channel.
        status: What the gateway says.
        ours: Whether the voucher that it shows carries this wallet's signature.

    Raises:
        ChannelDisputed: If it claims more than is known, without a voucher that another journal of this wallet signed.
    """
    with journal.transaction() as database:
        channel = find(database, terms.channel_id)
        if status.charged <= max(channel.owed, channel.signed):
            return
        if not ours or status.voucher <= channel.signed or status.charged > status.voucher:
            raise ChannelDisputed(
                f"the gateway says that {usd(status.charged, terms)} USD of the channel {terms.channel_id} were charged; by "
                f"this wallet's log it can be {usd(channel.owed, terms)} USD, and the gateway shows no voucher for more. "
                "Nothing was signed"
            )
        charged = atomic_to_nano_down(status.charged, terms.decimals) - channel.under_way_nano_usd
        database.execute(
            "UPDATE channel SET charged_nano_usd = MAX(charged_nano_usd, ?), signed = ?, balance = ? WHERE id = ?",
            (charged, padded(status.voucher), str(status.balance), terms.channel_id),
        )


def given_back(journal: Journal, channel_id: str, amount: int | None) -> int:
    """The gateway gave back `amount` (None: all that was left). Returns how much that is in atomic units."""
    with journal.transaction() as database:
        channel = find(database, channel_id)
        amount = channel.unspent if amount is None else min(amount, channel.balance)
        add_balance(database, channel_id, -amount)
    return amount


def get(journal: Journal, channel_id: str) -> Book:
    """One channel, which is in the journal."""
    with journal.transaction() as database:
        _give_up_old(journal, database, channel_id)
        return find(database, channel_id)


def paid_for(journal: Journal, payer: str, request: str) -> str | None:
    """The channel that a request was paid through last; None if through none."""
    with journal.transaction() as database:
        row = database.execute(
            "SELECT channel_id FROM voucher JOIN payment ON payment.id = payment_id "
            "WHERE request = ? AND payer = ? ORDER BY created_ms DESC LIMIT 1",
            (request, payer),
        ).fetchone()
    return None if row is None else str(row[0])


def of_wallet(journal: Journal, payer: str) -> list[Book]:
    """The wallet's channels, the newest first."""
    with journal.transaction() as database:
        rows = database.execute("SELECT id FROM channel WHERE payer = ? ORDER BY created_ms DESC", (payer,)).fetchall()
        for (channel_id,) in rows:
            _give_up_old(journal, database, channel_id)
        return [find(database, channel_id) for (channel_id,) in rows]


# ---------------------------------------------------------------------- inside a transaction


def _check_limits(
    journal: Journal, database: sqlite3.Connection, wanted: Wanted, growth: int, deposit: Deposit | None
) -> None:
    journal.check_limits(database, wanted.payer, wanted.windows, spending=growth, leaving=0)
    if deposit is not None and deposit.authorization is None:
        leaving = nano_up(deposit.amount, wanted.terms.decimals)
        what = "the deposit of the payment channel is"
        journal.check_limits(database, wanted.payer, wanted.windows, spending=0, leaving=leaving, what=what)


def _give_up_old(journal: Journal, database: sqlite3.Connection, channel_id: str) -> None:
    """What nobody can send any more may have been charged."""
    rows = database.execute(
        "SELECT payment.id, payment.state, price_nano_usd FROM voucher JOIN payment ON payment.id = payment_id "
        "WHERE channel_id = ? AND closed_ms IS NULL AND expires_at <= ?",
        (channel_id, milliseconds() // 1000 - REPLAY_GRACE_S),
    ).fetchall()
    for payment_id, state, price in rows:
        journal.end(database, payment_id, "void" if state == "reserved" else "expired")
        _end_voucher(database, payment_id, 0 if state == "reserved" else price)
    deposits.give_up_old(journal, database, channel_id)


def _unused(database: sqlite3.Connection, channel_id: str, least: int) -> int:
    """The smallest amount from `least` on that no voucher of this channel was over: the gateway binds each to one request."""
    rows = database.execute(
        "SELECT DISTINCT amount FROM voucher WHERE channel_id = ? AND amount >= ? ORDER BY amount",
        (channel_id, padded(least)),
    )
    for (used,) in rows:
        if int(used) != least:
            break
        least += 1
    rows.close()
    return least


def _raise_signed(database: sqlite3.Connection, channel: Book, amount: int) -> None:
    database.execute(
        "UPDATE channel SET signed = ? WHERE id = ?", (padded(max(channel.signed, amount)), channel.terms.channel_id)
    )


def _count(database: sqlite3.Connection, payment_id: str, charged_nano_usd: int | None) -> None:
    """A payment that was counted in full cost this."""
    (counted,) = database.execute(
        "UPDATE voucher SET receipt_id = NULL WHERE payment_id = ? RETURNING charged_nano_usd", (payment_id,)
    ).fetchone()
    if charged_nano_usd is None or charged_nano_usd >= counted:
        return
    database.execute("UPDATE voucher SET charged_nano_usd = ? WHERE payment_id = ?", (charged_nano_usd, payment_id))
    database.execute(
        "UPDATE channel SET charged_nano_usd = MAX(0, charged_nano_usd - ?) WHERE id = ?",
        (counted - charged_nano_usd, channel_of(database, payment_id)),
    )


def _end_voucher(database: sqlite3.Connection, payment_id: str, charged_nano_usd: int) -> str:
    database.execute(
        "UPDATE voucher SET closed_ms = ?, charged_nano_usd = ? WHERE payment_id = ?",
        (milliseconds(), charged_nano_usd, payment_id),
    )
    channel_id = channel_of(database, payment_id)
    database.execute(
        "UPDATE channel SET charged_nano_usd = charged_nano_usd + ? WHERE id = ?", (charged_nano_usd, channel_id)
    )
    return channel_id
