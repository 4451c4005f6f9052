"""What can be wrong with a payment, as one small tree.

Each error carries what the HTTP surface needs to answer: a status, a stable machine code, and a sentence that says what was
wrong and what to do. `gateway.api.errors` turns them into bodies; nothing else decides a status.
"""

from __future__ import annotations


class PaymentError(Exception):
    """Base of everything that a payer can be told about a payment."""

    status = 402

    def __init__(self, code: str, message: str) -> None:
        """Keep the code (snake_case, stable) and the message for the payer."""
        super().__init__(message)
        self.code = code
        self.message = message


class PaymentMalformed(PaymentError):
    """The header is not a payment at all: base64, JSON, schema or number spelling. 400, and no new quote."""

    status = 400


class PaymentRefused(PaymentError):
    """A well-formed payment that does not pay for this request. 402 with a fresh quote that says why."""


class SchemeRefused(PaymentRefused):
    """This payer is to pay by another scheme; the fresh quote does not offer this one again."""

    def __init__(self, code: str, message: str, scheme: str) -> None:
        """Also name the scheme."""
        super().__init__(code, message)
        self.scheme = scheme


class AllowanceRequired(PaymentError):
    """The payer has not approved Permit2 for the token yet. 412, with what to do."""

    status = 412


class PaymentConflict(PaymentError):
    """The authorization is already bound to another payload or request, or its first use is still under way. 409."""

    status = 409

    def __init__(self, code: str, message: str, receipt_id: str | None = None) -> None:
        """Also name the receipt of the first use, where the payer may know it."""
        super().__init__(code, message)
        self.receipt_id = receipt_id


class SettlementPending(PaymentError):
    """The transfer is broadcast and its fate unknown. 202 with a place to poll: unknown is not failed."""

    status = 202

    def __init__(self, code: str, message: str, receipt_id: str) -> None:
        """Name the receipt to poll."""
        super().__init__(code, message)
        self.receipt_id = receipt_id


class SettlementUnavailable(PaymentError):
    """The chain cannot be asked or used right now; nothing was taken. 503, send the same payment again."""

    status = 503
