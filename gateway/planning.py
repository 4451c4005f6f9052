"""From a request to a plan: which candidates may serve it, and what it may cost at most. Touches no database and no chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from gateway.api.errors import ApiError
from gateway.dialects.canonical import ChatRequest
from gateway.routing.catalog import Candidate, Catalog
from gateway.routing.engine import Engine, NoRoute, Preferences, Route
from gateway.settings import Settings, TokenizerFamily
from payments.money import divide_up, usd_to_nano
from payments.quotes import Quote, make_quote
from payments.x402.answers import describe_quote

AUTO_COST_FACTOR_MAX = 2
"""For `model: "auto"`: a fallback that could cost more than this times the first choice would only inflate the quote."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for a request, and its price."""

    request: ChatRequest
    strategy: str
    candidates: tuple[Candidate, ...]
    max_output_tokens: int
    quote: Quote
    scale: tuple[int, int] = (1, 1)
    """What an answer's cost is multiplied and divided by: a quote from before a rise in prices is honoured in its rates too."""

    def quote_json(self) -> dict[str, Any]:
        """The quote for people and programs: itemised, in dollars, with the route by name."""
        return describe_quote(self.quote) | {"strategy": self.strategy, "max_output_tokens": self.max_output_tokens}

    def details(self) -> dict[str, Any]:
        """What the receipt keeps of the plan."""
        return {"model_asked": self.request.model, "stream": self.request.stream, "quote": self.quote_json()}


class Planner:
    """Routes and prices requests.

    Args:
        settings: The configuration.
        catalog: The models.
        engine: Ranks candidates.
        count_input: Tokens of a request's input under a tokenizer, with its safety margin.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        engine: Engine,
        count_input: Callable[[ChatRequest, TokenizerFamily], int],
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._count_input = count_input
        self._default_max_output_tokens = settings.payments.default_max_output_tokens
        self._network_fee_nano_usd = usd_to_nano(settings.payments.network_fee_usd)
        self.minimum_nano_usd = usd_to_nano(settings.payments.minimum_charge_usd)
        self._ttl_s = settings.payments.quote_ttl_s

    def plan(self, request: ChatRequest, preferences: Preferences, digest: bytes, now: int) -> Plan:
        """Choose a route and price it.

        Args:
            request: What is asked.
            preferences: What the caller said about routing.
            digest: Of the raw request, see `payments.quotes.request_digest`.
            now: Unix seconds.

        Raises:
            ApiError: If nothing can serve the request, saying why.
        """
        maximum = self.max_output_tokens(request)
        try:
            route, costs = self.route(request, preferences)
        except NoRoute as error:
            raise ApiError(error.status, error.code, error.message, param=error.param) from None
        candidates = route.candidates
        quote = make_quote(
            inference_nano_usd=max(costs),
            network_fee_nano_usd=self._network_fee_nano_usd,
            minimum_nano_usd=self.minimum_nano_usd,
            route=tuple(candidate.id for candidate in candidates),
            request_digest=digest,
            expires_at=now + self._ttl_s,
        )
        return Plan(request, route.strategy, candidates, maximum, quote)

    def route(self, request: ChatRequest, preferences: Preferences) -> tuple[Route, list[int]]:
        """Choose a route, and say what each candidate of it may cost at most, in nano-USD.

        Raises:
            NoRoute: If nothing can serve the request, saying why.
        """
        maximum = self.max_output_tokens(request)
        route = self._engine.route(request, preferences, self._count_input(request, "o200k_base"), maximum)
        costs = [self.maximum_cost(request, candidate, maximum) for candidate in route.candidates]
        if request.model == "auto" and not request.models:
            dear = [cost > AUTO_COST_FACTOR_MAX * costs[0] for cost in costs]
            if any(dear):
                route = route.without(list(compress(route.candidates, dear)), "dearer_than_auto_may_be")
            costs = [cost for cost, left_out in zip(costs, dear, strict=True) if not left_out]
        return route, costs

    def honour(self, fresh: Plan, quote: Quote, marks: Sequence[bytes]) -> Plan | None:
        """The plan that an earlier quote promised, at its price, whatever prices have done since.

        Args:
            fresh: The plan that the same request would get now.
            quote: The earlier quote, its amount and digest verified.
            marks: Its route, as its token carried it.

        Returns:
            A plan with the candidates that were quoted, or if they are gone, those of `fresh` that cost no more than was
            quoted; None if there are none of either.
        """

        def maximum(candidate: Candidate) -> int:
            return self.maximum_cost(fresh.request, candidate, fresh.max_output_tokens)

        room = quote.maximum_nano_usd - quote.network_fee_nano_usd
        quoted = tuple(candidate for mark in marks if (candidate := self._catalog.by_mark(mark)) is not None)
        if not quoted:
            quoted = tuple(candidate for candidate in fresh.candidates if maximum(candidate) <= room)
        if not quoted:
            return None
        today = max(maximum(candidate) for candidate in quoted)
        scale = (room, today) if today > room else (1, 1)
        return Plan(fresh.request, fresh.strategy, quoted, fresh.max_output_tokens, quote, scale)

    def charge(self, plan: Plan, inference_nano_usd: int) -> int:
        """What an answer costs in all, in nano-USD: the inference, the fee that was quoted, at least the minimum."""
        return max(self.spent(plan, inference_nano_usd) + plan.quote.network_fee_nano_usd, self.minimum_nano_usd)

    def spent(self, plan: Plan, inference_nano_usd: int) -> int:
        """What an answer that nobody waited for costs, in nano-USD: what the provider bills, and no fee of ours."""
        return divide_up(inference_nano_usd * plan.scale[0], plan.scale[1])

    def max_output_tokens(self, request: ChatRequest) -> int:
        """The limit on the answer: the request's own, or the default."""
        return request.max_output_tokens or self._default_max_output_tokens

    def maximum_cost(self, request: ChatRequest, candidate: Candidate, max_output_tokens: int) -> int:
        """The most that a candidate's answer may cost, in nano-USD."""
        output = min(max_output_tokens, candidate.max_output_tokens) * request.choices
        return candidate.price.maximum_cost(self._count_input(request, candidate.tokenizer), output)
