"""What the gateway's answers say, and the few answers that are made here instead."""

from __future__ import annotations

import email.utils
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from agents_sdk.receipts import Watch, amount_of
from agents_sdk.steps import Lost, Reply


@dataclass(frozen=True, slots=True)
class Answer:
    """What the caller gets: a reply to pass on as it arrives (`body` None), or one that was read or made here."""

    status: int
    headers: httpx.Headers
    body: bytes | None = None
    reply: Reply | None = None
    watch: Watch | None = None


def document_in(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; empty if there is none."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def error_in(body: bytes) -> dict[str, Any]:
    """The `error` object in a body; empty if there is none."""
    error = document_in(body).get("error")
    return error if isinstance(error, dict) else {}


def error_code_in(body: bytes) -> str:
    """The machine word of an error: `error.code`, or in a 402 what stands before the colon of `error`."""
    error = document_in(body).get("error")
    if isinstance(error, dict):
        return str(error.get("code"))
    return error.partition(":")[0].strip() if isinstance(error, str) else ""


def credited_in(body: bytes) -> int | None:
    """What an error says was credited, in nano-USD: then the payment's outcome is known although it failed."""
    farebox = error_in(body).get("farebox")
    receipt = farebox.get("receipt") if isinstance(farebox, dict) else None
    return amount_of(receipt.get("credited_usd")) if isinstance(receipt, dict) else None


def final(headers: httpx.Headers) -> httpx.Headers:
    """Tell the OpenAI SDK not to retry by itself: what could be retried safely was."""
    final = headers.copy()
    final["x-should-retry"] = "false"
    return final


def _made(code: str, message: str, **extra: Any) -> Answer:
    body = json.dumps(
        {"error": {"message": message, "type": "api_error", "code": code, "param": None, **extra}}
    ).encode()
    headers = httpx.Headers({"content-type": "application/json", "content-length": str(len(body))})
    return Answer(504, final(headers), body)


def pending(reply: Reply, body: bytes) -> Answer:
    """Patience ended while the payment was being settled."""
    # A 202 would look like a completion without choices to the OpenAI SDK.
    receipt = document_in(body).get("receipt")
    return _made(
        "payment_pending",
        "the payment is still being settled; ask the same again later and the same payment is used",
        receipt=receipt if isinstance(receipt, str) else None,
    )


def outcome_unknown(lost: Lost) -> Answer:
    """The answer to a request on credit got lost."""
    # Credit has no signature that could be sent again: asking once more could be charged once more.
    return _made(
        "outcome_unknown",
        f"the answer got lost ({type(lost.error).__name__}) after it was asked for on the wallet's credit; it may have been "
        "charged. Asking again is a new request.",
    )


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that `Retry-After` asks to wait, given as such or as a date; None if it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value)) if value and value[0].isdigit() else _until(value)
    except ValueError:
        return None


def _until(value: str) -> float | None:
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
