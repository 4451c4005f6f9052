"""The price of one request before it is made, and the short token that carries it to the payer and back.

A quote touches no database and no chain. Its token holds the quote id, the expiry and the route; the amount and the request's
digest are recomputed when it comes back and are covered by the token's HMAC, so any replica can verify it without state.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from payments.money import divide_up

CHARGE_UNIT_NANO_USD = 1_000
"""Maxima are whole micro-dollars, so that they are exact in every token and can be recomputed from a payment's amount."""


@dataclass(frozen=True, slots=True)
class QuoteItem:
    """One line of a quote: ``inference`` or ``network_fee``."""

    name: str
    amount_nano_usd: int


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request may cost at most, for whom it is good, and until when.

    `route` lists candidate ids in the order of preference. `request_digest` is SHA-256 over method, path and raw body.
    """

    id: str
    items: tuple[QuoteItem, ...]
    maximum_nano_usd: int
    route: tuple[str, ...]
    request_digest: bytes
    expires_at: int
    """Unix seconds."""

    @property
    def network_fee_nano_usd(self) -> int:
        """The part that is charged whatever was used."""
        return sum(item.amount_nano_usd for item in self.items if item.name == "network_fee")


def make_quote(
    *,
    inference_nano_usd: int,
    network_fee_nano_usd: int,
    minimum_nano_usd: int,
    route: tuple[str, ...],
    request_digest: bytes,
    expires_at: int,
) -> Quote:
    """Itemise and total a quote; the total rounds up to whole micro-dollars and reaches the minimum charge."""
    total = max(inference_nano_usd + network_fee_nano_usd, minimum_nano_usd, CHARGE_UNIT_NANO_USD)
    items = [QuoteItem("inference", inference_nano_usd)]
    if network_fee_nano_usd:
        items.append(QuoteItem("network_fee", network_fee_nano_usd))
    return Quote(
        id=f"quote_{secrets.token_hex(10)}",
        items=tuple(items),
        maximum_nano_usd=divide_up(total, CHARGE_UNIT_NANO_USD) * CHARGE_UNIT_NANO_USD,
        route=route,
        request_digest=request_digest,
        expires_at=expires_at,
    )
