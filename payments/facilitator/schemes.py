"""What a facilitator must know of a scheme: how a payment made by it is checked for somebody else's requirement, and settled.

A new scheme is a class of this shape in a module of its own, and an entry in `payments.facilitator.opening`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from payments.chain.networks import Network, Token
from payments.errors import PaymentError, PaymentRefused
from payments.facilitator import records
from payments.facilitator.access import Client
from payments.facilitator.records import Record
from payments.facilitator.wire import FacilitatorCall
from payments.promises import Cover, Earlier
from payments.settlement.orders import SettlementOrder
from payments.settlement.outcomes import SettlementOutcome
from payments.sponsoring.sponsor import Approving

NEVER: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Checked:
    """What would be settled now, by the chain's word."""

    order: SettlementOrder | None
    """None if nothing is to be moved."""
    cover: Cover | None
    """What the payer has and it needs; None if nothing is taken from its balance."""
    extra: dict[str, Any] | None = None
    """What `/verify` says besides."""
    approval: Approving | None = None
    """What has to be brought to the chain before it."""


@dataclass(frozen=True, slots=True)
class Told:
    """What is said of something that is carried out."""

    amount: int
    """Atomic units."""
    extra: dict[str, Any] | None = None


class AlreadyDone(PaymentError):
    """Nothing is left to do: it is as it was asked for."""


class Facilitated(Protocol):
    """One settlement that does for its requirement, as far as that can be told without the chain and the database."""

    @property
    def identity(self) -> str:
        """The canonical name under which it can be settled once, see `Payment.identity`."""

    @property
    def payer(self) -> str:
        """Who is refused after too many reverts, lower-case hex."""

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """Every contract and calldata by which this very payment may have been settled."""

    @property
    def token(self) -> Token:
        """What it is in."""

    @property
    def value(self) -> int | None:
        """What it moves, in atomic units; None if only the chain can tell."""

    @property
    def worth(self) -> int | None:
        """What has to be worth settling, in atomic units; None for what `check_chain` says."""

    @property
    def refusal(self) -> PaymentRefused | None:
        """Why it is too late for a first settlement, if it is: only an earlier one is found. Its signature is not checked."""

    @property
    def once(self) -> bool:
        """Whether its success is told to one call only, because something is sold for it."""

    @property
    def repeats(self) -> frozenset[str]:
        """The states of an earlier settlement under its name after which another one may begin."""

    async def check_chain(self, earlier: Earlier) -> Checked:
        """Ask the chain whether it would be settled now, in one round trip (a second one for contract wallets, and where an
        approval has to go first).

        Args:
            earlier: What its payer has under way already.

        Raises:
            PaymentRefused, AllowanceRequired: It would not.
            AlreadyDone: There is nothing to do.
            SettlementUnavailable: The chain cannot be asked.
        """

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """What the answer of `/settle` says once it is carried out; no outcome if nothing had to be.

        Raises:
            SettlementUnavailable: The chain cannot be asked.
        """


def order_of(
    payment: Facilitated,
    kind: str,
    pay_to: str,
    value: int,
    *,
    reference: str | None = None,
    authorization_nonce: int | None = None,
    valid_before: int = 0,
    call: int = 0,
) -> SettlementOrder:
    """What settles a payment.

    Args:
        payment: Which one.
        kind: See `payments.facilitator.kinds`.
        pay_to: Whom it pays, lower-case hex.
        value: How much, in atomic units.
        reference: What it belongs to, if that is not its identity.
        authorization_nonce: What it uses up, if anything.
        valid_before: When it is too late, in Unix seconds; 0 for never.
        call: Which of the payment's calls makes it now.
    """
    call_to, call_data = payment.calls[call]
    return SettlementOrder(
        id=records.settlement_id(payment.identity),
        kind=kind,
        reference=reference or payment.identity,
        chain_id=payment.token.chain_id,
        token=payment.token.address,
        payer=payment.payer,
        pay_to=pay_to,
        value=value,
        authorization_nonce=authorization_nonce,
        call_to=call_to,
        call_data=call_data,
        valid_before=valid_before,
    )


@dataclass(frozen=True, slots=True)
class Promise:
    """A payment that nothing is settled for by itself, such as a voucher: it is verified only."""

    token: Token
    look: Callable[[], Awaitable[dict[str, Any]]]
    """Asks the chain whether it is good, and tells what `/verify` says besides; errors as for `Facilitated.check_chain`."""


class FacilitatedScheme(Protocol):
    """One scheme on one network."""

    name: str
    network: Network

    def kinds(self) -> list[dict[str, Any]]:
        """Its members of `kinds` in the answer of `/supported`."""

    def verifies(self, call: FacilitatorCall, client: Client, now: int) -> Facilitated | Promise:
        """Check offline what `/verify` is asked about by `client`; `now` in Unix seconds.

        Raises:
            PaymentRefused: It does not pay for the requirement.
            PaymentMalformed: It cannot be a payment.
        """

    def settles(self, call: FacilitatorCall, client: Client, now: int) -> Facilitated:
        """Check offline what `/settle` is asked to do; otherwise as `verifies`."""
