"""Money that leaves the treasury for a wallet: the one mechanism behind refunds and withdrawals.

A payout is a pending ledger transfer payer → custody, and an outbox row, which may come later. The transfer is posted on the
evidence of the treasury's own transaction and voided if that failed.
"""

from __future__ import annotations

from typing import Any

from payments.chain.networks import Token
from payments.chain.transactions import encode_transfer
from payments.ledger import transfers
from payments.ledger.accounts import account_id, payer_account
from payments.money import atomic_to_nano_down
from payments.settlement import outbox
from payments.settlement.evidence import TransferProof
from payments.settlement.orders import Kind, LedgerCallback, SettlementOrder
from payments.store import Transaction


def kind(on_paid: LedgerCallback, on_failed: LedgerCallback) -> Kind:
    """How the settlement engine carries a kind of payouts: the treasury signs, its own Transfer is the evidence."""
    return Kind(TransferProof(), on_paid, on_failed, outbox.order_gas, signed_by="treasury")


def hold(tx: Transaction, name: str, settlement_id: str, wallet: str, token: Token, value: int) -> None:
    """Set what is to be paid out aside.

    Args:
        tx: The unit's transaction.
        name: Of the ledger transfer's kind: ``refund`` or ``withdrawal``.
        settlement_id: Of the order that will follow.
        wallet: Whose credit it is and who is paid, lower-case hex.
        token: What it is in.
        value: Atomic units.

    Raises:
        InsufficientFunds: The wallet has less available.
    """
    transfers.hold(
        tx,
        id=f"{name}:{settlement_id}",
        debit=payer_account(wallet, token.asset),
        credit=account_id("custody", token.asset),
        amount=atomic_to_nano_down(value, token.decimals),
        reference=settlement_id,
    )


def enqueue(
    tx: Transaction, name: str, settlement_id: str, wallet: str, token: Token, value: int, treasury: str
) -> None:
    """Write the order for what `hold` has set aside; arguments as there, `treasury` in lower-case hex."""
    outbox.enqueue(
        tx,
        SettlementOrder(
            id=settlement_id,
            kind=name,
            reference=f"{name}:{settlement_id}",
            chain_id=token.chain_id,
            token=token.address,
            payer=treasury,
            pay_to=wallet,
            value=value,
            authorization_nonce=None,
            call_to=token.address,
            call_data=encode_transfer(wallet, value),
            valid_before=0,
        ),
    )


def paid(tx: Transaction, row: dict[str, Any], token: Token) -> None:
    """The treasury's transfer is mined. It paid the whole value, whatever a token with a fee let arrive."""
    take(tx, row["reference"], atomic_to_nano_down(int(row["value"]), token.decimals))


def failed(tx: Transaction, row: dict[str, Any]) -> None:
    """The treasury's transfer came to nothing: what was held is the wallet's again."""
    assert give_back(tx, row["reference"])


def take(tx: Transaction, transfer_id: str, amount: int) -> None:
    """Post what was held, in nano-USD: once, however often it is told.

    After a reorganisation it may have been given back before; then it is taken from the balance, and what that has no more is
    the operator's loss.
    """
    made = transfers.find(tx, transfer_id)
    assert made is not None, f"{transfer_id} was never held"
    if made.state == "pending":
        transfers.capture(tx, transfer_id, amount)
        return
    returns, revivals = _rounds(tx, transfer_id, made)
    if _is_out(made, returns, revivals):
        return
    lost = amount - transfers.balance(tx, made.debit).available
    if lost > 0:
        _post(tx, f"loss:{transfer_id}:{revivals}", _variance(made), made.debit, lost, made.reference)
    _post(tx, f"revived:{transfer_id}:{revivals}", made.debit, made.credit, amount, made.reference)


def give_back(tx: Transaction, transfer_id: str) -> bool:
    """Undo what was held, or was posted before a reorganisation: once, however often it is told. False if there is no such
    transfer."""
    made = transfers.find(tx, transfer_id)
    if made is None:
        return False
    if made.state == "pending":
        transfers.void(tx, transfer_id)
        return True
    returns, revivals = _rounds(tx, transfer_id, made)
    if not _is_out(made, returns, revivals):
        return True
    before = None if revivals == 0 else f"{transfer_id}:{revivals - 1}"
    revived = None if before is None else transfers.find(tx, f"revived:{before}")
    amount = made.posted_amount if revived is None else revived.amount
    assert amount is not None
    _post(tx, f"returned:{transfer_id}:{returns}", made.credit, made.debit, amount, made.reference)
    lost = None if before is None else transfers.find(tx, f"loss:{before}")
    if lost is not None:
        _post(tx, f"made-good:{before}", made.debit, _variance(made), lost.amount, made.reference)
    return True


def _rounds(tx: Transaction, transfer_id: str, made: transfers.Transfer) -> tuple[int, int]:
    """How often it was given back after it was posted, and posted after it was given back."""
    returns, revivals = (
        transfers.count(tx, made.reference, f"{kind}:{transfer_id}") for kind in ("returned", "revived")
    )
    return returns, revivals


def _is_out(made: transfers.Transfer, returns: int, revivals: int) -> bool:
    """Whether the money has left by now, of a hold that has ended."""
    return returns == revivals if made.state == "posted" else revivals == returns + 1


def _variance(made: transfers.Transfer) -> str:
    return account_id("variance", made.debit.rpartition("@")[2])


def _post(tx: Transaction, transfer_id: str, debit: str, credit: str, amount: int, reference: str) -> None:
    transfers.post(tx, id=transfer_id, debit=debit, credit=credit, amount=amount, reference=reference)
