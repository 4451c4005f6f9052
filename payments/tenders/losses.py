"""What the operator has lost on a payment that a reorganisation took away when its payer had spent it, or a running use held
it.

A loss is booked from `variance` to the payer under the payment's settlement, so that no balance is ever below zero. It is
regained when the use that held a share of it ends and leaves something over, and when the payment arrives after all. All of
it runs inside store units.
"""

from __future__ import annotations

from payments.ledger import transfers
from payments.ledger.accounts import account_id
from payments.store import Transaction

_FIND = (
    "SELECT settlement.id FROM settlement JOIN ledger_transfer ON ledger_transfer.reference = settlement.id"
    " WHERE settlement.reference = ? AND ledger_transfer.debit_account = ? AND ledger_transfer.credit_account = ? LIMIT 1"
)


def lose(tx: Transaction, settlement_id: str, account: str, amount_nano_usd: int) -> None:
    """Book what of a payment that is gone its payer's `account` has not to give back."""
    name = transfers.next_id(tx, settlement_id, f"loss:{settlement_id}")
    transfers.post(
        tx, id=name, debit=_variance(account), credit=account, amount=amount_nano_usd, reference=settlement_id
    )


def regain(tx: Transaction, settlement_id: str, account: str, at_most_nano_usd: int) -> None:
    """Take from `account`, which has so much, what is still lost on a payment."""
    variance = _variance(account)
    lost = transfers.moved(tx, settlement_id, variance, account) - transfers.moved(tx, settlement_id, account, variance)
    amount = min(lost, at_most_nano_usd)
    if amount > 0:
        name = transfers.next_id(tx, settlement_id, f"made-good:{settlement_id}")
        transfers.post(tx, id=name, debit=account, credit=variance, amount=amount, reference=settlement_id)


def regain_freed(tx: Transaction, receipt_id: str, account: str, freed_nano_usd: int) -> None:
    """A use has ended and left `freed_nano_usd` of what it held: if the payment is gone, that is not its payer's."""
    if freed_nano_usd:
        lost = tx.execute(_FIND, (receipt_id, _variance(account), account)).fetchone()
        if lost is not None:
            regain(tx, lost[0], account, freed_nano_usd)


def _variance(account: str) -> str:
    return account_id("variance", account.rpartition("@")[2])
