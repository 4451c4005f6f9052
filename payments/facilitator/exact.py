"""The scheme `exact` for others: a signed transfer to whoever the resource server names, over EIP-3009 and Permit2."""

from __future__ import annotations

from collections.abc import Sequence
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


class ExactFacilitation:
    """`exact` on one network, in every token that the operator configured there.

    Args:
        network: Where it is.
        chain_states: Judges payments by the chain.
        wallet_factories: Deploy contract wallets that pay before they exist (ERC-6492), in any letter case.
        sponsor: Brings payers' approvals of Permit2 to the chain, if anybody does.
    """

    name = "exact"

    def __init__(
        self,
        network: Network,
        chain_states: ChainStates,
        wallet_factories: Sequence[str] = (),
        sponsor: Sponsor | None = None,
    ) -> None:
        self.network = network
        factories = frozenset(address.lower() for address in wallet_factories)
        self._transfers = Transfers(kinds.EXACT, network, chain_states, sponsor, factories)

    def kinds(self) -> list[dict[str, Any]]:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        kinds: list[dict[str, Any]] = [{"x402Version": 2, "scheme": self.name, "network": self.network.caip2}]
        if self.network.v1_name is not None:
            kinds.append({"x402Version": 1, "scheme": self.name, "network": self.network.v1_name})
        return kinds

    def settles(self, call: FacilitatorCall, client: Client, now: int) -> Transfer:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        return replace(self.verifies(call, client, now), client=client.name)

    def verifies(self, call: FacilitatorCall, client: Client, now: int) -> Transfer:
        """See `payments.facilitator.schemes.FacilitatedScheme`."""
        payment, requirement = transfer_in(call), call.requirement
        token = token_of(requirement, self.network, requirement.extra.get("assetTransferMethod", "eip3009"))
        if requirement.amount == 0:
            raise PaymentRefused("invalid_requirements", "the amount must be more than 0")
        return self._transfers.read(payment, requirement, token, now)
