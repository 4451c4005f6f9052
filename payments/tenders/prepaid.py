"""Paying from the balance that a wallet has with us: deposits, top-ups, and what is left of its on-chain payments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from payments import receipts
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.accounts import payer_account
from payments.ledger.transfers import InsufficientFunds
from payments.money import nano_to_usd
from payments.quotes import Quote
from payments.store import Store, Transaction
from payments.tenders import closing
from payments.tenders.closing import LedgerHold, Use


class PrepaidTender:
    """A wallet's balance.

    Args:
        store: The database.
        address: The wallet that signed in, lower-case hex.
        assets: The ledger's names of the tokens whose credit may be spent, in the order of preference. One request is paid
            in one of them: a USDT is not a USDC.
        key_id: The wallet's API key that spends it, if it is one; the receipt names it.
    """

    def __init__(self, store: Store, address: str, assets: Sequence[str], key_id: str | None = None) -> None:
        assert address == address.lower()
        self._store = store
        self._address = address
        self._assets = tuple(assets)
        self._key = {} if key_id is None else {"api_key": key_id}

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> LedgerHold:
        """Hold the quoted maximum in the first token that has as much.

        Raises:
            PaymentRefused: ``insufficient_credit``: no token's credit suffices.
        """
        amount = quote.maximum_nano_usd
        details = details | self._key
        use = await self._store.write(lambda tx: self._hold(tx, amount, details), if_abandoned=_abandon)
        return LedgerHold(self._store, use, self._address, amount)

    def _hold(self, tx: Transaction, amount: int, details: dict[str, Any]) -> Use:
        receipt_id = receipts.new_receipt_id()
        for asset in self._assets:
            use = Use(receipt_id, asset, details)
            try:
                closing.place(tx, use, payer_account(self._address, asset), amount)
            except InsufficientFunds:
                continue
            receipts.open_receipt(
                tx,
                id=receipt_id,
                tender="prepaid",
                payer=self._address,
                asset=asset,
                quoted_nano_usd=amount,
                details=details,
            )
            return use
        credit = [transfers.balance(tx, payer_account(self._address, asset)).available for asset in self._assets]
        raise PaymentRefused(
            "insufficient_credit",
            f"this request may cost up to {nano_to_usd(amount)} USD and your wallet has a credit of"
            f" {nano_to_usd(max(credit, default=0))} USD in one token; pay with the request instead",
        )


def _abandon(tx: Transaction, use: Use) -> None:
    closing.release_if_open(tx, use, closing.because("caller_gone"))
