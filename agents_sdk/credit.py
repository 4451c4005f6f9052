"""Spending what earlier payments left with the gateway, before a new payment is signed.

A payment takes a request's maximum and what was not used stays as the wallet's credit. This signs in with the wallet (only
when there should be credit: it costs two round trips an hour) and pays with the session instead.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import httpx

from agents_sdk.errors import AnswerUnreadable, PolicyViolation, SignInRefused
from agents_sdk.money import usd_to_nano
from agents_sdk.policy import SpendingPolicy
from agents_sdk.shared import Session, Shared
from agents_sdk.sign_in import check_message
from agents_sdk.steps import Steps, fetch

SESSION_MARGIN_S = 30
_log = logging.getLogger("farebox.agent")


def enough_credit(shared: Shared, maximum_nano_usd: int, policy: SpendingPolicy) -> Steps[Session | None]:
    """A session to pay with, if the wallet should have enough credit in one token; else None.

    It is the gateway that chooses the token, so there must be enough in none that the policy forbids.

    Never raises for a gateway that has no credit to offer or cannot be signed in to: there is still the wallet to pay from.
    """
    if shared.settings.credit == "never":
        return None
    journal, origin, payer = shared.journal, shared.origin, shared.wallet.address
    if journal.expire_open(origin, payer):
        shared.look_for_credit = True
    try:
        if shared.look_for_credit:
            yield from look_up(shared)
        enough = [asset for asset, amount in journal.credit(origin, payer).items() if amount >= maximum_nano_usd]
        if not enough or not all(_is_allowed(shared, policy, asset) for asset in enough):
            return None
        return (yield from session(shared))
    except (SignInRefused, AnswerUnreadable, httpx.TransportError) as error:
        _log.warning("credit with %s cannot be used now: %s", origin, error)
        return None


def _is_allowed(shared: Shared, policy: SpendingPolicy, asset: str) -> bool:
    token = shared.settings.tokens.by_asset(asset)
    if token is None:  # in no token that could be signed for: only a policy without rules for tokens allows it
        return policy.tokens is None and policy.networks is None
    try:
        policy.check_token(token)
    except PolicyViolation:
        return False
    return True


def look_up(shared: Shared) -> Steps[list[dict[str, Any]]]:
    """Ask the gateway for the wallet's balances, and note them.

    Raises:
        SignInRefused, AnswerUnreadable, httpx.TransportError: As they say.
    """
    opened = yield from session(shared)
    url = shared.settings.base_url.join("/v1/wallet")
    reply, body = yield from fetch("GET", url, headers={"authorization": f"Bearer {opened.token}"})
    if reply.status == 401:
        shared.session = None
        raise SignInRefused("the gateway does not accept its own session")
    try:
        balances: list[dict[str, Any]] = _document(reply.status, body)["balances"]
        amounts = {str(balance["asset"]): usd_to_nano(balance["available_usd"]) for balance in balances}
    except (KeyError, TypeError, ValueError) as error:
        raise AnswerUnreadable("the gateway's answer about the wallet's balances cannot be read") from error
    shared.journal.set_credit(shared.origin, shared.wallet.address, amounts)
    shared.look_for_credit = False
    return balances


def session(shared: Shared) -> Steps[Session]:
    """The open session, or a new one: ask for a message, check it, sign it.

    Raises:
        SignInRefused, AnswerUnreadable, httpx.TransportError: As they say.
    """
    now = time.time()
    if shared.session is not None and shared.session.expires_at - SESSION_MARGIN_S > now:
        return shared.session
    base_url, wallet = shared.settings.base_url, shared.wallet
    asked = json.dumps({"address": wallet.address}).encode()
    reply, body = yield from fetch("POST", base_url.join("/v1/wallet/challenges"), asked)
    message = _document(reply.status, body).get("message")
    if not isinstance(message, str):
        raise AnswerUnreadable("the gateway's challenge has no message to sign")
    check_message(message, address=wallet.address, base_url=base_url, now=now)
    answer = json.dumps({"message": message, "signature": wallet.sign_message(message)}).encode()
    reply, body = yield from fetch("POST", base_url.join("/v1/wallet/sessions"), answer)
    document = _document(reply.status, body)
    try:
        opened = Session(str(document["token"]), int(document["expires_at"]))
    except (KeyError, TypeError, ValueError) as error:
        raise AnswerUnreadable("the gateway's session cannot be read") from error
    shared.session = opened
    return opened


def _document(status: int, body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if status >= 400:
        error = document.get("error") if isinstance(document, dict) else None
        reason = error.get("message") if isinstance(error, dict) else f"HTTP {status}"
        raise SignInRefused(f"the gateway refused: {reason}")
    if not isinstance(document, dict):
        raise AnswerUnreadable(f"the gateway answered HTTP {status} without a JSON object")
    return document
