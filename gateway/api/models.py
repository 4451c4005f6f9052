"""`GET /v1/models` and `GET /v1/models/{id}`: what can be called, and at what price."""

from __future__ import annotations

from typing import Any

from gateway.api.errors import ApiError
from gateway.routing.catalog import Candidate, Catalog
from payments.money import Price, nano_to_usd


def list_models(catalog: Catalog) -> dict[str, Any]:
    """All models, in the form of OpenAI's list with prices added."""
    return {"object": "list", "data": [describe(catalog, model) for model in catalog.models()]}


def get_model(catalog: Catalog, model: str) -> dict[str, Any]:
    """One model.

    Raises:
        ApiError: 404 if it is not in the catalog.
    """
    if not catalog.candidates(model):
        raise ApiError(
            404, "model_not_found", f"there is no model {model!r} here; GET /v1/models lists them", param="model"
        )
    return describe(catalog, model)


def describe(catalog: Catalog, model: str) -> dict[str, Any]:
    """A model with each provider that serves it."""
    candidates = catalog.candidates(model)
    first = candidates[0]
    return {
        "id": first.model,
        "object": "model",
        "created": 0,
        "owned_by": first.provider,
        "context_length": max(candidate.context_tokens for candidate in candidates),
        "capabilities": sorted(first.capabilities),
        "pricing": price_json(min((candidate.price for candidate in candidates), key=lambda price: price.output)),
        "providers": [_provider(candidate) for candidate in candidates],
    }


def price_json(price: Price) -> dict[str, str]:
    """A price in dollars per million tokens, and per request."""
    fields = {
        "input": price.input,
        "output": price.output,
        "cached_input": price.cached_input,
        "cache_write": price.cache_write,
    }
    shown = {f"{name}_usd_per_million": nano_to_usd(value) for name, value in fields.items() if value is not None}
    return shown | {"request_usd": nano_to_usd(price.request)}


def _provider(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.provider,
        "context_length": candidate.context_tokens,
        "max_output_tokens": candidate.max_output_tokens,
        "pricing": price_json(candidate.price),
    }
