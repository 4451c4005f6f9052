"""Mutations of the tenders and the ledger: a credit too many, a hold forgotten, a limit not looked at."""

from __future__ import annotations

from mutations.mutation import Mutation

MACHINE = ("tests/payments/test_tenders_machine.py",)
DEPOSITS = ("tests/payments/test_deposits.py",)
LEDGER = ("tests/payments/test_ledger.py",)

_EVIDENCE, _CLOSING = "payments/tenders/evidence.py", "payments/tenders/closing.py"
_PLEDGES, _UPTO = "payments/tenders/pledges.py", "payments/tenders/upto_settlement.py"
_AUTHORIZATIONS, _TRANSFERS = "payments/tenders/authorizations.py", "payments/ledger/transfers.py"
_MONEY, _PAYOUTS = "payments/money.py", "payments/settlement/payouts.py"

TENDERS = (
    Mutation(
        "what a reorganisation took away stays credited",
        _EVIDENCE,
        '        _take_back(tx, row["id"], found)\n',
        "        pass\n",
        ("tests/payments/test_exact_arrivals.py",),
    ),
    Mutation(
        "a payment credits what was quoted instead of what arrived",
        _EVIDENCE,
        "_credit(tx, row, found, received_nano_usd)",
        "_credit(tx, row, found, min(found.quoted_nano_usd, received_nano_usd))",
        MACHINE,
    ),
    Mutation(
        "an interrupted request's hold is not voided",
        _CLOSING,
        "        void(tx, use.hold_id)\n",
        "        pass\n",
        MACHINE,
    ),
    Mutation(
        "a capture takes all that is held",
        _CLOSING,
        "    transfers.capture(tx, use.hold_id, charged)\n",
        "    transfers.capture(tx, use.hold_id, held.amount)\n",
        MACHINE,
    ),
    Mutation(
        "a capture charges more than was held",
        _CLOSING,
        "    charged = min(amount_nano_usd, held.amount)\n",
        "    charged = amount_nano_usd\n",
        MACHINE,
    ),
    Mutation(
        "what a hold has paid is charged again when money that was gone arrives",
        _CLOSING,
        " - transfers.moved(tx, receipt_id, account, revenue)",
        "",
        ("tests/payments/test_hang_ups.py",),
    ),
    Mutation(
        "what a use leaves of a payment that is gone is its payer's",
        "payments/tenders/losses.py",
        "    if freed_nano_usd:",
        "    if False:",
        ("tests/payments/test_hang_ups.py",),
    ),
    Mutation(
        "an overrun is nobody's loss",
        _CLOSING,
        "    if overrun:\n        transfers.post(",
        "    if False:\n        transfers.post(",
        ("tests/payments/test_tenders.py",),
    ),
    Mutation(
        "a second use of a payment begins another request",
        _AUTHORIZATIONS,
        '        return AlreadyUsed(receipt_id, "in_progress")\n    if receipt_state != "interrupted":',
        '        tx.execute("UPDATE receipt SET state=\'interrupted\'")\n    elif receipt_state != "interrupted":',
        ("tests/payments/test_exact_again.py", *MACHINE),
    ),
    Mutation(
        "a payment serves another request",
        _AUTHORIZATIONS,
        "    if bytes(first_digest) != digest:\n        # The first",
        "    if False:\n        # The first",
        ("tests/payments/test_exact_again.py",),
    ),
    Mutation(
        "a resumed request takes credit that is not held",
        _AUTHORIZATIONS,
        "        closing.place(tx, use, payer_account(payer, asset), amount)\n",
        "        pass\n",
        ("tests/payments/test_exact_again.py",),
    ),
    Mutation(
        "exposure by upto is not looked at",
        _PLEDGES,
        "    if exposed + quoted_nano_usd > exposure_max_nano_usd:",
        "    if False:",
        MACHINE,
    ),
    Mutation(
        "what a reorganisation took away exposes nothing",
        "payments/promises.py",
        "receipt.paid_nano_usd, 0\n",
        "0, 0\n",
        ("tests/payments/test_promises.py",),
    ),
    Mutation(
        "debts by upto are not looked at",
        _PLEDGES,
        "    _check_debts(tx, payer)\n",
        "",
        ("tests/payments/test_upto_losses.py",),
    ),
    Mutation(
        "a debt by upto that is owed again is forgiven",
        _PLEDGES,
        'id=transfers.next_id(tx, receipt_id, f"repay:{receipt_id}")',
        'id=f"repay:{receipt_id}"',
        ("tests/payments/test_upto_losses.py",),
    ),
    Mutation(
        "a captured pledge is not earned",
        _PLEDGES,
        "        transfers.post(tx, id=use.hold_id, debit=owing, credit=revenue, amount=charged, reference=use.receipt_id)\n",
        "        pass\n",
        MACHINE,
    ),
    Mutation(
        "a released pledge can be used again",
        _PLEDGES,
        '    authorizations.mark(tx, use.receipt_id, "burnt")\n    return Charge(use.receipt_id, 0, 0)',
        "    return Charge(use.receipt_id, 0, 0)",
        ("tests/payments/test_upto.py", *MACHINE),
    ),
    Mutation(
        "a captured pledge is settled twice in the books",
        _UPTO,
        '    if state == "paid":\n            return\n',
        "    if False:\n            return\n",
        MACHINE,
    ),
    Mutation(
        "what a transfer of upto brings beyond the price is kept",
        _UPTO,
        '        _post(tx, f"excess:{row[\'id\']}{turn}", source, _payer(receipt), received - covered, row["id"])\n',
        '        _post(tx, f"excess:{row[\'id\']}{turn}", source, variance, received - covered, row["id"])\n',
        MACHINE,
    ),
    Mutation(
        "an answer by upto that was never paid is no loss",
        _UPTO,
        '        _post(tx, f"loss:{row[\'id\']}{turn}", variance, receivable, receipt.charged_nano_usd, row["id"])\n',
        "        del turn\n",
        MACHINE,
    ),
    Mutation(
        "a loss is not made good when the money comes after all",
        _UPTO,
        '        if state in ("defaulted", "repaid"):',
        "        if False:",
        ("tests/payments/test_upto_losses.py",),
    ),
    Mutation(
        "what was repaid from the balance is kept when the money comes after all",
        _UPTO,
        '        if state == "repaid":\n',
        "        if False:\n",
        ("tests/payments/test_upto_losses.py",),
    ),
    Mutation(
        "what is paid rounds down",
        _MONEY,
        "    return divide_up(amount_nano_usd,",
        "    return (amount_nano_usd) // (",
        MACHINE,
    ),
    Mutation(
        "a failed withdrawal keeps the money",
        _PAYOUTS,
        "        transfers.void(tx, transfer_id)\n        return True\n",
        "        return True\n",
        ("tests/payments/test_withdrawals.py",),
    ),
    Mutation(
        "a withdrawal that failed after it was paid keeps its fee",
        "payments/withdrawals.py",
        '    payouts.give_back(tx, _fee_id(row["id"]))\n',
        "",
        ("tests/payments/test_withdrawals.py",),
    ),
    # --- deposits -----------------------------------------------------------------------------------------------------
    Mutation(
        "what lay at an address before it was asked for is lost in a reorganisation",
        "payments/deposits.py",
        "seen.block_number - REORG_BLOCKS - 1",
        "seen.block_number",
        DEPOSITS,
    ),
    Mutation(
        "what lay at an address is credited once more when its logs are read",
        "payments/deposits.py",
        'held[movement.token] -= movement.value if movement.direction == "in" else -movement.value',
        "del movement",
        DEPOSITS,
    ),
    Mutation(
        "a sweep that a check of the books saw first stops the reading of deposits",
        "payments/forwarders.py",
        "taken=seen is not None",
        "taken=False",
        DEPOSITS,
    ),
    # --- the ledger ---------------------------------------------------------------------------------------------------
    Mutation(
        "a debit does not look at the balance",
        _TRANSFERS,
        '"UPDATE ledger_account SET balance = balance - ? WHERE id = ? AND (overdraft OR balance - pending_out >= ?)"',
        '"UPDATE ledger_account SET balance = balance - ? WHERE id = ? AND (overdraft OR ? > 0)"',
        LEDGER,
    ),
    Mutation(
        "a hold does not look at other holds",
        _TRANSFERS,
        '" WHERE id = ? AND (overdraft OR balance - pending_out >= ?) RETURNING id"\n)\n_UNRESERVE',
        '" WHERE id = ? AND (overdraft OR balance >= ?) RETURNING id"\n)\n_UNRESERVE',
        LEDGER,
    ),
    Mutation(
        "a transfer that was made before is made again",
        _TRANSFERS,
        "        _apply(tx, undo, (amount, debit))\n",
        "        pass\n",
        LEDGER,
    ),
    Mutation(
        "a transfer made again with other content passes",
        _TRANSFERS,
        "    if not same_kind or (",
        "    if False and (",
        LEDGER,
    ),
    Mutation(
        "a capture leaves the rest held",
        _TRANSFERS,
        "    _apply(tx, _TAKE_RESERVED, (amount, held, debit))\n",
        "    _apply(tx, _TAKE_RESERVED, (amount, amount, debit))\n",
        LEDGER,
    ),
    Mutation(
        "a hold that has ended can be ended again",
        _TRANSFERS,
        "\" WHERE id = ? AND state = 'pending' AND amount >= ? RETURNING",
        '" WHERE id = ? AND amount >= ? RETURNING',
        LEDGER,
    ),
)
