"""A tender is how one caller pays for one request: authorize, then capture or release.

`gateway.flow` knows only these two protocols. Everything that differs between a signed payment, a prepaid balance and an
API key is behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from payments.errors import PaymentError
from payments.quotes import Quote
from payments.store import Transaction

Also = Callable[[Transaction], object]
"""Something to be written in the same durable step."""


class HoldEnded(PaymentError):
    """The hold was ended in another way before, or there is nothing to capture yet: mostly because this process was stopped
    for so long that another one took it for dead.

    503. The same request again is safe: a payment finds its own first use, and what an account or a balance held is free again.
    """

    status = 503

    def __init__(self, receipt_id: str, why: str) -> None:
        """Name the receipt, and say for the log what is wrong with the hold."""
        super().__init__(
            "request_interrupted",
            "the work on this request was given up, or taken up elsewhere, because this instance was away for too long; send"
            f" the same request again, with the same payment: nothing is charged twice ({why})",
        )
        self.receipt_id = receipt_id


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the receipt keeps of how a request went. No content."""

    details: dict[str, Any] = field(default_factory=dict)
    """JSON-able: model, provider, strategy, attempts, usage, finish, reason."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a closed hold came to, in nano-USD."""

    receipt_id: str
    charged_nano_usd: int
    credited_nano_usd: int
    """What went back: to the payer's balance for an on-chain payment, freed from the hold otherwise."""
    transaction_hash: str | None = None


class Hold(Protocol):
    """Money set aside for one request. Exactly one of `capture`, `release` and `interrupt` ends it.

    Each is idempotent. What comes after another one raises `HoldEnded`, except that `interrupt` then does nothing: it is what
    one calls when one does not know how far things have come.
    """

    receipt_id: str
    payer: str
    asset: str
    maximum_nano_usd: int
    may_start_early: bool
    """Whether the inference may run before `ready` returns; its output is withheld until then all the same."""

    async def ready(self) -> None:
        """Return once the money is certain (an on-chain transfer is mined and in the ledger).

        Raises:
            PaymentRefused: The transfer failed; nothing was taken and nothing may be shown.
            SettlementPending: Its fate is still unknown after the configured wait.
        """

    async def capture(self, amount_nano_usd: int, outcome: Outcome, also: Also | None = None) -> Charge:
        """Charge what was used, free the rest and close the receipt, in one durable step.

        Args:
            amount_nano_usd: What the request cost. What exceeds the hold is the operator's loss, booked as variance.
            outcome: What the receipt keeps.
            also: Something else to write in the same step.

        Raises:
            HoldEnded: It was released or interrupted before, or its money has not arrived yet.
        """

    async def release(self, outcome: Outcome, also: Also | None = None) -> Charge:
        """Charge nothing: free the hold, close the receipt.

        Raises:
            HoldEnded: It was captured or interrupted before.
        """

    async def interrupt(self, outcome: Outcome, spent_nano_usd: int = 0) -> None:
        """Give up before there is anything to tell. The money is free; where the tender knows a second use of the same payment,
        that use takes the request up again.

        Args:
            outcome: What the receipt keeps.
            spent_nano_usd: What it has cost all the same, because the caller did not wait: charged, at most what is held.
        """

    def payment_response(self, charge_nano_usd: int | None = None) -> dict[str, Any] | None:
        """What the `PAYMENT-RESPONSE` header says, decoded; None for tenders that are not x402, and while nothing is known.

        Args:
            charge_nano_usd: What is going to be captured, where that is known before the answer begins.
        """


class Tender(Protocol):
    """How one caller pays for one request."""

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> Hold:
        """Set aside up to `quote.maximum_nano_usd` and open a receipt with `details`.

        Raises:
            PaymentError: Anything that the payer must be told, see `payments.errors`.
        """
