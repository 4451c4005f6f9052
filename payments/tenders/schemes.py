"""A scheme is one way of x402 to pay on one network: what it offers, and the tender that a payment made by it is.

A new scheme is a class of this shape in a module of its own, and an entry in the list of the network's schemes.
"""

from __future__ import annotations

from typing import Protocol

from payments.chain.networks import Network, Token
from payments.errors import PaymentRefused
from payments.tenders.authorizations import AlreadyUsed
from payments.tenders.base import Tender
from payments.x402.requirements import Requirement
from payments.x402.wire import PaymentHeader


class Scheme(Protocol):
    """One x402 scheme on one network."""

    name: str
    """As in a requirement: ``exact``, ``upto``, ``batch-settlement``."""
    network: Network
    tokens: tuple[Token, ...]
    """What it takes, the operator's first choice first."""

    def requirement(self, token: Token, amount_nano_usd: int, max_timeout_s: int) -> Requirement:
        """The offer to pay up to `amount_nano_usd` in one of `tokens`, by an authorization good for `max_timeout_s`.

        The same arguments give the same requirement on every replica: a payment is checked against it.
        """

    def tender(
        self,
        payment: PaymentHeader,
        token: Token,
        requirement: Requirement,
        request_digest: bytes,
        now: int,
        refusal: PaymentRefused | None = None,
        *,
        tops_up: bool = False,
    ) -> Tender:
        """What a payment is worth, as far as that can be told without the chain and the database.

        Args:
            payment: Decoded; its scheme is `name`.
            token: What it is in, one of `tokens`.
            requirement: Our own, for what the request costs.
            request_digest: Of the request that it came with.
            now: Unix seconds.
            refusal: Why it is too late for a first use, if it is: then only an earlier use is found.
            tops_up: It becomes its payer's balance, whole: all that `requirement` asks for is taken, and its hold captures 0.

        Raises:
            PaymentRefused: It does not pay for this.
            PaymentMalformed: It cannot be a payment.
        """

    async def first_outcome(self, payment: PaymentHeader, token: Token, request_digest: bytes) -> AlreadyUsed | None:
        """What became of a payment that was used before for this very request; None if it was not, or may be tried again."""

    async def use_ended(self, receipt_id: str, timeout_s: float) -> bool:
        """Wait until nobody works on a receipt. False if somebody still does after `timeout_s`."""
