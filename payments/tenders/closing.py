"""How a hold ends, the same for every tender: what it does to the ledger and to the receipt, in one unit.

A hold is the pending ledger transfer `hold:<receipt id>` from the payer's account to revenue. A request that cost more than was
held is charged what was held, and the rest is moved from `variance` to `revenue`: revenue is always what the answers cost, and
variance is what the operator lost. The payer never pays more than was quoted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from payments import receipts
from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.money import nano_to_usd
from payments.store import Store, StoreBusy, Transaction
from payments.tenders import losses
from payments.tenders.base import Also, Charge, HoldEnded, Outcome


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a receipt, and the details that it was opened with."""

    receipt_id: str
    asset: str
    details: dict[str, Any]
    number: int = 1
    """Counts the times that the same payment took up an interrupted request."""

    @property
    def hold_id(self) -> str:
        """The ledger transfer that holds for this use."""
        return hold_id(self.receipt_id, self.number)


def hold_id(receipt_id: str, use: int) -> str:
    """The ledger transfer that holds for the first or a later use of a receipt."""
    return f"hold:{receipt_id}" if use == 1 else f"hold:{receipt_id}:{use}"


def place(tx: Transaction, use: Use, account: str, amount_nano_usd: int, to: str | None = None) -> None:
    """Hold `amount_nano_usd` of `account` for this use; for `to`, by default what is earned.

    Raises:
        InsufficientFunds: If `account` has less.
    """
    credit = to or account_id("revenue", use.asset)
    transfers.hold(tx, id=use.hold_id, debit=account, credit=credit, amount=amount_nano_usd, reference=use.receipt_id)


def capture(tx: Transaction, use: Use, amount_nano_usd: int, outcome: Outcome) -> Charge:
    """Charge what was used, at most what is held, and close the receipt.

    Raises:
        HoldEnded: It ended otherwise before, or nothing is held yet.
    """
    assert amount_nano_usd >= 0
    held = transfers.find(tx, use.hold_id)
    if held is None:
        raise HoldEnded(use.receipt_id, "nothing is held: its payment has not arrived")
    charged = min(amount_nano_usd, held.amount)
    overrun = amount_nano_usd - charged
    details, reason = _merged(use, outcome)
    if overrun:
        details["overrun_usd"] = nano_to_usd(overrun)
    if not receipts.close_receipt(
        tx, use.receipt_id, use.number, "captured", charged_nano_usd=charged, details=details, reason=reason
    ):
        return _ended_before(tx, use, "captured")
    transfers.capture(tx, use.hold_id, charged)
    losses.regain_freed(tx, use.receipt_id, held.debit, held.amount - charged)
    if overrun:
        transfers.post(
            tx,
            id=f"variance:{use.receipt_id}",
            debit=account_id("variance", use.asset),
            credit=account_id("revenue", use.asset),
            amount=overrun,
            reference=use.receipt_id,
        )
    return _charge(tx, use)


def credit(tx: Transaction, use: Use, amount_nano_usd: int, outcome: Outcome) -> Charge:
    """Let all that is held go to whom it was held for, as a payment that charges nothing, and close the receipt.

    Raises:
        HoldEnded: It was released before.
    """
    details, reason = _merged(use, outcome)
    if not receipts.close_receipt(
        tx, use.receipt_id, use.number, "captured", charged_nano_usd=0, details=details, reason=reason
    ):
        return _ended_before(tx, use, "captured")
    transfers.capture(tx, use.hold_id, amount_nano_usd)
    receipts.set_paid(tx, use.receipt_id, amount_nano_usd)
    return _charge(tx, use)


def release(tx: Transaction, use: Use, outcome: Outcome) -> Charge:
    """Charge nothing and close the receipt.

    Raises:
        HoldEnded: It ended otherwise before.
    """
    details, reason = _merged(use, outcome)
    if not receipts.close_receipt(
        tx, use.receipt_id, use.number, "released", charged_nano_usd=0, details=details, reason=reason
    ):
        return _ended_before(tx, use, "released")
    _free(tx, use)
    return _charge(tx, use)


def interrupt(tx: Transaction, use: Use, outcome: Outcome, spent_nano_usd: int = 0) -> bool:
    """Charge what was spent, free the rest and leave the receipt to be taken up again. False, with nothing changed, if the use
    has ended.

    What is not held yet, because the payment has not arrived, is charged when it does: see `charge_spent`.
    """
    details, reason = _merged(use, outcome)
    if not receipts.close_receipt(
        tx, use.receipt_id, use.number, "interrupted", charged_nano_usd=None, details=details, reason=reason
    ):
        return False
    held = transfers.find(tx, use.hold_id)
    spent = spent_nano_usd if held is None else min(spent_nano_usd, held.amount)
    if spent:
        receipts.spend(tx, use.receipt_id, spent)
    if held is not None and spent:
        transfers.capture(tx, use.hold_id, spent)
        losses.regain_freed(tx, use.receipt_id, held.debit, held.amount - spent)
    else:
        _free(tx, use)
    return True


def charge_spent(tx: Transaction, receipt_id: str, asset: str, account: str, cost_nano_usd: int) -> None:
    """Charge what was spent before the payment that pays for it had arrived.

    Args:
        tx: The unit's transaction.
        receipt_id: The payment's.
        asset: What it is in.
        account: Whose it is.
        cost_nano_usd: All that is charged for the receipt. What holds or an earlier arrival of the money, which a
            reorganisation took away since, have paid of it is not charged again.
    """
    if not cost_nano_usd:
        return
    revenue = account_id("revenue", asset)
    due = cost_nano_usd - transfers.moved(tx, receipt_id, account, revenue)
    if due > 0:
        name = transfers.next_id(tx, receipt_id, f"{hold_id(receipt_id, 1)}:spent")
        transfers.post(tx, id=name, debit=account, credit=revenue, amount=due, reference=receipt_id)


def void(tx: Transaction, hold: str) -> None:
    """Free what is held under the ledger transfer `hold`; again: nothing."""
    if transfers.void(tx, hold):
        held = transfers.find(tx, hold)
        assert held is not None
        losses.regain_freed(tx, held.reference, held.debit, held.amount)


def was_held(tx: Transaction, use: Use) -> bool:
    """Whether something was held for this use, be it ended or not."""
    return transfers.find(tx, use.hold_id) is not None


def because(reason: str) -> Outcome:
    """The outcome of something that ended before anything happened."""
    return Outcome({"reason": reason})


def _free(tx: Transaction, use: Use) -> None:
    # An exact payment that is not mined yet holds nothing yet.
    if was_held(tx, use):
        void(tx, use.hold_id)


def _merged(use: Use, outcome: Outcome) -> tuple[dict[str, Any], str | None]:
    details = use.details | outcome.details
    return details, details.pop("reason", None)


def _ended_before(tx: Transaction, use: Use, wanted: receipts.State) -> Charge:
    receipt = receipts.get(tx, use.receipt_id)
    if receipt is None or receipt.state != wanted:
        state = "missing" if receipt is None else receipt.state
        raise HoldEnded(use.receipt_id, f"use {use.number} has ended: the receipt is {state}")
    return _charge(tx, use)


def _charge(tx: Transaction, use: Use) -> Charge:
    receipt = receipts.get(tx, use.receipt_id)
    assert receipt is not None
    assert receipt.charged_nano_usd is not None
    return Charge(receipt.id, receipt.charged_nano_usd, receipt.credited_nano_usd, receipt.transaction_hash)


class LedgerHold:
    """A hold on a balance that is in the ledger already: prepaid credit, or an API key's pool. It is certain at once."""

    may_start_early = True

    def __init__(self, store: Store, use: Use, payer: str, maximum_nano_usd: int) -> None:
        self.receipt_id = use.receipt_id
        self.payer = payer
        self.asset = use.asset
        self.maximum_nano_usd = maximum_nano_usd
        self._store = store
        self._use = use

    async def ready(self) -> None:
        """Nothing to wait for."""

    async def capture(self, amount_nano_usd: int, outcome: Outcome, also: Also | None = None) -> Charge:
        """See `payments.tenders.base.Hold`."""
        return await self._store.write_surely(
            lambda tx: _with(tx, also, capture(tx, self._use, amount_nano_usd, outcome)), self._over
        )

    async def release(self, outcome: Outcome, also: Also | None = None) -> Charge:
        """See `payments.tenders.base.Hold`."""
        return await self._store.write_surely(lambda tx: _with(tx, also, release(tx, self._use, outcome)), self._over)

    async def interrupt(self, outcome: Outcome, spent_nano_usd: int = 0) -> None:
        """Charge what was spent, else release it: the caller has nothing that could be sent again."""
        # The background goes on if the database cannot be written to now; nobody waits for the result.
        with contextlib.suppress(StoreBusy):
            await self._store.write_surely(lambda tx: _end_if_open(tx, self._use, outcome, spent_nano_usd))

    def _over(self, charge: Charge) -> None:
        """The hold has ended, durably."""

    def payment_response(self, charge_nano_usd: int | None = None) -> dict[str, Any] | None:
        """None: this is not x402."""
        return None


def release_if_open(tx: Transaction, use: Use, outcome: Outcome) -> None:
    """Release a use that may have ended otherwise, which then stands."""
    try:
        release(tx, use, outcome)
    except HoldEnded:
        return


def _end_if_open(tx: Transaction, use: Use, outcome: Outcome, spent_nano_usd: int) -> None:
    if not spent_nano_usd:
        release_if_open(tx, use, outcome)
        return
    with contextlib.suppress(HoldEnded):
        capture(tx, use, spent_nano_usd, outcome)


def _with(tx: Transaction, also: Also | None, charge: Charge) -> Charge:
    if also is not None:
        also(tx)
    return charge
