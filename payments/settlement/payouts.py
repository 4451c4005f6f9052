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
    transfers.capture(tx, row["reference"], atomic_to_nano_down(int(row["value"]), token.decimals))


def failed(tx: Transaction, row: dict[str, Any]) -> None:
    """The treasury's transfer cannot be mined any more: what was held is the wallet's again.

    After a reorganisation it may have been posted before; then it is given back.
    """
    assert give_back(tx, row["reference"])


def give_back(tx: Transaction, transfer_id: str) -> bool:
    """Undo what was held, or was posted before a reorganisation. False if there is no such transfer."""
    made = transfers.find(tx, transfer_id)
    if made is None:
        return False
    if made.state != "posted":
        transfers.void(tx, transfer_id)
        return True
    assert made.posted_amount is not None
    transfers.post(
        tx,
        id=f"returned:{transfer_id}",
        debit=made.credit,
        credit=made.debit,
        amount=made.posted_amount,
        reference=made.reference,
    )
    return True
