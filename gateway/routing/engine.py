"""Chooses the candidates for a request and their order, and can say why for each one.

Hard filters exclude, one score ranks what is left. A few microseconds a candidate: no database, no chain, no model inline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from gateway.dialects.canonical import ChatRequest
from gateway.routing.catalog import Candidate, Catalog
from gateway.routing.estimates import Signals, StaticSignals
from gateway.routing.features import Features, features_of
from gateway.routing.preferences import MaxPrice, Preferences
from gateway.routing.strategies import SORTS, STRATEGIES, Weights, score
from gateway.routing.tokens import with_margin
from gateway.settings import Settings
from payments.money import Usage

__all__ = ["Considered", "Engine", "NoRoute", "Preferences", "Route"]

AUTO = "auto"

_REASONS = {
    "context_length": "the request does not fit in its context",
    "max_output": "it cannot write as many tokens as asked",
    "breaker_open": "it is failing right now",
    "provider_not_allowed": "provider.only leaves it out",
    "provider_ignored": "provider.ignore names it",
    "max_price": "it costs more than provider.max_price",
    "no_tools": "it cannot use tools",
    "no_json_object": "it has no JSON mode",
    "no_json_schema": "it cannot follow a JSON schema",
    "no_vision": "it cannot see images",
    "no_audio": "it cannot hear audio",
    "no_choices": "it gives one answer at a time",
}


class NoRoute(Exception):
    """No candidate can serve the request.

    `code` is ``model_not_found`` (404), ``no_candidate_available`` (503: they are failing right now),
    ``context_length_exceeded`` or ``no_suitable_candidate`` (400). The message says what to change.
    """

    def __init__(self, code: str, message: str, status: int = 400, param: str | None = "model") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class Considered:
    """One candidate that was looked at: its score, and what kept it out if something did."""

    candidate_id: str
    score: float
    expected_nano_usd: int
    """What a typical answer would cost there; for ranking only."""
    excluded_by: str | None = None


@dataclass(slots=True)
class _Entry:
    candidate: Candidate
    score: float
    expected_nano_usd: int
    excluded_by: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """Candidates in the order in which they are to be tried, and why."""

    candidates: tuple[Candidate, ...]
    strategy: str
    _entries: tuple[_Entry, ...]

    @property
    def explanation(self) -> tuple[Considered, ...]:
        """Everything that was considered: the route first, then what was excluded. Made when asked for, which is seldom."""
        return tuple(
            Considered(entry.candidate.id, entry.score, entry.expected_nano_usd, entry.excluded_by)
            for entry in sorted(self._entries, key=lambda entry: entry.excluded_by is not None)
        )

    def without(self, candidates: Collection[Candidate], reason: str) -> Route:
        """This route without some of its candidates, and why they are left out."""
        entries = tuple(
            replace(entry, excluded_by=reason) if entry.candidate in candidates else entry for entry in self._entries
        )
        kept = tuple(candidate for candidate in self.candidates if candidate not in candidates)
        return Route(kept, self.strategy, entries)


def _never_open(candidate_id: str) -> bool:
    return False


class Engine:
    """Routes requests.

    Args:
        catalog: The models.
        settings: Strategy, fallbacks, the models of "auto", and how many candidates a route has at most.
        signals: Where estimates come from; by default the catalog's static facts.
        is_open: Whether a candidate's breaker keeps requests away from it right now, by candidate id.

    Raises:
        ValueError: If a fallback or a model of "auto" is not in the catalog; a checked configuration has none.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        signals: Signals | None = None,
        is_open: Callable[[str], bool] = _never_open,
    ) -> None:
        self._catalog = catalog
        self._routing = settings.routing
        self._signals = signals or StaticSignals(catalog)
        self._is_open = is_open
        named = [name for names in self._routing.fallbacks.values() for name in names if name != AUTO]
        for name in (*named, *self._routing.auto_models):
            if not catalog.candidates(name):
                raise ValueError(f"the routing settings name {name!r}, which is not a model of the catalog")
        auto = [entry for name in self._routing.auto_models for entry in catalog.candidates(name)]
        self._auto = tuple(dict.fromkeys(auto)) or catalog.all()

    def route(self, request: ChatRequest, preferences: Preferences, input_tokens: int, max_output_tokens: int) -> Route:
        """Choose the candidates for a request.

        Args:
            request: The canonical request. `model` may be a model, ``model@provider`` or ``auto``; `models` are tried after it.
            preferences: The caller's wishes.
            input_tokens: The request's input counted by o200k_base.
            max_output_tokens: The caller's limit on the answer, or the default that stands in for it.

        Raises:
            NoRoute: If no candidate can serve it.
        """
        features = features_of(request, input_tokens, max_output_tokens)
        weights = (
            SORTS[preferences.sort] if preferences.sort else STRATEGIES[preferences.strategy or self._routing.strategy]
        )
        entries: list[_Entry] = []
        for group in self._groups(request, preferences):
            entries += self._ranked(group, features, preferences, weights)
        route = [entry for entry in entries if entry.excluded_by is None]
        if not route:
            raise _no_route(request, features, entries)
        route = self._limited(route, request, preferences)
        return Route(
            candidates=tuple(entry.candidate for entry in route),
            strategy=preferences.sort or preferences.strategy or self._routing.strategy,
            _entries=tuple(entries),
        )

    def _groups(self, request: ChatRequest, preferences: Preferences) -> list[Sequence[Candidate]]:
        """Candidates in groups that are tried one after the other; within a group the score decides."""
        names = list(dict.fromkeys((request.model, *request.models) if request.model else request.models))
        if len(names) == 1 and preferences.allow_fallbacks:
            names += self._routing.fallbacks.get(self._catalog.resolve(names[0]) or names[0], [])
        seen: set[str] = set()
        groups: list[Sequence[Candidate]] = []
        for name in names:
            members = self._auto if name == AUTO else self._catalog.candidates(name)
            if not members:
                raise self._unknown(name, "model" if name == request.model else "models")
            groups.append([member for member in members if member.id not in seen])
            seen.update(member.id for member in members)
        return groups

    def _ranked(
        self, group: Sequence[Candidate], features: Features, preferences: Preferences, weights: Weights
    ) -> list[_Entry]:
        estimates = self._signals.estimates(features, group)
        entries = []
        usages: dict[int, Usage] = {}
        for candidate, estimate in zip(group, estimates, strict=True):
            usage = usages.get(estimate.output_tokens)
            if usage is None:
                output_tokens = min(estimate.output_tokens, features.max_output_tokens)
                usage = usages[estimate.output_tokens] = Usage(features.input_tokens, output_tokens=output_tokens)
            expected = candidate.price.cost(usage)
            excluded_by = _excluded_by(candidate, features, preferences)
            if excluded_by is None and self._is_open(candidate.id):
                excluded_by = "breaker_open"
            entries.append(_Entry(candidate, score(weights, estimate, expected), expected, excluded_by))
        places = {provider: place for place, provider in enumerate(preferences.order)}
        if places:
            # The caller's order of providers comes before any score.
            entries.sort(key=lambda entry: (places.get(entry.candidate.provider.casefold(), len(places)), -entry.score))
        else:
            entries.sort(key=lambda entry: -entry.score)
        return entries

    def _limited(self, route: list[_Entry], request: ChatRequest, preferences: Preferences) -> list[_Entry]:
        """Leave out what the caller has not consented to, and what exceeds the number of attempts."""
        first = route[0]
        explicit = not request.models and request.model != AUTO
        for place, entry in enumerate(route):
            listed = entry.candidate.provider.casefold() in preferences.order
            if not preferences.allow_fallbacks and place > 0 and not listed:
                entry.excluded_by = "fallbacks_not_allowed"
            elif explicit and _is_free(first.candidate) and not _is_free(entry.candidate):
                # Who asks for a free model has not agreed to pay for another one.
                entry.excluded_by = "free_to_paid"
        route = [entry for entry in route if entry.excluded_by is None]
        for entry in route[self._routing.attempts_max :]:
            entry.excluded_by = "attempts_max"
        return route[: self._routing.attempts_max]

    def _unknown(self, name: str, param: str) -> NoRoute:
        near = self._catalog.closest(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "GET /v1/models lists what there is"
        return NoRoute("model_not_found", f"there is no model {name[:200]!r} here; {hint}", 404, param)


def _excluded_by(candidate: Candidate, features: Features, preferences: Preferences) -> str | None:
    """The first hard filter that the candidate does not pass."""
    missing = features.needs - candidate.capabilities
    if missing:
        return f"no_{min(missing)}"
    if features.output_is_asked and features.max_output_tokens > candidate.max_output_tokens:
        return "max_output"
    output_tokens = min(features.max_output_tokens, candidate.max_output_tokens)
    if with_margin(features.input_tokens, candidate.tokenizer) + output_tokens > candidate.context_tokens:
        return "context_length"
    provider = candidate.provider.casefold()
    if preferences.only and provider not in preferences.only:
        return "provider_not_allowed"
    if provider in preferences.ignore:
        return "provider_ignored"
    if preferences.max_price is not None and _too_dear(candidate, preferences.max_price):
        return "max_price"
    return None


def _too_dear(candidate: Candidate, limit: MaxPrice) -> bool:
    price = candidate.price
    return (
        (limit.input is not None and price.input > limit.input)
        or (limit.output is not None and price.output > limit.output)
        or (limit.request is not None and price.request > limit.request)
    )


def _is_free(candidate: Candidate) -> bool:
    return candidate.price.maximum_cost(1_000_000, 1_000_000) == 0


def _no_route(request: ChatRequest, features: Features, entries: Sequence[_Entry]) -> NoRoute:
    counts = Counter(entry.excluded_by for entry in entries if entry.excluded_by is not None)
    reasons = "; ".join(
        f"{entry.candidate.id}: {_REASONS[entry.excluded_by]}" for entry in entries[:5] if entry.excluded_by is not None
    )
    more = f" (and {len(entries) - 5} more)" if len(entries) > 5 else ""
    if counts["breaker_open"]:
        return NoRoute("no_candidate_available", f"no candidate is available right now: {reasons}{more}", 503)
    if counts["context_length"] == len(entries) and entries:
        largest = max(entry.candidate.context_tokens for entry in entries)
        return NoRoute(
            "context_length_exceeded",
            f"the request needs about {features.input_tokens + features.max_output_tokens} tokens of context "
            f"({features.input_tokens} in, up to {features.max_output_tokens} out), and {request.model!r} has {largest}; "
            "shorten it, lower max_tokens, or choose a model with a larger context",
            param="messages",
        )
    return NoRoute("no_suitable_candidate", f"no candidate can serve this request: {reasons}{more}")
