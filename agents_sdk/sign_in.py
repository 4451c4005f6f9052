"""Checking a sign-in message (EIP-4361) before it is signed.

`personal_sign` signs any text, so a gateway could hand out one that means something elsewhere. Only the exact form of the
standard, for the host we talk to, our own address and a few minutes from now, is signed.
"""

from __future__ import annotations

import re
from datetime import datetime

import httpx

from agents_sdk.errors import SignInRefused

STATEMENT_START = "Sign in to Farebox"
LIFETIME_S_MAX = 3_600
CLOCK_SKEW_S = 300

_MESSAGE = re.compile(
    r"(?P<domain>[^\s/]{1,255}) wants you to sign in with your Ethereum account:\n"
    r"(?P<address>0x[0-9a-fA-F]{40})\n\n"
    r"(?P<statement>[\x20-\x7e]{1,200})\n\n"
    r"URI: (?P<uri>[^\s]{1,512})\n"
    r"Version: 1\n"
    r"Chain ID: [1-9][0-9]{0,17}\n"
    r"Nonce: [A-Za-z0-9]{8,128}\n"
    r"Issued At: (?P<issued>[0-9TZ:.+-]{20,32})\n"
    r"Expiration Time: (?P<expires>[0-9TZ:.+-]{20,32})",
    re.ASCII,
)


def check_message(message: str, *, address: str, base_url: httpx.URL, now: float) -> None:
    """Check that a message signs this wallet in at this gateway, soon and for nothing else.

    Args:
        message: What the gateway wants signed.
        address: The wallet's address.
        base_url: The gateway.
        now: Unix seconds.

    Raises:
        SignInRefused: If it is anything else.
    """
    parts = _MESSAGE.fullmatch(message)
    if parts is None:
        raise SignInRefused("the gateway's sign-in message does not have the form of EIP-4361; nothing was signed")
    host = base_url.netloc.decode("ascii").lower()
    if parts["domain"].lower() != host or httpx.URL(parts["uri"]).netloc.decode("ascii").lower() != host:
        raise SignInRefused(f"the sign-in message is for {parts['domain']}, not for {host}; nothing was signed")
    if parts["address"].lower() != address.lower():
        raise SignInRefused(f"the sign-in message is for {parts['address']}, not for this wallet; nothing was signed")
    if not parts["statement"].startswith(STATEMENT_START):
        raise SignInRefused("the sign-in message states something else than signing in; nothing was signed")
    issued, expires = _seconds(parts["issued"]), _seconds(parts["expires"])
    if not issued - CLOCK_SKEW_S <= now < expires <= now + LIFETIME_S_MAX + CLOCK_SKEW_S:
        raise SignInRefused("the sign-in message is not good now and soon over; nothing was signed")


def _seconds(text: str) -> float:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise SignInRefused(f"{text!r} is not a time") from None
    if at.tzinfo is None:
        raise SignInRefused(f"{text!r} has no time zone")
    return at.timestamp()
