"""What an agent may spend: limits and allow-lists, checked before anything is signed.

The limits bound what leaves the wallet. A payment takes the quoted maximum and the gateway credits back what was not used;
spending that credit later is not counted again, because it was counted when it left. So the limits hold even against a
gateway that lies about what it charged.

Of a payment channel two sums are held to the same limits, each by itself: deposits, which leave the wallet for the channel, and
what is spent from it, which is the growth of the highest voucher that was signed: more than that cannot be claimed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from agents_sdk.errors import (
    LimitExceeded,
    NetworkFeeTooHigh,
    NetworkNotAllowed,
    RecipientNotAllowed,
    TokenNotAllowed,
)
from agents_sdk.money import usd_to_nano
from agents_sdk.tokens import ADDRESS, NETWORK, Token

HOUR_S = 3_600
DAY_S = 86_400
Scheme = Literal["exact", "upto", "batch-settlement"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True, slots=True)
class Window:
    """A limit over the last `seconds`."""

    name: str
    seconds: int
    limit_nano_usd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingPolicy:
    """The rules that an agent pays by. Amounts are dollar texts such as ``"0.05"``; None means no limit.

    Args:
        max_per_request: The most that one request may cost, whether it is paid on chain or from credit.
        max_per_hour: The most that may leave the wallet within any 60 minutes.
        max_per_day: The most that may leave the wallet within any 24 hours.
        tokens: Allowed tokens, as symbols (``"USDC"``) or contract addresses. None: every token that the agent knows. Credit in
            another token is not spent either.
        networks: Allowed networks, as CAIP-2 identifiers. None: every network of the tokens known.
        recipients: Addresses that may be paid. None: whomever the gateway names.
        max_network_fee: The most that a quote may pass on for settling the payment.
        prefer: The order in which allowed tokens are chosen, as symbols or addresses; others follow in the gateway's order.
        schemes: Ways of x402 to pay, the first choice first: ``exact`` pays the quoted maximum and the rest becomes credit;
            ``upto`` pays what the answer cost, after it, and moves every token through Permit2; ``batch-settlement`` opens a
            channel with a deposit and pays each request from it with a signature, without gas and without waiting.
        channel_deposit: The most that lies unspent in the channels of one gateway and token. A channel is filled up to it when
            it is opened and when it does not cover a request any more; what is left comes back with `Agent.wallet`'s
            `refund_channel`.
        permit2_allowance: How many dollars Permit2 may move per approval, or ``"unlimited"``. Permit2 moves nothing without
            a signature of this wallet for each payment; the bound is for the day that one is stolen. A larger one means
            fewer approval transactions to pay gas for.

    Raises:
        ValueError: If an amount, a network or an address cannot be read.

    Example:
        >>> SpendingPolicy(max_per_request="0.05", max_per_day="2", tokens=["USDC"], networks=["eip155:8453"])
    """

    max_per_request: str | None = "1"
    max_per_hour: str | None = None
    max_per_day: str | None = "10"
    tokens: Collection[str] | None = None
    networks: Collection[str] | None = None
    recipients: Collection[str] | None = None
    max_network_fee: str | None = None
    prefer: Sequence[str] = ("USDC", "USDT")
    schemes: Sequence[Scheme] = ("exact",)
    channel_deposit: str = "1.00"
    permit2_allowance: str = "100"

    def __post_init__(self) -> None:
        if not self.schemes or isinstance(self.schemes, str) or not set(self.schemes) <= set(SCHEMES):
            raise ValueError(f"schemes must be a list of some of {', '.join(SCHEMES)}")
        if usd_to_nano(self.channel_deposit) == 0:
            raise ValueError("channel_deposit must be more than 0")
        for amount in (self.max_per_request, self.max_per_hour, self.max_per_day, self.max_network_fee):
            if amount is not None:
                usd_to_nano(amount)
        if self.permit2_allowance != "unlimited":
            usd_to_nano(self.permit2_allowance)
        for field in (self.tokens, self.networks, self.recipients, self.prefer):
            if isinstance(field, str):
                raise ValueError(f"{field!r} must be a list of texts, not one text")
        for network in self.networks or ():
            if not NETWORK.fullmatch(str(network)):
                raise ValueError(f"{network!r} is not a CAIP-2 network such as eip155:8453")
        for address in (*(self.recipients or ()), *filter(_is_hexadecimal, (*(self.tokens or ()), *self.prefer))):
            if not ADDRESS.fullmatch(str(address).lower()):
                raise ValueError(f"{address!r} is not an address: 0x and 40 hexadecimal digits")

    def windows(self) -> tuple[Window, ...]:
        """The limits over time, for the journal to hold atomically."""
        limits = (("hour", HOUR_S, self.max_per_hour), ("day", DAY_S, self.max_per_day))
        return tuple(Window(name, seconds, usd_to_nano(limit)) for name, seconds, limit in limits if limit is not None)

    def check_amounts(self, maximum_nano_usd: int, network_fee_nano_usd: int) -> None:
        """Check one quote against the limits per request.

        Raises:
            LimitExceeded: It may cost too much.
            NetworkFeeTooHigh: It passes on too large a fee.
        """
        if self.max_per_request is not None and maximum_nano_usd > usd_to_nano(self.max_per_request):
            raise LimitExceeded(
                "request", limit_nano_usd=usd_to_nano(self.max_per_request), asked_nano_usd=maximum_nano_usd
            )
        if self.max_network_fee is not None and network_fee_nano_usd > usd_to_nano(self.max_network_fee):
            raise NetworkFeeTooHigh(
                limit_nano_usd=usd_to_nano(self.max_network_fee), asked_nano_usd=network_fee_nano_usd
            )

    def check_payment(self, token: Token, recipient: str) -> None:
        """Check where a payment would go.

        Raises:
            NetworkNotAllowed, TokenNotAllowed, RecipientNotAllowed: As they say.
        """
        self.check_token(token)
        if self.recipients is not None and recipient.lower() not in {address.lower() for address in self.recipients}:
            raise RecipientNotAllowed(f"the payment would go to {recipient}, which is not an allowed recipient")

    def check_token(self, token: Token) -> None:
        """Check what a payment would be in.

        Raises:
            NetworkNotAllowed, TokenNotAllowed: As they say.
        """
        if self.networks is not None and token.network not in self.networks:
            raise NetworkNotAllowed(
                f"the payment would be on {token.network}; allowed are {', '.join(sorted(self.networks))}"
            )
        if self.tokens is not None and not any(_names(token, name) for name in self.tokens):
            raise TokenNotAllowed(
                f"the payment would be in {token.symbol} ({token.address}); allowed are {', '.join(sorted(self.tokens))}"
            )

    def rank(self, token: Token) -> int:
        """The place of a token in the order of preference; smaller is better."""
        places = (place for place, name in enumerate(self.prefer) if _names(token, name))
        return next(places, len(self.prefer))


def _is_hexadecimal(name: str) -> bool:
    return str(name).lower().startswith("0x")


def _names(token: Token, name: str) -> bool:
    return name.lower() == token.address if _is_hexadecimal(name) else name.upper() == token.symbol.upper()
