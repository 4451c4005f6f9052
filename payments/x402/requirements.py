"""One way to pay: what a 402 offers, and what a v2 payer sends back as the offer that it chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from payments.chain.networks import Network, Token, TransferMethod
from payments.money import nano_to_atomic_up


@dataclass(frozen=True, slots=True)
class Requirement:
    """One way to pay: what a 402 offers, and what a v2 payer sends back as `accepted`.

    Addresses are lower-case hex, `amount` is in the token's atomic units, `network` is a CAIP-2 identifier.
    """

    scheme: str
    network: str
    asset: str
    amount: int
    pay_to: str
    max_timeout_s: int
    extra: dict[str, Any]


def requirement_for(
    token: Token, network: Network, amount_nano_usd: int, pay_to: str, max_timeout_s: int
) -> Requirement:
    """The offer to pay `amount_nano_usd` in `token` by the exact scheme, settled first.

    Args:
        token: One of `network`'s tokens.
        network: The chain.
        amount_nano_usd: What is to be paid; rounds up to a whole atomic unit.
        pay_to: The treasury, in any letter case.
        max_timeout_s: How long the payer's authorization shall be valid.

    Returns:
        The requirement. Its `extra` holds what a client needs to sign, and says honestly that the transfer comes before the
        answer.
    """
    assert token.chain_id == network.chain_id
    return Requirement(
        scheme="exact",
        network=network.caip2,
        asset=token.address,
        amount=nano_to_atomic_up(amount_nano_usd, token.decimals),
        pay_to=pay_to.lower(),
        max_timeout_s=max_timeout_s,
        extra={
            **signing_domain(token, token.transfer_method),
            "assetTransferMethod": token.transfer_method,
            "paymentFlow": "upfront",
        },
    )


def signing_domain(token: Token, method: TransferMethod) -> dict[str, str]:
    """The token's EIP-712 name and version, where the payer has to sign something in that domain or may: an EIP-3009
    authorization, or a permit for Permit2. Stock clients try to sign a permit for every token that an offer names them of."""
    if method == "permit2" and not token.has_permit:
        return {}
    return {"name": token.domain_name, "version": token.domain_version}


def describe_requirement(requirement: Requirement) -> dict[str, Any]:
    """The JSON-able v2 form of an offer."""
    return {
        "scheme": requirement.scheme,
        "network": requirement.network,
        "asset": requirement.asset,
        "amount": str(requirement.amount),
        "payTo": requirement.pay_to,
        "maxTimeoutSeconds": requirement.max_timeout_s,
        "extra": requirement.extra,
    }
