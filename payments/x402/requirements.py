"""What a 402 says: the ways to pay, the itemised quote, and why a payment was not taken.

The v2 form is one header and stays small, since clients and proxies fail on large ones; the body holds the v1 form, and the
quote for people to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from payments.chain.networks import Network, Token
from payments.money import nano_to_atomic_up, nano_to_usd
from payments.quotes import Quote
from payments.x402.v1 import RESOURCE_DESCRIPTION, RESOURCE_MIME_TYPE, v1_requirement
from payments.x402.wire import QUOTE_EXTENSION, Requirement, encode_header

HEADER_BYTES_MAX = 3_000
"""Some clients and proxies fail from 3.5 kB on; the name and the blanks around the value count too."""
ERROR_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True)
class PaymentRequiredAnswer:
    """The two halves of a 402 answer."""

    header: str
    """The value of `PAYMENT-REQUIRED`: x402 v2, base64."""
    body: dict[str, Any]
    """JSON-able: x402 v1 with ``accepts`` and ``error``, and the itemised ``quote``."""


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
        The requirement. Its `extra` holds what a client needs to sign (the token's EIP-712 name and version), and says honestly
        that the transfer comes before the answer.
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
            "name": token.domain_name,
            "version": token.domain_version,
            "assetTransferMethod": token.transfer_method,
            "paymentFlow": "upfront",
        },
    )


def payment_required(
    requirements: Sequence[Requirement],
    quote: Quote,
    quote_token: str,
    resource_url: str,
    error: str,
    networks: Sequence[Network],
) -> PaymentRequiredAnswer:
    """Build a 402 answer.

    Args:
        requirements: The offers, the preferred one first (stock clients take the first that they can pay). The last ones are
            left out of the header where it would exceed `HEADER_BYTES_MAX`; at least one stays.
        quote: What the request may cost.
        quote_token: `QuoteSealer.seal(quote)`.
        resource_url: The URL of the request, as the caller sees it.
        error: Why there is a 402, a sentence; cut to `ERROR_CHARACTERS_MAX` in the header.
        networks: The chains of `requirements`.

    Returns:
        The header's value and the body.
    """
    assert requirements
    by_caip2 = {network.caip2: network for network in networks}
    v1_accepts = [v1_requirement(offer, by_caip2[offer.network], resource_url) for offer in requirements]
    return PaymentRequiredAnswer(
        header=_fitting_header(requirements, quote_token, resource_url, error[:ERROR_CHARACTERS_MAX]),
        body={
            "x402Version": 1,
            "error": error,
            "accepts": [offer for offer in v1_accepts if offer is not None],
            "quote": describe_quote(quote),
        },
    )


def describe_quote(quote: Quote) -> dict[str, Any]:
    """The quote as a JSON-able object for callers: amounts in dollars as strings, the route as models at providers."""
    return {
        "id": quote.id,
        "expires_at": quote.expires_at,
        "items": [{"name": item.name, "amount_usd": nano_to_usd(item.amount_nano_usd)} for item in quote.items],
        "maximum_usd": nano_to_usd(quote.maximum_nano_usd),
        "route": [_describe_candidate(candidate_id) for candidate_id in quote.route],
    }


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


def _describe_candidate(candidate_id: str) -> dict[str, str]:
    model, _, provider = candidate_id.rpartition("@")
    return {"model": model or candidate_id, "provider": provider if model else ""}


def _fitting_header(requirements: Sequence[Requirement], quote_token: str, resource_url: str, error: str) -> str:
    accepts = [describe_requirement(offer) for offer in requirements]
    while True:
        header = encode_header(
            {
                "x402Version": 2,
                "error": error,
                "resource": {
                    "url": resource_url,
                    "description": RESOURCE_DESCRIPTION,
                    "mimeType": RESOURCE_MIME_TYPE,
                },
                "accepts": accepts,
                # The plainest object that the Python and the TypeScript client both echo unchanged.
                "extensions": {QUOTE_EXTENSION: {"quote": quote_token}},
            }
        )
        if len(header) <= HEADER_BYTES_MAX or len(accepts) == 1:
            return header
        accepts.pop()
