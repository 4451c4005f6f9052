"""What the commands for a wallet's owner share: the agent with its policy, and what to do about what goes wrong.

`agents_sdk` is imported only when such a command runs. The wallet's key comes from the environment only: arguments are seen by
every process of the machine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.shared import Failed, WrongUsage

if TYPE_CHECKING:
    from agents_sdk import Agent
    from agents_sdk.shared import CreditMode

KEY_VARIABLE = "FAREBOX_WALLET_KEY"
GATEWAY_VARIABLE = "FAREBOX_GATEWAY"
RPC_VARIABLE = "FAREBOX_RPC_URL"

GatewayOption = Annotated[str, typer.Option(envvar=GATEWAY_VARIABLE, metavar="URL", help="The gateway's URL.")]
RpcOption = Annotated[
    str | None,
    typer.Option(envvar=RPC_VARIABLE, metavar="URL", help="A JSON-RPC server, to approve Permit2 with (USDT)."),
]
AssetOption = Annotated[
    str | None, typer.Option(metavar="ASSET", help="Such as USDC, or eip155:8453/USDC where several networks have it.")
]
GATEWAY_DEFAULT = "http://127.0.0.1:8402"


@contextlib.contextmanager
def agent_at(
    gateway: str, *, rpc_url: str | None = None, credit: CreditMode = "known", **policy: Any
) -> Iterator[Agent]:
    """The agent of the wallet in the environment.

    Args:
        gateway: The gateway's URL.
        rpc_url: A JSON-RPC server.
        credit: As for `agents_sdk.Agent`.
        policy: Fields of `agents_sdk.SpendingPolicy`.

    Raises:
        Failed: If there is no key, or something of what is done with the agent does not work: what, and what can be done.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise Failed("there is no wallet", f"Set {KEY_VARIABLE} to the wallet's private key")
    import httpx

    from agents_sdk import Agent, FareboxError, SpendingPolicy

    try:
        agent = Agent(key, gateway, policy=SpendingPolicy(**policy), rpc_url=rpc_url, credit=credit)
    except ValueError as error:
        raise _wrong_usage(error) from None
    with agent:
        try:
            yield agent
        except FareboxError as error:
            raise Failed(str(error), _fix(error)) from None
        except httpx.TransportError as error:
            what = f"{gateway} does not answer ({type(error).__name__})"
            fix = f"Check --gateway (or {GATEWAY_VARIABLE}); if something was asked for, run the same command again"
            raise Failed(what, fix) from None
        except ValueError as error:
            raise _wrong_usage(error) from None


def _wrong_usage(error: ValueError) -> WrongUsage:
    amount = "dollar amount" in str(error)
    return WrongUsage(str(error), "Write amounts as dollars, such as 12.50" if amount else "Correct it, and try again")


def _fix(error: Exception) -> str:
    """What the user can do."""
    import agents_sdk

    match error:
        case agents_sdk.OutcomeUnknown():
            return "Run the same command again: it goes on from there, and nothing is paid twice"
        case agents_sdk.TokenNotAllowed() | agents_sdk.NetworkNotAllowed():
            return "Name another --asset; `farebox wallet balance` shows those that the gateway has"
        case agents_sdk.ApprovalNeeded():
            return f"Give a JSON-RPC server by --rpc-url (or {RPC_VARIABLE})"
        case agents_sdk.LimitExceeded():
            return "Raise the limit if that is what you want"
        case agents_sdk.ChannelDisputed():
            return "Do not pay this gateway by channels; what is left in one can be withdrawn on chain"
        case agents_sdk.RequestRefused(code="insufficient_funds"):
            return "Ask for less, or send the wallet more of the token first"
        case agents_sdk.RequestRefused(code="insufficient_balance" | "insufficient_credit"):
            return "`farebox wallet balance` shows what is there, `farebox wallet topup` adds to it"
        case agents_sdk.RequestRefused(
            code="treasury_short" | "withdrawal_impossible" | "topup_unclaimed" | "daily_limit"
        ):
            return "Run it again later; nothing was taken"
        case agents_sdk.RequestRefused(code="key_not_found"):
            return "`farebox wallet keys list` shows the ids (key_…)"
        case agents_sdk.RequestRefused(code="channel" | "refund_no_balance"):
            return "`farebox channel list` shows the wallet's channels"
        case agents_sdk.RequestRefused(status=status) if status >= 500:
            return "Try again later"
        case agents_sdk.RequestRefused():
            return "Change what was asked for as it says"
        case agents_sdk.SignInRefused() | agents_sdk.AnswerUnreadable():
            return f"Check that --gateway (or {GATEWAY_VARIABLE}) is a Farebox gateway"
        case _:
            return "Read what it says; `farebox wallet --help` and `farebox channel --help` show examples"
