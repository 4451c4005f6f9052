"""The one place that decides what an upstream's failure means: try again here, try the next candidate, or tell the caller.

A provider's own words reach the caller only where the caller's request is at fault; everything else is told by code.
"""

from __future__ import annotations

import datetime
import email.utils
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import orjson

from gateway.dialects.upstream import ReportedError, Undecodable, Untranslatable
from gateway.execution.attempts import Attempt
from gateway.providers import upstream

RETRY_AFTER_S_MAX: Final = 3600.0
MESSAGE_CHARACTERS_MAX: Final = 500


class Verdict(Enum):
    """What to do after a failure."""

    RETRY_HERE = "retry_here"
    NEXT_CANDIDATE = "next_candidate"
    LARGER_CONTEXT = "larger_context"
    """The next candidate that takes more input than this one; if there is none, the caller is told."""
    TELL_CALLER = "tell_caller"


@dataclass(frozen=True, slots=True)
class Failure:
    """A classified failure of one attempt."""

    code: str
    """Stable, snake_case."""
    message: str
    verdict: Verdict
    http_status: int | None = None
    """What the upstream answered."""
    retry_after_s: float | None = None
    """How long it asked to be left alone; 0 to `RETRY_AFTER_S_MAX`."""
    trips: bool = True
    """Whether it speaks against the candidate's health; a fault of the caller's does not."""
    caller_status: int = 400
    param: str | None = None

    def __str__(self) -> str:
        return self.code if self.http_status is None else f"{self.code} (HTTP {self.http_status})"


class AttemptFailed(Exception):
    """Carries a failure from where it was noticed to where it is decided upon."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class ExecutionFailed(Exception):
    """No candidate answered. `last` is what the last one tried failed with, None if none could be tried."""

    def __init__(self, attempts: Sequence[Attempt], last: Failure | None) -> None:
        super().__init__(f"no candidate answered; the last failure was {last}")
        self.attempts = tuple(attempts)
        self.last = last


class CallerFault(Exception):
    """The request itself is at fault, in the way that `code`, `message` and `param` say; no candidate would answer it."""

    def __init__(
        self, attempts: Sequence[Attempt], status: int, message: str, code: str, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.attempts = tuple(attempts)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def next_candidate(code: str, message: str, **more: Any) -> Failure:
    """A failure that another candidate may not have."""
    return Failure(code, message, Verdict.NEXT_CANDIDATE, **more)


CUT: Final = next_candidate("upstream_cut", "the provider broke off in the middle of the answer")
SILENT: Final = next_candidate("upstream_silent", "the provider did not answer in time")
STALLED: Final = next_candidate("upstream_stalled", "the provider stopped in the middle of the answer")
TIMED_OUT: Final = next_candidate("upstream_timeout", "the answer took longer than the gateway allows")


def from_exception(error: Exception) -> Failure:
    """Classify what the seam or a dialect raised before the answer's first token."""
    if isinstance(error, upstream.ConnectTimedOut):
        return next_candidate("connect_timeout", "no connection to the provider in time")
    if isinstance(error, upstream.ConnectFailed):
        return Failure("connect_failed", "no connection to the provider", Verdict.RETRY_HERE)
    if isinstance(error, upstream.StaleConnection):
        return Failure("upstream_reset", "the provider closed a kept connection", Verdict.RETRY_HERE, trips=False)
    if isinstance(error, upstream.Disconnected):
        return next_candidate("upstream_reset", "the provider ended the connection without an answer")
    if isinstance(error, upstream.BodyTooLarge):
        return next_candidate("upstream_too_large", str(error))
    if isinstance(error, (upstream.NotHttp, Undecodable)):
        return next_candidate("upstream_malformed", "the provider's answer could not be read")
    if isinstance(error, ReportedError):
        return _classify(error.status, error.code, error.message, {}, None)
    if isinstance(error, Untranslatable):
        return Failure("unsupported_by_provider", error.message, Verdict.NEXT_CANDIDATE, trips=False, param=error.param)
    raise error


def from_response(status: int, headers: Mapping[str, str], body: bytes, now: float) -> Failure:
    """Classify an answer that is not 200.

    Args:
        status: The HTTP status.
        headers: Case-insensitive.
        body: As much of it as was read.
        now: Unix seconds, for dates in headers.
    """
    error = _error_object(body)
    code = error.get("code")
    if not isinstance(code, str):
        code = error.get("type") or error.get("status") or ""
    return _classify(status, str(code), str(error.get("message") or ""), headers, retry_after_s(headers, error, now))


def _error_object(body: bytes) -> dict[str, Any]:
    """The `error` member in which all three dialects report, wherever it is; empty if there is none."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    if isinstance(value, list) and value:  # Gemini's streams report in an array
        value = value[0]
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else {}


_CONTEXT: Final = re.compile(
    r"context[ _](length|window)|maximum context|prompt is too long|exceeds? (the )?(maximum|max|limit)[^.]*tokens"
    r"|token count[^.]*exceeds|too many (input )?tokens|input[^.]*too long|reduce the length",
    re.IGNORECASE,
)
_FILTER: Final = re.compile(
    r"content[ _](filter|policy|management)|safety (system|filter)|was blocked|usage polic|invalid_prompt",
    re.IGNORECASE,
)
_OUR_ACCOUNT: Final = re.compile(r"api[ _-]?key|credit balance|billing|quota|organi[sz]ation", re.IGNORECASE)
"""Some providers answer 400 where their own account holder, which is us, is at fault."""
_MISCONFIGURED: Final = {
    401: "upstream_credentials_refused",
    402: "upstream_account_unpaid",
    403: "upstream_forbidden",
    404: "upstream_model_missing",
    405: "upstream_misconfigured",
}
_CALLERS: Final = frozenset({400, 409, 413, 415, 422})


def _classify(status: int, code: str, message: str, headers: Mapping[str, str], retry_after: float | None) -> Failure:
    text = f"{code} {message}"
    if status in _CALLERS:
        if status == 413 or _CONTEXT.search(text):
            return Failure(
                "context_length_exceeded",
                _told(message, "the request is longer than the model's context"),
                Verdict.LARGER_CONTEXT,
                status,
                trips=False,
                param="messages",
            )
        if _FILTER.search(text):
            said = _told(message, "the provider's content filter refused the request")
            return Failure("content_filter", said, Verdict.TELL_CALLER, status, trips=False, param="messages")
        if _OUR_ACCOUNT.search(text):
            return next_candidate(
                "upstream_credentials_refused", "the provider refused the gateway", http_status=status
            )
        if status != 409:
            said = _told(message, "the provider refused the request")
            return Failure("invalid_request", said, Verdict.TELL_CALLER, status, trips=False)
    if status in _MISCONFIGURED:
        return next_candidate(_MISCONFIGURED[status], "the provider refused the gateway", http_status=status)
    if status == 429:
        said = "the provider limits the gateway's rate"
        return next_candidate("upstream_rate_limited", said, http_status=status, retry_after_s=retry_after)
    said = "the provider failed"
    return next_candidate("upstream_error", said, http_status=status, retry_after_s=retry_after)


def _told(message: str, otherwise: str) -> str:
    """A provider's words for the caller: bounded, on one line."""
    printable = "".join(character if character.isprintable() else " " for character in message[:8192])
    return " ".join(printable.split())[:MESSAGE_CHARACTERS_MAX] or otherwise


_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")
_LIMITS: Final = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
)


def retry_after_s(headers: Mapping[str, str], error: Mapping[str, Any], now: float) -> float | None:
    """How long the provider asks to be left alone, in seconds, at most `RETRY_AFTER_S_MAX`; None if it does not say.

    Read from `retry-after-ms`, `Retry-After` (RFC 9110: seconds or a date), the reset of a rate limit that has nothing left, or
    Gemini's `RetryInfo` in the body.
    """
    found = _milliseconds(headers.get("retry-after-ms")) or _seconds_or_date(headers.get("retry-after"), now)
    if found is None:
        resets = [_reset(headers.get(reset), now) for left, reset in _LIMITS if headers.get(left) == "0"]
        found = max((reset for reset in resets if reset is not None), default=None)
    if found is None and isinstance(error.get("details"), list):
        delays = [detail.get("retryDelay") for detail in error["details"] if isinstance(detail, dict)]
        found = next((_duration(delay) for delay in delays if isinstance(delay, str)), None)
    return None if found is None else min(max(found, 0.0), RETRY_AFTER_S_MAX)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text, re.ASCII) else None


def _milliseconds(text: str | None) -> float | None:
    value = None if text is None else _number(text.strip())
    return None if value is None else value / 1000


def _seconds_or_date(text: str | None, now: float) -> float | None:
    if text is None:
        return None
    seconds = _number(text.strip())
    if seconds is not None:
        return seconds
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - now
    except (ValueError, OverflowError):
        return None


def _reset(text: str | None, now: float) -> float | None:
    """A reset as a duration (``6m0s``), seconds, or a time (RFC 3339)."""
    if text is None:
        return None
    known = _number(text) if _number(text) is not None else _duration(text)
    if known is not None:
        return known
    try:
        return datetime.datetime.fromisoformat(text).timestamp() - now
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    match = _DURATION.fullmatch(text.strip()[:32])
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + float(seconds or 0) + int(milliseconds or 0) / 1000
