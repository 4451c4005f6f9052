"""Wallets that keep a balance here on purpose: whoever tops up, deposits or makes a key of its own.

What a passing payer has left over is sent back to it by itself (`payments.settlement.refunds`); a wallet with an account
decides itself when its money leaves.
"""

from __future__ import annotations

import time

from payments.store import Transaction


def open_account(tx: Transaction, address: str) -> None:
    """Note that a wallet (lower-case hex) keeps its balance. Opening it again changes nothing."""
    assert address == address.lower()
    tx.execute(
        "INSERT INTO wallet_account (address, opened_ms) VALUES (?, ?) ON CONFLICT (address) DO NOTHING",
        (address, time.time_ns() // 1_000_000),
    )


def keeps_balance(tx: Transaction, address: str) -> bool:
    """Whether a wallet keeps its balance."""
    return tx.execute("SELECT 1 FROM wallet_account WHERE address = ?", (address,)).fetchone() is not None
