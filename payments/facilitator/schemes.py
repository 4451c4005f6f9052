"""What a facilitator must know of a scheme: how a payment made by it is checked for somebody else's requirement, and settled.

A new scheme is a class of this shape in a module of its own, and an entry in `payments.facilitator.opening`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from payments.chain.networks import Network, Token
from payments.errors import PaymentRefused
from payments.facilitator.wire import FacilitatorCall
from payments.settlement.orders import SettlementOrder


class Facilitated(Protocol):
    """One payment that does for its requirement, as far as that can be told without the chain and the database."""

    @property
    def identity(self) -> str:
        """The canonical name under which it can be settled once, see `Payment.identity`."""

    @property
    def order(self) -> SettlementOrder:
        """What settles it, as far as is known without the chain."""

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """Every contract and calldata by which this very payment may have been settled."""

    @property
    def token(self) -> Token:
        """What it is in."""

    @property
    def refusal(self) -> PaymentRefused | None:
        """Why it is too late for a first settlement, if it is: only an earlier one is found. Its signature is not checked."""

    async def check_chain(self, other_open: Callable[[], int]) -> SettlementOrder:
        """Ask the chain whether it would be settled now, in one round trip (a second one for contract wallets).

        Args:
            other_open: Tells what the payer has under way besides, in nano-USD.

        Returns:
            What settles it.

        Raises:
            PaymentRefused, AllowanceRequired: It would not.
            SettlementUnavailable: The chain cannot be asked.
        """


class FacilitatedScheme(Protocol):
    """One scheme on one network."""

    name: str
    network: Network

    def kinds(self) -> list[dict[str, Any]]:
        """Its members of `kinds` in the answer of `/supported`."""

    def read(self, call: FacilitatorCall, now: int) -> Facilitated:
        """Check a payment offline; `now` in Unix seconds.

        Raises:
            PaymentRefused: It does not pay for the requirement.
            PaymentMalformed: It cannot be a payment.
        """
