"""Upstreams that fail before the first token: who is tried next, who is left alone, what the caller is told."""

from __future__ import annotations

import orjson
import pytest

from gateway.execution.errors import CallerFault, ExecutionFailed
from tests.gateway.executing import candidate, chat, executing, good, read, said, status
from tests.gateway.scripted import Script, Seen, Wire, scripted
from tests.gateway.wires import ALL, OPENAI, WireOf

EVERY_DIALECT = pytest.mark.parametrize("wire_of", ALL, ids=lambda wire_of: wire_of.dialect)
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["complete", "streamed"])


async def reset(seen: Seen, wire: Wire) -> None:
    """Resets before headers."""
    wire.reset()


async def silence(seen: Seen, wire: Wire) -> None:
    """Never answers."""
    await wire.hang()


async def not_http(seen: Seen, wire: Wire) -> None:
    """Speaks something else."""
    await wire.bytes(b"220 mail.example ESMTP\r\n\r\n")
    wire.cut()


async def endless_header(seen: Seen, wire: Wire) -> None:
    """Exceeds every limit of a header."""
    await wire.bytes(b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 100_000 + b"\r\ncontent-length: 0\r\n\r\n")


async def no_json(seen: Seen, wire: Wire) -> None:
    """A success that is a web page."""
    await wire.body(b"<html>welcome</html>")


async def no_choices(seen: Seen, wire: Wire) -> None:
    """A success without an answer."""
    await wire.json({"id": "x", "choices": []})


async def short_body(seen: Seen, wire: Wire) -> None:
    """Breaks off in the middle of a complete answer."""
    await wire.bytes(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": "x", ')
    wire.cut()


async def error_inside(seen: Seen, wire: Wire) -> None:
    """A success that reports an error."""
    await wire.json({"error": {"message": "upstream of the upstream", "code": 502}})


async def headers_then_silence(seen: Seen, wire: Wire) -> None:
    """Begins a stream and says only comments."""
    await wire.stream_head()
    await wire.events(b": still here\n\n", OPENAI.start)
    await wire.hang()


async def end_without_finish(seen: Seen, wire: Wire) -> None:
    """A stream that ends before its first token."""
    await wire.stream_head()
    await wire.events(OPENAI.start, OPENAI.end)
    await wire.end()


async def error_event_first(seen: Seen, wire: Wire) -> None:
    """A stream that begins with an error."""
    await wire.stream_head()
    await wire.events(OPENAI.start + OPENAI.error)
    await wire.end()


FAILURES: list[tuple[Script, str, int | None]] = [
    (status(500), "upstream_error", 500),
    (status(503), "upstream_error", 503),
    (status(529), "upstream_error", 529),
    (status(429), "upstream_rate_limited", 429),
    (status(401), "upstream_credentials_refused", 401),
    (status(402), "upstream_account_unpaid", 402),
    (status(403), "upstream_forbidden", 403),
    (status(404), "upstream_model_missing", 404),
    (status(302, location="http://127.0.0.1:1/"), "upstream_error", 302),
    (status(400, {"error": {"message": "API key not valid"}}), "upstream_credentials_refused", 400),
    (reset, "upstream_reset", None),
    (silence, "upstream_silent", None),
    (not_http, "upstream_malformed", None),
    (endless_header, "upstream_malformed", None),
]
WHOLE_FAILURES: list[tuple[Script, str, int | None]] = [
    (no_json, "upstream_malformed", None),
    (no_choices, "upstream_malformed", None),
    (short_body, "upstream_cut", None),
    (error_inside, "upstream_error", 502),
]
STREAM_FAILURES: list[tuple[Script, str, int | None]] = [
    (no_json, "upstream_malformed", None),
    (headers_then_silence, "upstream_silent", None),
    (end_without_finish, "upstream_cut", None),
    (error_event_first, "upstream_error", 503),
]


@pytest.mark.parametrize(
    ("script", "code", "http_status", "stream"),
    [(*case, stream) for case in FAILURES for stream in (False, True)]
    + [(*case, False) for case in WHOLE_FAILURES]
    + [(*case, True) for case in STREAM_FAILURES],
)
async def test_failure_before_the_first_token_is_invisible(
    script: Script, code: str, http_status: int | None, stream: bool
) -> None:
    async with (
        scripted(script) as failing,
        scripted(good) as healthy,
        executing(
            {"failing": ("openai_chat", failing.url), "healthy": ("openai_chat", healthy.url)},
            # Both must answer within it, and only who is silent is waited for.
            first_token_ms=500 if code == "upstream_silent" else 5_000,
        ) as executor,
    ):
        candidates = [candidate("failing"), candidate("healthy")]
        running = await executor.start(chat(stream=stream), candidates, 10)
        text = said(await read(running)) if stream else orjson.loads(running.body)["choices"][0]["message"]["content"]
    assert text == "Hello world"
    assert running.candidate.provider == "healthy"
    assert [attempt.status for attempt in running.attempts] == ["failed", "ok"]
    assert running.attempts[0].error_code == code
    assert running.attempts[0].http_status == http_status


async def test_refused_connection_is_tried_twice_and_then_left() -> None:
    async with (
        scripted(good) as healthy,
        executing({"gone": ("openai_chat", "http://127.0.0.1:1"), "healthy": ("openai_chat", healthy.url)}) as executor,
    ):
        running = await executor.start(chat(), [candidate("gone"), candidate("healthy")], 10)
    codes = [attempt.error_code for attempt in running.attempts]
    assert codes == ["connect_failed", "connect_failed", None]


async def test_kept_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    async def once_a_connection(seen: Seen, wire: Wire) -> None:
        if len(upstream.seen) == 2:
            wire.cut()
        else:
            await wire.json(OPENAI.whole)

    async with scripted(once_a_connection) as upstream, executing({"up": ("openai_chat", upstream.url)}) as executor:
        await executor.start(chat(), [candidate("up")], 10)
        running = await executor.start(chat(), [candidate("up")], 10)
    assert [attempt.error_code for attempt in running.attempts] == ["upstream_reset", None]


@EVERY_DIALECT
@BOTH_WAYS
async def test_all_failing_says_so_with_every_attempt(wire_of: WireOf, stream: bool) -> None:
    async with (
        scripted(status(500)) as one,
        scripted(reset) as two,
        executing({"one": (wire_of.dialect, one.url), "two": (wire_of.dialect, two.url)}) as executor,
    ):
        with pytest.raises(ExecutionFailed) as failed:
            await executor.start(chat(stream=stream), [candidate("one"), candidate("two")], 10)
    assert [attempt.error_code for attempt in failed.value.attempts] == ["upstream_error", "upstream_reset"]
    assert str(failed.value.last) == "upstream_reset"


async def test_attempts_are_bounded() -> None:
    async with (
        scripted(status(500)) as upstream,
        executing(dict.fromkeys("abcd", ("openai_chat", upstream.url)), attempts_max=2) as executor,
    ):
        with pytest.raises(ExecutionFailed) as failed:
            await executor.start(chat(), [candidate(name) for name in "abcd"], 10)
    assert len(failed.value.attempts) == len(upstream.seen) == 2


async def test_total_time_bounds_all_attempts_together() -> None:
    async with (
        scripted(silence) as upstream,
        executing(dict.fromkeys("ab", ("openai_chat", upstream.url)), total_ms=150) as executor,
    ):
        with pytest.raises(ExecutionFailed) as failed:
            await executor.start(chat(stream=True), [candidate(name) for name in "ab"], 10)
    assert [attempt.error_code for attempt in failed.value.attempts] == ["upstream_timeout"]


@EVERY_DIALECT
async def test_context_length_goes_to_a_larger_context_only(wire_of: WireOf) -> None:
    async with (
        scripted(status(400, wire_of.context_error)) as small,
        scripted(good) as large,
        executing(
            {
                "small": (wire_of.dialect, small.url),
                "same": ("openai_chat", large.url),
                "large": ("openai_chat", large.url),
            }
        ) as executor,
    ):
        candidates = [candidate("small"), candidate("same"), candidate("large", context_tokens=200_000)]
        running = await executor.start(chat(), candidates, 10)
        assert [attempt.error_code for attempt in running.attempts] == [
            "context_length_exceeded",
            "context_too_small",
            None,
        ]
        with pytest.raises(CallerFault) as fault:
            await executor.start(chat(), candidates[:2], 10)
    assert (fault.value.status, fault.value.code, fault.value.param) == (400, "context_length_exceeded", "messages")
    assert [attempt.status for attempt in fault.value.attempts] == ["failed", "skipped"]


@EVERY_DIALECT
@BOTH_WAYS
async def test_content_filter_is_told_and_nobody_else_is_asked(wire_of: WireOf, stream: bool) -> None:
    async def filtering(seen: Seen, wire: Wire) -> None:
        if "error" in wire_of.filter_error:
            await wire.json(wire_of.filter_error, 400)
        elif stream:
            await wire.stream_head()
            await wire.events(wire_of.filter_error)
            await wire.end()
        else:
            await wire.json(wire_of.filter_error)

    async with (
        scripted(filtering) as strict,
        scripted(good) as healthy,
        executing({"strict": (wire_of.dialect, strict.url), "healthy": ("openai_chat", healthy.url)}) as executor,
    ):
        with pytest.raises(CallerFault) as fault:
            await executor.start(chat(stream=stream), [candidate("strict"), candidate("healthy")], 10)
    assert (fault.value.status, fault.value.code) == (400, "content_filter")
    assert not healthy.seen


async def test_invalid_request_is_told_in_the_providers_words() -> None:
    body = {"error": {"message": "`temperature` is not\nsupported", "type": "invalid_request_error"}}
    async with scripted(status(400, body)) as upstream, executing({"up": ("openai_chat", upstream.url)}) as executor:
        with pytest.raises(CallerFault, match="`temperature` is not supported") as fault:
            await executor.start(chat(), [candidate("up")], 10)
        assert fault.value.code == "invalid_request"
        assert executor.breakers.of(candidate("up").id).state.value == "closed"


async def test_retry_after_is_respected_and_skips_are_recorded() -> None:
    async with (
        scripted(status(429, retry_after="30")) as limited,
        scripted(good) as healthy,
        executing({"limited": ("openai_chat", limited.url), "healthy": ("openai_chat", healthy.url)}) as executor,
    ):
        candidates = [candidate("limited"), candidate("healthy")]
        await executor.start(chat(), candidates, 10)
        running = await executor.start(chat(), candidates, 10)
    assert len(limited.seen) == 1
    assert [(attempt.status, attempt.error_code) for attempt in running.attempts] == [
        ("skipped", "breaker_open"),
        ("ok", None),
    ]


async def test_candidates_are_tried_all_the_same_when_every_breaker_is_open() -> None:
    async with (
        scripted(status(429, retry_after="30")) as limited,
        executing({"limited": ("openai_chat", limited.url)}) as executor,
    ):
        for _ in range(2):
            with pytest.raises(ExecutionFailed):
                await executor.start(chat(), [candidate("limited")], 10)
    assert len(limited.seen) == 2


async def test_provider_without_its_key_is_skipped() -> None:
    async with (
        scripted(good) as healthy,
        executing({"healthy": ("openai_chat", healthy.url)}) as executor,
    ):
        running = await executor.start(chat(), [candidate("unknown"), candidate("healthy")], 10)
    assert [attempt.error_code for attempt in running.attempts] == ["provider_unavailable", None]


async def test_request_that_no_dialect_can_express_is_the_callers_fault() -> None:
    async with executing({"up": ("anthropic_messages", "http://127.0.0.1:1")}) as executor:
        with pytest.raises(CallerFault) as fault:
            await executor.start(chat(n=2), [candidate("up")], 10)
    assert (fault.value.code, fault.value.param) == ("unsupported_by_provider", "n")
    assert [attempt.status for attempt in fault.value.attempts] == ["skipped"]
