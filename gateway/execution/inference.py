"""One request's inference until there is something to show, and what it costs if nobody waits for that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.dialects.canonical import ChatRequest
from gateway.execution.attempts import AttemptLog
from gateway.execution.errors import CallerFault, ExecutionFailed
from gateway.execution.failover import Executor
from gateway.execution.streams import Running
from gateway.routing.catalog import Candidate


class Inference:
    """Arguments as for `Executor.start`."""

    def __init__(
        self, executor: Executor, request: ChatRequest, candidates: Sequence[Candidate], max_output_tokens: int
    ) -> None:
        self._executor, self._request = executor, request
        self._candidates, self._max_output_tokens = candidates, max_output_tokens
        self._log = AttemptLog()
        self._task: asyncio.Task[Running] | None = None

    def begin(self) -> asyncio.Task[Running]:
        """Ask the providers, once."""
        if self._task is None:
            self._task = asyncio.create_task(
                self._executor.start(self._request, self._candidates, self._max_output_tokens, self._log)
            )
        return self._task

    async def answer(self) -> Running:
        """The first token of a stream, or the whole answer; result and errors as of `Executor.start`."""
        return await self.begin()

    async def abandon(self) -> int:
        """Stop it, since nobody will see it.

        Returns:
            Nano-USD that the provider bills all the same: for the input if it has that, and for what has come of the answer.
        """
        if self._task is None:
            return 0
        self._task.cancel()
        try:
            running = await self._task
        except (asyncio.CancelledError, ExecutionFailed, CallerFault):
            return self._executor.cost_so_far(self._request, self._log)
        await running.aclose()
        return running.candidate.price.cost(running.usage)
