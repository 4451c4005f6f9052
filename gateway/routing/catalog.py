"""The models that can be called, compiled from the configuration into candidates. Facts only; no decisions."""

from __future__ import annotations

from dataclasses import dataclass

from payments.money import Price


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
    context_tokens: int
    max_output_tokens: int
    capabilities: frozenset[str]
    """Of: tools, json_object, json_schema, vision, audio, reasoning, prefill."""
    tokenizer: str = "o200k_base"
    quality: float = 0.5
    """0..1, static prior."""
    first_token_ms: int = 800
    tokens_per_second: int = 60
    failure_rate: float = 0.01
