"""Streams after their first token: failures, and callers who go away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from payments.money import Usage
from tests.gateway.executing import candidate, chat, executing, good, read, said
from tests.gateway.scripted import Script, Seen, Wire, scripted
from tests.gateway.wires import ALL, ANTHROPIC, OPENAI, WireOf

EVERY_DIALECT = pytest.mark.parametrize("wire_of", ALL, ids=lambda wire_of: wire_of.dialect)


async def silence(seen: Seen, wire: Wire) -> None:
    """Never answers."""
    await wire.hang()


def after_hello(wire_of: WireOf, then: Callable[[Wire], Any]) -> Script:
    """Streams "Hello ", then does something else."""

    async def script(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.events(wire_of.start, wire_of.hello)
        result = then(wire)
        if result is not None:
            await result

    return script


async def _regular_end(wire: Wire) -> None:
    await wire.end()


async def _malformed(wire: Wire) -> None:
    await wire.events(b'data: {"choices": [{\n\n')
    await wire.hang()


async def _half_an_event(wire: Wire) -> None:
    await wire.events(b'data: {"choices": [{"del')
    await wire.end()


async def _pings(wire: Wire) -> None:
    for _ in range(50):
        await wire.events(b": ping\n\n")
        await asyncio.sleep(0.02)
    await wire.hang()


@EVERY_DIALECT
@pytest.mark.parametrize(
    ("then", "code"),
    [
        (Wire.cut, "upstream_cut"),
        (Wire.reset, "upstream_cut"),
        (_regular_end, "upstream_cut"),
        (_half_an_event, "upstream_cut"),
        (_malformed, "upstream_malformed"),
        (Wire.hang, "upstream_stalled"),
        (_pings, "upstream_stalled"),
    ],
)
async def test_failure_after_the_first_token_ends_in_an_error_and_no_finish(
    wire_of: WireOf, then: Callable[[Wire], Any], code: str
) -> None:
    async with (
        scripted(after_hello(wire_of, then)) as upstream,
        scripted(good) as healthy,
        executing(
            {"up": (wire_of.dialect, upstream.url), "healthy": ("openai_chat", healthy.url)}, between_tokens_ms=100
        ) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up"), candidate("healthy")], 10)
        frames = await read(running)
    assert said(frames) == "Hello "
    assert frames[-1]["error"]["code"] == running.failure == code
    assert "incomplete" in frames[-1]["error"]["message"]
    assert all(choice["finish_reason"] is None for frame in frames[:-1] for choice in frame["choices"])
    assert running.finish is None
    assert not healthy.seen
    assert [(attempt.status, attempt.error_code) for attempt in running.attempts] == [("failed", code)]
    input_tokens = 11 if wire_of is ANTHROPIC else 77
    assert (running.usage.input_tokens, running.usage.output_tokens, running.usage_source) == (
        input_tokens,
        1,
        "counted",
    )


@EVERY_DIALECT
async def test_error_event_in_the_middle_keeps_what_came_before_it(wire_of: WireOf) -> None:
    async def script(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.events(wire_of.start + wire_of.hello + wire_of.world + wire_of.error)
        await wire.end()

    async with (
        scripted(script) as upstream,
        executing({"up": (wire_of.dialect, upstream.url)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 10)
        frames = await read(running)
    assert said(frames) == "Hello world"
    assert frames[-1]["error"]["code"] == "upstream_error"


@EVERY_DIALECT
async def test_closing_a_stream_stops_the_upstream_and_counts_what_was_delivered(wire_of: WireOf) -> None:
    async with (
        scripted(after_hello(wire_of, Wire.hang)) as upstream,
        executing({"up": (wire_of.dialect, upstream.url)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 10)
        await anext(running.frames())
        await running.aclose()
        await upstream.gone.wait()
        await running.aclose()
    assert (running.usage.output_tokens, running.usage_source, running.failure) == (1, "counted", None)
    assert running.attempts[-1].error_code == "caller_hung_up"
    assert [frames async for frames in running.frames()] == []


async def test_stream_that_its_caller_did_not_wait_for_costs_its_input() -> None:
    async with (
        scripted(after_hello(OPENAI, Wire.hang)) as upstream,
        executing({"up": ("openai_chat", upstream.url)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 10)
        await running.aclose()
    # And what had come of it: the provider bills that, too.
    assert running.usage == Usage(input_tokens=77, output_tokens=1)


@pytest.mark.parametrize("stream", [False, True], ids=["complete", "streamed"])
async def test_cancelling_the_start_stops_the_upstream(stream: bool) -> None:
    async with scripted(silence) as upstream, executing({"up": ("openai_chat", upstream.url)}) as executor:
        task = asyncio.create_task(executor.start(chat(stream=stream), [candidate("up")], 10))
        await upstream.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.gone.wait()
        assert executor.breakers.of(candidate("up").id).state.value == "closed"


async def test_slow_caller_is_not_a_stalled_upstream() -> None:
    async def pausing(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.events(OPENAI.start, OPENAI.hello)
        await read_on.wait()
        await wire.events(OPENAI.world)
        await asyncio.sleep(0.2)
        await wire.events(OPENAI.finish, OPENAI.end)
        await wire.end()

    read_on = asyncio.Event()
    async with (
        scripted(pausing) as upstream,
        executing({"up": ("openai_chat", upstream.url)}, between_tokens_ms=100) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 10)
        frames = running.frames()
        data = await anext(frames)
        read_on.set()
        data += await anext(frames)
        await asyncio.sleep(0.4)  # the caller's pause, which covers the upstream's
        async for more in frames:
            data += more
    assert running.failure is None
    assert b'"finish_reason":"stop"' in data
