"""Paying with an API key, which draws on its organisation's pool."""

from __future__ import annotations

from typing import Any

from payments import receipts
from payments.accounts import POOL_ASSET, pool_account
from payments.errors import PaymentRefused
from payments.ledger import transfers
from payments.ledger.transfers import InsufficientFunds
from payments.money import nano_to_usd
from payments.quotes import Quote
from payments.store import Store, Transaction
from payments.tenders import closing
from payments.tenders.closing import LedgerHold, Use


class AccountTender:
    """An API key.

    Args:
        store: The database.
        key_id: The key's id, which the receipt names.
        pool: The pool that it draws on.
    """

    def __init__(self, store: Store, key_id: str, pool: str) -> None:
        self._store = store
        self._payer = f"key:{key_id}"
        self._pool = pool

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> LedgerHold:
        """Hold the quoted maximum in the pool.

        Raises:
            PaymentRefused: ``insufficient_pool``: less is available.
        """
        amount = quote.maximum_nano_usd
        use = await self._store.write(lambda tx: self._hold(tx, amount, details), if_abandoned=_abandon)
        return LedgerHold(self._store, use, self._payer, amount)

    def _hold(self, tx: Transaction, amount: int, details: dict[str, Any]) -> Use:
        use = Use(receipts.new_receipt_id(), POOL_ASSET, details)
        pool = pool_account(self._pool)
        try:
            closing.place(tx, use, pool, amount)
        except InsufficientFunds:
            available = transfers.balance(tx, pool).available
            raise PaymentRefused(
                "insufficient_pool",
                f"this request may cost up to {nano_to_usd(amount)} USD and the pool {self._pool!r} has"
                f" {nano_to_usd(available)} USD left; ask its owner to fund it, or lower max_tokens",
            ) from None
        receipts.open_receipt(
            tx,
            id=use.receipt_id,
            tender="account",
            payer=self._payer,
            asset=POOL_ASSET,
            quoted_nano_usd=amount,
            details=details,
        )
        return use


def _abandon(tx: Transaction, use: Use) -> None:
    closing.release_if_open(tx, use, closing.because("caller_gone"))
