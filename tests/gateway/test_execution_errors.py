"""What an upstream's failure means."""

from __future__ import annotations

import email.utils
from typing import Any

import orjson
import pytest

from gateway.execution.errors import RETRY_AFTER_S_MAX, Verdict, from_response, retry_after_s

NOW = 1_750_000_000.0


@pytest.mark.parametrize(
    ("status", "error", "code", "verdict"),
    [
        (500, {}, "upstream_error", Verdict.NEXT_CANDIDATE),
        (529, {"type": "overloaded_error"}, "upstream_error", Verdict.NEXT_CANDIDATE),
        (408, {}, "upstream_error", Verdict.NEXT_CANDIDATE),
        (409, {}, "upstream_error", Verdict.NEXT_CANDIDATE),
        (429, {"code": "insufficient_quota"}, "upstream_rate_limited", Verdict.NEXT_CANDIDATE),
        (401, {}, "upstream_credentials_refused", Verdict.NEXT_CANDIDATE),
        (404, {"code": "model_not_found"}, "upstream_model_missing", Verdict.NEXT_CANDIDATE),
        (400, {"message": "API key not valid."}, "upstream_credentials_refused", Verdict.NEXT_CANDIDATE),
        (400, {"message": "Your credit balance is too low"}, "upstream_credentials_refused", Verdict.NEXT_CANDIDATE),
        (400, {"code": "context_length_exceeded"}, "context_length_exceeded", Verdict.LARGER_CONTEXT),
        (
            400,
            {"message": "prompt is too long: 9 tokens > 8 maximum"},
            "context_length_exceeded",
            Verdict.LARGER_CONTEXT,
        ),
        (413, {"type": "request_too_large"}, "context_length_exceeded", Verdict.LARGER_CONTEXT),
        (400, {"code": "content_filter"}, "content_filter", Verdict.TELL_CALLER),
        (400, {"message": "Invalid value for `stop`"}, "invalid_request", Verdict.TELL_CALLER),
        (422, {"message": "unknown field"}, "invalid_request", Verdict.TELL_CALLER),
    ],
)
def test_classes_of_errors(status: int, error: dict[str, Any], code: str, verdict: Verdict) -> None:
    failure = from_response(status, {}, orjson.dumps({"error": error}), NOW)
    assert (failure.code, failure.verdict, failure.http_status) == (code, verdict, status)


def test_only_the_candidates_own_faults_speak_against_it() -> None:
    assert from_response(500, {}, b"", NOW).trips
    assert not from_response(400, {}, b"", NOW).trips


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"[1]", b'"x"', b"null", b'{"error":3}', b'{"error":"text"}'])
def test_any_body_of_an_error_is_survived(body: bytes) -> None:
    assert from_response(503, {}, body, NOW).code == "upstream_error"
    assert from_response(400, {}, body, NOW).code == "invalid_request"


def test_providers_words_are_bounded_and_on_one_line() -> None:
    body = orjson.dumps({"error": {"message": "bad\n\x00 thing " + "x" * 10_000}})
    message = from_response(400, {}, body, NOW).message
    assert message.startswith("bad thing xxx")
    assert len(message) == 500


def test_providers_words_about_our_account_are_kept_from_the_caller() -> None:
    body = orjson.dumps({"error": {"message": "Incorrect API key provided: sk-123"}})
    for status in (400, 401, 403):
        assert "sk-123" not in from_response(status, {}, body, NOW).message


@pytest.mark.parametrize(
    ("headers", "error", "expected"),
    [
        ({}, {}, None),
        ({"retry-after": "7"}, {}, 7),
        ({"retry-after": "0.5"}, {}, 0.5),
        ({"retry-after": email.utils.formatdate(NOW + 20, usegmt=True)}, {}, 20),
        ({"retry-after": email.utils.formatdate(NOW - 20, usegmt=True)}, {}, 0),
        ({"retry-after": "soon"}, {}, None),
        ({"retry-after": "999999"}, {}, RETRY_AFTER_S_MAX),
        ({"retry-after-ms": "1500", "retry-after": "9"}, {}, 1.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, {}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, {}, 0.12),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "6m0s"}, {}, None),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2025-06-15T15:07:10Z",
            },
            {},
            30,
        ),
        ({}, {"details": [{"@type": "x"}, {"retryDelay": "37s"}]}, 37),
        ({}, {"details": ["nonsense", {"retryDelay": 5}]}, None),
    ],
)
def test_how_long_a_provider_asks_to_be_left_alone(
    headers: dict[str, str], error: dict[str, Any], expected: float | None
) -> None:
    assert retry_after_s(headers, error, NOW) == (None if expected is None else pytest.approx(expected))
