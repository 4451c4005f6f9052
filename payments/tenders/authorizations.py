"""Signed authorizations, reserved once under their canonical identity before any work is done for them.

The reservation is what makes a payment pay once: of fifty identical requests one inserts the row and the others find it. A
use that a crash or a hang-up interrupted is taken up by the same payment sent again, and again by exactly one. Everything
here runs inside store units.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from payments import promises, receipts
from payments.errors import PaymentConflict, PaymentRefused
from payments.ledger.accounts import payer_account
from payments.ledger.transfers import InsufficientFunds
from payments.promises import Promise
from payments.store import Transaction
from payments.tenders import closing
from payments.tenders.closing import Use
from payments.x402.extensions import identifier as identifiers

State = Literal["reserved", "paid", "failed", "pledged", "burnt", "defaulted", "repaid"]

TRANSITIONS: dict[str, frozenset[str]] = {
    # Bound to a payload and a request. Its transfer may not have been written, be under way, or be unknown.
    "reserved": frozenset({"paid", "failed"}),
    # The money is in the payer's account of the ledger. Back to failed only if a reorganisation took it away.
    "paid": frozenset({"failed", "defaulted"}),
    # The transfer cannot succeed any more; should the money arrive all the same, it is the payer's.
    "failed": frozenset({"paid"}),
    # Of the scheme `upto`, see `payments.tenders.pledges`: the answer is under way, or its settlement is.
    "pledged": frozenset({"paid", "burnt", "defaulted"}),
    # Nothing is ever settled under it.
    "burnt": frozenset(),
    # The answer was given and its settlement has failed. Then paid from the payer's balance, or pledged again when it is tried
    # once more.
    "defaulted": frozenset({"paid", "repaid", "pledged"}),
    "repaid": frozenset({"paid"}),
}

USES_MAX = 16
"""Uses of one payment. What the operator spends on one that the caller hangs up on is charged, see `closing.interrupt`."""

_INSERT = (
    "INSERT INTO payment_authorization (identity, digest, receipt_id, payer, state, value_nano_usd, exposed_nano_usd,"
    " created_ms) VALUES (?, ?, ?, ?, 'reserved', ?, ?, ?) ON CONFLICT (identity) DO NOTHING RETURNING identity"
)
_FIND = """
    SELECT reservation.digest, reservation.state, receipt.id, receipt.state, receipt.reason, receipt.asset,
           receipt.quoted_nano_usd, receipt.paid_nano_usd, receipt.spent_nano_usd,
           EXISTS (SELECT 1 FROM settlement WHERE settlement.reference = receipt.id)
    FROM payment_authorization AS reservation JOIN receipt ON receipt.id = reservation.receipt_id
    WHERE reservation.identity = ?
"""
_FORGET_UNWRITTEN = (
    "DELETE FROM payment_authorization WHERE state = 'reserved'"
    " AND NOT EXISTS (SELECT 1 FROM settlement WHERE settlement.reference = payment_authorization.receipt_id)"
)
_UNATTENDED = (
    " AND NOT EXISTS (SELECT 1 FROM receipt JOIN lease ON lease.name = 'instance:' || receipt.instance"
    " WHERE receipt.id = payment_authorization.receipt_id)"
)
_FORGET = f"{_FORGET_UNWRITTEN} AND receipt_id = ? RETURNING receipt_id"

UseState = Literal["in_progress", "captured", "released", "credited", "burnt"]
"""What became of a payment that was sent before."""

_SAID_BY_STATE: dict[UseState, tuple[str, str]] = {
    "in_progress": (
        "payment_in_progress",
        "this payment's first use is still under way; nothing more is charged, send the same payment again later",
    ),
    "captured": (
        "payment_already_used",
        "this payment has paid for an answer already; nothing more was charged, sign a new payment for a new answer",
    ),
    "released": (
        "payment_already_credited",
        "this payment's request is over without an answer; all that its receipt does not say was charged is your wallet's"
        " credit; sign in to spend it",
    ),
    "credited": (
        "payment_already_credited",
        "this payment's request was interrupted, its amount became your wallet's credit and has been spent since",
    ),
    "burnt": (
        "authorization_spent",
        "this authorization's request failed and nothing is taken under it; sign a new one with a nonce of its own",
    ),
}


class AlreadyUsed(PaymentConflict):
    """The same payment for the same request was sent before. `state` says what became of it."""

    def __init__(self, receipt_id: str, state: UseState) -> None:
        """Name the receipt of the first use; the code and the message follow from the state."""
        super().__init__(*_SAID_BY_STATE[state], receipt_id)
        self.receipt_id: str = receipt_id
        self.state = state


@dataclass(frozen=True, slots=True)
class Reservation:
    """The right to work on a payment's request, held by one caller at a time until the use ends."""

    use: Use
    stage: Literal["new", "settling", "held"]
    """How far the payment has come: nothing was written to the outbox yet; its transfer is under way; or it was mined before
    and this use holds its credit."""
    held_nano_usd: int
    """What is held already, or is going to be if the whole value arrives."""
    may_start_early: bool = False
    """Whether the request may be worked on before the transfer is mined: that is within the payer's exposure limit, and a
    payment has it once. A slow chain would make each resend another inference that nobody sees."""
    earlier: tuple[Promise, ...] = ()
    """What the payer had under way when a new payment was reserved: that comes first."""


def reserve(
    tx: Transaction,
    *,
    identity: str,
    digest: bytes,
    payer: str,
    asset: str,
    quoted_nano_usd: int,
    value_nano_usd: int,
    details: dict[str, Any],
    exposure_max_nano_usd: int,
    refusal: PaymentRefused | None = None,
    identifier: str | None = None,
    tender: Literal["exact", "upto"] = "exact",
) -> Reservation | AlreadyUsed:
    """Bind an authorization to a payload and a request, or take its interrupted use up again.

    Args:
        tx: The unit's transaction.
        identity: See `Payment.identity`.
        digest: Of payload and request together.
        payer: Who signed, lower-case hex.
        asset: The ledger's name of the token.
        quoted_nano_usd: What the request may cost.
        value_nano_usd: What the signed value is worth, at least the quoted amount.
        details: What the receipt is opened with.
        exposure_max_nano_usd: Inference that the payer may have under way, by all schemes together, before its money has
            arrived; above that the transfer comes first.
        refusal: Why it does not do for a first use, if it does not: then only an earlier use is found.
        identifier: The payer's own name for it, if it has one.
        tender: What the receipt says that it is paid by.

    Returns:
        The reservation; or, if the first use has ended or is under way, what it came to. That is returned and not raised
        because finding out may itself be a change that must stand.

    Raises:
        PaymentConflict: ``authorization_reused``: it is bound to another payload or another request;
            ``payment_identifier_used``: another payment of the payer's bears `identifier`.
        PaymentRefused: ``settlement_failed``: its transfer has failed for good; or `refusal`.
    """
    if refusal is not None:
        # Decided in the unit that would reserve: an earlier use may be forgotten between a look and a reservation.
        if not is_known(tx, identity):
            raise refusal
        return _find_first_use(tx, identity, digest, payer, details)
    earlier = promises.under_way(tx, payer)
    early = promises.exposure(earlier) + quoted_nano_usd <= exposure_max_nano_usd
    exposed = quoted_nano_usd if early else 0
    receipt_id = receipts.new_receipt_id()
    # The receipt first, for the reservation's reference to it; repeated payments are rare and pay for taking it back.
    receipts.open_receipt(
        tx, id=receipt_id, tender=tender, payer=payer, asset=asset, quoted_nano_usd=quoted_nano_usd, details=details
    )
    row = (identity, digest, receipt_id, payer, value_nano_usd, exposed, _now_ms())
    if tx.execute(_INSERT, row).fetchone() is not None:
        if identifier is not None:
            identifiers.bind(tx, payer, identifier, receipt_id)
        return Reservation(Use(receipt_id, asset, details), "new", quoted_nano_usd, early, tuple(earlier))
    receipts.forget(tx, receipt_id)
    return _find_first_use(tx, identity, digest, payer, details)


def outcome_of(tx: Transaction, identity: str, digest: bytes) -> AlreadyUsed | None:
    """What became of an authorization that was used before for this very payload and request; changes nothing.

    Returns:
        None if it was not, or was interrupted and could be taken up again.
    """
    row = tx.execute(_FIND, (identity,)).fetchone()
    if row is None or bytes(row[0]) != digest or row[1] == "failed" or row[3] == "interrupted":
        return None
    states: dict[str, UseState] = {"open": "in_progress", "captured": "captured", "released": "released"}
    return AlreadyUsed(row[2], states[row[3]])


def is_known(tx: Transaction, identity: str) -> bool:
    """Whether an authorization of this identity was reserved before."""
    return tx.execute("SELECT 1 FROM payment_authorization WHERE identity = ?", (identity,)).fetchone() is not None


def is_reserved(tx: Transaction, receipt_id: str) -> bool:
    """Whether a receipt's authorization is bound to it still, and not forgotten."""
    row = tx.execute("SELECT 1 FROM payment_authorization WHERE receipt_id = ?", (receipt_id,)).fetchone()
    return row is not None


def forget(tx: Transaction, use: Use, reason: str) -> None:
    """End a use for which nothing was written to the outbox, as if it had never been; if something was, interrupt it."""
    if tx.execute(_FORGET, (use.receipt_id,)).fetchone() is not None:
        receipts.forget(tx, use.receipt_id)
    else:
        interrupt(tx, use, reason)


def forget_unwritten(tx: Transaction) -> int:
    """Forget every reservation for which nothing was written to the outbox, and of whose instance there is no lease: nobody
    can be about to.

    Nobody was told of their receipts, and nothing can come of them; the same payment sent again is a first use.

    Returns:
        How many that were.
    """
    receipt_ids = [row[0] for row in tx.execute(f"{_FORGET_UNWRITTEN}{_UNATTENDED} RETURNING receipt_id").fetchall()]
    for receipt_id in receipt_ids:
        receipts.forget(tx, receipt_id)
    return len(receipt_ids)


def settle_first(tx: Transaction, receipt_id: str) -> None:
    """Nothing begins before a payment has arrived, so that nothing is exposed."""
    tx.execute("UPDATE payment_authorization SET exposed_nano_usd = 0 WHERE receipt_id = ?", (receipt_id,))


def interrupt(tx: Transaction, use: Use, reason: str) -> None:
    """End a use so that the same payment sent again takes it up."""
    closing.interrupt(tx, use, closing.because(reason))


def mark(tx: Transaction, receipt_id: str, to: State) -> bool:
    """Move a receipt's authorization to `to`. False, with nothing changed, if it is there already."""
    sources = tuple(source for source, targets in TRANSITIONS.items() if to in targets)
    marks = ",".join("?" * len(sources))
    row = tx.execute(
        f"UPDATE payment_authorization SET state = ? WHERE receipt_id = ? AND state IN ({marks}) RETURNING identity",  # noqa: S608 - names from this module
        (to, receipt_id, *sources),
    ).fetchone()
    return row is not None


def _find_first_use(
    tx: Transaction, identity: str, digest: bytes, payer: str, details: dict[str, Any]
) -> Reservation | AlreadyUsed:
    first_digest, state, receipt_id, receipt_state, reason, asset, quoted, paid, spent, written = tx.execute(
        _FIND, (identity,)
    ).fetchone()
    if bytes(first_digest) != digest:
        # The first use's receipt is not named: whoever sends this need not be who made that.
        raise PaymentConflict(
            "authorization_reused",
            "this authorization is bound to another request or payload; sign a new one with a nonce of its own",
        )
    if state == "failed":
        raise PaymentRefused("settlement_failed", f"this payment's transfer failed ({reason}); nothing was taken")
    if receipt_state == "open":
        return AlreadyUsed(receipt_id, "in_progress")
    if receipt_state != "interrupted":
        return AlreadyUsed(receipt_id, "captured" if receipt_state == "captured" else "released")
    number = receipts.reopen_receipt(tx, receipt_id)
    assert number is not None
    use = Use(receipt_id, asset, details, number)
    if state == "reserved":
        if written:
            return Reservation(use, "settling", quoted - spent)
        others = tuple(other for other in promises.under_way(tx, payer) if other.id != receipt_id)
        return Reservation(use, "new", quoted, earlier=others)
    if number > USES_MAX:
        receipts.release_unsettled(tx, receipt_id, "interrupted_too_often")
        return AlreadyUsed(receipt_id, "released")
    amount = min(quoted, paid) - spent
    if amount <= 0:
        receipts.release_unsettled(tx, receipt_id, "spent_on_hang_ups")
        return AlreadyUsed(receipt_id, "released")
    try:
        closing.place(tx, use, payer_account(payer, asset), amount)
    except InsufficientFunds:
        receipts.release_unsettled(tx, receipt_id, "credit_spent")
        return AlreadyUsed(receipt_id, "credited")
    return Reservation(use, "held", amount)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
