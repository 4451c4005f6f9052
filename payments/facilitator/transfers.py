"""A signed transfer from a payer to whoever a resource server names: what `exact` and `upto` have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace

from payments.chain.networks import Network, Token
from payments.chain.transactions import settle_call
from payments.errors import AllowanceRequired, PaymentRefused
from payments.facilitator.records import Record
from payments.facilitator.schemes import NEVER, Checked, Told, order_of
from payments.facilitator.wire import FacilitatorCall
from payments.promises import Earlier
from payments.settlement.orders import SettlementOrder
from payments.settlement.outcomes import SettlementOutcome
from payments.sponsoring.sponsor import Sponsor
from payments.verification import checks
from payments.verification.chain_state import ChainStates
from payments.verification.wallet_signatures import check_factory
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
            order, approval = self._order(has_code=False), self.payment.approval
            facilitator = getattr(self.payment.authorization, "facilitator", None)
            approving = await self.sponsor.approving(approval, required, self.token, order, facilitator, self.client)
            return Checked(order, None, approval=approving)

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
        return order_of(
            self,
            self.kind,
            authorization.recipient,
            self.value,
            authorization_nonce=authorization.nonce,
            valid_before=authorization.expires_at,
            call=0 if has_code else 1,
        )

    async def told(self, record: Record, outcome: SettlementOutcome | None) -> Told:
        """See `payments.facilitator.schemes.Facilitated`."""
        return Told(self.value)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Reads the transfers of one scheme on one network."""

    kind: str
    """Of their settlements."""
    network: Network
    chain_states: ChainStates
    """Judges them by the chain."""
    sponsor: Sponsor | None
    """Brings payers' approvals of Permit2 to the chain, if anybody does."""
    wallet_factories: frozenset[str] = frozenset()
    """Deploy contract wallets that pay before they exist (ERC-6492), lower-case hex."""

    def read(self, payment: Payment, requirement: Requirement, token: Token, now: int) -> Transfer:
        """Check a payment offline, all of which is taken unless less is said; `now` in Unix seconds.

        Raises:
            PaymentRefused: It does not pay for the requirement.
        """
        refusal: PaymentRefused | None = None
        unproven: PaymentRefused | None = None
        try:
            checks.check_offline(payment, requirement, self.network, token, now=now)
        except checks.SignatureUnproven as error:
            check_factory(payment.signature, self.wallet_factories)
            unproven = error
        except PaymentRefused as error:
            # Times pass: whoever settled in time is told of the outcome all the same.
            if error.code not in checks.TOO_LATE:
                raise
            refusal = error
        return Transfer(
            kind=self.kind,
            payment=payment,
            token=token,
            value=payment.authorization.value,
            refusal=refusal,
            unproven=unproven,
            chain_states=self.chain_states,
            sponsor=self.sponsor,
        )


def transfer_in(call: FacilitatorCall) -> Payment:
    """The payment of a call whose requirement is to be paid by a transfer.

    Raises:
        PaymentRefused: ``wrong_scheme``.
    """
    payment, scheme = call.payment, call.requirement.scheme
    if not isinstance(payment, Payment) or payment.scheme != scheme:
        raise PaymentRefused("wrong_scheme", f"the payment's scheme must be {scheme}")
    return payment


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
