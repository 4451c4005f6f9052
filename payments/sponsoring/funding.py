"""The coin that a payer is given for its approval: an order of the settlement engine, like everything else that leaves us."""

from __future__ import annotations

from typing import Any

from payments.chain.logs import Log
from payments.chain.networks import NOBODY
from payments.chain.signers import WEI_PER_GWEI
from payments.ledger import transfers
from payments.ledger.accounts import account_id, native_asset
from payments.money import divide_up
from payments.settlement.orders import NO_LOG, Evidence, Kind, NoEvidence, Search, SettlementOrder
from payments.store import Transaction

KIND = "approval_funding"
GAS = 30_000
"""An account without code takes 21,000."""

_SIGNER = (
    "SELECT chain_transaction.signer FROM settlement JOIN chain_transaction ON chain_transaction.id = settlement.transaction_id"
    " WHERE settlement.id = ?"
)


class CoinProof:
    """A transfer of coin leaves no log: our own transaction that did not revert is the evidence."""

    def of_call(self, order: SettlementOrder, receipt: dict[str, Any], logs: list[Log]) -> Evidence | None:
        """See `payments.settlement.orders.Proof`."""
        return Evidence(
            transaction_hash=receipt["transactionHash"],
            block_number=int(receipt["blockNumber"], 16),
            block_hash=receipt["blockHash"],
            transfer_log_index=NO_LOG,
            received_value=order.value,
        )

    async def search(self, order: SettlementOrder, where: Search) -> Evidence | NoEvidence:
        """See `payments.settlement.orders.Proof`. Nobody else gives in our name."""
        return NoEvidence(nonce_consumed=False)


def kind() -> Kind:
    """How the settlement engine carries it: any signer gives of its own coin."""
    return Kind(CoinProof(), _paid, _failed, lambda _: GAS)


def order(approval: str, chain_id: int, payer: str, wei: int) -> SettlementOrder:
    """To give `wei` to `payer` (lower-case hex) for an approval; the same approval is the same order."""
    return SettlementOrder(
        id=f"fund:{approval}",
        kind=KIND,
        reference=approval,
        chain_id=chain_id,
        token=NOBODY,
        payer=NOBODY,
        pay_to=payer,
        value=wei,
        authorization_nonce=None,
        call_to=payer,
        call_data=b"",
        valid_before=0,
    )


def _paid(tx: Transaction, row: dict[str, Any]) -> None:
    """It is gas like any other."""
    signer, gas = _accounts(tx, row)
    booked = _booked(tx, row)
    if booked is not None and booked.debit == signer:
        return
    # A reorganisation has made another signer's the one that is in the chain.
    _failed(tx, row)
    amount, name = divide_up(int(row["value"]), WEI_PER_GWEI), transfers.next_id(tx, row["id"], row["id"])
    transfers.post(tx, id=name, debit=signer, credit=gas, amount=amount, reference=row["id"])


def _failed(tx: Transaction, row: dict[str, Any]) -> None:
    """After a reorganisation it may have been paid, and be so no more."""
    booked = _booked(tx, row)
    if booked is not None:
        name = transfers.next_id(tx, row["id"], f"un{row['id']}")
        transfers.post(tx, id=name, debit=booked.credit, credit=booked.debit, amount=booked.amount, reference=row["id"])


def _booked(tx: Transaction, row: dict[str, Any]) -> transfers.Transfer | None:
    """How it is booked now; None if it is not, or is not any more."""
    taken_back = transfers.count(tx, row["id"], f"un{row['id']}")
    return transfers.find(tx, f"{row['id']}:{taken_back}" if taken_back else row["id"])


def _accounts(tx: Transaction, row: dict[str, Any]) -> tuple[str, str]:
    asset = native_asset(row["chain_id"])
    signer = tx.execute(_SIGNER, (row["id"],)).fetchone()[0]
    return account_id("signer", asset, signer), account_id("gas", asset)
