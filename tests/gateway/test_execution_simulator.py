"""The executor against the simulator: every behaviour of an upstream, in each dialect, between real processes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from gateway.dev.simulator.process import Simulator
from gateway.execution.errors import CallerFault, ExecutionFailed
from gateway.execution.streams import Running
from gateway.routing.catalog import Candidate
from tests.gateway.executing import candidate, chat, executing, read, said

DIALECTS = ("openai_chat", "anthropic_messages", "gemini")
EVERY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS)
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["complete", "streamed"])
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
IMPATIENT: dict[str, dict[str, Any]] = {
    "sim-silent": {"first_token_ms": 1_000},
    "sim-stall-3": {"between_tokens_ms": 1_000},
}
"""With those who say nothing; all others are given the time that a loaded machine may need."""


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator.start() as running:
        yield running


def providers(simulator: Simulator) -> dict[str, tuple[str, str]]:
    return {
        "openai_chat": ("openai_chat", simulator.openai_url),
        "anthropic_messages": ("anthropic_messages", simulator.anthropic_url),
        "gemini": ("gemini", simulator.gemini_url),
    }


def named(dialect: str, model: str) -> Candidate:
    return dataclasses.replace(candidate(dialect), id=f"{model}@{dialect}", upstream_model=model)


async def told(running: Running, *, stream: bool) -> str:
    if stream:
        return said(await read(running))
    return orjson.loads(running.body)["choices"][0]["message"]["content"] or ""


@EVERY_DIALECT
@BOTH_WAYS
async def test_answer_and_its_usage(simulator: Simulator, dialect: str, stream: bool) -> None:
    model = "sim-tokens-12-reasoning-4-cached-2"
    async with executing(providers(simulator)) as executor:
        running = await executor.start(chat(stream=stream), [named(dialect, model)], 100)
        assert await told(running, stream=stream)
    assert (running.usage_source, running.finish, running.failure) == ("provider", "stop", None)
    assert running.usage.cached_input_tokens == 2
    assert running.usage.output_tokens == 16


@EVERY_DIALECT
@BOTH_WAYS
async def test_token_limit_ends_the_answer(simulator: Simulator, dialect: str, stream: bool) -> None:
    async with executing(providers(simulator)) as executor:
        running = await executor.start(chat(stream=stream), [named(dialect, "sim-tokens-50")], 7)
        await told(running, stream=stream)
    assert (running.finish, running.usage.output_tokens) == ("length", 7)


@EVERY_DIALECT
@BOTH_WAYS
async def test_tool_call_and_its_result(simulator: Simulator, dialect: str, stream: bool) -> None:
    async with executing(providers(simulator)) as executor:
        route = [named(dialect, "sim-tool")]
        running = await executor.start(chat(stream=stream, tools=[TOOL]), route, 100)
        if stream:
            parts = [
                part
                for frame in await read(running)
                for choice in frame["choices"]
                for part in choice["delta"].get("tool_calls", ())
            ]
            call: dict[str, Any] = {
                "id": parts[0]["id"],
                "type": "function",
                "function": {
                    "name": parts[0]["function"]["name"],
                    "arguments": "".join(part["function"].get("arguments", "") for part in parts),
                },
            }
        else:
            (call,) = orjson.loads(running.body)["choices"][0]["message"]["tool_calls"]
        assert running.finish == "tool_calls"
        assert call["function"]["name"] == "weather"
        assert "city" in orjson.loads(call["function"]["arguments"])
        history = [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
        ]
        running = await executor.start(chat(stream=stream, tools=[TOOL], messages=history), route, 100)
        assert await told(running, stream=stream)
        assert running.finish == "stop"


@EVERY_DIALECT
@BOTH_WAYS
@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("sim-error-503", "upstream_error"),
        ("sim-error-500", "upstream_error"),
        ("sim-error-429-retry-2", "upstream_rate_limited"),
        ("sim-error-401", "upstream_credentials_refused"),
        ("sim-error-404", "upstream_model_missing"),
        ("sim-reset", "upstream_reset"),
        ("sim-silent", "upstream_silent"),
        ("sim-cut-0", "upstream_cut"),
        ("sim-malformed-0", "upstream_malformed"),
        ("sim-abort-0", "upstream_error"),
        ("sim-quota", None),
    ],
)
async def test_failure_before_the_first_token_fails_over(
    simulator: Simulator, dialect: str, stream: bool, model: str, code: str | None
) -> None:
    async with executing(providers(simulator), **IMPATIENT.get(model, {})) as executor:
        healthy = named("openai_chat", "sim-fast")
        running = await executor.start(chat(stream=stream), [named(dialect, model), healthy], 10)
        assert await told(running, stream=stream)
    assert [attempt.status for attempt in running.attempts] == ["failed", "ok"]
    assert running.candidate is healthy
    assert code in (None, running.attempts[0].error_code)


@EVERY_DIALECT
@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("sim-cut-3", "upstream_cut"),
        ("sim-stall-3", "upstream_stalled"),
        ("sim-malformed-3", "upstream_malformed"),
        ("sim-abort-3", "upstream_error"),
    ],
)
async def test_failure_in_the_middle_is_told(simulator: Simulator, dialect: str, model: str, code: str) -> None:
    async with executing(providers(simulator), **IMPATIENT.get(model, {})) as executor:
        running = await executor.start(chat(stream=True), [named(dialect, model)], 50)
        frames = await read(running)
    assert frames[-1]["error"]["code"] == running.failure == code
    assert said(frames)
    assert running.usage_source == "counted"
    assert running.usage.output_tokens > 0
    assert running.finish is None


@EVERY_DIALECT
async def test_missing_end_is_judged_by_the_finish_reason(simulator: Simulator, dialect: str) -> None:
    async with executing(providers(simulator)) as executor:
        running = await executor.start(chat(stream=True), [named(dialect, "sim-noend")], 50)
        await read(running)
    # Gemini has no end but the chunk with the finish reason.
    assert (running.failure, running.finish) == (("upstream_cut", None) if dialect == "gemini" else (None, "stop"))


@EVERY_DIALECT
@BOTH_WAYS
async def test_missing_usage_is_counted(simulator: Simulator, dialect: str, stream: bool) -> None:
    async with executing(providers(simulator)) as executor:
        running = await executor.start(chat(stream=stream), [named(dialect, "sim-nousage")], 50)
        text = await told(running, stream=stream)
    assert (running.usage.input_tokens, running.usage.output_tokens) == (77, len(text.split()))
    assert running.usage_source == "counted"


@EVERY_DIALECT
@BOTH_WAYS
@pytest.mark.parametrize(
    ("model", "code"), [("sim-context", "context_length_exceeded"), ("sim-filter", "content_filter")]
)
async def test_callers_fault_is_told(simulator: Simulator, dialect: str, stream: bool, model: str, code: str) -> None:
    async with executing(providers(simulator)) as executor:
        with pytest.raises(CallerFault) as fault:
            await executor.start(chat(stream=stream), [named(dialect, model), named("gemini", "sim-fast")], 50)
    assert (fault.value.status, fault.value.code) == (400, code)


@EVERY_DIALECT
async def test_hanging_up_is_seen_by_the_provider(simulator: Simulator, dialect: str) -> None:
    simulator.clear()
    async with executing(providers(simulator)) as executor:
        running = await executor.start(chat(stream=True), [named(dialect, "sim-tokens-5000-tps-50")], 5000)
        await anext(running.frames())
        await running.aclose()
        for _ in range(200):
            if not simulator.under_way():
                break
            await asyncio.sleep(0.02)
    assert [attempt["outcome"] for attempt in simulator.attempts()] == ["disconnected"]


async def test_all_dialects_failing_is_reported_with_every_attempt(simulator: Simulator) -> None:
    async with executing(providers(simulator)) as executor:
        with pytest.raises(ExecutionFailed) as failed:
            await executor.start(chat(), [named(dialect, "sim-error-500") for dialect in DIALECTS], 50)
    assert [attempt.http_status for attempt in failed.value.attempts] == [500, 500, 500]
