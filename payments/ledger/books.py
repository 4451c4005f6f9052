"""The proof that the books are right, from the transfers up. `payments.reconciliation` compares them with the chain."""

from __future__ import annotations

from dataclasses import dataclass

from payments.ledger.accounts import OVERDRAFT_KINDS
from payments.store import Transaction


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the books that must not be. `subject` is the asset, account, transfer or receipt concerned."""

    code: str
    subject: str
    message: str


_SUMS = "SELECT asset, SUM(balance) FROM ledger_account GROUP BY asset HAVING SUM(balance) <> 0"
# One pass over the transfers: each counts once as a debit and once as a credit.
_REBUILT = """
    SELECT account.id, account.kind, account.balance, account.pending_out, account.overdraft,
           COALESCE(SUM(side.posted), 0), COALESCE(SUM(side.pending), 0)
    FROM ledger_account AS account
    LEFT JOIN (
        SELECT debit_account AS id, -COALESCE(posted_amount, 0) AS posted,
               CASE WHEN state = 'pending' THEN amount ELSE 0 END AS pending
        FROM ledger_transfer
        UNION ALL
        SELECT credit_account, COALESCE(posted_amount, 0), 0 FROM ledger_transfer
    ) AS side ON side.id = account.id
    GROUP BY account.id, account.kind, account.balance, account.pending_out, account.overdraft
    ORDER BY account.id
"""
_ACROSS_ASSETS = """
    SELECT transfer.id FROM ledger_transfer AS transfer
    JOIN ledger_account AS debit ON debit.id = transfer.debit_account
    JOIN ledger_account AS credit ON credit.id = transfer.credit_account
    WHERE debit.asset <> credit.asset
"""
# A hold that nobody can end any more would keep its payer's money for good.
_ORPHANED = """
    SELECT transfer.id, COALESCE(receipt.state, 'missing') FROM ledger_transfer AS transfer
    LEFT JOIN receipt ON receipt.id = transfer.reference
    WHERE transfer.state = 'pending' AND transfer.id LIKE 'hold:%' AND COALESCE(receipt.state, 'missing') <> 'open'
"""
# What comes from a channel as a top-up is paid and not charged, and posted by the hold just so.
_CHARGES = """
    SELECT receipt.id, receipt.charged_nano_usd, COALESCE(SUM(transfer.posted_amount), 0) FROM receipt
    LEFT JOIN ledger_transfer AS transfer ON transfer.reference = receipt.id AND transfer.id LIKE 'hold:%'
    WHERE receipt.state IN ('captured', 'released')
    GROUP BY receipt.id, receipt.charged_nano_usd, receipt.paid_nano_usd, receipt.tender
    HAVING COALESCE(receipt.charged_nano_usd, -1) + CASE WHEN receipt.tender = 'channel' THEN receipt.paid_nano_usd ELSE 0 END
        <> COALESCE(SUM(transfer.posted_amount), 0)
"""
# What a withdrawal says of itself, and what its money does.
# After reorganisations money may have been given back and have left again: see `payments.settlement.payouts`.
_WITHDRAWALS = """
    SELECT id, state, place FROM (
        SELECT withdrawal.id, withdrawal.state, CASE
            WHEN hold.id IS NULL THEN 'nowhere'
            WHEN hold.state = 'pending' THEN 'held'
            WHEN CASE hold.state WHEN 'posted' THEN 1 ELSE 0 END + (
                SELECT COALESCE(SUM(CASE
                    WHEN later.id LIKE 'revived:withdrawal:%' THEN 1
                    WHEN later.id LIKE 'returned:withdrawal:%' THEN -1 ELSE 0 END), 0)
                FROM ledger_transfer AS later WHERE later.reference = withdrawal.id
            ) = 0 THEN 'with the wallet' ELSE 'gone' END AS place
        FROM withdrawal LEFT JOIN ledger_transfer AS hold ON hold.id = 'withdrawal:' || withdrawal.id
    ) AS placed
    WHERE place <> CASE state
        WHEN 'paid' THEN 'gone' WHEN 'failed' THEN 'with the wallet' WHEN 'rejected' THEN 'with the wallet' ELSE 'held' END
"""


def check(tx: Transaction) -> list[Finding]:
    """Everything wrong with the books; empty if they balance.

    Each asset's balances sum to zero; each balance is what the transfers make it, and what is held is what is pending; no
    account but the books' own is below zero; no transfer mixes assets; every pending hold has an open receipt; every closed
    receipt says what its hold posted; a withdrawal's money is where its state says.
    """
    findings = [
        Finding("sum_not_zero", asset, f"the balances in {asset} sum to {total} nano-USD instead of 0")
        for asset, total in tx.execute(_SUMS).fetchall()
    ]
    for account, kind, balance, pending_out, overdraft, posted, pending in tx.execute(_REBUILT).fetchall():
        if balance != posted:
            message = f"the balance is {balance} nano-USD, its transfers make {posted}"
            findings.append(Finding("balance_wrong", account, message))
        if pending_out != pending:
            message = f"{pending_out} nano-USD are held, its pending transfers make {pending}"
            findings.append(Finding("pending_wrong", account, message))
        if bool(overdraft) != (kind in OVERDRAFT_KINDS):
            findings.append(Finding("overdraft_wrong", account, f"overdraft is {bool(overdraft)} for a {kind} account"))
        if not overdraft and not 0 <= pending_out <= balance:
            message = f"{pending_out} of {balance} nano-USD are held: more than there is"
            findings.append(Finding("overdrawn", account, message))
    findings += [
        Finding("assets_mixed", transfer, "the transfer's two accounts are in different assets")
        for (transfer,) in tx.execute(_ACROSS_ASSETS).fetchall()
    ]
    findings += [
        Finding("hold_orphaned", transfer, f"the hold is pending, but its receipt is {state}")
        for transfer, state in tx.execute(_ORPHANED).fetchall()
    ]
    findings += [
        Finding("charge_wrong", receipt, f"the receipt says {charged} nano-USD were charged, its holds posted {posted}")
        for receipt, charged, posted in tx.execute(_CHARGES).fetchall()
    ]
    findings += [
        Finding("withdrawal_wrong", withdrawal, f"it is {state}, but its money is {place}")
        for withdrawal, state, place in tx.execute(_WITHDRAWALS).fetchall()
    ]
    return findings
