"""What is expected of each candidate for a request: how good, how much, how fast, how likely to fail.

`Signals` is the seam: today's estimates are the catalog's static facts, learned ones take their place behind the same call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway.routing.catalog import Candidate, Catalog
from gateway.routing.features import Features

TYPICAL_OUTPUT_TOKENS = 400
"""What an answer has when nothing is known: expected costs are ranked by this, never charged by it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one candidate is expected to do with one request."""

    quality: float
    """0..1."""
    output_tokens: int
    first_token_ms: float
    ms_per_token: float
    failure: float
    """Probability that an attempt fails, 0..1."""
    log_first_token_ms: float = field(init=False)
    """Base-10 logarithms of the two times, which the score uses: taken once, not for every request."""
    log_ms_per_token: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_first_token_ms", math.log10(max(self.first_token_ms, 1.0)))
        object.__setattr__(self, "log_ms_per_token", math.log10(max(self.ms_per_token, 0.1)))


class Signals(Protocol):
    """Where estimates come from."""

    def estimates(self, features: Features, candidates: Sequence[Candidate]) -> Sequence[Estimate]:
        """One estimate per candidate, in their order. Called for every request: microseconds, no input or output."""


class StaticSignals:
    """Estimates that are the catalog's own facts, compiled once.

    Args:
        catalog: The models.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._estimates = {
            candidate.id: Estimate(
                quality=candidate.quality,
                output_tokens=TYPICAL_OUTPUT_TOKENS,
                first_token_ms=float(candidate.first_token_ms),
                ms_per_token=1000 / candidate.tokens_per_second,
                failure=candidate.failure_rate,
            )
            for candidate in catalog.all()
        }

    def estimates(self, features: Features, candidates: Sequence[Candidate]) -> Sequence[Estimate]:
        """The same whatever the request."""
        known = self._estimates
        return [known[candidate.id] for candidate in candidates]
