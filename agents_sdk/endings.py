"""What the end of a payment does to the journal: its outcome, what is credit now, and the receipt.

Four ways of paying end in their own ways. An exact payment took the maximum, and what was not used is credit; `upto` took what
the answer cost; a channel counts what it cost; credit is credit less.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from agents_sdk.answers import credited_in
from agents_sdk.channels import book, deposits
from agents_sdk.channels.terms import SCHEME
from agents_sdk.journal import StoredPayment
from agents_sdk.money import nano_to_usd
from agents_sdk.receipts import Ending, amount_of, document_of, settled_in
from agents_sdk.shared import Shared

OnEnd = Callable[[Ending, dict[str, Any]], None]


def scheme_of(payment: StoredPayment) -> str:
    """By which scheme a signed payment pays."""
    assert payment.header is not None
    return str(json.loads(base64.b64decode(payment.header))["accepted"]["scheme"])


class Endings:
    """Writes endings down.

    Args:
        shared: The agent's state.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._journal = shared.journal
        self._payer = shared.wallet.address

    def known(self, payment: StoredPayment, state: str, headers: httpx.Headers, body: bytes) -> None:
        """The gateway said what became of a payment, without an answer to the request.

        Args:
            payment: The payment.
            state: What became of it, as a state of the journal.
            headers: Of what the gateway said.
            body: What it said.
        """
        scheme = scheme_of(payment)
        if scheme == SCHEME:
            self._note_receipt(payment, headers)
            book.close(self._journal, payment, state, 0 if state in ("refused", "credited") else None)
            return
        self._journal.close_payment(payment, state)
        if state == "refused" or scheme == "upto":
            return
        credited = credited_in(body)
        if credited is None and state == "credited":
            credited = payment.amount_nano_usd
        if credited is None:
            self._shared.look_for_credit = True
        else:
            amount = min(credited, payment.amount_nano_usd)
            self._journal.add_credit(self._shared.origin, self._payer, payment.asset, amount)

    def served(self, payment: StoredPayment, headers: httpx.Headers) -> OnEnd:
        """The answer to a payment begins. Returns what is to be called when it is over."""
        if scheme_of(payment) == SCHEME:
            return self._served_through_channel(payment, headers)

        def on_end(ending: Ending, comment: dict[str, Any]) -> None:
            if ending == "broken":
                self._journal.let_go(payment)
                return
            document = document_of(headers, comment)
            charged = amount_of(document["charged_usd"])
            scheme = scheme_of(payment)
            if scheme == "upto":
                document["credited_usd"] = nano_to_usd(0)  # nothing else was taken
            elif charged is None:
                self._shared.look_for_credit = True
            else:
                # A token that takes a fee on its way leaves less credit than the difference: the gateway knows.
                told = amount_of(document.get("credited_usd"))
                unused = max(0, payment.amount_nano_usd - charged)
                unused = unused if told is None else min(told, unused)
                document["credited_usd"] = nano_to_usd(unused)
                self._journal.add_credit(self._shared.origin, self._payer, payment.asset, unused)
            self._journal.close_payment(payment, "answered")
            self._keep_receipt(document, payment.id, scheme, payment.amount_nano_usd, payment.asset)

        return on_end

    def _served_through_channel(self, payment: StoredPayment, headers: httpx.Headers) -> OnEnd:
        deposits.accepted(self._journal, payment)
        told = _told(headers)
        self._note_receipt(payment, headers)

        def on_end(ending: Ending, comment: dict[str, Any]) -> None:
            if ending == "broken":
                self._journal.let_go(payment)
                return
            document = document_of(headers, comment)
            charged = amount_of(document["charged_usd"])
            book.close(self._journal, payment, "answered", charged, told)
            document["credited_usd"] = nano_to_usd(0)
            self._keep_receipt(document, payment.id, SCHEME, payment.amount_nano_usd, payment.asset)

        return on_end

    def _note_receipt(self, payment: StoredPayment, headers: httpx.Headers) -> None:
        receipt_id = headers.get("x-farebox-receipt")
        if receipt_id:
            book.served_as(self._journal, payment, receipt_id[:128])

    def served_on_credit(self, headers: httpx.Headers, maximum_nano_usd: int) -> OnEnd:
        """The same for an answer that is paid from credit."""

        def on_end(ending: Ending, comment: dict[str, Any]) -> None:
            origin, journal = self._shared.origin, self._journal
            document = document_of(headers, comment)
            charged = amount_of(document["charged_usd"])
            amounts = journal.credit(origin, self._payer)
            asset = max(amounts, key=lambda name: amounts[name], default="")
            if charged is None or not asset:
                self._shared.look_for_credit = True
            else:
                journal.add_credit(origin, self._payer, asset, -charged)
            if ending != "broken" or charged is not None:
                receipt_id = f"credit_{hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:20]}"
                self._keep_receipt(document, receipt_id, "credit", maximum_nano_usd, asset)

        return on_end

    def _keep_receipt(self, document: dict[str, Any], reserve_id: str, paid_with: str, quoted: int, asset: str) -> None:
        document["id"] = document.get("id") or reserve_id
        document["quoted_usd"] = document.get("quoted_usd") or nano_to_usd(quoted)
        document |= {"gateway": self._shared.origin, "paid_with": paid_with, "asset": asset}
        self._journal.add_receipt(document["id"], self._payer, document)


def _told(headers: httpx.Headers) -> int | None:
    """What was charged through the channel in all, by the gateway's word."""
    settled = settled_in(headers)
    state = None if settled is None or settled.extra is None else settled.extra.get("channelState")
    charged = state.get("chargedCumulativeAmount") if isinstance(state, dict) else None
    return int(charged) if isinstance(charged, str) and charged.isascii() and charged.isdigit() else None
