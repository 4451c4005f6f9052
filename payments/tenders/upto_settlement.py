"""How captured pledges are settled and booked: the kind ``upto`` of settlements.

What an answer cost is earned at once and `receivable` from the payer; the transfer pays that. If the payer drained its wallet
or cancelled meanwhile, the operator has lost it (`variance`), which the exposure limit bounds, and the payer owes it.

The callbacks run inside the engine's own unit and are idempotent.
"""

from __future__ import annotations

from typing import Any

from payments import receipts
from payments.chain.networks import Network
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import atomic_to_nano_down
from payments.settlement.evidence import PaymentProof, payment_nonce
from payments.settlement.orders import Kind
from payments.settlement.outbox import order_facilitator, order_gas
from payments.store import Transaction
from payments.tenders import authorizations

KIND = "upto"

_STATE = "SELECT state FROM payment_authorization WHERE receipt_id = ?"


def settlement_id(receipt_id: str) -> str:
    """The settlement of a captured pledge."""
    return f"upto:{receipt_id}"


def kind(network: Network) -> Kind:
    """Settlements of the kind ``upto`` on a network; they go through the batch contract, whom payers name as facilitator."""
    books = _Books(network)
    return Kind(
        PaymentProof(),
        books.on_paid,
        books.on_failed,
        order_gas,
        batchable=True,
        through=order_facilitator,
        on_tried_again=books.on_tried_again,
        nonce=payment_nonce,
    )


class _Books:
    def __init__(self, network: Network) -> None:
        self._decimals = {token.address: token.decimals for token in network.tokens}

    def on_paid(self, tx: Transaction, row: dict[str, Any]) -> None:
        """The transfer is mined: it pays what was receivable; what is more, less than an atomic unit, is the payer's."""
        state, receipt = _find(tx, row)
        if state == "paid":
            return
        charged = receipt.charged_nano_usd
        assert charged
        received = atomic_to_nano_down(int(row["received_value"]), self._decimals[row["token"]])
        custody, variance, receivable = _accounts(receipt)
        seen = transfers.find(tx, f"log:{row['transaction_hash']}:{row['transfer_log_index']}")
        source = custody if seen is None else seen.credit
        covered = min(received, charged)
        turn = _turn(tx, row["id"], "settle:")
        _post(tx, f"settle:{row['id']}{turn}", source, receivable, covered, row["id"])
        _post(tx, f"excess:{row['id']}{turn}", source, _payer(receipt), received - covered, row["id"])
        _post(tx, f"short:{row['id']}{turn}", variance, receivable, charged - covered, row["id"])
        if state in ("defaulted", "repaid"):
            _post(tx, f"made-good:{row['id']}{turn}", receivable, variance, charged, row["id"])
        if state == "repaid":
            _post(tx, f"unrepay:{row['id']}{turn}", variance, _payer(receipt), charged, row["id"])
        authorizations.mark(tx, receipt.id, "paid")
        receipts.set_paid(tx, receipt.id, received)

    def on_failed(self, tx: Transaction, row: dict[str, Any]) -> None:
        """Nothing was taken: the operator's loss, and the payer's debt, unless its money comes after all."""
        state, receipt = _find(tx, row)
        if not authorizations.mark(tx, receipt.id, "defaulted"):
            return
        assert receipt.charged_nano_usd
        custody, variance, receivable = _accounts(receipt)
        if state == "paid":
            # A reorganisation took the transfer away for good; what it brought beyond the price may be spent by now.
            turn = _turn(tx, row["id"], "unsettle:")
            covered = min(receipt.paid_nano_usd, receipt.charged_nano_usd)
            _post(tx, f"unsettle:{row['id']}{turn}", receivable, custody, covered, row["id"])
            _post(tx, f"unexcess:{row['id']}{turn}", variance, custody, receipt.paid_nano_usd - covered, row["id"])
            _post(tx, f"unshort:{row['id']}{turn}", receivable, variance, receipt.charged_nano_usd - covered, row["id"])
            receipts.set_paid(tx, receipt.id, 0)
        turn = _turn(tx, row["id"], "loss:")
        _post(tx, f"loss:{row['id']}{turn}", variance, receivable, receipt.charged_nano_usd, row["id"])

    def on_tried_again(self, tx: Transaction, row: dict[str, Any]) -> bool:
        """It may be mined by now: receivable as it was, and promised, unless the payer has paid its debt from its balance."""
        state, receipt = _find(tx, row)
        if state != "defaulted":
            return False
        authorizations.mark(tx, receipt.id, "pledged")
        assert receipt.charged_nano_usd
        _, variance, receivable = _accounts(receipt)
        turn = _turn(tx, row["id"], "unloss:")
        _post(tx, f"unloss:{row['id']}{turn}", receivable, variance, receipt.charged_nano_usd, row["id"])
        return True


def _find(tx: Transaction, row: dict[str, Any]) -> tuple[str, receipts.ReceiptView]:
    receipt = receipts.get(tx, row["reference"])
    state = tx.execute(_STATE, (row["reference"],)).fetchone()
    assert receipt is not None
    assert state is not None, f"a settlement refers to {row['reference']}, for which nothing is pledged"
    return state[0], receipt


def _accounts(receipt: receipts.ReceiptView) -> tuple[str, str, str]:
    asset = receipt.asset
    return account_id("custody", asset), account_id("variance", asset), account_id("receivable", asset, receipt.payer)


def _payer(receipt: receipts.ReceiptView) -> str:
    return payer_account(receipt.payer, receipt.asset)


def _turn(tx: Transaction, settlement: str, prefix: str) -> str:
    """What makes the names of a second round's transfers their own: only after reorganisations and late evidence."""
    rounds = transfers.count(tx, settlement, prefix)
    return f":{rounds}" if rounds else ""


def _post(tx: Transaction, transfer_id: str, debit: str, credit: str, amount: int, reference: str) -> None:
    if amount:
        transfers.post(tx, id=transfer_id, debit=debit, credit=credit, amount=amount, reference=reference)
