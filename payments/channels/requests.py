"""One request paid through a channel: taken on a voucher, then charged or given back. Everything here runs inside store units.

A voucher is the payer's word for a sum, and says nothing of a request. So the first request that comes with a voucher is bound
to it, as long as it is under way or was charged: the same payment for the same request finds the first outcome, and the same
voucher with another request is not taken. What was not charged gives its voucher back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from payments import promises, receipts
from payments.chain.networks import Token
from payments.channels import book
from payments.channels.book import Channel
from payments.errors import PaymentRefused, SettlementUnavailable
from payments.ledger.accounts import payer_account
from payments.money import atomic_to_nano_down, nano_to_atomic_down, nano_to_atomic_up
from payments.settlement import states
from payments.store import Transaction
from payments.tenders import closing
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Charge, Outcome
from payments.tenders.closing import Use
from payments.x402.channels import (
    CUMULATIVE_MISMATCH,
    DEPOSIT_FAILED,
    EXCEEDS_BALANCE,
    SCHEME,
    ChannelStatus,
    Voucher,
    corrected,
)
from payments.x402.extensions import identifier as identifiers
from payments.x402.requirements import Requirement

_FIND = """
    SELECT receipt.id, receipt.state, request.exposed_nano_usd
    FROM channel_request AS request JOIN receipt ON receipt.id = request.receipt_id
    WHERE request.digest = ?
"""
_INSERT = (
    "INSERT INTO channel_request (digest, channel_id, voucher, receipt_id, deposit_id, exposed_nano_usd, created_ms)"
    " VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_BOUND = """
    SELECT 1 FROM channel_request AS request JOIN receipt ON receipt.id = request.receipt_id
    WHERE request.channel_id = ? AND request.voucher = ?
      AND (receipt.state = 'open'
           OR (receipt.state = 'captured' AND receipt.charged_nano_usd + receipt.paid_nano_usd > 0))
"""
_DEPOSITS = (
    "SELECT value FROM settlement WHERE reference = ? AND kind = 'channel_deposit' AND state IN (?, ?) AND id <> ?"
)
_DEPOSIT = "SELECT state, reason FROM settlement WHERE id = ?"


class OutOfStep(PaymentRefused):
    """The voucher is not the one that comes next. A corrective 402 tells the payer where the channel stands."""

    def __init__(self, channel: Channel, status: ChannelStatus, message: str) -> None:
        """Keep the channel and what its payer is to be told."""
        super().__init__(CUMULATIVE_MISMATCH, message)
        self._channel = channel
        self._status = status

    def correct(self, requirement: Requirement) -> Requirement | None:
        """The offer that tells the payer where its channel stands; None if this is none of the channel's kind."""
        channel = self._channel
        if (requirement.scheme, requirement.network, requirement.asset) != (
            SCHEME,
            f"eip155:{channel.chain_id}",
            channel.config.token,
        ):
            return None
        return corrected(requirement, self._status, channel.highest())


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that wants to be paid through a channel. All of it was checked as far as that needs no database."""

    channel: Channel
    voucher: Voucher
    digest: bytes
    """Of payment and request together."""
    price_nano_usd: int
    decimals: int
    deposit_id: str | None
    """The settlement of the deposit that comes with it."""
    deposit_value: int
    details: dict[str, Any]
    exposure_max_nano_usd: int
    """Inference that its payer may have under way, by all schemes together, before its money has arrived."""
    refusal: PaymentRefused | None = None
    """Why it is too late for a first use, if it is."""
    identifier: str | None = None
    """The payer's own name for it, if it has one."""
    unclaimed_s_max: float = float("inf")
    """How long the channel may owe us without a claim."""
    tops_up: bool = False
    """Whether it becomes its payer's balance; else it pays for an answer."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that is paid, up to its price."""

    use: Use
    channel: Channel
    price_nano_usd: int
    deposit: Literal["none", "due", "under way", "paid"]
    may_start_early: bool
    """Whether it may be worked on before its deposit has arrived, or there is nothing to wait for."""


@dataclass(frozen=True, slots=True)
class MustWait:
    """Another request or a deposit is in the way, and may soon be out of it; or the chain has to be asked first."""

    why: Literal["requests", "deposit", "unsynced"]


def take(tx: Transaction, wanted: Wanted, *, patient: bool) -> Taken | MustWait | AlreadyUsed | PaymentRefused:
    """Decide about a request, and hold its price if it is paid for.

    Args:
        tx: The unit's transaction.
        wanted: The request.
        patient: Whether it may wait for others.

    Returns:
        What to do; an error is returned and not raised where deciding is itself a change that must stand.

    Raises:
        PaymentRefused: It is not paid for.
        PaymentConflict: ``payment_identifier_used``: another payment of the payer's bears its name.
        SettlementUnavailable: ``channel_unclaimed``: what the channel owes could not be claimed for too long.
    """
    known = tx.execute(_FIND, (wanted.digest,)).fetchone()
    if known is not None and known[1] in ("open", "captured"):
        return AlreadyUsed(known[0], "in_progress" if known[1] == "open" else "captured")
    if wanted.refusal is not None:
        raise wanted.refusal
    channel = book.find(tx, wanted.channel.id)
    assert channel is not None
    _check_claims(channel, wanted)
    deposit = _deposit_stage(tx, wanted)
    if channel.unsynced and deposit != "due":
        return MustWait("unsynced")
    if wanted.identifier is not None and channel.on_chain.balance:
        # Before the voucher is judged: whoever lost everything but the name has no right voucher either. Only a channel that
        # was paid into is the payer's own word, so that nobody learns of another's receipts.
        identifiers.check(tx, channel.config.payer, wanted.identifier)
    held = book.held_nano_usd(tx, channel)
    needed = channel.charged_nano_usd + held + wanted.price_nano_usd
    problem = _out_of_step(tx, channel, wanted, held, needed, patient=patient)
    if problem is not None:
        return problem
    shortage = _shortage(tx, channel, wanted, needed, deposit)
    if shortage is not None:
        return shortage
    return _hold(tx, channel, wanted, known, deposit)


def capture(
    tx: Transaction, use: Use, channel_id: str, amount_nano_usd: int, outcome: Outcome, announced: int, token: Token
) -> Charge:
    """Charge what a request cost, at most what is held; once, however often it is called.

    Raises:
        HoldEnded: It was released before.
    """
    before = receipts.get(tx, use.receipt_id)
    charge = closing.capture(tx, use, amount_nano_usd, outcome)
    if before is not None and before.state == "open":
        book.charge(tx, channel_id, charge.charged_nano_usd, announced, token)
    return charge


def credit(
    tx: Transaction, use: Use, channel: Channel, amount_nano_usd: int, outcome: Outcome, announced: int, token: Token
) -> Charge:
    """Make all that is held its payer's balance; once, however often it is called.

    Raises:
        HoldEnded: It was released before.
    """
    before = receipts.get(tx, use.receipt_id)
    charge = closing.credit(tx, use, amount_nano_usd, outcome)
    if before is not None and before.state == "open":
        book.credit(tx, channel.id, amount_nano_usd, announced, token)
    return charge


def outcome_of(tx: Transaction, digest: bytes) -> AlreadyUsed | None:
    """What became of the same payment for the same request, if it was taken before and not given back."""
    known = tx.execute(_FIND, (digest,)).fetchone()
    if known is None or known[1] not in ("open", "captured"):
        return None
    return AlreadyUsed(known[0], "in_progress" if known[1] == "open" else "captured")


def _check_claims(channel: Channel, wanted: Wanted) -> None:
    """Serve no channel on and on of which nothing can be claimed: its payer may be withdrawing, and we have nobody to ask."""
    since = channel.unclaimed_since_ms
    owed = nano_to_atomic_down(channel.claimable_nano_usd, wanted.decimals)
    if since is None or owed <= 0 or book.now_ms() - since <= wanted.unclaimed_s_max * 1000:
        return
    raise SettlementUnavailable(
        "channel_unclaimed",
        "what this channel owes could not be claimed for too long; nothing was taken, send the same payment again later",
    )


def _out_of_step(
    tx: Transaction, channel: Channel, wanted: Wanted, held: int, needed: int, *, patient: bool
) -> MustWait | PaymentRefused | None:
    signed_nano_usd = atomic_to_nano_down(wanted.voucher.amount, wanted.decimals)
    highest_nano_usd = atomic_to_nano_down(max(wanted.voucher.amount, channel.voucher), wanted.decimals)
    bound = tx.execute(_BOUND, (channel.id, str(wanted.voucher.amount))).fetchone() is not None
    price = nano_to_atomic_up(wanted.price_nano_usd, wanted.decimals)
    if not bound and signed_nano_usd > channel.charged_nano_usd and highest_nano_usd >= needed:
        return None
    # A stock client counts one request at a time; when the one before it has ended, this one may fit.
    if patient and held and signed_nano_usd >= channel.charged_nano_usd + wanted.price_nano_usd:
        return MustWait("requests")
    # Told the sum that it has, such a client would sign the same voucher once more.
    repeats = bound and wanted.voucher.amount == channel.announced + price
    _raise_voucher(tx, channel, wanted.voucher)
    current = book.find(tx, channel.id)
    assert current is not None
    told = book.announce(tx, current, held, wanted.decimals, bump=repeats)
    return OutOfStep(
        told,
        told.status(),
        "the voucher is not the next one of this channel: sign what was charged, what is under way and the price of this"
        " request",
    )


def _shortage(
    tx: Transaction, channel: Channel, wanted: Wanted, needed: int, deposit: str
) -> MustWait | PaymentRefused | None:
    arriving = wanted.deposit_value if deposit in ("due", "under way") else 0
    there = channel.spendable + arriving
    if needed <= atomic_to_nano_down(there, wanted.decimals) and wanted.voucher.amount <= there:
        return None
    rows = tx.execute(_DEPOSITS, (channel.id, *sorted(states.OPEN), wanted.deposit_id or "")).fetchall()
    if rows and max(nano_to_atomic_up(needed, wanted.decimals), wanted.voucher.amount) <= there + sum(
        int(row[0]) for row in rows
    ):
        return MustWait("deposit")
    return PaymentRefused(
        EXCEEDS_BALANCE,
        f"the channel has {max(there, 0)} atomic units that are not to be withdrawn or given back, and "
        f"{max(nano_to_atomic_up(needed, wanted.decimals), wanted.voucher.amount)} are signed or needed in all: add a deposit",
    )


def _deposit_stage(tx: Transaction, wanted: Wanted) -> Literal["none", "due", "under way", "paid"]:
    if wanted.deposit_id is None:
        return "none"
    row = tx.execute(_DEPOSIT, (wanted.deposit_id,)).fetchone()
    if row is None:
        return "due"
    if row[0] in states.PAID:
        return "paid"
    if row[0] in states.OPEN:
        return "under way"
    raise PaymentRefused(DEPOSIT_FAILED, f"this deposit failed ({row[1] or 'no reason is known'}); sign a new one")


def _hold(
    tx: Transaction,
    channel: Channel,
    wanted: Wanted,
    known: tuple[str, str, int] | None,
    deposit: Literal["none", "due", "under way", "paid"],
) -> Taken:
    if known is not None:
        tx.execute("DELETE FROM channel_request WHERE digest = ?", (wanted.digest,))
    waits = deposit in ("due", "under way")
    early, exposed = not waits, 0
    if waits and known is not None:
        # It had its early start: a slow chain would make each resend another inference that nobody sees.
        exposed = int(known[2])
    elif waits and not wanted.tops_up:
        owed = promises.exposure(promises.under_way(tx, channel.config.payer))
        early = owed + wanted.price_nano_usd <= wanted.exposure_max_nano_usd
        exposed = wanted.price_nano_usd if early else 0
    receipt_id = receipts.new_receipt_id()
    receipts.open_receipt(
        tx,
        id=receipt_id,
        tender="channel",
        payer=channel.config.payer,
        asset=channel.asset,
        quoted_nano_usd=wanted.price_nano_usd,
        details=wanted.details,
    )
    use = Use(receipt_id, channel.asset, wanted.details)
    to = payer_account(channel.config.payer, channel.asset) if wanted.tops_up else None
    closing.place(tx, use, channel.account, wanted.price_nano_usd, to)
    waits_for = wanted.deposit_id if waits else None
    row = (wanted.digest, channel.id, str(wanted.voucher.amount), receipt_id, waits_for, exposed, book.now_ms())
    tx.execute(_INSERT, row)
    if wanted.identifier is not None:
        identifiers.bind(tx, channel.config.payer, wanted.identifier, receipt_id)
    _raise_voucher(tx, channel, wanted.voucher)
    return Taken(use, channel, wanted.price_nano_usd, deposit, early)


def _raise_voucher(tx: Transaction, channel: Channel, voucher: Voucher) -> None:
    if voucher.amount > channel.voucher:
        book.put(tx, channel.id, voucher=voucher.amount, signature=voucher.signature)


__all__ = [
    "MustWait",
    "OutOfStep",
    "Taken",
    "Wanted",
    "capture",
    "credit",
    "outcome_of",
    "take",
]
