"""What a caller gets when an upstream answers, in each dialect, streamed and not."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from payments.money import Usage
from tests.gateway.executing import PUBLIC_MODEL, candidate, chat, executing, read, said
from tests.gateway.scripted import Script, Seen, Wire, scripted
from tests.gateway.wires import ALL, ANTHROPIC, GEMINI, OPENAI, WireOf

EVERY_DIALECT = pytest.mark.parametrize("wire_of", ALL, ids=lambda wire_of: wire_of.dialect)


def answers(wire_of: WireOf, *events: bytes) -> Script:
    """Streams `events` (a whole good answer by default), or gives the complete answer."""

    async def script(seen: Seen, wire: Wire) -> None:
        if not seen.body.get("stream") and "stream" not in seen.path:
            await wire.json(wire_of.whole)
            return
        await wire.stream_head()
        for part in events or (wire_of.start, wire_of.hello, wire_of.world, wire_of.finish, wire_of.usage, wire_of.end):
            if part:
                await wire.events(part)
        await wire.end()

    return script


@EVERY_DIALECT
async def test_complete_answer_carries_the_public_model_and_the_providers_usage(wire_of: WireOf) -> None:
    async with (
        scripted(answers(wire_of)) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        running = await executor.start(chat(), [candidate("up")], 50)
    body = orjson.loads(running.body)
    assert body["model"] == PUBLIC_MODEL
    assert body["choices"][0]["message"]["content"] == "Hello world"
    assert body["choices"][0]["finish_reason"] == running.finish == "stop"
    assert running.usage_source == "provider"
    assert running.usage.input_tokens == 11
    assert running.usage.cached_input_tokens == 3
    assert running.usage.output_tokens == 5
    assert body["usage"]["total_tokens"] == 16
    assert [attempt.status for attempt in running.attempts] == ["ok"]


@EVERY_DIALECT
async def test_stream_carries_the_public_model_the_text_and_one_finish(wire_of: WireOf) -> None:
    async with (
        scripted(answers(wire_of)) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 50)
        frames = await read(running)
    assert said(frames) == "Hello world"
    assert {frame["model"] for frame in frames} == {PUBLIC_MODEL}
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert [choice["finish_reason"] for frame in frames for choice in frame["choices"]][-1] == "stop"
    assert all("usage" not in frame for frame in frames), "nobody asked for usage"
    assert (running.usage.input_tokens, running.usage.cached_input_tokens, running.usage.output_tokens) == (11, 3, 5)
    assert (running.usage_source, running.finish, running.failure) == ("provider", "stop", None)


@EVERY_DIALECT
async def test_usage_chunk_comes_last_where_it_was_asked_for(wire_of: WireOf) -> None:
    async with (
        scripted(answers(wire_of)) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        request = chat(stream=True, stream_options={"include_usage": True})
        frames = await read(await executor.start(request, [candidate("up")], 50))
    with_usage = [frame for frame in frames if frame.get("usage")]
    assert with_usage == frames[-1:]
    assert frames[-1]["choices"] == []
    assert (frames[-1]["usage"]["prompt_tokens"], frames[-1]["usage"]["completion_tokens"]) == (11, 5)


@EVERY_DIALECT
async def test_missing_usage_is_counted_and_still_told_to_who_asked(wire_of: WireOf) -> None:
    start = wire_of.start.replace(b'"usage"', b'"unused"')
    script = answers(wire_of, start, wire_of.hello, wire_of.world, wire_of.finish, wire_of.end)
    async with (
        scripted(script) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        request = chat(stream=True, stream_options={"include_usage": True})
        running = await executor.start(request, [candidate("up")], 50)
        frames = await read(running)
    assert (running.usage, running.usage_source) == (Usage(input_tokens=77, output_tokens=2), "counted")
    assert frames[-1]["usage"]["total_tokens"] == 79


@EVERY_DIALECT
async def test_missing_usage_of_a_complete_answer_is_counted(wire_of: WireOf) -> None:
    async def script(seen: Seen, wire: Wire) -> None:
        await wire.json({name: value for name, value in wire_of.whole.items() if not name.startswith("usage")})

    async with (
        scripted(script) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        running = await executor.start(chat(), [candidate("up")], 50)
    assert (running.usage, running.usage_source) == (Usage(input_tokens=77, output_tokens=2), "counted")
    assert orjson.loads(running.body)["usage"]["completion_tokens"] == 2


@EVERY_DIALECT
async def test_missing_end_marker_after_the_finish_is_a_whole_answer(wire_of: WireOf) -> None:
    async def script(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        await wire.events(wire_of.start, wire_of.hello, wire_of.finish)
        wire.cut()

    async with (
        scripted(script) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 50)
        frames = await read(running)
    assert (said(frames), running.failure, running.finish) == ("Hello ", None, "stop")


async def test_events_cut_anywhere_on_the_way_are_put_together() -> None:
    whole = b"".join((OPENAI.start, OPENAI.hello, OPENAI.world, OPENAI.finish, OPENAI.usage, OPENAI.end))
    pieces = [whole[at : at + 7] for at in range(0, len(whole), 7)]
    async with (
        scripted(answers(OPENAI, *pieces)) as upstream,
        executing({"up": ("openai_chat", upstream.url)}) as executor,
    ):
        running = await executor.start(chat(stream=True), [candidate("up")], 50)
        assert said(await read(running)) == "Hello world"
    assert running.usage_source == "provider"


async def test_connections_are_used_again_after_streams_and_answers() -> None:
    async with (
        scripted(answers(OPENAI)) as upstream,
        executing({"up": ("openai_chat", upstream.url)}) as executor,
    ):
        for _ in range(3):
            await read(await executor.start(chat(stream=True), [candidate("up")], 50))
        assert upstream.connections == 1


async def test_what_only_the_shared_dialect_knows_passes_through() -> None:
    async with (
        scripted(answers(OPENAI)) as upstream,
        executing({"up": ("openai_chat", upstream.url)}) as executor,
    ):
        request = chat(seed=7, logit_bias={"1": 2}, provider={"order": ["x"]}, models=["a"], max_completion_tokens=9)
        running = await executor.start(request, [candidate("up")], 9)
    sent = upstream.seen[0].body
    assert orjson.loads(running.body)["system_fingerprint"] == "fp_1"
    assert (sent["seed"], sent["logit_bias"], sent["model"]) == (7, {"1": 2}, "up-model")
    assert sent["max_completion_tokens"] == 9
    assert not {"provider", "models", "max_tokens"} & sent.keys()


async def test_token_limit_is_always_sent_and_bounded_by_the_candidate() -> None:
    async with (
        scripted(answers(OPENAI)) as upstream,
        executing({"up": ("openai_chat", upstream.url)}) as executor,
    ):
        await read(await executor.start(chat(stream=True), [candidate("up", max_output_tokens=20)], 50))
    assert upstream.seen[0].body["max_tokens"] == 20
    assert upstream.seen[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("wire_of", "path", "header"),
    [
        (OPENAI, "/v1/chat/completions", ("authorization", "Bearer secret-key")),
        (ANTHROPIC, "/v1/messages", ("x-api-key", "secret-key")),
        (GEMINI, "/v1beta/models/up-model:streamGenerateContent?alt=sse", ("x-goog-api-key", "secret-key")),
    ],
)
async def test_each_dialect_has_its_own_path_and_key_header(
    wire_of: WireOf, path: str, header: tuple[str, str]
) -> None:
    async with (
        scripted(answers(wire_of)) as upstream,
        executing({"up": (wire_of.dialect, upstream.url + wire_of.base)}) as executor,
    ):
        await read(await executor.start(chat(stream=True), [candidate("up")], 50))
    assert upstream.seen[0].path == path
    assert upstream.seen[0].headers[header[0]] == header[1]
    assert upstream.seen[0].headers.get("anthropic-version") == ("2023-06-01" if wire_of is ANTHROPIC else None)


async def test_several_choices_finish_with_the_last_of_them() -> None:
    def choice(index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        body = {"id": "c", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}
        return b"data: " + orjson.dumps(body) + b"\n\n"

    first = (choice(0, {"content": "a"}), choice(0, {}, "stop"), choice(1, {"content": "b"}))
    async with (
        scripted(answers(OPENAI, *first, choice(1, {}, "length"), OPENAI.end)) as whole,
        scripted(answers(OPENAI, *first)) as truncated,
        executing({"whole": ("openai_chat", whole.url), "cut": ("openai_chat", truncated.url)}) as executor,
    ):
        running = await executor.start(chat(stream=True, n=2), [candidate("whole")], 50)
        assert said(await read(running)) == "ab"
        assert (running.failure, running.usage.output_tokens) == (None, 1)
        running = await executor.start(chat(stream=True, n=2), [candidate("cut")], 50)
        assert "error" in (await read(running))[-1]
        assert running.failure == "upstream_cut"
