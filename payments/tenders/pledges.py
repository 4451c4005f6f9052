"""Pledges: authorizations of the scheme `upto`, from which an amount is taken only when the answer is there.

A pledge is reserved durably before any work and is never forgotten: one that came to nothing (a failed request, an answer that
cost nothing, a restart) keeps its row, so that it buys no second answer however long its deadline is. Until its amount is
settled it is the operator's risk, see `payments.promises`. Everything here runs inside store units.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from payments import promises, receipts
from payments.errors import PaymentConflict, PaymentRefused, SchemeRefused
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import nano_to_usd
from payments.promises import Promise
from payments.store import Transaction
from payments.tenders import authorizations
from payments.tenders.authorizations import AlreadyUsed, UseState
from payments.tenders.base import Charge, HoldEnded, Outcome
from payments.tenders.closing import Use
from payments.x402.extensions import identifier as identifiers

_INSERT = (
    "INSERT INTO payment_authorization (identity, digest, receipt_id, payer, state, value_nano_usd, exposed_nano_usd,"
    " created_ms) VALUES (?, ?, ?, ?, 'pledged', ?, ?, ?) ON CONFLICT (identity) DO NOTHING RETURNING identity"
)
_FIND = """
    SELECT pledge.digest, pledge.state, receipt.id, receipt.state
    FROM payment_authorization AS pledge JOIN receipt ON receipt.id = pledge.receipt_id
    WHERE pledge.identity = ?
"""
_DEBTS = """
    SELECT receipt.id, receipt.asset, receipt.charged_nano_usd
    FROM receipt JOIN payment_authorization AS pledge ON pledge.receipt_id = receipt.id
    WHERE receipt.payer = ? AND receipt.tender = 'upto' AND pledge.state = 'defaulted' ORDER BY receipt.created_ms
"""
_BURN_ORPHANS = """
    UPDATE payment_authorization SET state = 'burnt' WHERE state = 'pledged' AND EXISTS (
        SELECT 1 FROM receipt WHERE receipt.id = payment_authorization.receipt_id
        AND receipt.state <> 'open' AND receipt.charged_nano_usd = 0)
"""


@dataclass(frozen=True, slots=True)
class Pledge:
    """A pledge that was reserved just now, and what its payer had under way then: that comes first."""

    use: Use
    earlier: tuple[Promise, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a captured pledge came to. `value_nano_usd` is to be settled; 0 settles nothing."""

    charge: Charge
    first: bool
    """Whether this very call captured it."""


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
) -> Pledge | AlreadyUsed:
    """Bind a pledge to a payload and a request. Arguments and results are those of `authorizations.reserve`; besides:

    Args:
        exposure_max_nano_usd: What one payer may owe, by all schemes together, for answers whose money has not arrived.

    Raises:
        SchemeRefused: ``exposure_exceeded`` or ``unpaid_answers``: this payer is to pay in another way now.
    """
    known = tx.execute(_FIND, (identity,)).fetchone()
    if known is not None:
        return _first_use(known, digest)
    if refusal is not None:
        raise refusal
    if identifier is not None:
        identifiers.check(tx, payer, identifier)
    _check_debts(tx, payer)
    earlier = tuple(promises.under_way(tx, payer))
    exposed = promises.exposure(earlier)
    if exposed + quoted_nano_usd > exposure_max_nano_usd:
        raise SchemeRefused(
            "exposure_exceeded",
            f"this answer may cost {nano_to_usd(quoted_nano_usd)} USD, and {nano_to_usd(exposed)} USD of this wallet's answers"
            f" are not settled; by upto {nano_to_usd(exposure_max_nano_usd)} USD may be: pay by exact or a channel",
            "upto",
        )
    receipt_id = receipts.new_receipt_id()
    receipts.open_receipt(
        tx, id=receipt_id, tender="upto", payer=payer, asset=asset, quoted_nano_usd=quoted_nano_usd, details=details
    )
    now_ms = time.time_ns() // 1_000_000
    row = (identity, digest, receipt_id, payer, value_nano_usd, quoted_nano_usd, now_ms)
    assert tx.execute(_INSERT, row).fetchone() is not None  # writers take turns
    if identifier is not None:
        identifiers.bind(tx, payer, identifier, receipt_id)
    return Pledge(Use(receipt_id, asset, details), earlier)


def outcome_of(tx: Transaction, identity: str, digest: bytes) -> AlreadyUsed | None:
    """What became of a pledge that was used before for this very payload and request; None if it was not."""
    known = tx.execute(_FIND, (identity,)).fetchone()
    return None if known is None or bytes(known[0]) != digest else _first_use(known, digest)


def forget(tx: Transaction, use: Use) -> None:
    """Take a pledge back for which nothing was begun, as if it had never been."""
    tx.execute("DELETE FROM payment_authorization WHERE receipt_id = ? AND state = 'pledged'", (use.receipt_id,))
    receipts.forget(tx, use.receipt_id)


def capture(
    tx: Transaction, use: Use, payer: str, quoted_nano_usd: int, amount_nano_usd: int, outcome: Outcome
) -> Taken:
    """Charge what was used, at most what was quoted, as earned and not yet on the chain; the rest was never taken.

    Raises:
        HoldEnded: It was released before.
    """
    charged = min(amount_nano_usd, quoted_nano_usd)
    details, overrun = use.details | outcome.details, amount_nano_usd - charged
    reason = details.pop("reason", None)
    if overrun:
        details["overrun_usd"] = nano_to_usd(overrun)
    first = receipts.close_receipt(
        tx, use.receipt_id, use.number, "captured", charged_nano_usd=charged, details=details, reason=reason
    )
    if not first:
        return Taken(_ended_before(tx, use, "captured"), False)
    revenue = account_id("revenue", use.asset)
    if charged:
        owing = account_id("receivable", use.asset, payer)
        transfers.post(tx, id=use.hold_id, debit=owing, credit=revenue, amount=charged, reference=use.receipt_id)
    else:
        authorizations.mark(tx, use.receipt_id, "burnt")
    if overrun:
        variance = account_id("variance", use.asset)
        transfers.post(
            tx,
            id=f"variance:{use.receipt_id}",
            debit=variance,
            credit=revenue,
            amount=overrun,
            reference=use.receipt_id,
        )
    return Taken(Charge(use.receipt_id, charged, 0), True)


def release(tx: Transaction, use: Use, outcome: Outcome) -> Charge:
    """Charge nothing, and burn the pledge.

    Raises:
        HoldEnded: It was captured before.
    """
    details = use.details | outcome.details
    reason = details.pop("reason", None)
    if not receipts.close_receipt(
        tx, use.receipt_id, use.number, "released", charged_nano_usd=0, details=details, reason=reason
    ):
        return _ended_before(tx, use, "released")
    authorizations.mark(tx, use.receipt_id, "burnt")
    return Charge(use.receipt_id, 0, 0)


def burn_orphans(tx: Transaction) -> int:
    """After a restart: burn the pledges whose requests it ended. Returns how many."""
    return tx.execute(_BURN_ORPHANS).rowcount


def _first_use(known: Any, digest: bytes) -> AlreadyUsed:
    first_digest, state, receipt_id, receipt_state = known
    if bytes(first_digest) != digest:
        raise PaymentConflict(
            "authorization_reused",
            "this authorization is bound to another request or payload; sign a new one with a nonce of its own",
        )
    if receipt_state == "open":
        return AlreadyUsed(receipt_id, "in_progress")
    used: UseState = "burnt" if state == "burnt" and receipt_state != "captured" else "captured"
    return AlreadyUsed(receipt_id, used)


def _check_debts(tx: Transaction, payer: str) -> None:
    """Pay answers whose settlement failed from what the payer's balance has meanwhile; refuse if that does not do."""
    for receipt_id, asset, charged in tx.execute(_DEBTS, (payer,)).fetchall():
        account = payer_account(payer, asset)
        try:
            transfers.post(
                tx,
                id=transfers.next_id(tx, receipt_id, f"repay:{receipt_id}"),
                debit=account,
                credit=account_id("variance", asset),
                amount=charged,
                reference=receipt_id,
            )
        except transfers.InsufficientFunds:
            raise SchemeRefused(
                "unpaid_answers",
                f"{nano_to_usd(charged)} USD of an earlier answer could not be taken from this wallet; pay by exact, and leave"
                " as much in the balance here, or top it up: then upto is taken again",
                "upto",
            ) from None
        authorizations.mark(tx, receipt_id, "repaid")


def _ended_before(tx: Transaction, use: Use, wanted: receipts.State) -> Charge:
    receipt = receipts.get(tx, use.receipt_id)
    if receipt is None or receipt.state != wanted:
        raise HoldEnded(use.receipt_id, f"the receipt is {receipt and receipt.state}")
    return Charge(receipt.id, receipt.charged_nano_usd or 0, 0, receipt.transaction_hash)
