"""The providers of the configuration, with their keys, ready to be spoken to. Keys are read from the environment once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from yarl import URL

from gateway.dialects import anthropic_messages, gemini, openai_upstream
from gateway.dialects.canonical import ChatRequest
from gateway.dialects.upstream import UpstreamDialect
from gateway.providers.upstream import UpstreamRequest
from gateway.routing.catalog import Candidate
from gateway.settings import ProviderSettings, Settings

DIALECTS: Final[Mapping[str, UpstreamDialect]] = {
    openai_upstream.NAME: openai_upstream,
    anthropic_messages.NAME: anthropic_messages,
    gemini.NAME: gemini,
}


@dataclass(frozen=True, slots=True)
class Provider:
    """How to reach one upstream."""

    name: str
    dialect: UpstreamDialect
    base_url: str
    headers: Mapping[str, str] = field(repr=False)
    """They carry the key: never shown, never logged."""
    unavailable: str | None = None
    """Why it cannot be used, and what to do; None if it can."""

    def request(self, request: ChatRequest, candidate: Candidate, max_output_tokens: int) -> UpstreamRequest:
        """Write a request for this upstream.

        Raises:
            Untranslatable: Its dialect cannot express the request.
        """
        call = self.dialect.build(request, candidate, max_output_tokens, self.base_url)
        return UpstreamRequest(call.url, self.headers, call.body)


class Registry:
    """All providers, by name."""

    def __init__(self, providers: Mapping[str, Provider]) -> None:
        self._providers = dict(providers)

    @classmethod
    def from_settings(cls, settings: Settings, env: Mapping[str, str] | None = None) -> Registry:
        """Compile the configured providers.

        Args:
            settings: The configuration.
            env: Where the keys are; the process's environment by default.
        """
        variables = os.environ if env is None else env
        return cls({name: _provider(name, entry, variables) for name, entry in settings.providers.items()})

    def get(self, name: str) -> Provider | None:
        """The provider of this name."""
        return self._providers.get(name)

    def problems(self) -> tuple[str, ...]:
        """What keeps providers from being used, one sentence each."""
        return tuple(provider.unavailable for provider in self._providers.values() if provider.unavailable is not None)


def _provider(name: str, entry: ProviderSettings, variables: Mapping[str, str]) -> Provider:
    dialect = DIALECTS[entry.dialect]
    key: str | None = None
    unavailable: str | None = None
    if not _is_http(entry.base_url):
        unavailable = (
            f"provider {name!r}: base_url {entry.base_url!r} is not an http or https URL; its models are skipped"
        )
    elif entry.api_key_env is not None:
        key = variables.get(entry.api_key_env, "").strip()
        if not key:
            unavailable = (
                f"provider {name!r}: the environment variable {entry.api_key_env} is not set; its models are skipped"
            )
        elif not (key.isascii() and key.isprintable()):
            unavailable = (
                f"provider {name!r}: {entry.api_key_env} has characters that no key has; its models are skipped"
            )
            key = None
    headers = {
        "content-type": "application/json",
        "accept": "*/*",
        "accept-encoding": "identity",  # compressing single tokens gains nothing and costs CPU
        "user-agent": "farebox",
        **dialect.auth_headers(key),
        **{header.lower(): value for header, value in entry.headers.items()},
    }
    return Provider(name, dialect, entry.base_url, headers, unavailable)


def _is_http(url: str) -> bool:
    try:
        parsed = URL(url)
    except ValueError:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)
