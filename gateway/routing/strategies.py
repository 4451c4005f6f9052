"""A strategy is a set of weights on one score: quality − λc·cost − λl·latency − λf·failure.

Cost and latency enter as base-10 logarithms (of nano-dollars and milliseconds), so that "ten times dearer" weighs the same for
a small request as for a large one. `quality` is 0..1: with λc = 0.12, ten times the price must buy 0.12 of quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gateway.routing.estimates import Estimate
from gateway.settings import StrategyName

Sort = Literal["price", "latency", "throughput"]


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each part of the score counts. Latency has two parts: waiting for the first token, and writing each one."""

    quality: float
    cost: float
    first_token: float
    token: float
    failure: float


STRATEGIES: dict[StrategyName, Weights] = {
    "balanced": Weights(quality=1.0, cost=0.12, first_token=0.05, token=0.05, failure=1.0),
    "cost-first": Weights(quality=0.2, cost=0.50, first_token=0.02, token=0.02, failure=0.5),
    "latency-first": Weights(quality=0.2, cost=0.03, first_token=0.40, token=0.30, failure=0.5),
    "availability-first": Weights(quality=0.4, cost=0.05, first_token=0.03, token=0.03, failure=10.0),
}

SORTS: dict[Sort, Weights] = {
    "price": Weights(quality=0, cost=1, first_token=0, token=0, failure=0),
    "latency": Weights(quality=0, cost=0, first_token=1, token=0, failure=0),
    "throughput": Weights(quality=0, cost=0, first_token=0, token=1, failure=0),
}
"""A caller's `provider.sort`: one property alone decides."""


def score(weights: Weights, estimate: Estimate, expected_nano_usd: int) -> float:
    """The score of a candidate: the higher, the better; only differences mean anything.

    Args:
        weights: The strategy.
        estimate: What is expected of the candidate.
        expected_nano_usd: What the expected usage costs there.
    """
    return (
        weights.quality * estimate.quality
        - weights.cost * math.log10(expected_nano_usd or 1)
        - weights.first_token * estimate.log_first_token_ms
        - weights.token * estimate.log_ms_per_token
        - weights.failure * estimate.failure
    )
