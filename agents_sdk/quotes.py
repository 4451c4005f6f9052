"""Reading a 402 and deciding whether it is honest: what is signed must be what is shown.

Nothing here trusts the gateway. The itemised quote has to add up, the amount to sign has to be that sum in the token's units,
the token has to be one whose decimals and signing domain we know ourselves, and the resource has to be on the host we asked:
otherwise somebody else's price could be passed on to us.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError
from x402.http.utils import decode_payment_required_header
from x402.schemas import PaymentRequired, PaymentRequirements

from agents_sdk.errors import FareboxError, PolicyViolation, QuoteRejected, TokenNotAllowed
from agents_sdk.money import nano_to_atomic_up, nano_to_usd, usd_to_nano
from agents_sdk.policy import SpendingPolicy
from agents_sdk.tokens import Token, TokenBook

CHARGE_UNIT_NANO_USD = 1_000
"""Maxima are rounded up to whole micro-dollars, so the items may fall short of the maximum by at most this."""
PAYMENT_TIMEOUT_S_MAX = 3_600
"""A signed payment is good for this long at most: later it could surprise us."""
HEADER_CHARACTERS_MAX = 16_384
_SETTLEMENT_FLOWS = (None, "upfront", "authorization")


@dataclass(frozen=True, slots=True)
class Quote:
    """The price of one request."""

    id: str
    maximum_nano_usd: int
    network_fee_nano_usd: int
    items: tuple[tuple[str, int], ...]
    """Name and nano-USD."""
    expires_at: int
    """Unix seconds."""
    route: tuple[str, ...]
    """``model@provider``, first choice first."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A 402 that asks for an x402 payment."""

    required: PaymentRequired
    quote: Quote
    code: str
    """Why, if a payment was sent and did not do: the machine word before the colon of `error`."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to pay that passed all checks."""

    requirement: PaymentRequirements
    token: Token

    @property
    def scheme(self) -> str:
        """The x402 scheme."""
        return self.requirement.scheme

    @property
    def through_permit2(self) -> bool:
        """Whether Permit2 has to be approved for it."""
        return self.requirement.scheme == "upto" or self.token.transfer_method == "permit2"


def read_demand(headers: Mapping[str, str], body: bytes) -> Demand | None:
    """Read a 402.

    Returns:
        The demand, or None if the 402 does not ask for an x402 (v2) payment.

    Raises:
        QuoteRejected: If it does, but cannot be read or carries no itemised quote.
    """
    header = headers.get("payment-required")
    if not header:
        return None
    if len(header) > HEADER_CHARACTERS_MAX:
        raise QuoteRejected("the 402's header is too long")
    try:
        required = decode_payment_required_header(header)
        document = json.loads(body)
    except (binascii.Error, ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise QuoteRejected(f"the 402 cannot be read: {type(error).__name__}") from error
    if not isinstance(required, PaymentRequired):
        raise QuoteRejected("the 402's header is not x402 version 2")
    quote = _read_quote(document.get("quote") if isinstance(document, dict) else None)
    return Demand(required, quote, (required.error or "").partition(":")[0].strip())


def check_quote(demand: Demand, url: httpx.URL, now: float) -> None:
    """Check that a quote adds up, is still good, and is for the host that was asked.

    Raises:
        QuoteRejected: If not, saying what is wrong.
    """
    quote = demand.quote
    total = sum(amount for _, amount in quote.items)
    if not total <= quote.maximum_nano_usd <= total + CHARGE_UNIT_NANO_USD:
        raise QuoteRejected(
            f"the quote's items add up to {nano_to_usd(total)} USD, its maximum is {nano_to_usd(quote.maximum_nano_usd)} USD"
        )
    if quote.expires_at <= now:
        raise QuoteRejected("the quote has expired already; is this machine's clock right?")
    resource = demand.required.resource
    if resource is None or not _same_host(resource.url, url):
        offered = "nothing" if resource is None else resource.url
        raise QuoteRejected(f"the 402 is for {offered}, but {url.host} was asked")


def choose_offer(
    demand: Demand,
    policy: SpendingPolicy,
    tokens: TokenBook,
    excluded: Collection[tuple[str, str]] = (),
    asset: str | None = None,
) -> Offer:
    """Choose among the ways to pay: the policy's preference first, then the gateway's order.

    Args:
        demand: The 402, see `check_quote`.
        policy: The agent's rules.
        tokens: The tokens that the agent knows.
        excluded: Ways not to pay, as scheme and asset (``eip155:8453/USDC``): they were tried, and cannot.
        asset: The only one to pay in, as ``USDC`` or ``eip155:8453/USDC``; None for any.

    Raises:
        QuoteRejected: If an offer in a known token shows something else than it would have signed.
        PolicyViolation: If no offer is allowed: what is wrong with the best one.
    """
    ranked: list[tuple[int, int, int, Offer]] = []
    refusals: list[tuple[int, int, FareboxError]] = []
    for place, requirement in enumerate(demand.required.accepts):
        scheme = requirement.scheme
        if scheme not in policy.schemes or requirement.extra.get("paymentFlow") not in _SETTLEMENT_FLOWS:
            continue
        token = tokens.find(requirement.network, requirement.asset)
        if token is None:
            unknown = TokenNotAllowed(
                f"the token {requirement.asset} on {requirement.network} is not known; describe it in Agent(tokens=[...])"
            )
            refusals.append((len(policy.prefer) + 1, place, unknown))
            continue
        if asset not in (None, token.asset, token.symbol):
            continue
        try:
            policy.check_payment(token, requirement.pay_to)
        except PolicyViolation as violation:
            refusals.append((policy.rank(token), place, violation))
            continue
        _check_offer(requirement, token, demand.quote.maximum_nano_usd)
        if (scheme, token.asset) not in excluded:
            choice = list(policy.schemes).index(requirement.scheme)  # type: ignore[arg-type]
            ranked.append((choice, policy.rank(token), place, Offer(requirement, token)))
    if ranked:
        return min(ranked, key=lambda entry: entry[:3])[3]
    if refusals:
        raise min(refusals, key=lambda entry: entry[:2])[2]
    raise TokenNotAllowed(
        "the 402 offers no way to pay that this agent has: its policy takes x402 "
        + ", ".join(policy.schemes)
        + (f", and {asset} is wanted" if asset else "")
    )


def _check_offer(requirement: PaymentRequirements, token: Token, maximum_nano_usd: int) -> None:
    expected = nano_to_atomic_up(maximum_nano_usd, token.decimals)
    if requirement.amount != str(expected):
        raise QuoteRejected(
            f"the quote's maximum is {nano_to_usd(maximum_nano_usd)} USD, which is {expected} units of {token.symbol}; "
            f"the payment asked for is {requirement.amount}"
        )
    if not 0 < requirement.max_timeout_seconds <= PAYMENT_TIMEOUT_S_MAX:
        raise QuoteRejected(f"a payment good for {requirement.max_timeout_seconds} seconds is asked for")
    method = requirement.extra.get("assetTransferMethod", "eip3009")
    if requirement.scheme == "upto":
        if method != "permit2":
            raise QuoteRejected(f"upto moves tokens by permit2, the 402 says {method}")
    elif method != token.transfer_method:
        raise QuoteRejected(f"{token.symbol} moves by {token.transfer_method}, the 402 says {method}")
    # Signed over by EIP-3009: another domain would be a signature for something else.
    domain = (requirement.extra.get("name"), requirement.extra.get("version"))
    if method == "eip3009" and domain != (token.name, token.version):
        raise QuoteRejected(
            f"the signing domain of {token.symbol} on {token.network} is {(token.name, token.version)}, the 402 says {domain}"
        )


def _read_quote(document: Any) -> Quote:
    try:
        items = tuple((str(item["name"]), usd_to_nano(item["amount_usd"])) for item in document["items"])
        return Quote(
            id=str(document["id"]),
            maximum_nano_usd=usd_to_nano(document["maximum_usd"]),
            network_fee_nano_usd=sum(amount for name, amount in items if name == "network_fee"),
            items=items,
            expires_at=int(document["expires_at"]),
            route=tuple(f"{step['model']}@{step['provider']}" for step in document.get("route", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QuoteRejected(f"the 402 has no itemised quote that can be read: {error!r}") from error


def _same_host(resource: str, asked: httpx.URL) -> bool:
    try:
        offered = httpx.URL(resource)
    except httpx.InvalidURL:
        return False
    # Not the scheme: behind a proxy that ends TLS, a gateway may not know that it was reached over https.
    return (offered.host.lower(), offered.port) == (asked.host.lower(), asked.port)


def origin_of(url: httpx.URL) -> str:
    """Scheme, host and port of a URL, the port always spelled out."""
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    return f"{url.scheme}://{url.host.lower()}:{port}"
