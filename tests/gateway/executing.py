"""What the execution tests share: requests, candidates, an executor over scripted upstreams."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson

from gateway.dialects.canonical import ChatRequest
from gateway.dialects.openai_chat import parse_request
from gateway.execution.breakers import Breakers
from gateway.execution.failover import Executor
from gateway.execution.streams import Running
from gateway.providers.registry import Registry
from gateway.routing.catalog import Candidate
from gateway.settings import ProviderSettings, RoutingSettings, Settings, TimeoutSettings
from payments.money import Price
from tests.gateway.scripted import Script, Seen, Wire
from tests.gateway.wires import OPENAI

PUBLIC_MODEL = "public-model"


def count_text(text: str, tokenizer: str) -> int:
    """A count that tests can do in their heads: words."""
    return len(text.split())


def count_input(request: ChatRequest, tokenizer: str) -> int:
    """A count that is recognized at once."""
    return 77


def chat(*, stream: bool = False, **more: Any) -> ChatRequest:
    """A request."""
    body = {"model": PUBLIC_MODEL, "messages": [{"role": "user", "content": "Say hello"}], "stream": stream, **more}
    return parse_request(body, orjson.dumps(body))


def candidate(provider: str, *, context_tokens: int = 100_000, max_output_tokens: int = 4096) -> Candidate:
    """A candidate at a provider."""
    return Candidate(
        id=f"{PUBLIC_MODEL}@{provider}",
        model=PUBLIC_MODEL,
        provider=provider,
        upstream_model=f"{provider}-model",
        price=Price(input=1, output=1),
        context_tokens=context_tokens,
        max_output_tokens=max_output_tokens,
        capabilities=frozenset(),
        tokens_per_second=10_000,
    )


@contextlib.asynccontextmanager
async def executing(
    providers: Mapping[str, tuple[str, str]],
    *,
    breakers: Breakers | None = None,
    attempts_max: int = 4,
    **timeouts_ms: int,
) -> AsyncIterator[Executor]:
    """An executor over providers of the form name → (dialect, URL)."""
    limits = {
        "connect_ms": 2_000,
        "first_token_ms": 5_000,
        "between_tokens_ms": 5_000,
        "total_ms": 20_000,
    } | timeouts_ms
    settings = Settings(
        providers={
            name: ProviderSettings(dialect=dialect, base_url=url, api_key_env="TEST_KEY")  # type: ignore[arg-type]
            for name, (dialect, url) in providers.items()
        },
        routing=RoutingSettings(attempts_max=attempts_max),
        timeouts=TimeoutSettings(**limits),
    )
    registry = Registry.from_settings(settings, {"TEST_KEY": "secret-key"})
    executor = Executor(settings, registry, count_text=count_text, count_input=count_input, breakers=breakers)
    try:
        yield executor
    finally:
        await executor.aclose()


async def read(running: Running) -> list[dict[str, Any]]:
    """All frames of a stream, decoded."""
    data = b"".join([frames async for frames in running.frames()])
    await running.aclose()
    events = data.split(b"\n\n")
    assert events.pop() == b""
    return [orjson.loads(event.removeprefix(b"data: ")) for event in events]


def said(frames: list[dict[str, Any]]) -> str:
    """The text of a stream."""
    return "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame.get("choices", ()))


async def good(seen: Seen, wire: Wire) -> None:
    """Answers in OpenAI's dialect."""
    if seen.body.get("stream"):
        await wire.stream_head()
        await wire.events(OPENAI.start, OPENAI.hello, OPENAI.world, OPENAI.finish, OPENAI.usage, OPENAI.end)
        await wire.end()
    else:
        await wire.json(OPENAI.whole)


def status(code: int, body: object = None, **headers: str) -> Script:
    """Answers with an error status."""

    async def script(seen: Seen, wire: Wire) -> None:
        await wire.json(body or {"error": {"message": "no", "type": "some_error"}}, code, **headers)

    return script
