"""What the receipt and the response say about each attempt at a candidate."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gateway.routing.catalog import Candidate

AttemptStatus = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one candidate, or the reason why it was not tried. Holds no content."""

    candidate_id: str
    status: AttemptStatus
    error_code: str | None
    http_status: int | None
    started_ms: int
    """After the execution began."""
    duration_ms: int
    first_token_ms: int | None = None
    """After this attempt began; for a complete answer, when it was there."""

    def as_json(self) -> dict[str, Any]:
        """The attempt for receipts and bodies."""
        return {
            "candidate": self.candidate_id,
            "status": self.status,
            "error_code": self.error_code,
            "http_status": self.http_status,
            "started_ms": self.started_ms,
            "duration_ms": self.duration_ms,
            "first_token_ms": self.first_token_ms,
        }


def tried(attempts: Sequence[Attempt]) -> int:
    """How many of them reached for an upstream."""
    return sum(attempt.status != "skipped" for attempt in attempts)


class AttemptLog:
    """The attempts of one execution, in order. Times are the event loop's, in seconds."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time()
        self.attempts: list[Attempt] = []
        self.asked: Candidate | None = None
        """Whose provider has the request and has not refused it: it bills the input, whoever hangs up now."""

    @property
    def tried(self) -> int:
        """How many attempts reached for an upstream."""
        return tried(self.attempts)

    def skipped(self, candidate_id: str, error_code: str) -> None:
        """A candidate was not tried."""
        self.attempts.append(Attempt(candidate_id, "skipped", error_code, None, self._ms(self.began), 0))

    def failed(self, candidate_id: str, error_code: str, http_status: int | None, began: float) -> None:
        """An attempt that began at `began` failed now."""
        self.attempts.append(
            Attempt(candidate_id, "failed", error_code, http_status, self._ms(self.began, began), self._ms(began))
        )

    def answered(self, candidate_id: str, began: float) -> None:
        """An attempt that began at `began` has its first token, or its whole answer, now."""
        taken_ms = self._ms(began)
        started_ms = self._ms(self.began, began)
        self.attempts.append(Attempt(candidate_id, "ok", None, 200, started_ms, taken_ms, taken_ms))

    def ended(self, status: AttemptStatus, error_code: str | None, began: float) -> None:
        """The last attempt, which had its first token, is over now."""
        self.attempts[-1] = dataclasses.replace(
            self.attempts[-1], status=status, error_code=error_code, duration_ms=self._ms(began)
        )

    def _ms(self, since: float, until: float | None = None) -> int:
        return round(((self._loop.time() if until is None else until) - since) * 1000)
