"""The extension `bazaar`: what a paid route takes and gives, for catalogues of what is sold over x402.

Source: x402 `specs/extensions/bazaar.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

NAME = "bazaar"
CHAT_PATH = "/v1/chat/completions"
SERVICE_NAME = "Farebox"
TAGS = ("ai", "llm", "chat")


def declaration(model: str) -> dict[str, Any]:
    """What `POST /v1/chat/completions` takes, with an example for one model."""
    return {
        "info": {
            "input": {
                "type": "http",
                "method": "POST",
                "bodyType": "json",
                "body": {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
            },
            "output": {
                "type": "json",
                "example": {"choices": [{"message": {"role": "assistant", "content": "Rayleigh scattering: …"}}]},
            },
        },
        "schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "input": {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "const": "http"},
                        "method": {"type": "string", "enum": ["POST"]},
                        "bodyType": {"type": "string", "enum": ["json"]},
                        "body": {
                            "type": "object",
                            "properties": {"model": {"type": "string"}, "messages": {"type": "array"}},
                            "required": ["model", "messages"],
                        },
                    },
                    "required": ["type", "method", "bodyType", "body"],
                },
                "output": {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]},
            },
            "required": ["input"],
        },
    }


def listing(
    resource_url: str, description: str, accepts: Sequence[dict[str, Any]], model: str, limit: int, offset: int
) -> dict[str, Any]:
    """The answer of `/discovery/resources` of a gateway that sells one route.

    Args:
        resource_url: Of the route.
        description: What it is.
        accepts: The offers for the example in the declaration.
        model: Of the example.
        limit: Of a page, at least 1.
        offset: How many of the one route to leave out.
    """
    item = {
        "resource": resource_url,
        "type": "http",
        "x402Version": 2,
        "accepts": list(accepts),
        "lastUpdated": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "description": description,
        "mimeType": "application/json",
        "serviceName": SERVICE_NAME,
        "tags": list(TAGS),
        "extensions": {NAME: declaration(model)},
    }
    return {"x402Version": 2, "items": [item][offset:], "pagination": {"limit": limit, "offset": offset, "total": 1}}
