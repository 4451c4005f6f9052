"""What can go wrong while an agent pays, as one small tree.

    FareboxError
    ├── PolicyViolation            your own rules say no; nothing was signed
    │   ├── LimitExceeded          per request, per hour, per day
    │   ├── NetworkFeeTooHigh
    │   ├── TokenNotAllowed
    │   ├── NetworkNotAllowed
    │   └── RecipientNotAllowed
    ├── ChannelDisputed            the gateway claims more of a channel than was signed or charged; nothing was signed
    ├── QuoteRejected              the gateway's 402 does not add up, or is not what it should be; nothing was signed
    ├── ApprovalNeeded             Permit2 is not approved for the token, and this agent has no `rpc_url` to do it
    ├── ApprovalFailed             the approval was tried and did not work (no gas, reverted, wrong chain)
    ├── SignInRefused              a sign-in message that is not one, or that the gateway did not accept
    ├── RequestRefused             the gateway says no to what the wallet wants of it (its own limits, no such key, …)
    ├── OutcomeUnknown             what was asked for may have happened; asking again goes on from there
    └── AnswerUnreadable           the gateway answered something that is not its API

Failures of the network stay `httpx` exceptions, and answers that are no success stay responses, so that a client built on
this transport (such as the OpenAI SDK) treats them as it always does.

Example:
    >>> try:
    ...     client.chat.completions.create(model="auto", messages=messages)
    ... except PolicyViolation as refusal:
    ...     print(refusal)
    this request may cost 0.40 USD, more than the 0.05 USD allowed per request
"""

from __future__ import annotations

from agents_sdk.money import nano_to_usd


class FareboxError(Exception):
    """Base of everything that this package raises."""


class PolicyViolation(FareboxError):
    """The spending policy forbids the payment. Raised before anything is signed."""


class LimitExceeded(PolicyViolation):
    """A limit on amounts would be broken.

    Args:
        window: ``request``, ``hour`` or ``day``.
        limit_nano_usd: What the policy allows.
        asked_nano_usd: What this payment would take at most.
        used_nano_usd: What was taken in this window already.
        what: What would take it.
    """

    def __init__(
        self,
        window: str,
        *,
        limit_nano_usd: int,
        asked_nano_usd: int,
        used_nano_usd: int = 0,
        what: str = "this request may cost",
    ) -> None:
        self.window = window
        self.limit_usd = nano_to_usd(limit_nano_usd)
        self.asked_usd = nano_to_usd(asked_nano_usd)
        self.used_usd = nano_to_usd(used_nano_usd)
        before = f" on top of the {self.used_usd} USD paid already" if used_nano_usd else ""
        super().__init__(
            f"{what} {self.asked_usd} USD{before}, more than the {self.limit_usd} USD allowed per {window}"
        )


class NetworkFeeTooHigh(PolicyViolation):
    """The quote passes on a larger network fee than the policy allows."""

    def __init__(self, *, limit_nano_usd: int, asked_nano_usd: int) -> None:
        self.limit_usd = nano_to_usd(limit_nano_usd)
        self.asked_usd = nano_to_usd(asked_nano_usd)
        super().__init__(f"the network fee is {self.asked_usd} USD, more than the {self.limit_usd} USD allowed")


class TokenNotAllowed(PolicyViolation):
    """None of the tokens asked for is one that the policy allows and this package knows."""


class NetworkNotAllowed(PolicyViolation):
    """The payment would be on a network that the policy does not allow."""


class RecipientNotAllowed(PolicyViolation):
    """The payment would go to an address that the policy does not allow."""


class QuoteRejected(FareboxError):
    """The 402 is inconsistent, expired, for another host, or would have something else signed than it shows."""


class ChannelDisputed(FareboxError):
    """The gateway says of a payment channel what this wallet's log contradicts. Nothing was signed.

    What was signed before can be claimed, no more; the rest can be taken back on chain after the channel's delay.
    """


class ApprovalNeeded(FareboxError):
    """The token moves through Permit2, which the wallet has not approved yet; give the agent an `rpc_url`."""


class ApprovalFailed(FareboxError):
    """The Permit2 approval could not be made. Nothing was paid."""


class SignInRefused(FareboxError):
    """The message to sign in with is not one that this wallet should sign, or the gateway refused the signature."""


class RequestRefused(FareboxError):
    """The gateway refuses what the wallet wants of it; its message says why, and what to do.

    Args:
        status: The HTTP status.
        code: The gateway's word for it, such as ``insufficient_funds``.
        message: Its sentence.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class OutcomeUnknown(FareboxError):
    """What was asked for may have happened or not. The same asked again goes on from there and is not done twice."""


class AnswerUnreadable(FareboxError):
    """The gateway, or the chain's RPC server, answered something that cannot be understood."""
