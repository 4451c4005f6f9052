"""A signed transfer from a payer to whoever a resource server names: what `exact` and `upto` have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace

from payments.chain.networks import Network, Token
from payments.chain.transactions import settle_call
from payments.errors import AllowanceRequired, PaymentRefused
from payments.facilitator import records
from payments.facilitator.records import Record
from payments.facilitator.schemes import NEVER, Checked, Told
from payments.promises import Earlier
from payments.settlement.orders import SettlementOrder
from payments.settlement.outcomes import SettlementOutcome
from payments.sponsoring.sponsor import Approving, Sponsor
from payments.verification.chain_state import ChainStates
from payments.x402.requirements import Requirement
from payments.x402.wire import Payment


@dataclass(frozen=True, slots=True)
class Transfer:
    """See `payments.facilitator.schemes.Facilitated`."""

    kind: str
    """Of its settlement."""
    payment: Payment
    token: Token
    value: int
    """What is taken, in atomic units; 0 only of `upto`."""
    refusal: PaymentRefused | None
    unproven: PaymentRefused | None
    """Why the signature is bad unless the payer is a contract that takes it."""
    chain_states: ChainStates
    sponsor: Sponsor | None = None
    """Brings the approval to the chain that may have come along."""
    client: str = ""
    """Who wants it settled."""

    once = True
    repeats = NEVER

    @property
    def identity(self) -> str:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.payment.identity(self.token.chain_id, self.token)

    @property
    def payer(self) -> str:
        """See `payments.facilitator.schemes.Facilitated`."""
        return self.payment.payer

    @property
    def worth(self) -> int:
        """All that is authorised: a server that takes less of it has done its work, too."""
        return self.payment.authorization.value

    @property
    def calls(self) -> tuple[tuple[str, bytes], ...]:
        """See `payments.facilitator.schemes.Facilitated`: a wallet may have been deployed with it."""
        return tuple(
            settle_call(self.payment, self.token, deploy=deploy, amount=self.value) for deploy in (False, True)
        )

    async def check_chain(self, earlier: Earlier) -> Checked:
        """See `payments.facilitator.schemes.Facilitated`."""
        try:
            return await self._look(earlier)
        except AllowanceRequired as required:
            if self.sponsor is None or not self.value:
                raise
            order = self._order(has_code=False)
            facilitator = getattr(self.payment.authorization, "facilitator", None)
            wanted = await self.sponsor.consider(
                self.payment.approval, required, self.token, order, facilitator, self.client
            )
            return Checked(order, None, approval=Approving(self.sponsor, wanted))

    async def _look(self, earlier: Earlier) -> Checked:
        if not self.value and self.unproven is None:
            return Checked(None, None)
        authorization = self.payment.authorization
        seen = await self.chain_states.check(
            self.payment, self.token, authorization.recipient, earlier, self.unproven, self.value or None
        )
        if not self.value:
            return Checked(None, None)
        return Checked(self._order(has_code=seen.has_code), seen.cover)

    def _order(self, *, has_code: bool) -> SettlementOrder:
        authorization = self.payment.authorization
        call_to, call_data = settle_call(self.payment, self.token, deploy=not has_code, amount=self.value)
        return SettlementOrder(
            id=records.settlement_id(self.identity),
            kind=self.kind,
            reference=self.identity,
            chain_id=self.token.chain_id,
            token=self.token.address,
            payer=authorization.payer,
            pay_to=authorization.recipient,
            value=self.value,
            authorization_nonce=authorization.nonce,
            call_to=call_to,
            call_data=call_data,
            valid_before=authorization.expires_at,
        )

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        return Told(self.value)


def token_of(requirement: Requirement, network: Network, method: str) -> Token:
    """The token as it is to be moved: any may be moved by Permit2, only some by their own EIP-3009.

    Args:
        requirement: What the resource server wants.
        network: Where.
        method: ``eip3009`` or ``permit2``, or what the resource server wrote instead.

    Raises:
        PaymentRefused: ``invalid_requirements``.
    """
    token = network.token_at(requirement.asset)
    if token is None:
        known = ", ".join(known.symbol for known in network.tokens)
        raise PaymentRefused("invalid_requirements", f"on {network.caip2} these tokens are settled: {known}")
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
