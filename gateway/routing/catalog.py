"""The models that can be called, compiled from the configuration into candidates. Facts only; no decisions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.settings import Dialect, ModelSettings, Settings, TokenizerFamily
from payments.money import Price, divide_up, usd_to_nano
from payments.quotes import route_mark

_SEPARATORS = re.compile(r"[._\s-]+")
_NAME_CHARACTERS_MAX = 200
"""Names longer than this match nothing; comparing them with every model would only cost time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model at one provider: what the engine ranks and the executor calls."""

    id: str
    """`<model>@<provider>`"""
    model: str
    """The id that callers use."""
    provider: str
    upstream_model: str
    """The id that the provider uses."""
    price: Price
    """With the operator's markup, if there is one."""
    context_tokens: int
    max_output_tokens: int
    capabilities: frozenset[str]
    """Of: tools, json_object, json_schema, vision, audio, reasoning, prefill, and choices (several answers at once)."""
    tokenizer: TokenizerFamily = "o200k_base"
    quality: float = 0.5
    """0..1, static prior."""
    first_token_ms: int = 800
    tokens_per_second: int = 60
    failure_rate: float = 0.01


class Catalog:
    """All candidates, found by model name or by the mark that a quote carries.

    Args:
        candidates: In the operator's order, which breaks ties. Ids must be unique.
    """

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._all = tuple(candidates)
        self._by_id = {candidate.id: candidate for candidate in self._all}
        self._by_mark = {route_mark(candidate.id): candidate for candidate in self._all}
        assert len(self._by_id) == len(self._all), "candidate ids repeat"
        assert len(self._by_mark) == len(self._all), "two candidate ids have the same 48-bit mark"
        models: dict[str, list[Candidate]] = {}
        for candidate in self._all:
            models.setdefault(candidate.model, []).append(candidate)
        self._by_model = {model: tuple(entries) for model, entries in models.items()}
        self._by_spelling = _unambiguous((normal_name(model), model) for model in self._by_model)
        self._by_tail = _unambiguous((_tail(normal_name(model)), model) for model in self._by_model)

    @classmethod
    def from_settings(cls, settings: Settings) -> Catalog:
        """Compile the configured models; prices get the markup here and nowhere else."""
        markup_percent = settings.payments.markup_percent
        return cls(
            _candidate(model, markup_percent, settings.providers[model.provider].dialect) for model in settings.models
        )

    def all(self) -> tuple[Candidate, ...]:
        """Every candidate, in the operator's order."""
        return self._all

    def models(self) -> tuple[str, ...]:
        """The model ids that callers can use, in the operator's order."""
        return tuple(self._by_model)

    def resolve(self, name: str) -> str | None:
        """The model id that `name` means, or None.

        An exact id always wins. Else case and the separators ``. _ -`` and space do not matter (``GPT-4.7`` is
        ``gpt-4-7``), and a vendor's prefix (``anthropic/``) may be there or not. A spelling that could mean two models
        means neither.
        """
        if name in self._by_model:
            return name
        if len(name) > _NAME_CHARACTERS_MAX:
            return None
        normal = normal_name(name)
        found = self._by_spelling.get(normal)
        if found is None:
            found = self._by_tail.get(normal) if "/" not in normal else self._by_spelling.get(_tail(normal))
        return found

    def candidates(self, name: str) -> tuple[Candidate, ...]:
        """The candidates of a model, in the operator's order; ``model@provider`` names exactly one; none if unknown."""
        model = self.resolve(name)
        if model is not None:
            return self._by_model[model]
        model_name, at, provider = name.rpartition("@")
        model = self.resolve(model_name) if at else None
        if model is None:
            return ()
        return tuple(candidate for candidate in self._by_model[model] if candidate.provider == provider)

    def by_mark(self, mark: bytes) -> Candidate | None:
        """The candidate with this mark (see `payments.quotes.route_mark`), or None if it is gone."""
        return self._by_mark.get(mark)

    def closest(self, name: str) -> list[str]:
        """Up to three model ids that look like `name`, the most alike first."""
        normal = {normal_name(model): model for model in self._by_model}
        near = difflib.get_close_matches(normal_name(name[:_NAME_CHARACTERS_MAX]), normal, n=3, cutoff=0.5)
        return [normal[spelling] for spelling in near]


def normal_name(name: str) -> str:
    """A model name without what people spell differently: case and separators."""
    return _SEPARATORS.sub("-", name.strip().casefold()).strip("-")


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for key, value in pairs:
        found.setdefault(key, set()).add(value)
    return {key: next(iter(values)) for key, values in found.items() if len(values) == 1}


_LACKING_IN_DIALECT: dict[Dialect, frozenset[str]] = {
    "openai_chat": frozenset(),
    "anthropic_messages": frozenset({"json_object", "json_schema", "choices"}),
    "gemini": frozenset({"choices"}),
}
"""What a dialect has no words for, whatever the model could do."""


def _candidate(model: ModelSettings, markup_percent: int, dialect: Dialect) -> Candidate:
    def nano(usd: str) -> int:
        return divide_up(usd_to_nano(usd) * (100 + markup_percent), 100)

    capabilities = {*model.capabilities, "choices"}
    if "json_schema" in capabilities:
        capabilities.add("json_object")
    return Candidate(
        id=f"{model.id}@{model.provider}",
        model=model.id,
        provider=model.provider,
        upstream_model=model.upstream_model or model.id,
        price=Price(
            input=nano(model.input_usd),
            output=nano(model.output_usd),
            cached_input=None if model.cached_input_usd is None else nano(model.cached_input_usd),
            cache_write=None if model.cache_write_usd is None else nano(model.cache_write_usd),
            request=nano(model.request_usd),
        ),
        context_tokens=model.context_tokens,
        max_output_tokens=model.max_output_tokens,
        capabilities=frozenset(capabilities - _LACKING_IN_DIALECT[dialect]),
        tokenizer=model.tokenizer,
        quality=model.quality,
        first_token_ms=model.first_token_ms,
        tokens_per_second=model.tokens_per_second,
        failure_rate=model.failure_rate,
    )
