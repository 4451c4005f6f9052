"""What is said to a payer: the 402 with the ways to pay and the itemised quote, and how a payment went.

The v2 form of a 402 is one header and stays small, since clients and proxies fail on large ones; the body holds the v1 form,
and the quote for people to read.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from payments.chain.networks import Network
from payments.money import nano_to_usd
from payments.quotes import Quote
from payments.x402.requirements import Requirement, describe_requirement
from payments.x402.v1 import RESOURCE_DESCRIPTION, RESOURCE_MIME_TYPE, v1_requirement

QUOTE_EXTENSION = "farebox"
HEADER_BYTES_MAX = 3_000
"""Some clients and proxies fail from 3.5 kB on; the name and the blanks around the value count too."""
HEADER_BYTES_ASKED_MAX = 7_500
"""For those who ask for extensions by name: the limit of the strictest servers and proxies in use is 8 kB."""
ERROR_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True)
class PaymentRequiredAnswer:
    """The two halves of a 402 answer."""

    header: str
    """The value of `PAYMENT-REQUIRED`: x402 v2, base64."""
    body: dict[str, Any]
    """JSON-able: x402 v1 with ``accepts`` and ``error``, and the itemised ``quote``."""


def payment_required(
    requirements: Sequence[Requirement],
    quote: Quote,
    quote_token: str,
    resource_url: str,
    error: str,
    networks: Sequence[Network],
    extensions: Mapping[str, Any] | None = None,
    header_bytes_max: int = HEADER_BYTES_MAX,
    description: str = RESOURCE_DESCRIPTION,
) -> PaymentRequiredAnswer:
    """Build a 402 answer.

    Args:
        requirements: The offers, the preferred one first (stock clients take the first that they can pay). The last ones are
            left out of the header where it would exceed `header_bytes_max`; at least one stays.
        quote: What the request may cost.
        quote_token: `QuoteSealer.seal(quote)`.
        resource_url: The URL of the request, as the caller sees it.
        error: Why there is a 402, a sentence; cut to `ERROR_CHARACTERS_MAX` in the header.
        networks: The chains of `requirements`.
        extensions: Declarations by name, the most wanted one first; the last ones are left out before an offer is.
        header_bytes_max: Of the header.
        description: What is paid for, in words.

    Returns:
        The header's value and the body.
    """
    assert requirements
    by_caip2 = {network.caip2: network for network in networks}
    v1_accepts = [v1_requirement(offer, by_caip2[offer.network], resource_url, description) for offer in requirements]
    resource = {"url": resource_url, "description": description, "mimeType": RESOURCE_MIME_TYPE}
    return PaymentRequiredAnswer(
        header=_fitting_header(
            requirements, quote_token, resource, error[:ERROR_CHARACTERS_MAX], extensions or {}, header_bytes_max
        ),
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


def payment_response(
    success: bool,
    tx_hash: str | None,
    network: str,
    payer: str | None,
    v1: bool = False,
    *,
    error_reason: str | None = None,
    amount: int | None = None,
    extensions: Mapping[str, Any] | None = None,
    **extra: Any,
) -> str:
    """Build the value of `PAYMENT-RESPONSE` (or, for v1, of `X-PAYMENT-RESPONSE`).

    Args:
        success: Whether the payment settled.
        tx_hash: The transaction that settled it; None where there is none (clients want the member all the same).
        network: The network as the payer named it (`Payment.network`).
        payer: Lower-case hex, or None if unknown.
        v1: Leave out the members that v1 does not have: `amount` and `extra`.
        error_reason: A stable code, if it did not settle.
        amount: What was settled, in atomic units.
        extensions: By name, such as the signed receipt.
        extra: JSON-able members of v2's `extra`, such as ``receipt="rcpt_…"``.

    Returns:
        Base64 of the JSON object.
    """
    answer: dict[str, Any] = {"success": success, "transaction": tx_hash or "", "network": network}
    if payer is not None:
        answer["payer"] = payer
    if error_reason is not None:
        answer["errorReason"] = error_reason
    if amount is not None and not v1:
        answer["amount"] = str(amount)
    if extensions:
        answer["extensions"] = dict(extensions)
    if extra and not v1:
        answer["extra"] = extra
    return _encode_header(answer)


def _describe_candidate(candidate_id: str) -> dict[str, str]:
    model, _, provider = candidate_id.rpartition("@")
    return {"model": model or candidate_id, "provider": provider if model else ""}


def _fitting_header(
    requirements: Sequence[Requirement],
    quote_token: str,
    resource: Mapping[str, str],
    error: str,
    extensions: Mapping[str, Any],
    header_bytes_max: int,
) -> str:
    accepts = [describe_requirement(offer) for offer in requirements]
    # The plainest object that the Python and the TypeScript client both echo unchanged.
    declared: dict[str, Any] = {QUOTE_EXTENSION: {"quote": quote_token}, **extensions}
    while True:
        header = _encode_header(
            {
                "x402Version": 2,
                "error": error,
                "resource": resource,
                "accepts": accepts,
                "extensions": declared,
            }
        )
        if len(header) <= header_bytes_max or (len(accepts) == 1 and len(declared) == 1):
            return header
        if len(declared) > 1:
            declared.popitem()
        else:
            accepts.pop()


def _encode_header(value: dict[str, Any]) -> str:
    """JSON in base64, as all x402 headers are."""
    return binascii.b2a_base64(orjson.dumps(value), newline=False).decode("ascii")
