"""A tender is how one caller pays for one request: authorize, then capture or release.

`gateway.flow` knows only these two protocols. Everything that differs between a signed payment, a prepaid balance and an
API key is behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from payments.quotes import Quote
from payments.store import Unit


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
    """Money set aside for one request. Exactly one of `capture` and `release` ends it; both are idempotent."""

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

    async def capture(self, amount_nano_usd: int, outcome: Outcome, *, also: Unit[None] | None = None) -> Charge:
        """Charge `amount_nano_usd` (more than the maximum is the operator's loss, booked as variance), free the rest and
        close the receipt, in one durable step, of which `also` is part (the gateway keeps the answer for a replay there)."""

    async def release(self, outcome: Outcome) -> Charge:
        """Charge nothing: free the hold, close the receipt."""

    async def interrupt(self, outcome: Outcome) -> None:
        """The request ended without an answer and without a verdict (the caller hung up, the process stops): free the hold,
        leave the receipt `interrupted`. The same on-chain payment sent again resumes from the credit. Safe before `ready`:
        a transfer that is mined later becomes credit."""

    def payment_response(self) -> dict[str, Any] | None:
        """What the `PAYMENT-RESPONSE` header says, decoded; None for tenders that are not x402."""


class Tender(Protocol):
    """How one caller pays for one request."""

    async def authorize(self, quote: Quote, details: dict[str, Any]) -> Hold:
        """Set aside up to `quote.maximum_nano_usd` and open a receipt with `details`.

        Raises:
            PaymentError: Anything that the payer must be told, see `payments.errors`.
        """
