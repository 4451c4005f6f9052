"""The scheme `upto` for others: the payer authorises a maximum, of which the resource server takes what its work came to.

Only our own batch contract, which payers name as `facilitator`, can settle it. Between `/verify` and `/settle` nothing holds
the payer's money: a payer who spends it meanwhile makes `/settle` fail, and the resource server has worked for nothing. That is
its risk, not ours; before any gas is spent the chain is asked again. What is settled for nothing burns the authorization here,
so that it never settles later; nothing is sent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from payments.chain.networks import Network
from payments.errors import PaymentRefused
from payments.facilitator import kinds
from payments.facilitator.access import Client
from payments.facilitator.transfers import Transfer, Transfers, token_of, transfer_in
from payments.facilitator.wire import FacilitatorCall
from payments.sponsoring.sponsor import Sponsor
from payments.verification.chain_state import ChainStates
from payments.verification.wallet_signatures import unwrap
from payments.x402.requirements import Requirement


class UptoFacilitation:
    """`upto` on one network, in every token that the operator configured there.

    Args:
        network: Where it is.
        chain_states: Judges payments by the chain.
        facilitator: The operator's batch contract, in any letter case.
        sponsor: Brings payers' approvals of Permit2 to the chain, if anybody does.
    """

    name = "upto"

    def __init__(
        self, network: Network, chain_states: ChainStates, facilitator: str, sponsor: Sponsor | None = None
    ) -> None:
        self.network = network
        self._transfers = Transfers(kinds.UPTO, network, chain_states, sponsor)
        self._facilitator = facilitator.lower()

    def kinds(self) -> list[dict[str, Any]]:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        extra = {"facilitatorAddress": self._facilitator}
        return [{"x402Version": 2, "scheme": self.name, "network": self.network.caip2, "extra": extra}]

    def verifies(self, call: FacilitatorCall, client: Client, now: int) -> Transfer:
        """See `payments.facilitator.schemes.FacilitatedScheme`. The requirement's amount is the maximum."""
        if call.requirement.amount == 0:
            raise PaymentRefused("invalid_requirements", "the amount must be more than 0")
        return self._read(call, call.requirement, now)

    def settles(self, call: FacilitatorCall, client: Client, now: int) -> Transfer:
        """See `payments.facilitator.schemes.FacilitatedScheme`. The requirement's amount is what is taken; 0 takes nothing."""
        taken, accepted = call.requirement.amount, call.payment.accepted
        maximum = taken if accepted is None else accepted.amount
        transfer = self._read(call, replace(call.requirement, amount=maximum), now)
        if taken > maximum:
            raise PaymentRefused("exceeds_maximum", f"the payer authorised {maximum} atomic units at most")
        return replace(transfer, value=taken, client=client.name)

    def _read(self, call: FacilitatorCall, requirement: Requirement, now: int) -> Transfer:
        payment, requirement = transfer_in(call), _plain(requirement)
        assert payment.accepted is not None
        token = token_of(requirement, self.network, requirement.extra.get("assetTransferMethod", "permit2"))
        if token.transfer_method != "permit2":
            raise PaymentRefused("invalid_requirements", "upto is settled by permit2: see extra.assetTransferMethod")
        if requirement.extra.get("facilitatorAddress") != self._facilitator:
            raise PaymentRefused("wrong_facilitator", f"extra.facilitatorAddress must be {self._facilitator}")
        if unwrap(payment.signature)[1] is not None:
            raise PaymentRefused("unsupported_signature", "by upto only wallets that are deployed pay (no ERC-6492)")
        plain = replace(payment, accepted=_plain(payment.accepted))
        return self._transfers.read(plain, requirement, token, now)


def _plain(requirement: Requirement) -> Requirement:
    """The same with the facilitator's address in one spelling."""
    facilitator = requirement.extra.get("facilitatorAddress")
    if not isinstance(facilitator, str):
        return requirement
    return replace(requirement, extra=requirement.extra | {"facilitatorAddress": facilitator.lower()})
