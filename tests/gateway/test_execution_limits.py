"""Providers that cannot be used, and answers that are longer than the gateway holds."""

from __future__ import annotations

import pytest

from gateway.execution import attempting, streams
from gateway.execution.errors import ExecutionFailed
from gateway.providers.registry import Registry
from gateway.settings import ProviderSettings, Settings
from tests.gateway.executing import candidate, chat, executing, good, read, said
from tests.gateway.scripted import Seen, Wire, scripted
from tests.gateway.wires import OPENAI


def registry(entry: ProviderSettings, **env: str) -> Registry:
    return Registry.from_settings(Settings(providers={"acme": entry}), env)


def test_missing_key_makes_a_provider_unavailable_and_says_which_variable() -> None:
    entry = ProviderSettings(dialect="gemini", base_url="https://acme.example", api_key_env="ACME_KEY")
    for env in ({}, {"ACME_KEY": " "}):
        (problem,) = registry(entry, **env).problems()
        assert "'acme'" in problem
        assert "ACME_KEY" in problem
    assert registry(entry, ACME_KEY="k").problems() == ()


@pytest.mark.parametrize("key", ["line\nbreak", "umlaut-ü"])
def test_key_that_cannot_be_a_header_makes_a_provider_unavailable(key: str) -> None:
    entry = ProviderSettings(dialect="openai_chat", base_url="https://acme.example", api_key_env="ACME_KEY")
    (problem,) = registry(entry, ACME_KEY=key).problems()
    assert key not in problem


@pytest.mark.parametrize("url", ["localhost:9", "ftp://x", "http://[bad", "", "/v1"])
def test_base_url_that_is_none_makes_a_provider_unavailable(url: str) -> None:
    (problem,) = registry(ProviderSettings(dialect="openai_chat", base_url=url)).problems()
    assert "base_url" in problem


def test_key_does_not_show_in_a_providers_representation() -> None:
    entry = ProviderSettings(dialect="anthropic_messages", base_url="https://acme.example", api_key_env="ACME_KEY")
    provider = registry(entry, ACME_KEY="very-secret").get("acme")
    assert provider is not None
    assert provider.headers["x-api-key"] == "very-secret"
    assert "very-secret" not in repr(provider)


def test_configured_headers_are_added_and_win() -> None:
    entry = ProviderSettings(
        dialect="openai_chat", base_url="https://a.example", headers={"User-Agent": "u", "X-Org": "o"}
    )
    provider = registry(entry).get("acme")
    assert provider is not None
    assert (provider.headers["user-agent"], provider.headers["x-org"]) == ("u", "o")
    assert "authorization" not in provider.headers


async def test_complete_answer_that_is_too_long_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempting, "ANSWER_BYTES_MAX", 100)
    async with scripted(good) as upstream, executing({"up": ("openai_chat", upstream.url)}) as executor:
        with pytest.raises(ExecutionFailed) as failed:
            await executor.start(chat(), [candidate("up")], 10)
    assert failed.value.attempts[0].error_code == "upstream_too_large"


async def test_stream_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless(seen: Seen, wire: Wire) -> None:
        await wire.stream_head()
        while not upstream.gone.is_set():
            await wire.events(OPENAI.hello)

    monkeypatch.setattr(streams, "STREAM_BYTES_MAX", 1_000_000)
    async with scripted(endless) as upstream, executing({"up": ("openai_chat", upstream.url)}) as executor:
        running = await executor.start(chat(stream=True), [candidate("up")], 10)
        frames = await read(running)
        await upstream.gone.wait()
    assert running.failure == frames[-1]["error"]["code"] == "upstream_too_large"
    assert said(frames).startswith("Hello Hello ")
