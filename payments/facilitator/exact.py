"""The scheme `exact` for others: a signed transfer to whoever the resource server names, over EIP-3009 and Permit2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from payments.chain.networks import Network, Token
from payments.chain.transactions import settle_call
from payments.errors import PaymentRefused
from payments.facilitator.records import KIND, settlement_id
from payments.facilitator.wire import FacilitatorCall
from payments.settlement.orders import SettlementOrder
from payments.verification import checks
from payments.verification.chain_state import ChainStates
from payments.verification.permits import check_permit
from payments.verification.wallet_signatures import check_factory
from payments.x402.extensions import eip2612
from payments.x402.requirements import Requirement
from payments.x402.wire import Payment, Permit2Authorization


@dataclass(frozen=True, slots=True)
class ExactFacilitated:
    """See `payments.facilitator.schemes.Facilitated`."""

    identity: str
    order: SettlementOrder
    token: Token
    refusal: PaymentRefused | None
    payment: Payment
    chain_states: ChainStates
    unproven: PaymentRefused | None
    """Why the signature is bad unless the payer is a contract that takes it."""

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`: a wallet may have been deployed with it."""
        return tuple(settle_call(self.payment, self.token, deploy=deploy) for deploy in (False, True))

    async def check_chain(self, other_open: Callable[[], int]) -> SettlementOrder:
        """See `payments.facilitator.schemes.Facilitated`."""
        has_code = await self.chain_states.check(self.payment, self.token, self.order.pay_to, other_open, self.unproven)
        call_to, call_data = settle_call(self.payment, self.token, deploy=not has_code)
        return replace(self.order, call_to=call_to, call_data=call_data)


class ExactFacilitation:
    """`exact` on one network, in every token that the operator configured there.

    Args:
        network: Where it is.
        chain_states: Judges payments by the chain.
        wallet_factories: Deploy contract wallets that pay before they exist (ERC-6492), in any letter case.
    """

    name = "exact"

    def __init__(self, network: Network, chain_states: ChainStates, wallet_factories: Sequence[str] = ()) -> None:
        self.network = network
        self._chain_states = chain_states
        self._wallet_factories = frozenset(address.lower() for address in wallet_factories)

    def kinds(self) -> list[dict[str, Any]]:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        kinds: list[dict[str, Any]] = [{"x402Version": 2, "scheme": self.name, "network": self.network.caip2}]
        if self.network.v1_name is not None:
            kinds.append({"x402Version": 1, "scheme": self.name, "network": self.network.v1_name})
        return kinds

    def read(self, call: FacilitatorCall, now: int) -> ExactFacilitated:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        payment, requirement = call.payment, call.requirement
        if not isinstance(payment, Payment) or payment.scheme != requirement.scheme:
            raise PaymentRefused("wrong_scheme", f"the payment's scheme must be {requirement.scheme}")
        token = self._token(requirement)
        refusal: PaymentRefused | None = None
        unproven: PaymentRefused | None = None
        try:
            checks.check_offline(payment, requirement, self.network, token, now=now)
        except checks.SignatureUnproven as error:
            check_factory(payment.signature, self._wallet_factories)
            unproven = error
        except PaymentRefused as error:
            # Times pass: whoever settled in time is told of the outcome all the same.
            if error.code != "expired":
                raise
            refusal = error
        if isinstance(payment.authorization, Permit2Authorization):
            permit = eip2612.read(call.document.get("extensions"))
            if permit is not None:
                refusal = refusal or _too_late(permit, payment.authorization, token, now)
                payment = replace(payment, permit=permit)
        identity = payment.identity(self.network.chain_id, token)
        authorization = payment.authorization
        call_to, call_data = settle_call(payment, token)
        order = SettlementOrder(
            id=settlement_id(identity),
            kind=KIND,
            reference=identity,
            chain_id=self.network.chain_id,
            token=token.address,
            payer=authorization.payer,
            pay_to=requirement.pay_to,
            value=authorization.value,
            authorization_nonce=authorization.nonce,
            call_to=call_to,
            call_data=call_data,
            valid_before=authorization.expires_at,
        )
        return ExactFacilitated(identity, order, token, refusal, payment, self._chain_states, unproven)

    def _token(self, requirement: Requirement) -> Token:
        """The token as it is to be moved: any may be moved by Permit2, only some by their own EIP-3009."""
        token = self.network.token_at(requirement.asset)
        if token is None:
            known = ", ".join(known.symbol for known in self.network.tokens)
            raise PaymentRefused("invalid_requirements", f"on {self.network.caip2} these tokens are settled: {known}")
        if requirement.amount == 0:
            raise PaymentRefused("invalid_requirements", "the amount must be more than 0")
        method = requirement.extra.get("assetTransferMethod", "eip3009")
        if method == "permit2":
            return replace(token, transfer_method="permit2")
        if method != "eip3009" or token.transfer_method != "eip3009":
            raise PaymentRefused(
                "invalid_requirements", f"{token.symbol} is settled by {token.transfer_method}, not by {method}"
            )
        for name, ours in (("name", token.domain_name), ("version", token.domain_version)):
            if requirement.extra.get(name, ours) != ours:
                raise PaymentRefused("invalid_requirements", f"extra.{name} of {token.symbol} must be {ours}")
        return token


def _too_late(
    permit: eip2612.Eip2612Permit, authorization: Permit2Authorization, token: Token, now: int
) -> PaymentRefused | None:
    """Check a permit; the refusal if all that is wrong with it is its age."""
    try:
        check_permit(permit, authorization, token, now=now)
    except PaymentRefused as error:
        if error.code != "eip2612_deadline_expired":
            raise
        return error
    return None
