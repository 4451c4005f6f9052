"""What the settlement engine's findings do to the ledger: money that arrived is the payer's, and held if a request waits.

Both functions run inside the engine's own unit, so that a settlement's state and its money are one commit. They are
idempotent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments import receipts
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.store import Transaction
from payments.tenders import authorizations, closing, losses
from payments.tenders.closing import Use

_FIND = """
    SELECT reservation.state, reservation.value_nano_usd, receipt.state, receipt.uses, receipt.payer, receipt.asset,
           receipt.quoted_nano_usd, receipt.paid_nano_usd, COALESCE(receipt.charged_nano_usd, receipt.spent_nano_usd)
    FROM payment_authorization AS reservation JOIN receipt ON receipt.id = reservation.receipt_id
    WHERE reservation.receipt_id = ?
"""
PAID_LATE = "paid_after_it_had_failed"
"""Somebody executed the authorization when its settlement had failed and its request was over: all of it is credit."""


@dataclass(frozen=True, slots=True)
class _Paid:
    state: authorizations.State
    value_nano_usd: int
    receipt_state: receipts.State
    uses: int
    payer: str
    asset: str
    quoted_nano_usd: int
    paid_nano_usd: int
    cost_nano_usd: int
    """What is charged for it; as long as it is not closed, what interrupted uses have spent."""

    @property
    def custody(self) -> str:
        return account_id("custody", self.asset)

    @property
    def account(self) -> str:
        return payer_account(self.payer, self.asset)


def on_mined(tx: Transaction, row: dict[str, Any]) -> None:
    """A payment's transfer is mined: credit the payer with what arrived, and hold it for the request that waits for it.

    After a restart or a hang-up none waits: the money stays the payer's credit until the same payment is sent again.

    Args:
        tx: The engine's transaction.
        row: The settlement: `id`, `reference` (the receipt), `value`, and `received_value` where less arrived than that.
    """
    receipt_id = row["reference"]
    found = _find(tx, receipt_id)
    if found.state == "paid":
        return
    value = int(row["value"])
    received = int(row.get("received_value") or value)
    # Exact: what the value is worth is a multiple of what one unit is worth, or the other way round.
    received_nano_usd = found.value_nano_usd * received // value
    if received_nano_usd == 0:
        on_failed(tx, row | {"reason": "nothing arrived"})
        return
    authorizations.mark(tx, receipt_id, "paid")
    _credit(tx, row, found, received_nano_usd)
    receipts.set_paid(tx, receipt_id, received_nano_usd)
    if found.state == "failed":
        receipts.explain(tx, receipt_id, PAID_LATE)
    cost = min(found.cost_nano_usd, received_nano_usd)
    closing.charge_spent(tx, receipt_id, found.asset, found.account, cost)
    left, use = min(found.quoted_nano_usd, received_nano_usd) - cost, Use(receipt_id, found.asset, {}, found.uses)
    # A use that was running when a reorganisation took the money away holds its share still.
    if found.receipt_state == "open" and left and not closing.was_held(tx, use):
        closing.place(tx, use, found.account, left)


def on_failed(tx: Transaction, row: dict[str, Any]) -> None:
    """A payment's transfer cannot succeed any more: close its receipt.

    If a reorganisation took away money that was credited, it is taken from the payer again; what the payer has spent of it
    meanwhile is the operator's loss.

    Args:
        tx: The engine's transaction.
        row: The settlement: `id`, `reference` (the receipt), `reason`.
    """
    receipt_id = row["reference"]
    found = _find(tx, receipt_id)
    if not authorizations.mark(tx, receipt_id, "failed"):
        return
    if found.state == "paid":
        _take_back(tx, row["id"], found)
    # A use that is running on money that was there holds its share still and ends by itself.
    if found.state != "paid" or found.receipt_state != "open":
        receipts.release_unsettled(tx, receipt_id, row.get("reason") or "its transfer failed")
    receipts.set_paid(tx, receipt_id, 0)


def _find(tx: Transaction, receipt_id: str) -> _Paid:
    row = tx.execute(_FIND, (receipt_id,)).fetchone()
    assert row is not None, f"a settlement refers to {receipt_id}, for which no authorization is reserved"
    return _Paid(*row)


def _credit(tx: Transaction, row: dict[str, Any], found: _Paid, received_nano_usd: int) -> None:
    settlement_id = row["id"]
    reversals = _reversals(tx, settlement_id) if found.state == "failed" else 0
    # A check of the books may have seen the money before anybody knew whose it is.
    seen = transfers.find(tx, f"log:{row.get('transaction_hash')}:{row.get('transfer_log_index')}")
    source = found.custody if seen is None else seen.credit
    _post(tx, f"settle:{_round(settlement_id, reversals)}", source, found.account, received_nano_usd, settlement_id)
    if reversals:
        # What was taken back arrives after all, so the operator's loss is made good.
        losses.regain(tx, settlement_id, found.account, received_nano_usd)


def _take_back(tx: Transaction, settlement_id: str, found: _Paid) -> None:
    this = _round(settlement_id, _reversals(tx, settlement_id))
    lost = found.paid_nano_usd - transfers.balance(tx, found.account).available
    if lost > 0:
        losses.lose(tx, settlement_id, found.account, lost)
    _post(tx, f"unsettle:{this}", found.account, found.custody, found.paid_nano_usd, settlement_id)


def _post(tx: Transaction, transfer_id: str, debit: str, credit: str, amount: int, settlement_id: str) -> None:
    transfers.post(tx, id=transfer_id, debit=debit, credit=credit, amount=amount, reference=settlement_id)


def _reversals(tx: Transaction, settlement_id: str) -> int:
    return transfers.count(tx, settlement_id, "unsettle:")


def _round(settlement_id: str, reversals: int) -> str:
    return settlement_id if reversals == 0 else f"{settlement_id}:{reversals}"
